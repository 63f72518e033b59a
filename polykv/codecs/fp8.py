"""8-bit floating point, as inference engines store KV caches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from polykv.codecs.base import Codec, Shape, fp32_scale
from polykv.errors import PolyKVError

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Fp8(Codec):
    """OCP 8-bit floating point (arXiv 2209.05433), "e4m3" (largest value 448) or "e5m2" (57344).

    One fp32 scale = absmax / largest for the whole layer tensor, all heads and tokens together: the granularity of
    vLLM's `kv_cache_dtype=fp8` and of transformers' Fp8QuantizedLayer, which also compute it from the prefill.
    Rounded to nearest, ties to even. Stored: 8 bits per value, plus 4 bytes per layer tensor.
    """

    version = 1

    format: str = "e4m3"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise PolyKVError(f"Fp8 has no format '{self.format}'; choose {' or '.join(FORMATS)}")

    def payload_bits(self, dtype: torch.dtype) -> float:
        return 8.0

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return prod(shape) + 4

    def _statistics(self, chunks: Iterable[Tensor]) -> dict[str, Tensor]:
        absmax = torch.stack([chunk.abs().amax().float() for chunk in chunks]).amax()
        largest = torch.finfo(FORMATS[self.format]).max
        return {"scale": fp32_scale(absmax, largest).view(1, 1, 1, 1)}

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kind = FORMATS[self.format]
        largest = torch.finfo(kind).max
        divisor = torch.where(shared["scale"] > 0, shared["scale"], 1)
        values = (x_BHTD.float() / divisor).clamp_(-largest, largest).to(kind)
        return {"codes": values.view(torch.uint8)}

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        return tensors["codes"].view(FORMATS[self.format]).float() * tensors["scale"]
