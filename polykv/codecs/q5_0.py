"""ggml's q5_0: blocks of 32 values with an fp16 scale, fifth bits stored separately."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polykv.codecs import ggml
from polykv.codecs.base import Codec, Shape
from polykv.codecs.bitpack import pack, unpack


@dataclass(frozen=True)
class Q5_0(Codec):  # noqa: N801  (the name of the format)
    """ggml's block_q5_0 along head_dim, bit-exact with `quantize_row_q5_0_ref` (ggml-quants.c).

    Per block of 32: d = m / -16 with m the value of the largest magnitude, its sign kept; codes =
    min(31, trunc(x * (1 / d) + 16.5)); d is stored in fp16; x' = (code - 16) * d. Bit 4 of value j
    is bit j of the little-endian word qh. Stored: 22 bytes per block (d, qh, 16 bytes of nibbles), 5.5
    bits per value at 64, 96 and 128.
    """

    version = 1

    def payload_bits(self, dtype: torch.dtype) -> float:
        return 5.0

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return ggml.block_bytes(shape, 2 + 4 + 16)

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        blocks = ggml.blocks_of(x_BHTD.float())
        d = ggml.signed_absmax(blocks) / -16
        codes = ggml.truncated_codes(blocks * ggml.reciprocal(d) + 16.5, 31)
        return {
            "codes": ggml.pack_nibbles(codes & 15),
            "high": pack(codes >> 4, 1).flatten(-2),
            "scale": d.squeeze(-1).half(),
        }

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        high = unpack(tensors["high"].unflatten(-1, (-1, 4)), 1, ggml.BLOCK)
        codes = ggml.unpack_nibbles(tensors["codes"]) | high << 4
        blocks = (codes.float() - 16) * tensors["scale"].float().unsqueeze(-1)
        return blocks.flatten(-2)[..., :dim]
