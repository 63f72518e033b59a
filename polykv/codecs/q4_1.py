"""ggml's q4_1: blocks of 32 values with an fp16 scale and minimum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polykv.codecs import ggml
from polykv.codecs.base import Codec, Shape


@dataclass(frozen=True)
class Q4_1(Codec):  # noqa: N801  (the name of the format)
    """ggml's block_q4_1 along head_dim, bit-exact with `quantize_row_q4_1_ref` (ggml-quants.c).

    Per block of 32: m = min, d = (max - min) / 15; codes = min(15, trunc((x - m) * (1 / d) + 0.5));
    d and m are stored in fp16; x' = code * d + m. Stored: 20 bytes per block (d, m, 16 bytes of
    nibbles), 5 bits per value at 64, 96 and 128.
    """

    version = 1

    def payload_bits(self, dtype: torch.dtype) -> float:
        return 4.0

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return ggml.block_bytes(shape, 2 + 2 + 16)

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        blocks = ggml.blocks_of(x_BHTD.float())
        low, high = blocks.aminmax(dim=-1, keepdim=True)
        d = (high - low) / 15
        codes = ggml.truncated_codes((blocks - low) * ggml.reciprocal(d) + 0.5, 15)
        return {
            "codes": ggml.pack_nibbles(codes),
            "scale": d.squeeze(-1).half(),
            "minimum": low.squeeze(-1).half(),
        }

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        scale, low = (tensors[name].float().unsqueeze(-1) for name in ("scale", "minimum"))
        blocks = ggml.unpack_nibbles(tensors["codes"]) * scale + low
        return blocks.flatten(-2)[..., :dim]
