"""Tests and intervals against hand-worked examples and what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from polykv.evaluation import continuation
from polykv.evaluation.continuation import Comparison
from polykv.evaluation.statistics import (
    document_interval,
    holm,
    interval_name,
    mean_interval,
    paired_p,
)
from polykv.results import Rows


def test_holm_worked_out_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, and never below the one before.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_is_between_no_correction_and_bonferroni_and_keeps_the_order(p):
    adjusted = holm(p)
    for raw, mended in zip(p, adjusted, strict=True):
        assert raw <= mended <= min(1, raw * len(p)) + 1e-12
    order = np.argsort(p, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_holm_holds_the_family_wise_error():
    rng = np.random.default_rng(0)
    wrong = sum(min(holm(rng.uniform(size=30))) < 0.05 for _ in range(1000))
    assert wrong / 1000 < 0.07


def test_paired_p_by_hand():
    # Six pairs, all of one sign: 2 of 64 sign patterns are as extreme.
    assert paired_p([2, 3, 4, 5, 6, 7], [1, 1.5, 2, 2.5, 3, 3.5]) == pytest.approx(2 / 64)
    assert paired_p([1, 2, 3], [1, 2, 3]) == 1
    first = np.random.default_rng(0).normal(size=20)
    assert paired_p(first, first + 1) == paired_p(first + 1, first) < 1e-4


def test_the_ratios_interval_uses_the_pairing_as_llama_cpp_does():
    rng = np.random.default_rng(0)
    base = rng.normal(3, 1, 500)
    other = base + rng.normal(0.02, 0.05, 500)
    low, high = mean_interval(other - base)
    n = len(base)
    variance = base.var(ddof=1) / n + other.var(ddof=1) / n - 2 * np.cov(base, other)[0, 1] / n
    reach = 1.959964 * math.sqrt(variance)
    assert (low, high) == pytest.approx(
        ((other - base).mean() - reach, (other - base).mean() + reach)
    )
    unpaired = math.sqrt(base.var(ddof=1) / n + other.var(ddof=1) / n)
    assert high - low < 0.1 * unpaired * 2 * 1.96


def test_blocks_of_tokens_widen_the_interval_of_dependent_tokens():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=2000)
    independent = [noise]
    dependent = [np.convolve(noise, np.ones(8) / 8, mode="same")]

    def width(samples):
        low, high = document_interval(samples)
        return high - low

    per_token = 2 * 1.96 * dependent[0].std() / math.sqrt(2000)
    assert width(dependent) > 2 * per_token
    assert width(independent) == pytest.approx(2 * 1.96 / math.sqrt(2000), rel=0.15)
    assert interval_name(dependent).endswith("over blocks of tokens")
    assert interval_name(dependent * 8).endswith("over documents")
    assert document_interval([np.ones(1)]) is None


def one_each(values):
    return [np.array([value]) for value in values]


def test_without_skewness_the_interval_is_students_t():
    values = np.array([-5.0, -3, -2, -1, 1, 2, 3, 5])
    expected = stats.t.interval(0.95, 7, loc=values.mean(), scale=stats.sem(values))
    assert document_interval(one_each(values)) == pytest.approx(expected)


def test_at_its_ends_halls_transformed_error_is_the_quantile_of_t():
    values = np.array([0.1, 0.2, 0.2, 0.3, 0.4, 0.5, 0.9, 2.5])
    reach = stats.t.ppf(0.975, 7) / math.sqrt(8)
    g = stats.skew(values)
    for end, sign in zip(document_interval(one_each(values)), (1, -1), strict=True):
        w = (values.mean() - end) / values.std(ddof=1)
        transformed = w + g * w**2 / 3 + g**2 * w**3 / 27 + g / 48
        assert transformed == pytest.approx(sign * reach)


@pytest.mark.parametrize(
    ("draw", "truth", "least"),
    [
        (lambda rng, n: rng.normal(0.3, 1, n), 0.3, {8: 0.94, 24: 0.94}),
        # As skewed as divergences are, worse than which nothing with so few documents is near nominal.
        (lambda rng, n: rng.lognormal(0, 0.5, n), math.exp(0.125), {8: 0.92, 24: 0.935}),
        (lambda rng, n: rng.lognormal(0, 1, n), math.exp(0.5), {8: 0.89, 24: 0.915}),
    ],
)
def test_the_interval_over_documents_covers_what_it_says(draw, truth, least):
    rng = np.random.default_rng(0)
    for n_documents, share in least.items():
        found = [document_interval(one_each(draw(rng, n_documents))) for _ in range(2000)]
        assert share < np.mean([low <= truth <= high for low, high in found]) < 0.965


def test_an_interval_stays_within_what_the_mean_can_be():
    one_large = one_each([0.0] * 7 + [1.0])
    assert document_interval(one_large)[0] < 0
    low, high = document_interval(one_large, (0, 1))
    assert low == 0 and 0.5 < high <= 1


def comparison(rng, n=100):
    full = rng.uniform(0.5, 3, n)
    return Comparison(
        full, full + rng.normal(0.01, 0.1, n), rng.exponential(0.1, n), rng.random(n) > 0.1
    )


def test_continuation_reports_what_llama_cpp_reports():
    rng = np.random.default_rng(0)
    found = [comparison(rng) for _ in range(9)]
    rows = Rows()
    continuation.add_rows(rows, found)
    got = {row["metric"]: row for row in rows}
    kl = np.concatenate([c.kl for c in found])
    for name, q in [("median", 50), ("p90", 90), ("p95", 95), ("p99", 99), ("p999", 99.9)]:
        assert got[f"kl_{name}"]["value"] == pytest.approx(np.percentile(kl, q))
    assert got["kl_max"]["value"] == kl.max()
    change = np.concatenate([np.exp(-c.nll) - np.exp(-c.nll_full) for c in found])
    assert got["delta_p_mean"]["value"] == pytest.approx(change.mean())
    assert got["delta_p_rms"]["value"] == pytest.approx(math.sqrt((change**2).mean()))
    assert got["delta_p_p05"]["value"] == pytest.approx(np.percentile(change, 5))
    ratio = got["perplexity_ratio"]
    assert ratio["value"] == pytest.approx(
        got["perplexity"]["value"] / got["perplexity_full"]["value"]
    )
    assert ratio["ci_low"] < ratio["value"] < ratio["ci_high"]
    assert 100 * (ratio["value"] - 1) == pytest.approx(got["perplexity_delta"]["value"])


def test_document_rows_average_to_the_whole():
    rng = np.random.default_rng(0)
    found = [comparison(rng) for _ in range(5)]
    rows, whole = Rows(), Rows()
    continuation.add_document_rows(rows, found)
    continuation.add_rows(whole, found)
    kl = [row["value"] for row in rows if row["metric"] == "document_kl_mean"]
    assert len(kl) == 5 and len({row["protocol"] for row in rows}) == 5
    total = next(row["value"] for row in whole if row["metric"] == "kl_mean")
    assert np.mean(kl) == pytest.approx(total)
