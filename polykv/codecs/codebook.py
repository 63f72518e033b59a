"""Lloyd-Max codebooks of the standard normal distribution.

S. P. Lloyd, "Least squares quantization in PCM" (1957, 1982); J. Max, "Quantizing for minimum distortion" (1960). A
level is the mean of the density between its boundaries, a boundary the midpoint of two levels; the two conditions are
iterated to a fixed point. The moments are computed exactly (erfc), without sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import erfc, exp, inf, pi, sqrt


@dataclass(frozen=True)
class Codebook:
    """2**bits `levels`, ascending; the `boundaries` between them; `distortion`, the mean squared error on N(0, 1)."""

    levels: tuple[float, ...]
    boundaries: tuple[float, ...]
    distortion: float


@lru_cache
def lloyd_max(bits: int) -> Codebook:
    """The optimal scalar quantizer of N(0, 1) with 2**bits levels, for 1 to 5 bits.

    The density is even, so the positive half is solved and mirrored; zero is a boundary.
    """
    n_half = 1 << (bits - 1)
    levels = [3.0 * (i + 0.5) / n_half for i in range(n_half)]
    moved = inf
    while moved > 1e-13:
        edges = [0.0, *_midpoints(levels), inf]
        means = [_mean(a, b) for a, b in zip(edges, edges[1:], strict=False)]
        moved = max(abs(new - old) for new, old in zip(means, levels, strict=True))
        levels = means
    edges = [0.0, *_midpoints(levels), inf]
    # Where every level is the mean of its cell, E(x - q)^2 = E x^2 - E q^2.
    energy = sum(2 * _mass(a, b) * c * c for a, b, c in zip(edges, edges[1:], levels, strict=False))
    full = (*(-c for c in reversed(levels)), *levels)
    return Codebook(full, tuple(_midpoints(full)), 1 - energy)


def _midpoints(levels: Sequence[float]) -> list[float]:
    return [(a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)]


def _mass(a: float, b: float) -> float:
    return (erfc(a / sqrt(2)) - erfc(b / sqrt(2))) / 2


def _mean(a: float, b: float) -> float:
    """Mean of the standard normal between a and b."""
    return (exp(-a * a / 2) - exp(-b * b / 2)) / sqrt(2 * pi) / _mass(a, b)
