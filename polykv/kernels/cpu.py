"""Vectorized CPU kernels for Int8, Q8_0, TurboQuantMSE and Uniform; attention also for Identity, LOG_KEYS and
LOG_VALUES.

The arithmetic is C++ (csrc/), compiled once on this machine and called through ctypes with the addresses of tensors.
Where a function returns None, the caller takes the torch path, which also raises the errors.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from polykv.codecs.base import Codec, Packed, Shape
from polykv.codecs.context import NOTHING, LayerContext
from polykv.codecs.identity import Identity
from polykv.codecs.int8 import Int8
from polykv.codecs.q8_0 import Q8_0
from polykv.codecs.trellis import TrellisKey, TrellisValue
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.codecs.turboquant_log import TurboQuantLog
from polykv.codecs.uniform import Uniform
from polykv.codecs.waterfill import WaterfillKey
from polykv.kernels import cpu_log, cpu_suffix
from polykv.kernels.cpu_build import BuildError, library
from polykv.kernels.cpu_layout import DTYPES, Input, Queries, empty_tensors, strides, struct_of
from polykv.segment import Segment

# Up to MAX_DIM of csrc/rotate.h.
DIMS = range(16, 257, 16)
BITS = {TurboQuantMSE: (2, 3, 4), Uniform: (2, 3, 4, 8)}
UNROTATED = (Identity, Int8, Q8_0, Uniform)
LOG_KEYS, LOG_VALUES = (WaterfillKey, TrellisKey), (TurboQuantLog, TrellisValue)
BLOCK_STEP = 16  # the block size of Uniform has to be a multiple of this

# Work per thread, below which another one costs more than it saves.
VALUES_PER_THREAD = 1 << 17
PRODUCTS_PER_THREAD = 1 << 21
DECODED = 16  # decoding a value takes as long as this many products
TILE = 64  # queries per job
MIN_TOKENS = 512  # per part: attention is split along tokens where threads would have unequal work


@lru_cache
def loaded_library() -> Any:
    """The compiled library, or the reason why it is not available."""
    try:
        loaded = ctypes.CDLL(str(library()))
    except (BuildError, OSError) as error:
        return str(error).splitlines()[0]
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.polykv_encode.argtypes = [pointer, pointer, number]
    loaded.polykv_decode.argtypes = [pointer, pointer, number]
    loaded.polykv_attend.argtypes = [*[pointer] * 3, number, *[pointer] * 4, number]
    loaded.polykv_encode_log.argtypes = [pointer, pointer, pointer, pointer, pointer, number]
    loaded.polykv_attend_suffix.argtypes = [*[pointer] * 5, number]
    loaded.polykv_run_on.argtypes = [pointer]
    for name in ("decode", "attend", "attend_suffix", "run_on"):
        getattr(loaded, f"polykv_{name}").restype = None
    loaded.polykv_run_on(_threads_of_torch())
    # A forked process has none of the OpenMP threads, and would wait for them.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: loaded.polykv_run_on(None))
    return loaded


@lru_cache
def _threads_of_torch() -> int | None:
    """Address of GOMP_parallel, which runs work on the threads of this process's OpenMP; None where there is none.

    torch loads its OpenMP for all to see, so that this is torch's unless another was loaded before.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):  # not there, and on Windows no CDLL(None)
        return None


def available() -> str | None:
    """None if the kernels can run, else the reason; compiles them on first use."""
    found = loaded_library()
    return found if isinstance(found, str) else None


