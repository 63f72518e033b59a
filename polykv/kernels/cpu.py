"""The fast CPU path: Int8, Q8_0 and TurboQuantMSE encoded, decoded and attended to in vector registers.

The arithmetic is C++ (csrc/), compiled once on this machine and called through ctypes with the addresses of
tensors. Where a function answers None, the torch path does the work, errors included.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache

import torch
from torch import Tensor

from polykv.codecs.base import Codec, Packed, Shape
from polykv.codecs.bitpack import packed_size
from polykv.codecs.codebook import lloyd_max
from polykv.codecs.int8 import Int8
from polykv.codecs.q8_0 import BLOCK, Q8_0
from polykv.codecs.rotation import random_signs
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.kernels.cpu_build import BuildError, library
from polykv.segment import Segment

# As in csrc: Dtype (vector.h) and Kind, MAX_DIM (rows.h, rotate.h).
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
INT8_TENSOR, INT8_TOKEN, Q8, TURBOQUANT = range(4)
DIMS = range(16, 257, 16)
BITS = (2, 3, 4)

# Starting a thread takes as long as this many values take to encode, or products to sum.
VALUES_PER_THREAD = 1 << 17
PRODUCTS_PER_THREAD = 1 << 21
TILE = 64  # queries at a time
MIN_TOKENS = (
    512  # of a split: attention is split along tokens only where heads and tiles are too few
)


class _Input(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 3),
    ]


class _Packed(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 4),
        ("codes", ctypes.c_void_p),
        ("code_strides", ctypes.c_int64 * 3),
        ("scale", ctypes.c_void_p),
        ("scale_strides", ctypes.c_int64 * 3),
        ("levels", ctypes.c_void_p),
        ("boundaries", ctypes.c_void_p),
        ("signs", ctypes.c_void_p),
    ]


class _Queries(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("count", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    ]


@lru_cache
def _library() -> ctypes.CDLL | str:
    """The compiled functions, or why they cannot be had."""
    try:
        loaded = ctypes.CDLL(str(library()))
    except (BuildError, OSError) as error:
        return str(error).splitlines()[0]
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.polykv_encode.argtypes = [pointer, pointer, number]
    loaded.polykv_decode.argtypes = [pointer, pointer, number]
    loaded.polykv_attend.argtypes = [pointer, pointer, pointer, number, pointer, pointer, number]
    loaded.polykv_decode.restype = loaded.polykv_attend.restype = None
    return loaded


def available() -> str | None:
    """None where the kernels can run; they are compiled now if they never were."""
    found = _library()
    return found if isinstance(found, str) else None


def encode(codec: Codec, x_BHTD: Tensor) -> Packed | None:
    """`codec.encode`, or None: another codec, dtype or layout, or values that cannot be encoded.

    Codes differ from those of the torch path only where a rotated value lies within rounding of a boundary.
    """
    if x_BHTD.dtype not in DTYPES or x_BHTD.ndim != 4 or 0 in x_BHTD.shape:
        return None
    shape = tuple(x_BHTD.shape)
    if not (_takes(codec, shape) and _readable(x_BHTD)):
        return None
    packed = Packed(_empty_tensors(codec, shape), shape, x_BHTD.dtype, codec.group)
    x = _Input(x_BHTD.data_ptr(), DTYPES[x_BHTD.dtype], shape, _strides(x_BHTD))
    threads = _threads(x_BHTD.numel() // VALUES_PER_THREAD)
    good = _library().polykv_encode(ctypes.byref(x), _described(codec, packed), threads)
    return packed if good else None


def decode_rotated(codec: Codec, packed: Packed) -> Tensor | None:
    """`codec.decode_rotated`: fp32 (batch, kv_heads, tokens, head_dim), or None for another codec or layout."""
    if not (_takes(codec, packed.shape) and _readable(*packed.tensors.values())):
        return None
    out_BHTD = torch.empty(packed.shape, dtype=torch.float32)
    threads = _threads(out_BHTD.numel() // VALUES_PER_THREAD)
    _library().polykv_decode(_described(codec, packed), out_BHTD.data_ptr(), threads)
    return out_BHTD


def attend(q_HQD: Tensor, segment: Segment, scaling: float) -> tuple[Tensor, Tensor] | None:
    """Output (kv_heads, queries, head_dim) and log-sum-exp (kv_heads, queries), fp32, of queries in fp32, bf16 or
    fp16 that all see the whole segment; None for another codec pair or layout, or batches.

    Memory beyond the result is 0.3 MiB a thread, whatever the context.
    """
    key, value = segment.key, segment.value
    heads, queries, dim = q_HQD.shape
    if key.shape != (1, heads, key.shape[2], dim) or key.shape != value.shape:
        return None
    if q_HQD.dtype not in DTYPES or queries == 0 or key.shape[2] == 0:
        return None
    if not (_takes(segment.key_codec, key.shape) and _takes(segment.value_codec, value.shape)):
        return None
    if not _readable(q_HQD, *key.tensors.values(), *value.tensors.values()):
        return None
    q_HQD = q_HQD.contiguous()
    threads = _threads(heads * queries * dim * key.shape[2] // PRODUCTS_PER_THREAD)
    splits = min(-(-threads // (heads * -(-queries // TILE))), -(-key.shape[2] // MIN_TOKENS))
    out_SHQD = torch.empty((splits, heads, queries, dim), dtype=torch.float32)
    lse_SHQ = torch.empty((splits, heads, queries), dtype=torch.float32)
    q = _Queries(q_HQD.data_ptr(), DTYPES[q_HQD.dtype], queries, scaling)
    _library().polykv_attend(
        ctypes.byref(q),
        _described(segment.key_codec, key),
        _described(segment.value_codec, value),
        splits,
        out_SHQD.data_ptr(),
        lse_SHQ.data_ptr(),
        threads,
    )
    if splits == 1:
        return out_SHQD[0], lse_SHQ[0]
    lse_HQ = lse_SHQ.logsumexp(dim=0)
    shares = (lse_SHQ - lse_HQ).exp_().unsqueeze(-1)
    return out_SHQD.mul_(shares).sum(dim=0), lse_HQ


def _takes(codec: Codec, shape: Shape) -> bool:
    # Not isinstance: a subclass may quantize in another way.
    if type(codec) is TurboQuantMSE and codec.bits not in BITS:
        return False
    return type(codec) in (Int8, Q8_0, TurboQuantMSE) and shape[3] in DIMS


def _readable(*tensors: Tensor) -> bool:
    """Vectors of consecutive values in this machine's memory."""
    return all(t.device.type == "cpu" and (t.shape[-1] == 1 or t.stride(-1) == 1) for t in tensors)


