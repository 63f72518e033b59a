"""Symmetric absmax int8, with a scale per tensor or per token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from polykv.codecs.base import Codec, Packed, Shape, fp32_scale
from polykv.errors import PolyKVError


@dataclass(frozen=True)
class Int8(Codec):
    """codes = round(x / scale) in [-127, 127] with scale = absmax / 127; x' = codes * scale.

    granularity "tensor": one fp32 scale for the whole layer tensor, all heads and tokens together,
    as PolyKV publishes it (arXiv 2604.24971). Stored: 8 bits per value, plus 4 bytes per layer
    tensor.

    granularity "token": one fp16 scale per token and head. Stored: 8 + 16/head_dim bits per value
    (8.125 at 128). Codes are computed from the fp16 scale, so that its rounding adds no error.
    """

    version = 1

    granularity: str = "tensor"

    def __post_init__(self) -> None:
        if self.granularity not in ("tensor", "token"):
            raise PolyKVError(
                f"Int8 has no granularity '{self.granularity}'; choose 'tensor' or 'token'"
            )

    def payload_bits(self, dtype: torch.dtype) -> float:
        return 8.0

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return prod(shape) + (4 if self.granularity == "tensor" else 2 * prod(shape[:3]))

    def _statistics(self, chunks: Iterable[Tensor]) -> dict[str, Tensor]:
        if self.granularity == "token":
            return {}
        absmax = torch.stack([_absmax(chunk, dim=(0, 1, 2, 3)) for chunk in chunks]).amax(dim=0)
        return {"scale": fp32_scale(absmax, 127)}

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scale = shared["scale"] if shared else (_absmax(x_BHTD, dim=(3,)) / 127).half()
        # The scale is zero where all values are zero (or vanish in fp16): any divisor gives code 0.
        divisor = torch.where(scale > 0, scale, 1).float()
        codes = x_BHTD.float().div(divisor).round_().clamp_(-127, 127).to(torch.int8)
        return {"codes": codes} if shared else {"codes": codes, "scale": scale}

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        return tensors["codes"] * tensors["scale"].float()

    @torch.no_grad()
    def scores(self, q_BHQD: Tensor, packed: Packed) -> Tensor:
        # Scaling the scores takes Q * T products, scaling the keys T * D.
        products = q_BHQD @ packed.tensors["codes"].float().mT
        return products.mul_(packed.tensors["scale"].float().mT)


def _absmax(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Largest absolute value over `dim`, kept as size 1, in fp32; NaN propagates."""
    return x.abs().amax(dim=dim, keepdim=True).float()