def encode(codec: Codec, x_BHTD: Tensor, context: LayerContext = NOTHING) -> Packed | None:
    """`codec.encode`, or None for another codec, dtype or layout, or values that cannot be encoded.

    Codes differ from the torch path's only where rounding moves a rotated value across a decision boundary.
    """
    if x_BHTD.dtype not in DTYPES or x_BHTD.ndim != 4 or 0 in x_BHTD.shape:
        return None
    batch, heads, n_tokens, dim = x_BHTD.shape
    shape = (batch, heads, n_tokens, dim)
    if isinstance(codec, Identity):
        return _cast(codec, x_BHTD, shape) if _readable(x_BHTD) else None
    threads = _threads(x_BHTD.numel() // VALUES_PER_THREAD)
    if isinstance(codec, TurboQuantLog | WaterfillKey) and type(codec) in (*LOG_KEYS, *LOG_VALUES):
        if dim not in DIMS or not _readable(x_BHTD):
            return None
        return cpu_log.encode(loaded_library(), codec, x_BHTD, context, threads)
    if not (_takes(codec, shape) and _readable(x_BHTD)):
        return None
    packed = Packed(empty_tensors(codec, shape), shape, x_BHTD.dtype, codec.group)
    x = Input(x_BHTD.data_ptr(), DTYPES[x_BHTD.dtype], shape, strides(x_BHTD))
    good = loaded_library().polykv_encode(ctypes.byref(x), struct_of(codec, packed), threads)
    return packed if good else None


@torch.no_grad()
def _cast(codec: Identity, x_BHTD: Tensor, shape: Shape) -> Packed | None:
    """Exact tokens; with few of them, the general path takes longer than the kernels take for the others."""
    values = x_BHTD.to(codec.kept(x_BHTD.dtype), copy=True).contiguous()
    finite = values.abs().amax() < torch.inf  # also False for NaN
    return Packed({"values": values}, shape, x_BHTD.dtype) if finite else None


def decode_rotated(codec: Codec, packed: Packed) -> Tensor | None:
    """`codec.decode_rotated`: fp32 (batch, kv_heads, tokens, head_dim), or None for another codec or layout."""
    if not (_takes(codec, packed.shape) and _readable(*packed.tensors.values())):
        return None
    out_BHTD = torch.empty(packed.shape, dtype=torch.float32)
    threads = _threads(out_BHTD.numel() // VALUES_PER_THREAD)
    loaded_library().polykv_decode(struct_of(codec, packed), out_BHTD.data_ptr(), threads)
    return out_BHTD


def attend(q_HQD: Tensor, segment: Segment, scaling: float) -> tuple[Tensor, Tensor] | None:
    """Output (kv_heads, queries, head_dim) and log-sum-exp (kv_heads, queries), both fp32; no mask.

    Queries are fp32, bf16 or fp16. Those in bf16 are multiplied in it where the processor has AVX-512 BF16; sums are
    fp32. None for other codec pairs, layouts, or batches. Temporary memory is 0.3 MiB per thread at any context length.
    """
    key, value = segment.key, segment.value
    heads, queries, dim = q_HQD.shape
    if key.shape != (1, heads, key.shape[2], dim) or key.shape != value.shape:
        return None
    if q_HQD.dtype not in DTYPES or queries == 0 or key.shape[2] == 0:
        return None
    if not (_attends(segment.key_codec, key, *LOG_KEYS) and _attends(segment.value_codec, value)):
        return None
    if not _readable(q_HQD, *key.tensors.values(), *value.tensors.values()):
        return None
    q_HQD = q_HQD.contiguous()
    products = heads * (queries + DECODED) * dim * key.shape[2]
    threads = _threads(products // PRODUCTS_PER_THREAD)
    splits = _splits(heads * -(-queries // TILE), threads, key.shape[2])
    parts_SHQD = torch.empty((splits, heads, queries, dim), dtype=torch.float32)
    lse_SHQ = torch.empty((splits, heads, queries), dtype=torch.float32)
    out_HQD, lse_HQ = torch.empty_like(parts_SHQD[0]), torch.empty_like(lse_SHQ[0])
    q = Queries(q_HQD.data_ptr(), DTYPES[q_HQD.dtype], queries, scaling)
    loaded_library().polykv_attend(
        ctypes.byref(q),
        struct_of(segment.key_codec, key),
        struct_of(segment.value_codec, value),
        splits,
        *(tensor.data_ptr() for tensor in (parts_SHQD, lse_SHQ, out_HQD, lse_HQ)),
        threads,
    )
    return out_HQD, lse_HQ


def attend_suffix(
    q_BHRD: Tensor,
    own: Segment,
    mask_B1QT: Tensor,
    scaling: float,
    other: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor] | None:
    """`polykv.kernels.attend_suffix`; None where there are many queries, or for another codec, dtype or layout."""
    n_rows = q_BHRD.shape[2]
    if not 0 < n_rows <= cpu_suffix.MAX_ROWS or own.n_tokens == 0 or q_BHRD.dtype not in DTYPES:
        return None
    for codec, packed in ((own.key_codec, own.key), (own.value_codec, own.value)):
        if not (type(codec) in UNROTATED and _attends(codec, packed)):
            return None
    if not _readable(q_BHRD, *own.key.tensors.values(), *own.value.tensors.values(), mask_B1QT):
        return None
    threads = _threads(q_BHRD.numel() * own.n_tokens // PRODUCTS_PER_THREAD)
    return cpu_suffix.attend(loaded_library(), q_BHRD, own, mask_B1QT, scaling, other, threads)


def _takes(codec: Any, shape: Shape) -> bool:
    # Not isinstance: a subclass may quantize differently.
    kind = type(codec)
    if kind in BITS and codec.bits not in BITS[kind]:
        return False
    if kind is Uniform and not (codec.symmetric and codec.block_size(shape[3]) % BLOCK_STEP == 0):
        return False
    return kind in (Int8, Q8_0, TurboQuantMSE, Uniform) and shape[3] in DIMS


def _attends(codec: Any, packed: Packed, *more: type) -> bool:
    """Whether attention takes a codec; `more` are kinds that keys may have and values may not."""
    if type(codec) in (*LOG_VALUES, *more):
        shared = [tensor for tensor in packed.tensors.values() if tensor.shape[2] == 1]
        rope = packed.context.rope
        tables = [] if rope is None else [rope.cos_TP, rope.sin_TP]
        return packed.shape[3] in DIMS and all(t.is_contiguous() for t in (*shared, *tables))
    if type(codec) is Identity:
        return packed.shape[3] in DIMS and packed.tensors["values"].dtype in DTYPES
    return _takes(codec, packed.shape)


def _readable(*tensors: Tensor) -> bool:
    """Whether all tensors are in CPU memory, contiguous along the last dimension."""
    return all(t.device.type == "cpu" and (t.shape[-1] == 1 or t.stride(-1) == 1) for t in tensors)


def _splits(jobs: int, threads: int, n_tokens: int) -> int:
    """The smallest number of parts that lets all threads do equally many jobs, or the largest allowed."""
    most = -(-n_tokens // MIN_TOKENS)
    return next((n for n in range(1, most) if n * jobs % threads == 0), most)


def _threads(useful: int) -> int:
    """One, or as many as torch has if they are torch's: OpenMP ends threads if a team is smaller than the last."""
    most = torch.get_num_threads()
    if _threads_of_torch() is None:
        return max(min(most, useful), 1)
    return most if useful > 1 else 1
