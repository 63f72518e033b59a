"""NormalFloat-4 (QLoRA, arXiv 2305.14314): 16 quantiles of a normal distribution, one fp16 absmax per vector."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from polykv.codecs.base import Codec, Shape
from polykv.codecs.bitpack import pack, packed_size, unpack

# 7 below zero, zero, 8 above; 0.9677083 is QLoRA's.
P = torch.cat([1 - torch.linspace(0.9677083, 0.5, 8), torch.linspace(0.5, 0.9677083, 9)[1:]])
LEVELS = torch.special.ndtri(P) / torch.special.ndtri(P[-1])


@dataclass(frozen=True)
class NormalFloat4(Codec):
    def payload_bits(self, dtype: torch.dtype) -> float:
        return 4.0

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return prod(shape[:3]) * (packed_size(shape[3], 4) + 2)

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        absmax = x_BHTD.float().abs().amax(-1, keepdim=True).half()
        between = ((LEVELS[1:] + LEVELS[:-1]) / 2).to(x_BHTD.device)
        codes = torch.bucketize(x_BHTD / torch.where(absmax > 0, absmax, 1).float(), between)
        return {"codes": pack(codes.to(torch.uint8), 4), "absmax": absmax}

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        codes = unpack(tensors["codes"], 4, dim).int()
        return LEVELS.to(codes.device)[codes] * tensors["absmax"].float()
