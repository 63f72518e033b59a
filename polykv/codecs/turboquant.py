"""TurboQuant-MSE: rotates vectors, then quantizes each coordinate with the optimal scalar quantizer for N(0, 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from polykv.codecs.base import Codec, Shape
from polykv.codecs.bitpack import pack, packed_size, unpack
from polykv.codecs.codebook import lloyd_max
from polykv.codecs.rotation import rotation
from polykv.errors import PolyKVError


@dataclass(frozen=True)
class TurboQuantMSE(Codec):
    """TurboQuant without the residual for inner products (arXiv 2504.19874, Algorithm 1), with the norm stored in fp16.

    The vector of one token and head is divided by its norm, rotated and multiplied by sqrt(head_dim), which makes its
    coordinates close to N(0, 1). Each is rounded to the nearest of the 2**bits Lloyd-Max levels of N(0, 1), and the
    codes are bit-packed. Decoded: x' = norm / sqrt(head_dim) * unrotate(levels[codes]).

    Stored per vector: ceil(head_dim * bits / 8) bytes of codes and 2 of the norm. If head_dim * bits is a multiple of
    8, that is bits + 16 / head_dim bits per value: 3.125 at 3 bits and head_dim 128.

    A vector whose norm rounds to zero in fp16 (below 3e-8) decodes to zeros.

    Attributes:
        bits: per coordinate, 1 to 5.
        signs: flip coordinates by random signs before the Hadamard transform, as TurboQuant requires. PolyKV
            (arXiv 2604.24971) does not; an offset that all channels share then ends up in one large coordinate, which
            is clipped to the outermost level.
        seed: of the signs.

    Raises:
        PolyKVError: bits out of range.
    """

    version = 1

    bits: int = 3
    signs: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits not in range(1, 6):
            raise PolyKVError(f"TurboQuantMSE has no {self.bits}-bit codebook; choose 1 to 5 bits")

    def payload_bits(self, dtype: torch.dtype) -> float:
        return float(self.bits)

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return prod(shape[:3]) * (packed_size(shape[3], self.bits) + 2)

    def rotation(self, dim: int, device: torch.device) -> Tensor:
        return rotation(dim, self.seed if self.signs else None, device)

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x_BHTD, dim = x_BHTD.float(), x_BHTD.shape[-1]
        norm_BHT1 = torch.linalg.vector_norm(x_BHTD, dim=-1, keepdim=True)
        y_BHTD = self.rotate(x_BHTD, {})
        # Clamped so that a zero vector is not divided by zero.
        y_BHTD *= dim**0.5 / norm_BHT1.clamp_min(torch.finfo(torch.float32).tiny)
        # A code is the number of boundaries below the coordinate. torch.bucketize gives the same, several times slower.
        codes_BHTD = torch.zeros(y_BHTD.shape, dtype=torch.uint8, device=y_BHTD.device)
        for boundary in lloyd_max(self.bits).boundaries:
            codes_BHTD += y_BHTD > boundary
        return {"codes": pack(codes_BHTD, self.bits), "norm": norm_BHT1.half()}

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        levels = tensors["norm"].new_tensor(lloyd_max(self.bits).levels, dtype=torch.float32)
        codes_BHTD = unpack(tensors["codes"], self.bits, dim)
        y_BHTD = levels.index_select(0, codes_BHTD.int().flatten()).view(codes_BHTD.shape)
        return y_BHTD.mul_(tensors["norm"].float() / dim**0.5)
