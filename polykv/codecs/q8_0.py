"""ggml's q8_0: blocks of 32 values with an fp16 scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from polykv.codecs.base import Codec, Shape

BLOCK = 32
BELOW_HALF = torch.tensor(0.5 - 2**-25, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Q8_0(Codec):  # noqa: N801  (the format's own name)
    """ggml's block_q8_0 along head_dim, bit-exact with `quantize_row_q8_0_ref` (ggml-quants.c).

    Per block of 32: d = absmax / 127 in fp32; codes = roundf(x * (1 / d)), halves away from zero,
    against the fp32 d; d is stored in fp16; x' = codes * d. Codes and scales are kept as two
    tensors; the bytes are the same 34 per block. Where head_dim is no multiple of 32, which ggml
    refuses, the last block of a vector is shorter and has its own scale. Stored: 8 + 16 *
    ceil(head_dim / 32) / head_dim bits per value: 8.5 at 64, 96 and 128, 8.6 at 80. A block whose d
    is below the smallest normal fp32 number is kept as zeros: its fp16 scale is zero anyway.
    """

    version = 1

    def payload_bits(self, dtype: torch.dtype) -> float:
        return 8.0

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return prod(shape) + 2 * prod(shape[:3]) * ceil(shape[3] / BLOCK)

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        blocks = _blocks(x_BHTD.float())
        scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
        inverse = torch.where(scale < torch.finfo(torch.float32).tiny, 0, 1 / scale)
        codes = _roundf_int8(blocks * inverse).flatten(-2)[..., : x_BHTD.shape[-1]]
        return {"codes": codes, "scale": scale.squeeze(-1).half()}

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        blocks = _blocks(tensors["codes"]) * tensors["scale"].float().unsqueeze(-1)
        return blocks.flatten(-2)[..., :dim]


def _blocks(x_BHTD: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, H, T, ceil(D / 32), 32), filled up with zeros."""
    missing = -x_BHTD.shape[-1] % BLOCK
    return (F.pad(x_BHTD, (0, missing)) if missing else x_BHTD).unflatten(-1, (-1, BLOCK))


def _roundf_int8(x: Tensor) -> Tensor:
    """C's roundf, halves away from zero (torch.round takes them to even), as int8.

    The cast cuts towards zero. One half itself would be wrong to add: 0.49999997 + 0.5 is 1 in
    fp32.
    """
    return (x + torch.copysign(BELOW_HALF.to(x.device), x)).to(torch.int8)
