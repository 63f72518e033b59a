# ruff: noqa: ANN001, ANN201, ANN202  (Triton evaluates annotations; only constexpr is allowed)
"""Triton kernels that encode (in one pass) and decode symmetric Uniform at 2, 4 or 8 bits.

Used for the quantized tokens of cards: a whole cache takes two calls, where torch takes some forty passes over it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from polykv.codecs.base import Packed
from polykv.codecs.bitpack import packed_size
from polykv.codecs.uniform import Uniform
from polykv.kernels.triton_bits import padded, rows_contiguous, tile_shape
from polykv.kernels.triton_int8 import ROUND, absmax
from polykv.kernels.triton_stream import codes_of, fetch, store_codes, words


@triton.jit
def _encode(
    x, codes, scale, stride_b, stride_h, stride_t, n_heads, n_tokens, step_of_top,
    DIM: tl.constexpr, PAD: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    TOP: tl.constexpr = 2**BITS - 1
    cols, blocks = tl.arange(0, PAD), tl.arange(0, BLOCKS)
    head = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_T, here_T = head * n_tokens + t, t < n_tokens
    source = x + head // n_heads * stride_b + head % n_heads * stride_h
    x_TD = tl.load(source + t[:, None] * stride_t + cols[None, :], here_T[:, None], 0.0).to(
        tl.float32
    )
    x_TNB = tl.reshape(x_TD, (ROWS, BLOCKS, PAD // BLOCKS))
    scale_TN = (absmax(x_TNB, 2) * step_of_top).to(tl.float16)
    tl.store(scale + row_T[:, None] * BLOCKS + blocks[None, :], scale_TN, here_T[:, None])
    step_TN = scale_TN.to(tl.float32)
    # A true division, as in torch, so that every backend writes the same bits.
    y_TNB = tl.div_rn(x_TNB, tl.where(step_TN > 0, step_TN, 1.0)[:, :, None]) + TOP / 2
    y_TD = tl.minimum(tl.maximum(tl.reshape(y_TNB, (ROWS, PAD)), 0.0), TOP * 1.0)
    codes_TD = (y_TD + ROUND).to(tl.int32, bitcast=True) & TOP
    if BITS == 8:
        tl.store(
            codes + row_T[:, None] * DIM + cols[None, :], codes_TD.to(tl.uint8), here_T[:, None]
        )
    else:
        codes_TG8 = tl.reshape(codes_TD, (ROWS, PAD // 8, 8))
        store_codes(codes + row_T * (DIM * BITS // 8), codes_TG8, here_T, DIM, BITS)


@triton.jit
def _decode(
    codes, scale, out,
    stride_b, stride_h, stride_t, scale_b, scale_h, scale_t, n_heads, n_tokens,
    DIM: tl.constexpr, PAD: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    cols, blocks = tl.arange(0, PAD), tl.arange(0, BLOCKS)
    head = tl.program_id(1).to(tl.int64)
    batch, kv_head = head // n_heads, head % n_heads
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here_T = t < n_tokens
    codes += batch * stride_b + kv_head * stride_h
    scale += batch * scale_b + kv_head * scale_h
    scale_TN = tl.load(scale + t[:, None] * scale_t + blocks[None, :], here_T[:, None], 0.0)
    if BITS == 8:
        codes_TD = tl.load(codes + t[:, None] * stride_t + cols[None, :], here_T[:, None], 0)
    else:
        first, second, third = fetch(codes, t, stride_t, here_T, DIM, PAD, BITS)
        codes_TD = codes_of(words(first, second, third, BITS), BITS)
    steps_TD = codes_TD.to(tl.float32) - (2**BITS - 1) / 2
    y_TNB = (
        tl.reshape(steps_TD, (ROWS, BLOCKS, PAD // BLOCKS)) * scale_TN.to(tl.float32)[:, :, None]
    )
    y_TD = tl.reshape(y_TNB, (ROWS, PAD))
    tl.store(out + (head * n_tokens + t)[:, None] * DIM + cols[None, :], y_TD, here_T[:, None])


def takes(codec: Uniform, dim: int) -> bool:
    """Whether head_dim needs no padding and is a whole number of blocks."""
    whole = dim == padded(dim) and dim % codec.block_size(dim) == 0
    return whole and codec.symmetric and codec.bits in (2, 4, 8)


def encode(codec: Uniform, x_BHTD: Tensor) -> Packed:
    """`codec.encode`; values that are not finite show in the scales, which the caller checks."""
    x_BHTD, (batch, heads, n_tokens, dim) = rows_contiguous(x_BHTD), x_BHTD.shape
    n_blocks, tile = dim // codec.block_size(dim), tile_shape(dim)
    n_bytes = packed_size(dim, codec.bits)
    codes = x_BHTD.new_empty((batch, heads, n_tokens, n_bytes), dtype=torch.uint8)
    scale = x_BHTD.new_empty((batch, heads, n_tokens, n_blocks), dtype=torch.float16)
    _encode[(triton.cdiv(n_tokens, tile["ROWS"]), batch * heads)](
        x_BHTD, codes, scale, *x_BHTD.stride()[:3], heads, n_tokens, 2 / (2**codec.bits - 1),
        BITS=codec.bits, BLOCKS=n_blocks, **tile,
    )  # fmt: skip
    return Packed({"codes": codes, "scale": scale}, (batch, heads, n_tokens, dim), x_BHTD.dtype)


def decode_rotated(codec: Uniform, packed: Packed) -> Tensor:
    """`codec.decode_rotated`."""
    batch, heads, n_tokens, dim = packed.shape
    codes, scale = packed.tensors["codes"], packed.tensors["scale"]
    out_BHTD = codes.new_empty(packed.shape, dtype=torch.float32)
    tile = tile_shape(dim)
    _decode[(triton.cdiv(n_tokens, tile["ROWS"]), batch * heads)](
        codes, scale, out_BHTD, *codes.stride()[:3], *scale.stride()[:3], heads, n_tokens,
        BITS=codec.bits, BLOCKS=scale.shape[3], **tile,
    )  # fmt: skip
    return out_BHTD
