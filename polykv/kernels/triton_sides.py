# ruff: noqa: ANN001, ANN201, ANN202  (Triton evaluates annotations; only constexpr is allowed)
"""Triton: loading and dequantization of keys and values of any codec within attention.

A side's kind says how its scale is applied. A scale per "tensor" or per "token" (and head) multiplies the score or the
weight, and the dequantized numbers are codes or levels without it. A scale per "block" of a vector multiplies the
numbers. "exact" values have no scale.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from polykv.codecs.base import Codec, Packed
from polykv.codecs.codebook import lloyd_max
from polykv.codecs.ggml import BLOCK
from polykv.codecs.identity import Identity
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.codecs.uniform import Uniform
from polykv.kernels.triton_bits import INTERPRETED, level_table, levels_of
from polykv.kernels.triton_int8 import scale_shared_by
from polykv.kernels.triton_stream import fetch, words

FP16_MAX = tl.constexpr(65504.0)
MIDDLE = tl.constexpr(127.5)  # the centre of the 256 levels of 8-bit Uniform


@dataclass(frozen=True)
class Side:
    """Arguments of the kernel for keys or values; `table` is for `load_table` if codes have less than 8 bits."""

    kind: str
    codes: Tensor
    scale: Tensor
    table: Tensor
    bits: int
    block: int

    @classmethod
    def of(
        cls, codec: Codec, packed: Packed, dtype: torch.dtype, token_dtype: torch.dtype
    ) -> "Side":
        """`dtype`: that of the numbers; `token_dtype`: that of the levels if a token has a single scale."""
        heads, dim = packed.shape[1], packed.shape[3]
        if isinstance(codec, Identity):
            values = packed.tensors["values"]
            return cls("exact", values, values, values, 8 * values.itemsize, 1)
        codes = packed.tensors["codes"]
        if isinstance(codec, TurboQuantMSE):
            table = level_table(lloyd_max(codec.bits).levels, token_dtype, codes.device)
            return cls("token", codes, packed.tensors["norm"], table, codec.bits, 1)
        scale = packed.tensors["scale"].expand(1, heads, -1, -1)
        if not isinstance(codec, Uniform):
            return cls(scale_shared_by(codec), codes, scale, scale, 8, BLOCK)
        if codec.bits == 8:  # 16-bit floats do not hold its levels
            return cls("block", codes, scale, scale, 8, codec.block_size(dim))
        levels = tuple(code - (2**codec.bits - 1) / 2 for code in range(2**codec.bits))
        kind = "token" if scale.shape[3] == 1 else "block"
        table = level_table(levels, token_dtype if kind == "token" else dtype, codes.device)
        return cls(kind, codes, scale, table, codec.bits, codec.block_size(dim))


@triton.jit
def load_codes(
    codes, t, stride_t, here_T, DIM: tl.constexpr, PAD: tl.constexpr, BITS: tl.constexpr
):
    """Issue the loads of the codes of tokens `t`, for `numbers`."""
    if BITS < 8:
        return fetch(codes, t, stride_t, here_T, DIM, PAD, BITS)
    else:
        cols = tl.arange(0, PAD)
        here_TD = here_T[:, None] & (cols < DIM)[None, :]
        whole_TD = tl.load(codes + t[:, None] * stride_t + cols[None, :], here_TD, 0)
        return whole_TD, whole_TD, whole_TD


@triton.jit
def numbers(
    first, second, third, table, scale, t, scale_t, here_T,
    KIND: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    DIM: tl.constexpr, PAD: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Dequantize the result of `load_codes` to (T, D) in DTYPE, without the scale per token or tensor."""
    if BITS < 8:
        x_TD = levels_of(words(first, second, third, BITS), table, BITS, DTYPE)
    elif first.dtype == tl.uint8:
        x_TD = first.to(tl.float32) - MIDDLE
    else:
        x_TD = as_float(first, DTYPE)
    if KIND == "block":
        cols = tl.arange(0, PAD)
        here_TD = here_T[:, None] & (cols < DIM)[None, :]
        scale_TD = tl.load(scale + t[:, None] * scale_t + cols[None, :] // BLOCK, here_TD, 0.0)
        x_TD = x_TD.to(tl.float32) * scale_TD.to(tl.float32)
        if tl.float16 == DTYPE:  # a scale that was rounded up may overflow it
            x_TD = tl.minimum(tl.maximum(x_TD, -FP16_MAX), FP16_MAX)
        x_TD = x_TD.to(DTYPE)
    return x_TD


@triton.jit
def as_float(values, DTYPE: tl.constexpr):
    """Cast of int8 codes (exact in every 16-bit float) or of exact values."""
    if INTERPRETED:  # which cannot cast integers to bf16
        return values.to(tl.float32).to(DTYPE)
    else:
        return values.to(DTYPE)
