"""TurboQuant-MSE: rotation, then an optimal scalar quantizer of the normal distribution per coordinate."""

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
    """TurboQuant without inner-product residual (arXiv 2504.19874, Algorithm 1), with the norm stored separately.

    Per token and head: the norm in fp16; the unit vector, rotated and scaled by sqrt(head_dim), rounded to the
    nearest of 2**bits Lloyd-Max levels of N(0, 1); codes bit-packed.
    x' = norm / sqrt(head_dim) * unrotate(levels[codes]).
    Stored: 8 * ceil(head_dim * bits / 8) + 16 bits per vector; bits + 16/head_dim per value where
    that packs evenly: 3.125 at 3 bits and head_dim 128.

    signs: random signs before the Hadamard transform (from `seed`), as TurboQuant requires. PolyKV (arXiv 2604.24971)
    has none; a vector with a common offset is then rotated to a single spike, which the codebook clips. A vector whose
    norm vanishes in fp16 (below 3e-8) decodes to zeros.
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
        y_BHTD *= dim**0.5 / norm_BHT1.clamp_min(torch.finfo(torch.float32).tiny)
        # Same as torch.bucketize, and several times faster for so few boundaries.
        codes_BHTD = torch.zeros(y_BHTD.shape, dtype=torch.uint8, device=y_BHTD.device)
        for boundary in lloyd_max(self.bits).boundaries:
            codes_BHTD += y_BHTD > boundary
        return {"codes": pack(codes_BHTD, self.bits), "norm": norm_BHT1.half()}

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        levels = tensors["norm"].new_tensor(lloyd_max(self.bits).levels, dtype=torch.float32)
        codes_BHTD = unpack(tensors["codes"], self.bits, dim)
        y_BHTD = levels.index_select(0, codes_BHTD.int().flatten()).view(codes_BHTD.shape)
        return y_BHTD.mul_(tensors["norm"].float() / dim**0.5)
