# ruff: noqa: ANN001, ANN201, ANN202  (Triton evaluates annotations; only constexpr is allowed)
"""Triton kernels that encode (in one pass) and decode Int8 and Q8_0.

Memory-bound: every value is read once and every byte written once; a per-tensor scale takes a pass of its own.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from polykv.codecs.base import Packed
from polykv.codecs.ggml import BLOCK
from polykv.codecs.int8 import Int8
from polykv.codecs.q8_0 import Q8_0
from polykv.kernels.triton_bits import rows_contiguous, tile_shape

BELOW_HALF = tl.constexpr(0.5 - 2**-25)  # see codecs/q8_0.py
ROUND = tl.constexpr(1.5 * 2**23)  # the low bits of x + ROUND are round(x), halves to even
TINY = tl.constexpr(2.0**-126)  # the smallest normal fp32

# SHARED_BY: the values that share a scale: a "tensor", a "token" (per head), or a "block" of 32 values.


@triton.jit
def _absmax(
    x, top, stride_b, stride_h, stride_t, n_heads, n_tokens,
    DIM: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Largest |x| of the whole tensor, as fp32 bits, in one kernel (torch takes a pass and seven small kernels)."""
    cols, head = tl.arange(0, PAD), tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = x + head // n_heads * stride_b + head % n_heads * stride_h
    inside_TD = (t < n_tokens)[:, None] & (cols < DIM)[None, :]
    x_TD = tl.load(source + t[:, None] * stride_t + cols[None, :], inside_TD, 0.0).to(tl.float32)
    tl.atomic_max(top, tl.max(bits_of_size(x_TD)), sem="relaxed")


