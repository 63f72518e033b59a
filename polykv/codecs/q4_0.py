"""ggml's q4_0: blocks of 32 values with an fp16 scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polykv.codecs import ggml
from polykv.codecs.base import Codec, Shape


@dataclass(frozen=True)
class Q4_0(Codec):  # noqa: N801  (the name of the format)
    """ggml's block_q4_0 along head_dim, bit-exact with `quantize_row_q4_0_ref` (ggml-quants.c).

    Per block of 32: d = m / -8 with m the value of the largest magnitude, its sign kept; codes =
    min(15, trunc(x * (1 / d) + 8.5)), so m has code 0; d is stored in fp16; x' = (code - 8) * d.
    Stored: 18 bytes per block (d, 16 bytes of nibbles), 4.5 bits per value at 64, 96 and 128.
    """

    version = 1

    def payload_bits(self, dtype: torch.dtype) -> float:
        return 4.0

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return ggml.block_bytes(shape, 2 + 16)

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        blocks = ggml.blocks_of(x_BHTD.float())
        d = ggml.signed_absmax(blocks) / -8
        codes = ggml.truncated_codes(blocks * ggml.reciprocal(d) + 8.5, 15)
        return {"codes": ggml.pack_nibbles(codes), "scale": d.squeeze(-1).half()}

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        codes = ggml.unpack_nibbles(tensors["codes"])
        blocks = (codes.float() - 8) * tensors["scale"].float().unsqueeze(-1)
        return blocks.flatten(-2)[..., :dim]
