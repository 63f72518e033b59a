"""FibQuant: pairs of rotated coordinates, each rounded to the nearest point of a spiral codebook in the plane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import pi, prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from polykv.codecs.base import Codec, Shape
from polykv.codecs.bitpack import pack, packed_size, unpack
from polykv.codecs.rotation import rotation
from polykv.errors import PolyKVError

GOLDEN_ANGLE = 2 * pi * (1 - 2 / (1 + sqrt(5)))
PLASTIC = 1.3247179572447460  # the real root of x^3 = x + 1, of Roberts' sequence in two dimensions
POINTS = 1 << 15  # of the source
ITERATIONS = 20
DISTANCES = 1 << 15  # computed at once


@dataclass(frozen=True)
class FibQuant(Codec):
    """Pairs of coordinates of normalized, rotated vectors in a codebook of 4**bits points, and the norm in fp16.

    Source: arXiv 2605.11478, for blocks of k = 2. Two coordinates of a random unit vector of d = head_dim are a
    spherical-Beta source: their squared radius is Beta(1, (d - 2) / 2), their angle uniform. Codeword n of N starts at
    the angle n times the golden angle and the radius whose square is the quantile (n - 1/2) / N of Beta(1, d / 4),
    the best density of points for that source (exponent k / (k + 2)), and is refined by Lloyd's algorithm.

    Left open there or chosen here: k = 2, whose codebook of 256 points at 4 bits is small enough to search in full (the
    paper's larger blocks gain more at low rates); the rotation is a signed Hadamard instead of a Haar matrix, as in
    TurboQuantMSE; Lloyd runs once over a fixed quasi-random set in fp64, without restarts; an odd head_dim gets a
    zero; below 5 channels, the codebook for 4. Stored per vector: ceil(2 * bits * ceil(head_dim / 2) / 8) bytes of
    codes and 2 of the norm: bits + 16 / head_dim per value. The codebook is computed and not stored.

    bits: a multiple of 1/2 from 1 to 4.
    """

    version = 1

    bits: float = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits not in [half / 2 for half in range(2, 9)]:
            raise PolyKVError(f"FibQuant has no bits={self.bits}; choose 1, 1.5, 2, ... or 4 bits")

    @property
    def code_bits(self) -> int:
        """Bits of the code of a pair."""
        return round(2 * self.bits)

    def payload_bits(self, dtype: torch.dtype) -> float:
        return float(self.bits)

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return prod(shape[:3]) * (packed_size(-(-shape[3] // 2), self.code_bits) + 2)

    def rotation(self, dim: int, device: torch.device) -> Tensor:
        return rotation(dim, self.seed, device)

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x_BHTD, dim = x_BHTD.float(), x_BHTD.shape[-1]
        norm_BHT1 = torch.linalg.vector_norm(x_BHTD, dim=-1, keepdim=True)
        y_BHTD = self.rotate(x_BHTD, {})
        # Clamped so that a zero vector is not divided by zero.
        y_BHTD /= norm_BHT1.clamp_min(torch.finfo(torch.float32).tiny)
        pairs = F.pad(y_BHTD, (0, dim % 2)).unflatten(-1, (-1, 2))
        codes = nearest(pairs.flatten(0, -2), codebook(dim, self.code_bits).to(pairs))
        return {
            "codes": pack(codes.view(pairs.shape[:-1]), self.code_bits),
            "norm": norm_BHT1.half(),
        }

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        codes = unpack(tensors["codes"], self.code_bits, -(-dim // 2))
        points = codebook(dim, self.code_bits).to(codes.device, torch.float32)
        pairs = points.index_select(0, codes.int().flatten()).view(*codes.shape, 2)
        return pairs.flatten(-2)[..., :dim].mul(tensors["norm"].float())


def nearest(points_P2: Tensor, codebook_N2: Tensor) -> Tensor:
    """uint8 codes (P,) of the nearest codewords, computed in bounded memory."""
    # |p - c|^2 = |p|^2 - 2 (p.c - |c|^2 / 2)
    half_energy_N = codebook_N2.square().sum(1) / 2
    codes = torch.empty(len(points_P2), dtype=torch.uint8, device=points_P2.device)
    step = max(max(DISTANCES, points_P2.numel()) // len(codebook_N2), 1)
    for start in range(0, len(points_P2), step):
        near = torch.addmm(-half_energy_N, points_P2[start : start + step], codebook_N2.T)
        codes[start : start + step] = near.argmax(1)
    return codes


@lru_cache
def codebook(dim: int, code_bits: int) -> Tensor:
    """fp64 codewords (2**code_bits, 2) in the unit disk, for vectors of `dim` channels."""
    n_codes, dim = 1 << code_bits, max(dim, 4)
    number = torch.arange(n_codes, dtype=torch.float64, device="cpu")
    codewords = _polar(_radius((number + 0.5) / n_codes, dim / 4), number * GOLDEN_ANGLE)
    points = source(dim, POINTS)
    for _ in range(ITERATIONS):
        cell = nearest(points, codewords).long()
        sums = torch.zeros_like(codewords).index_add_(0, cell, points)
        counts = cell.bincount(minlength=n_codes).unsqueeze(1)
        codewords = torch.where(counts > 0, sums / counts.clamp_min(1), codewords)
    return codewords


def source(dim: int, n_points: int) -> Tensor:
    """fp64 points (n_points, 2) spread evenly over the distribution of two coordinates of a unit vector.

    Roberts' two-dimensional sequence (frac(n / p), frac(n / p^2)), p the plastic number, mapped to radius and angle.
    """
    number = torch.arange(1, n_points + 1, dtype=torch.float64, device="cpu")
    quantile, turn = (number / PLASTIC).frac(), (number / PLASTIC**2).frac()
    return _polar(_radius(quantile, (dim - 2) / 2), 2 * pi * turn)


def _radius(quantile: Tensor, beta: float) -> Tensor:
    """The radius whose square is this quantile of Beta(1, beta)."""
    return (1 - (1 - quantile) ** (1 / beta)).sqrt()


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