@triton.jit
def _encode(
    x, top, codes, scale, stride_b, stride_h, stride_t, n_heads, n_tokens,
    DIM: tl.constexpr, PAD: tl.constexpr, SHARED_BY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (PAD + 31) // 32
    cols, blocks = tl.arange(0, PAD), tl.arange(0, BLOCKS)
    head = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_T = head * n_tokens + t
    inside_TD = (t < n_tokens)[:, None] & (cols < DIM)[None, :]
    source = x + head // n_heads * stride_b + head % n_heads * stride_h
    x_TD = tl.load(source + t[:, None] * stride_t + cols[None, :], inside_TD, 0.0).to(tl.float32)
    if SHARED_BY == "block":
        x_TNB = tl.reshape(x_TD, (ROWS, BLOCKS, PAD // BLOCKS))
        scale_TN = tl.div_rn(absmax(x_TNB, 2), 127.0)
        inverse_TN = tl.where(scale_TN < TINY, 0.0, tl.div_rn(1.0, tl.maximum(scale_TN, TINY)))
        x_TNB *= inverse_TN[:, :, None]
        x_TNB += tl.where(x_TNB < 0, -BELOW_HALF, BELOW_HALF)
        codes_TD = tl.reshape(x_TNB, (ROWS, PAD)).to(tl.int8)
        n_blocks: tl.constexpr = (DIM + 31) // 32
        kept_TN = (t < n_tokens)[:, None] & (blocks < n_blocks)[None, :]
        tl.store(
            scale + row_T[:, None] * n_blocks + blocks[None, :], scale_TN.to(tl.float16), kept_TN
        )
    else:
        if SHARED_BY == "token":
            scale_T = tl.div_rn(absmax(x_TD, 1), 127.0).to(tl.float16)
            tl.store(scale + row_T, scale_T, t < n_tokens)
            scale_T = scale_T.to(tl.float32)
        else:
            one = tl.div_rn(tl.load(top).to(tl.float32, bitcast=True), 127.0)
            one = tl.where(one < TINY, 0.0, one)  # its inverse might overflow
            tl.store(scale, one)  # every program stores the same value
            scale_T = tl.zeros((ROWS,), tl.float32) + one
        x_TD *= tl.div_rn(1.0, tl.where(scale_T > 0, scale_T, 1.0))[:, None]
        x_TD = tl.minimum(tl.maximum(x_TD, -127.0), 127.0)
        codes_TD = (x_TD + ROUND).to(tl.int32, bitcast=True).to(tl.int8)
    tl.store(codes + row_T[:, None] * DIM + cols[None, :], codes_TD, inside_TD)


@triton.jit
def absmax(x, axis: tl.constexpr):
    """Largest |x| along `axis`; NaN propagates."""
    return tl.max(bits_of_size(x), axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def bits_of_size(x):
    """The bits of |x| as an integer, which orders like |x|, with NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _decode(
    codes, scale, out,
    stride_b, stride_h, stride_t, scale_b, scale_h, scale_t, n_heads, n_tokens,
    DIM: tl.constexpr, PAD: tl.constexpr, SHARED_BY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, PAD)
    head = tl.program_id(1).to(tl.int64)
    batch, kv_head = head // n_heads, head % n_heads
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_TD = (t < n_tokens)[:, None] & (cols < DIM)[None, :]
    source = codes + batch * stride_b + kv_head * stride_h
    y_TD = tl.load(source + t[:, None] * stride_t + cols[None, :], inside_TD, 0).to(tl.float32)
    scale += batch * scale_b + kv_head * scale_h
    if SHARED_BY == "block":
        scale_TD = tl.load(scale + t[:, None] * scale_t + cols[None, :] // 32, inside_TD, 0.0)
        y_TD *= scale_TD.to(tl.float32)
    elif SHARED_BY == "token":
        y_TD *= tl.load(scale + t * scale_t, t < n_tokens, 0.0)[:, None].to(tl.float32)
    else:
        y_TD *= tl.load(scale)
    tl.store(out + (head * n_tokens + t)[:, None] * DIM + cols[None, :], y_TD, inside_TD)


def encode(codec: Int8 | Q8_0, x_BHTD: Tensor) -> Packed:
    """`codec.encode`; values that are not finite show in the scales, which the caller checks."""
    x_BHTD, (batch, heads, n_tokens, dim) = rows_contiguous(x_BHTD), x_BHTD.shape
    shared_by = scale_shared_by(codec)
    codes = x_BHTD.new_empty(x_BHTD.shape, dtype=torch.int8)
    tile = tile_shape(dim)
    grid = (triton.cdiv(n_tokens, tile["ROWS"]), batch * heads)
    top = None
    if shared_by == "tensor":
        scale = x_BHTD.new_empty((1, 1, 1, 1), dtype=torch.float32)
        top = torch.zeros(1, dtype=torch.int32, device=x_BHTD.device)
        _absmax[grid](x_BHTD, top, *x_BHTD.stride()[:3], heads, n_tokens, **tile)
    else:
        n_scales = triton.cdiv(dim, BLOCK) if shared_by == "block" else 1
        scale = x_BHTD.new_empty((batch, heads, n_tokens, n_scales), dtype=torch.float16)
    _encode[grid](
        x_BHTD, top, codes, scale, *x_BHTD.stride()[:3], heads, n_tokens,
        SHARED_BY=shared_by, **tile,
    )  # fmt: skip
    return Packed({"codes": codes, "scale": scale}, (batch, heads, n_tokens, dim), x_BHTD.dtype)


def decode_rotated(codec: Int8 | Q8_0, packed: Packed) -> Tensor:
    """`codec.decode_rotated`."""
    batch, heads, n_tokens, dim = packed.shape
    codes = packed.tensors["codes"]
    scale = packed.tensors["scale"].expand(batch, heads, -1, -1)  # stride 0 along shared dimensions
    out_BHTD = codes.new_empty(packed.shape, dtype=torch.float32)
    tile = tile_shape(dim)
    _decode[(triton.cdiv(n_tokens, tile["ROWS"]), batch * heads)](
        codes, scale, out_BHTD, *codes.stride()[:3], *scale.stride()[:3], heads, n_tokens,
        SHARED_BY=scale_shared_by(codec), **tile,
    )  # fmt: skip
    return out_BHTD


def scale_shared_by(codec: Any) -> str:
    """SHARED_BY of a codec."""
    return "block" if isinstance(codec, Q8_0) else codec.granularity
