"""Encoding on the CPU for codecs whose norms are 8-bit logarithms: passes in C++, the allocation of bits in torch."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from polykv.codecs.base import Packed
from polykv.codecs.context import LayerContext, Rope
from polykv.codecs.turboquant_log import TurboQuantLog
from polykv.codecs.waterfill import WaterfillKey
from polykv.kernels.cpu_layout import DTYPES, Input, PackedStruct, strides, struct_of

PART = 256  # tokens, as in csrc/kernels.cpp


def encode(
    library: Any,
    codec: TurboQuantLog | WaterfillKey,
    x_BHTD: Tensor,
    context: LayerContext,
    threads: int,
) -> Packed | None:
    """`codec.encode`; None if a value or statistic is not finite."""
    batch, heads, n_tokens, dim = shape = x_BHTD.shape
    context = codec.told(context)
    if context.rope is not None and context.rope.n_tokens != n_tokens:
        return None
    x = Input(x_BHTD.data_ptr(), DTYPES[x_BHTD.dtype], shape, strides(x_BHTD))
    shared = {}
    if isinstance(codec, WaterfillKey):
        shared = _statistics(library, codec, x, shape, context, threads)
    codes = codec.code_bytes(heads, dim)
    rows = 1 if isinstance(codec, WaterfillKey) else heads
    kept = {
        "codes": torch.empty((batch, rows, n_tokens, codes), dtype=torch.uint8),
        "norm": torch.empty((batch, heads, n_tokens, 1), dtype=torch.uint8),
        **shared,
        "largest": torch.ones((batch, heads, 1, 1), dtype=torch.float16),
    }
    packed = Packed(kept, (batch, heads, n_tokens, dim), x_BHTD.dtype, context=context)
    most_BHp = torch.empty(batch, heads, -(-n_tokens // PART), dtype=torch.float32)
    for write in (0, 1):
        struct = struct_of(codec, packed)
        library.polykv_encode_log(ctypes.byref(x), struct, write, most_BHp.data_ptr(), threads)
        if not write:
            kept["largest"].copy_(most_BHp.amax(-1).view(batch, heads, 1, 1))
            if not all(t.isfinite().all() for t in kept.values() if t.is_floating_point()):
                return None
    return packed


def _statistics(
    library: Any, codec: WaterfillKey, x: Input, shape: Any, context: LayerContext, threads: int
) -> dict[str, Tensor]:
    """`codec`'s statistics but for the largest RMS, from two passes over the keys."""
    batch, heads, n_tokens, dim = shape
    rope = context.rope

    def average(of: Rope | None, mean: Tensor | None) -> Tensor:
        """Over the tokens: of the keys rotated by `of`, or of the squares of the keys without the mean."""
        sums = torch.empty(batch, heads, -(-n_tokens // PART), dim, dtype=torch.float64)
        told = PackedStruct(shape=tuple(shape))
        told.set_rope(of)
        library.polykv_waterfill_sums(
            ctypes.byref(x),
            ctypes.byref(told),
            None if mean is None else mean.data_ptr(),
            sums.data_ptr(),
            threads,
        )
        return sums.sum(2, keepdim=True) / n_tokens

    mean = average(None if rope is None else rope.inverse(), None).half() * codec.centred
    sigma = average(rope, mean.float()).sqrt().float()
    return {"mean": mean, **codec.plan(sigma, context)}