def _threads(useful: int) -> int:
    return max(min(torch.get_num_threads(), useful), 1)


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Bytes along (batch, heads, tokens); 0 where all share one entry."""
    item = tensor.element_size()
    return tuple(
        s * item if n > 1 else 0 for s, n in zip(tensor.stride()[:3], tensor.shape, strict=False)
    )


def _empty_tensors(codec: Codec, shape: Shape) -> dict[str, Tensor]:
    batch, heads, n_tokens, dim = shape
    if isinstance(codec, TurboQuantMSE):
        size = packed_size(dim, codec.bits)
        codes = torch.empty((batch, heads, n_tokens, size), dtype=torch.uint8)
        return {"codes": codes, "norm": torch.empty((*shape[:3], 1), dtype=torch.float16)}
    codes = torch.empty(shape, dtype=torch.int8)
    if isinstance(codec, Int8) and codec.granularity == "tensor":
        return {"codes": codes, "scale": torch.empty((1, 1, 1, 1), dtype=torch.float32)}
    scales = 1 if isinstance(codec, Int8) else -(-dim // BLOCK)
    return {"codes": codes, "scale": torch.empty((*shape[:3], scales), dtype=torch.float16)}


def _described(codec: Codec, packed: Packed) -> ctypes.c_void_p:
    """The struct that csrc reads, by reference; it lives as long as `packed` does for its addresses."""
    codes = packed.tensors["codes"]
    told = _Packed(shape=packed.shape, codes=codes.data_ptr(), code_strides=_strides(codes))
    if isinstance(codec, TurboQuantMSE):
        scale = packed.tensors["norm"]
        levels, boundaries = _codebook(codec.bits)
        told.kind, told.bits = TURBOQUANT, codec.bits
        told.levels, told.boundaries = levels.data_ptr(), boundaries.data_ptr()
        if codec.signs:
            told.signs = _signs(packed.shape[3], codec.seed).data_ptr()
    else:
        scale = packed.tensors["scale"]
        per_tensor = isinstance(codec, Int8) and codec.granularity == "tensor"
        told.kind = INT8_TENSOR if per_tensor else INT8_TOKEN if isinstance(codec, Int8) else Q8
    told.scale, told.scale_strides = scale.data_ptr(), _strides(scale)
    return ctypes.byref(told)


@lru_cache
def _codebook(bits: int) -> tuple[Tensor, Tensor]:
    """Levels and boundaries in fp32, each filled up to 16 entries."""
    book = lloyd_max(bits)
    tables = torch.zeros(2, 16, dtype=torch.float32, device="cpu")
    tables[0, : len(book.levels)] = torch.tensor(book.levels)
    tables[1, : len(book.boundaries)] = torch.tensor(book.boundaries)
    return tables[0], tables[1]


@cache
def _signs(dim: int, seed: int) -> Tensor:
    return random_signs(dim, seed)
