"""Tests and intervals against hand-worked examples and what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pairwise import slow
from scipy import stats

from polykv.evaluation.statistics import document_interval, holm


def test_holm_worked_out_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, and never below the one before.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.001, 0.999))
def test_holm_rejects_what_the_step_down_procedure_rejects(p, alpha):
    """Holm 1979: from the smallest on, while p of the k-th of m is at most alpha / (m - k + 1)."""
    rejected = set()
    for k, place in enumerate(np.argsort(p, kind="stable")):
        if p[place] > alpha / (len(p) - k):
            break
        rejected.add(place)
    near = any(abs(q * m - alpha) < 1e-9 for q in p for m in range(1, len(p) + 1))
    assert near or rejected == {place for place, q in enumerate(holm(p)) if q <= alpha}


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
        *slow((lambda rng, n: rng.lognormal(0, 0.5, n), math.exp(0.125), {8: 0.92, 24: 0.935})),
        *slow((lambda rng, n: rng.lognormal(0, 1, n), math.exp(0.5), {8: 0.89, 24: 0.915})),
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
