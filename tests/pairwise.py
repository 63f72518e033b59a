"""Pairwise sampling: few cases in which every two values of two parameters meet."""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(*values: Iterable[Any]) -> list[tuple]:
    """Combinations, one value of each list, that hold every pair of values of two lists; greedy, always the same.

    Two lists of m and n values take all m x n; every further list of no more values adds few or none.
    """
    every = list(product(*(enumerate(of) for of in values)))

    def pairs(case: tuple) -> set:
        return set(combinations([(place, index) for place, (index, _) in enumerate(case)], 2))

    left, found = {pair for case in every for pair in pairs(case)}, []
    while left:
        found.append(max(every, key=lambda case: len(pairs(case) & left)))
        left -= pairs(found[-1])
    return [tuple(value for _, value in case) for case in found]


def slow(*cases: Any) -> list:
    """These cases as pytest parameters marked `slow`."""
    return [
        pytest.param(*(case if type(case) is tuple else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


def sampled(*values: Iterable[Any]) -> list:
    """Every combination as a pytest parameter: those of `pairwise`, and the others marked `slow`."""
    values = [list(of) for of in values]
    every = list(product(*(range(len(of)) for of in values)))
    chosen = set(pairwise(*(range(len(of)) for of in values)))
    return [
        pytest.param(
            *(of[index] for of, index in zip(values, case, strict=True)),
            marks=() if case in chosen else pytest.mark.slow,
        )
        for case in every
    ]
