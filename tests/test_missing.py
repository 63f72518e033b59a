"""A metric that cannot be computed is missing and says why: never 0, NaN or infinite in a row."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.rows import SCORES, add_scores
from polykv.errors import PolyKVError
from polykv.evaluation import bertscore, gsm8k, layers
from polykv.evaluation.continuation import UNITS, Comparison, compare
from polykv.evaluation.statistics import document_interval, mcnemar, skewed_interval, wilson
from polykv.results import Rows

INF, NAN = math.inf, math.nan


def comparison(nll_full, nll, kl, same_top1=None):
    top1 = np.ones(len(kl), bool) if same_top1 is None else np.array(same_top1)
    return Comparison(*(np.array(x, np.float32) for x in (nll_full, nll, kl)), {"same_top1": top1})


def rows_of(*comparisons):
    """(metric, statistic) -> row of the only document; each is a finite value, or none and a reason."""
    rows = Rows(SCORES)
    add_scores(rows, comparisons, [f"{n}" for n in range(len(comparisons))])
    for row in rows:
        assert row["value"] is None and row["note"] or math.isfinite(row["value"]), row
    whole = [row for row in rows if row.get("block") is None]
    return {(row["metric"], row.get("statistic")): row for row in whole}


def test_a_perplexity_without_bound_is_missing_with_its_reason():
    found = rows_of(comparison([1, 2, 3, 1], [1, 2, INF, 1], [0, 0, INF, 0.5]))
    assert found["nll_full", None]["value"] == 7 / 4
    for place in (("nll", None), ("nll_delta", None), ("kl", None), ("kl", "max")):
        assert found[place]["value"] is None
        assert "infinite at 1 of 4 scored tokens" in found[place]["note"]
    assert found["kl", "median"]["value"] == 0.25  # three of four are finite
    better = rows_of(comparison([INF, 1], [1, 1], [1, 1]))
    assert better["nll_delta", None]["value"] is None  # not -100 %
    assert "uncompressed" in better["nll_delta", None]["note"]


def test_nan_is_never_averaged_away():
    found = rows_of(comparison([1, 2], [1, NAN], [0, NAN], [1, 1]))
    exact = ("nll_full", None)
    assert all(row["value"] is None for place, row in found.items() if place != exact)
    assert found[exact]["value"] == 1.5
    assert "NaN at 1 of 2" in found["same_top1", None]["note"]


def test_one_scored_token_is_a_row_and_none_is_an_error():
    found = rows_of(comparison([1], [1.5], [0.5]))
    assert found["nll_delta", None]["value"] == 0.5
    for none in ([], [comparison([], [], [])]):
        with pytest.raises(PolyKVError, match="no token was scored"):
            add_scores(Rows(SCORES), none, ["text"] * len(none))


def test_kl_over_masked_vocabulary():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.75, 0.0]])
    rest = torch.tensor([[0, 1]])
    assert compare(p.log(), q.log(), rest).kl == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)
    assert compare(p.log(), torch.tensor([[0.25, 0.25, 0.5]]).log(), rest).kl > 0
    assert compare(q.log(), torch.tensor([[0.0, 1.0, 0.0]]).log(), rest).kl == INF
    broken = torch.full((1, 3), NAN)
    assert np.isnan(compare(p.log(), broken, rest).kl).all()
    assert np.isnan(compare(broken, broken, rest).kl).all()


ANY = st.one_of(st.floats(0, 2000, width=32), st.sampled_from([INF, NAN]))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(ANY, ANY, ANY), min_size=1, max_size=30))
def test_no_row_is_ever_nan_or_infinite(values):
    found = rows_of(comparison(*zip(*values, strict=True)))
    assert {metric for metric, statistic in found if statistic is None} == set(UNITS)


def test_intervals_and_tests_of_nothing_or_one():
    assert wilson(0, 0) is None
    assert wilson(1, 1) == pytest.approx((0.2065, 1.0), abs=1e-4)
    for samples in ([], [np.array([])], [np.ones(1)], [np.array([1, INF, 2, 3, 4, 5.0])]):
        assert document_interval(samples) is None
    assert document_interval([np.array([]), np.arange(9.0)]) == document_interval([np.arange(9.0)])
    assert skewed_interval(np.ones(1)) is skewed_interval(np.array([1, NAN])) is None
    assert mcnemar([True], [False]) == (1, 0, 1.0)
    with pytest.raises(ValueError, match="at least one problem"):
        mcnemar([], [])


def test_answers_without_a_number_are_wrong():
    found = gsm8k.right(["", "#### "], ["1", "2"])
    assert set(found) == set(gsm8k.EXTRACTIONS)
    assert all(verdicts == [False, False] for verdicts in found.values())


def test_bertscore_of_answers_without_words():
    texts = ["", " ", "\u200b", "\ufeff", "\u202e"]  # nothing that a tokenizer keeps
    assert np.isnan(bertscore.f1(texts, texts[::-1], bertscore.MINILM)).all()
    assert (bertscore.f1(texts, ["a cat"] * 5, bertscore.MINILM) == 0).all()
    assert bertscore.floor_pairs([], []) == bertscore.floor_pairs([["a"]], [["b"]]) == []


def test_relative_errors_of_zeros_are_nan_for_the_caller_to_say():
    zeros, q = torch.zeros(1, 2, 3, 8), torch.randn(1, 4, 2, 8)
    assert layers.head_errors(q, (zeros, zeros), (zeros, zeros))["key"].isnan().all()
    one = torch.randn(1, 2, 1, 8)
    found = layers.head_errors(q, (one, one), (one + 0.1, one))
    assert found["logits"].isnan().all() and (found["output"] == 0).all()
    assert all(math.isnan(value) for value in layers.diagnostics(zeros).values())
