"""Helpers of ggml's block formats: blocks of 32 values along head_dim, and packed nibbles.

ggml (ggml-common.h, ggml-quants.c) stores value j of a block in the low nibble of byte j and value j + 16 in its high
nibble; fifth bits are stored separately, as bit j of a little-endian 32-bit word. Here each field of a block (d, m,
qh, qs) is a tensor of its own; the number of bytes is the same. If head_dim is not a multiple of 32, which ggml does
not support, the last block of a vector is padded with its last value.
"""

from __future__ import annotations

from math import ceil, prod

import torch
from torch import Tensor

from polykv.codecs.base import Shape, padded_blocks

BLOCK = 32


def blocks_of(x_BHTD: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, H, T, ceil(D / 32), 32), padded with the last value."""
    return padded_blocks(x_BHTD, BLOCK)


def block_bytes(shape: Shape, each: int) -> int:
    """Bytes of a (B, H, T, D) tensor at `each` bytes per block."""
    return prod(shape[:3]) * ceil(shape[3] / BLOCK) * each


def signed_absmax(blocks: Tensor) -> Tensor:
    """The value (..., 1) of largest magnitude of each block, with its sign; the first one on ties."""
    where = blocks.abs().argmax(dim=-1, keepdim=True)
    largest = blocks.gather(-1, where)
    # The C code starts from +0 and takes strictly larger magnitudes, so the result for zeros is never -0.
    return torch.where(largest == 0, 0.0, largest)


def reciprocal(d: Tensor) -> Tensor:
    """1 / d in fp32; 0 for 0, as in C, and for subnormal d.

    There 1 / d may overflow, which C leaves undefined, and the fp16 scale is zero anyway.
    """
    return torch.where(d.abs() < torch.finfo(torch.float32).tiny, 0.0, 1 / d)


def truncated_codes(shifted: Tensor, largest: int) -> Tensor:
    """C's `MIN(largest, (int8_t) x)` for x >= 0, as uint8."""
    return shifted.clamp_(0, largest).to(torch.uint8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes (..., blocks, 32) below 16 -> bytes (..., blocks * 16)."""
    low, high = codes.split(BLOCK // 2, dim=-1)
    return (low | high << 4).flatten(-2)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    packed = packed.unflatten(-1, (-1, BLOCK // 2))
    return torch.cat([packed & 15, packed >> 4], dim=-1)
