"""A metric that cannot be computed is missing and says why: never 0, NaN or infinite in a row."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polykv.errors import PolyKVError
from polykv.evaluation import bertscore, continuation, gsm8k, layers, missing
from polykv.evaluation.continuation import Comparison, compare
from polykv.evaluation.statistics import document_interval, mcnemar, mean_interval, paired_p, wilson
from polykv.results import Rows

INF, NAN = math.inf, math.nan


def comparison(nll_full, nll, kl, same_top1=None):
    top1 = np.ones(len(kl), bool) if same_top1 is None else np.array(same_top1)
    return Comparison(*(np.array(x, np.float32) for x in (nll_full, nll, kl)), top1)


def rows_of(add, *args):
    """metric -> row, every one of them checked: a finite value, or none and a reason."""
    rows = Rows()
    add(rows, *args)
    for row in rows:
        assert row["value"] is None and row["note"] or math.isfinite(row["value"]), row
        assert all(row[end] is None or math.isfinite(row[end]) for end in ("ci_low", "ci_high"))
    return {row["metric"]: row for row in rows}


def test_a_perplexity_without_bound_is_missing_with_its_reason():
    found = rows_of(
        continuation.add_rows, [comparison([1, 2, 3, 1], [1, 2, INF, 1], [0, 0, INF, 0.5])]
    )
    assert found["perplexity_full"]["value"] == pytest.approx(math.exp(7 / 4))
    for metric in ("perplexity", "perplexity_delta", "perplexity_ratio", "kl_mean", "kl_max"):
        assert found[metric]["value"] is None
        assert "infinite at 1 of 4 scored tokens" in found[metric]["note"]
    assert found["kl_median"]["value"] == 0.25  # three of four are finite
    overflow = [comparison([1, 2], [800, 900], [1, 1])]
    found = rows_of(continuation.add_rows, overflow)
    assert "range of a float" in found["perplexity"]["note"]
    assert found["kl_mean"]["value"] == 1
    better = rows_of(continuation.add_rows, [comparison([INF, 1], [1, 1], [1, 1])])
    assert better["perplexity_delta"]["value"] is None  # not -100 %
    assert "uncompressed" in better["perplexity_delta"]["note"]


def test_nan_is_never_averaged_away():
    found = rows_of(continuation.add_rows, [comparison([1, 2], [1, NAN], [0, NAN], [1, 1])])
    assert all(row["value"] is None for name, row in found.items() if name != "perplexity_full")
    assert "NaN at 1 of 2" in found["same_top1"]["note"]
    by_document = rows_of(continuation.add_document_rows, [comparison([1], [INF], [INF])])
    assert all(row["value"] is None and row["note"] for row in by_document.values())


def test_one_scored_token_has_no_interval_and_none_is_an_error():
    found = rows_of(continuation.add_rows, [comparison([1], [1.1], [0.1])])
    assert found["perplexity_delta"]["ci_low"] is None
    assert found["perplexity_delta"]["value"] == pytest.approx(100 * math.expm1(0.1), rel=1e-5)
    for none in ([], [comparison([], [], [])]):
        with pytest.raises(PolyKVError, match="no token was scored"):
            continuation.add_rows(Rows(), none)


def test_kl_over_masked_vocabulary():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.75, 0.0]])
    rest = torch.tensor([[0, 1]])
    assert compare(p.log(), q.log(), rest).kl == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)
    assert compare(p.log(), torch.tensor([[0.25, 0.25, 0.5]]).log(), rest).kl > 0
    assert compare(q.log(), torch.tensor([[0.0, 1.0, 0.0]]).log(), rest).kl == INF
    broken = torch.full((1, 3), NAN)
    assert np.isnan(compare(p.log(), broken, rest).kl).all()
    assert np.isnan(compare(broken, broken, rest).kl).all()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.one_of(st.floats(0, 2000, width=32), st.sampled_from([INF, NAN]))] * 3),
        min_size=1,
        max_size=30,
    )
)
def test_no_row_is_ever_nan_or_infinite(values):
    found = rows_of(continuation.add_rows, [comparison(*zip(*values, strict=True))])
    assert len(found) == 21


def test_intervals_and_tests_of_nothing_or_one():
    assert wilson(0, 0) is None
    assert wilson(1, 1) == pytest.approx((0.2065, 1.0), abs=1e-4)
    for samples in ([], [np.array([])], [np.ones(1)], [np.array([1, INF, 2, 3, 4, 5.0])]):
        assert document_interval(samples) is None
    assert document_interval([np.array([]), np.arange(9.0)]) == document_interval([np.arange(9.0)])
    assert mean_interval(np.ones(1)) is mean_interval(np.array([1, NAN])) is None
    assert mcnemar([True], [False]) == (1, 0, 1.0)
    assert paired_p([1], [2]) == paired_p([1, 1], [1, 1]) == 1
    for first in ([], [NAN]):
        with pytest.raises(ValueError, match="one pair or more"):
            paired_p(first, first)
    with pytest.raises(ValueError, match="one problem or more"):
        mcnemar([], [])


def test_accuracy_of_no_problems_and_of_empty_answers():
    assert rows_of(gsm8k.add_rows, [], [], "test")["accuracy"]["note"] == "no problem was answered"
    assert rows_of(gsm8k.add_rows, ["", "#### "], ["1", "2"], "test")["accuracy"]["value"] == 0


def test_bertscore_of_answers_without_words():
    texts = ["", " ", "\u200b", "\ufeff", "\u202e"]  # nothing that a tokenizer keeps
    assert np.isnan(bertscore.f1(texts, texts[::-1], bertscore.MINILM)).all()
    assert (bertscore.f1(texts, ["a cat"] * 5, bertscore.MINILM) == 0).all()

    def scored(answers, references):
        return rows_of(bertscore.add_rows, answers, references, bertscore.MINILM)

    nothing = scored([["", ""]], [["", ""]])
    assert nothing["bertscore_f1"]["value"] is None and nothing["empty_pairs"]["value"] == 2
    for nobody in ([], [[]]):
        assert scored(nobody, nobody)["bertscore_f1"]["note"] == "no agent was asked"
    assert "above the floor" in scored([["a", "a"]], [["a", "a "]])["bertscore_rescaled"]["note"]
    one = scored([["yes", ""]], [["yes", "yes"]])
    assert one["bertscore_floor"]["value"] is None and one["bertscore_f1"]["value"] < 1


def test_relative_errors_of_zeros_are_nan_for_the_caller_to_say():
    zeros, q = torch.zeros(1, 2, 3, 8), torch.randn(1, 4, 2, 8)
    assert layers.head_errors(q, (zeros, zeros), (zeros, zeros))["key"].isnan().all()
    one = torch.randn(1, 2, 1, 8)
    found = layers.head_errors(q, (one, one), (one + 0.1, one))
    assert found["logits"].isnan().all() and (found["output"] == 0).all()
    assert all(math.isnan(value) for value in layers.diagnostics(zeros).values())


def test_a_missing_row_says_why():
    rows = Rows()
    missing.add(rows, "x", NAN, "u", "because", n=3, note="median")
    missing.add(rows, "y", 1, "u", "because", ci=(0.5, INF))
    missing.add(rows, "z", 1, "u", "because", ci=(0.5, 2))
    assert [(r["value"], r["ci_low"], r["note"]) for r in rows] == [
        (None, None, "because"), (1, None, None), (1, 0.5, None)
    ]  # fmt: skip
