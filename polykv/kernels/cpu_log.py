"""Encoding on the CPU for codecs whose norms are 8-bit logarithms: one call of C++ on the tensors that are kept."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from polykv.codecs.base import Packed, Shape
from polykv.codecs.context import LayerContext
from polykv.codecs.turboquant_log import TurboQuantLog
from polykv.codecs.waterfill import BLOCK, WaterfillKey
from polykv.kernels.cpu_layout import DTYPES, Allocation, Input, strides, struct_of

PART, MORE = 256, 32  # tokens, as PART in csrc/kernels.cpp and TOKENS in csrc/waterfill_encode.h
HALVES = ("mean", "scale", "block_rms", "largest")  # the tensors in fp16


def encode(
    library: Any,
    codec: TurboQuantLog | WaterfillKey,
    x_BHTD: Tensor,
    context: LayerContext,
    threads: int,
) -> Packed | None:
    """`codec.encode`; None if a value or statistic is not finite."""
    batch, heads, n_tokens, dim = x_BHTD.shape
    shape = (batch, heads, n_tokens, dim)
    told = codec.told(context)
    if told.rope is not None and told.rope.n_tokens != n_tokens:
        return None
    packed = Packed(_empty_tensors(codec, shape), shape, x_BHTD.dtype, context=told)
    x = Input(x_BHTD.data_ptr(), DTYPES[x_BHTD.dtype], shape, strides(x_BHTD))
    plan, query_rms = Allocation(), told.query_rms
    if isinstance(codec, WaterfillKey):
        plan.total = codec.code_bytes(heads, dim) * 8 // BLOCK
        plan.widest, plan.centred = codec.widest, codec.centred
        plan.equal_widths = codec.equal_widths
    if query_rms is not None:
        query_rms = query_rms.float().contiguous()
        plan.query_rms = query_rms.data_ptr()
    sums = torch.empty(batch * heads * -(-n_tokens // PART) * dim, dtype=torch.float64)
    norms = torch.empty(batch * heads * n_tokens + MORE, dtype=torch.float32)
    good = library.polykv_encode_log(
        ctypes.byref(x),
        struct_of(codec, packed),
        ctypes.byref(plan),
        sums.data_ptr(),
        norms.data_ptr(),
        threads,
    )
    return packed if good else None


def _empty_tensors(codec: TurboQuantLog | WaterfillKey, shape: Shape) -> dict[str, Tensor]:
    """Uninitialized tensors for what `codec.encode` stores of a tensor of this shape."""
    batch, heads, n_tokens, dim = shape
    keys, n_blocks = isinstance(codec, WaterfillKey), dim // BLOCK
    sizes = {
        "codes": (1 if keys else heads, n_tokens, codec.code_bytes(heads, dim)),
        "norm": (heads, n_tokens, 1),
    }
    if keys:
        sizes |= {"mean": (heads, 1, dim), "scale": (heads, 1, dim), "order": (heads, 1, dim)}
        sizes |= {"block_rms": (heads, 1, n_blocks), "widths": (heads, 1, -(-n_blocks // 2))}
    sizes |= {"largest": (heads, 1, 1)}
    return {
        name: torch.empty((batch, *size), dtype=torch.float16 if name in HALVES else torch.uint8)
        for name, size in sizes.items()
    }
