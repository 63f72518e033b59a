"""Lloyd-Max codebooks of the standard normal distribution.

S. P. Lloyd, "Least squares quantization in PCM" (1957, 1982); J. Max, "Quantizing for minimum distortion" (1960). A
level is the mean of the density between its boundaries, a boundary the midpoint of two levels. Newton's method solves
both conditions together; applying them in turn, as Lloyd does, takes tens of thousands of iterations at 7 bits. The
moments are computed exactly (erfc), without sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import erfc, exp, inf, pi, sqrt
from statistics import NormalDist


@dataclass(frozen=True)
class Codebook:
    """2**bits `levels`, ascending; the `boundaries` between them; `distortion`, the mean squared error on N(0, 1)."""

    levels: tuple[float, ...]
    boundaries: tuple[float, ...]
    distortion: float


@lru_cache
def lloyd_max(bits: int) -> Codebook:
    """The optimal scalar quantizer of N(0, 1) with 2**bits levels, for 1 to 7 bits.

    The density is even, so the positive half is solved and mirrored; zero is a boundary.
    """
    n_half = 1 << (bits - 1)
    # The best density of many levels is proportional to the cube root of the normal density, which is a normal density
    # of variance 3 (P. F. Panter & W. Dite, 1951).
    spread = NormalDist(0, sqrt(3))
    levels = [spread.inv_cdf(0.5 + (i + 0.5) / (2 * n_half)) for i in range(n_half)]
    moved = inf
    while moved > 1e-13:
        step = _newton_step(levels)
        levels = [level + by for level, by in zip(levels, step, strict=True)]
        moved = max(map(abs, step))
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
    return (_density(a) - _density(b)) / _mass(a, b)


def _density(x: float) -> float:
    return exp(-x * x / 2) / sqrt(2 * pi)


def _newton_step(levels: Sequence[float]) -> list[float]:
    """The step from positive `levels` to levels that are the means of their cells, to first order.

    The mean of a cell depends on its level and the two next to it, so the system is tridiagonal.
    """
    edges = [0.0, *_midpoints(levels), inf]
    step: list[float] = []
    slopes: list[float] = []  # d step[i] / d step[i + 1] after elimination
    for level, a, b in zip(levels, edges, edges[1:], strict=False):
        mass, mean = _mass(a, b), _mean(a, b)
        # Derivatives of the mean by the level below and above; a boundary moves half as far as a level.
        below = _density(a) * (mean - a) / mass / 2 if step else 0.0
        above = _density(b) * (b - mean) / mass / 2 if b < inf else 0.0
        pivot = 1 - below - above - (below * slopes[-1] if step else 0.0)
        step.append((mean - level + (below * step[-1] if step else 0.0)) / pivot)
        slopes.append(above / pivot)
    for i in reversed(range(len(step) - 1)):
        step[i] += slopes[i] * step[i + 1]
    return step
