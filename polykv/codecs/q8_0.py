"""ggml's q8_0: blocks of 32 values with an fp16 scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from polykv.codecs import ggml
from polykv.codecs.base import Codec, Shape

BELOW_HALF = torch.tensor(0.5 - 2**-25, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Q8_0(Codec):  # noqa: N801  (the name of the format)
    """ggml's block_q8_0 along head_dim, bit-exact with `quantize_row_q8_0_ref` (ggml-quants.c).

    Per block of 32: d = absmax / 127 in fp32; codes = roundf(x * (1 / d)), halves away from zero; d is stored in fp16;
    x' = codes * d. Codes and scales are two tensors; the bytes are the same 34 per block. If head_dim is not a multiple
    of 32, which ggml does not support, the last block of a vector is shorter and has its own scale. Stored: 8 + 16 *
    ceil(head_dim / 32) / head_dim bits per value: 8.5 at 64, 96 and 128, 8.6 at 80. A block with subnormal d is stored
    as zeros: its fp16 scale is zero anyway.
    """

    version = 1

    def payload_bits(self, dtype: torch.dtype) -> float:
        return 8.0

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return prod(shape) + 2 * prod(shape[:3]) * ceil(shape[3] / ggml.BLOCK)

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        blocks = ggml.blocks_of(x_BHTD.float())
        scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
        codes = _roundf_int8(blocks * ggml.reciprocal(scale)).flatten(-2)[..., : x_BHTD.shape[-1]]
        return {"codes": codes, "scale": scale.squeeze(-1).half()}

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        blocks = ggml.blocks_of(tensors["codes"]) * tensors["scale"].float().unsqueeze(-1)
        return blocks.flatten(-2)[..., :dim]


def _roundf_int8(x: Tensor) -> Tensor:
    """C's roundf, halves away from zero (torch.round rounds them to even), as int8.

    The cast truncates. Adding exactly one half would be wrong: 0.49999997 + 0.5 is 1 in fp32.
    """
    return (x + torch.copysign(BELOW_HALF.to(x.device), x)).to(torch.int8)
