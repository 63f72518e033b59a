"""Lloyd-Max codebooks against the literature, sampling, and the conditions that define them."""

from statistics import NormalDist

import pytest
import torch

from polykv.codecs.codebook import lloyd_max

# J. Max, "Quantizing for minimum distortion" (1960), table I.
DISTORTION = {1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.00950, 5: 0.00250}


@pytest.mark.parametrize(("bits", "expected"), DISTORTION.items())
def test_distortion_is_the_published_one(bits, expected):
    assert lloyd_max(bits).distortion == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("bits", range(1, 8))
def test_distortion_is_that_of_gaussian_samples(bits):
    book = lloyd_max(bits)
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    boundaries = torch.tensor(book.boundaries, dtype=torch.float64)
    quantized = torch.tensor(book.levels, dtype=torch.float64)[torch.bucketize(x, boundaries)]
    assert float((x - quantized).square().mean()) == pytest.approx(book.distortion, rel=0.01)


@pytest.mark.parametrize("bits", range(1, 8))
def test_levels_are_centroids_and_boundaries_midpoints(bits):
    book, normal = lloyd_max(bits), NormalDist()
    levels = book.levels
    assert len(levels) == 2**bits and list(levels) == sorted(levels)
    assert levels == tuple(-level for level in reversed(levels))
    midpoints = [(a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)]
    assert book.boundaries == pytest.approx(midpoints)
    edges = [-40.0, *book.boundaries, 40.0]
    for a, b, level in zip(edges, edges[1:], levels, strict=False):
        mean = (normal.pdf(a) - normal.pdf(b)) / (normal.cdf(b) - normal.cdf(a))
        assert level == pytest.approx(mean, abs=1e-9)


def test_one_bit_is_the_mean_of_the_half_normal():
    assert lloyd_max(1).levels[1] == pytest.approx((2 / torch.pi) ** 0.5)
