"""The sampling of parameters holds every pair, and needs far fewer cases than their product."""

from itertools import combinations, product

import pytest
from pairwise import pairwise, sampled

VALUES = ("abcde", range(3), (True, False), "xy")


def test_every_pair_of_values_is_there_in_few_cases():
    found = pairwise(*VALUES)
    for one, other in combinations(range(len(VALUES)), 2):
        wanted = set(product(VALUES[one], VALUES[other]))
        assert {(case[one], case[other]) for case in found} == wanted
    assert len(found) < 20 < 60 == len(list(product(*VALUES)))
    assert len(set(found)) == len(found) and found == pairwise(*VALUES)


@pytest.mark.parametrize(("values", "n"), [(([1, 2, 3], [4, 5]), 6), (([], [1]), 0)])
def test_two_lists_take_their_product(values, n):
    assert len(pairwise(*values)) == n


def test_what_is_not_sampled_is_slow():
    cases = sampled(*VALUES)
    assert {case.values for case in cases} == set(product(*VALUES))
    assert [case.values for case in cases if not case.marks] == sorted(
        pairwise(*VALUES), key=list(product(*VALUES)).index
    )
