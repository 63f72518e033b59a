"""No quantization: the tensor's own dtype (the baseline), or a cast to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from polykv.codecs.base import Codec, Shape
from polykv.errors import PolyKVError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Identity(Codec):
    """Stores the values as they are (`dtype` None) or cast to "float16", "bfloat16" or "float32".

    Stored: 16 bits per value in fp16 and bf16, 32 in fp32.
    """

    version = 1

    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise PolyKVError(
                f"Identity has no dtype '{self.dtype}'; choose null or one of {', '.join(DTYPES)}"
            )

    def payload_bits(self, dtype: torch.dtype) -> float:
        return 8.0 * self.kept(dtype).itemsize

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return prod(shape) * self.kept(dtype).itemsize

    def kept(self, dtype: torch.dtype) -> torch.dtype:
        """What values of this dtype are stored as."""
        return dtype if self.dtype is None else DTYPES[self.dtype]

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"values": x_BHTD.to(self.kept(x_BHTD.dtype))}

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        return tensors["values"]
