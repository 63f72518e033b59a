"""The C structs of csrc, and their construction from a codec's tensors."""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from polykv.codecs.base import Codec, Packed, Shape
from polykv.codecs.bitpack import packed_size
from polykv.codecs.codebook import lloyd_max
from polykv.codecs.context import Rope
from polykv.codecs.ggml import BLOCK
from polykv.codecs.identity import Identity
from polykv.codecs.int8 import Int8
from polykv.codecs.normal import log_values
from polykv.codecs.rotation import random_signs
from polykv.codecs.trellis import WIDEST, TrellisKey, TrellisValue, levels_of
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.codecs.turboquant_log import TurboQuantLog
from polykv.codecs.uniform import Uniform
from polykv.codecs.waterfill import BLOCK as CHANNELS
from polykv.codecs.waterfill import WaterfillKey

# The enums Dtype (vector.h) and Kind (rows.h) of csrc.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
INT8_TENSOR, INT8_TOKEN, Q8, TURBOQUANT, UNIFORM, EXACT, TURBOQUANT_LOG, WATERFILL = range(8)


class Input(ctypes.Structure):
    """`Input` of encode.h: a tensor (batch, heads, tokens, dim) to encode."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 3),
    ]


class PackedStruct(ctypes.Structure):
    """`Packed` of rows.h: a codec's tensors."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 4),
        ("codes", ctypes.c_void_p),
        ("code_strides", ctypes.c_int64 * 3),
        ("scale", ctypes.c_void_p),
        ("scale_strides", ctypes.c_int64 * 3),
        ("levels", ctypes.c_void_p),
        ("boundaries", ctypes.c_void_p),
        ("signs", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("trellis", "log_values", "largest")),
        *((name, ctypes.c_void_p) for name in ("mean", "channel_scale", "block_rms")),
        *((name, ctypes.c_void_p) for name in ("order", "widths", "cos", "sin", "first", "second")),
        ("pairs", ctypes.c_int64),
    ]

    def set_rope(self, rope: Rope | None) -> None:
        """The addresses of its tensors, which have to stay alive."""
        if rope is not None:
            self.cos, self.sin = rope.cos_TP.data_ptr(), rope.sin_TP.data_ptr()
            self.first, self.second = rope.first_P.data_ptr(), rope.second_P.data_ptr()
            self.pairs = len(rope.first_P)


class Queries(ctypes.Structure):
    """`Queries` of attend.h: queries (heads, count, dim)."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("count", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    ]


class Allocation(ctypes.Structure):
    """`Allocation` of waterfill_plan.h: how WaterfillKey plans the blocks of a layer."""

    _fields_ = [
        ("query_rms", ctypes.c_void_p),
        ("total", ctypes.c_int64),
        ("widest", ctypes.c_int32),
        ("centred", ctypes.c_int32),
        ("equal_widths", ctypes.c_int32),
    ]


def strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides in bytes along (batch, heads, tokens); 0 along dimensions of size 1, which broadcast."""
    item = tensor.element_size()
    batch, heads, tokens = (
        s * item if n > 1 else 0 for s, n in zip(tensor.stride()[:3], tensor.shape, strict=False)
    )
    return batch, heads, tokens


def empty_tensors(codec: Codec, shape: Shape) -> dict[str, Tensor]:
    """Uninitialized tensors for what `codec.encode` stores of a tensor of this shape."""
    dim = shape[3]
    if isinstance(codec, TurboQuantMSE):
        codes = torch.empty((*shape[:3], packed_size(dim, codec.bits)), dtype=torch.uint8)
        return {"codes": codes, "norm": torch.empty((*shape[:3], 1), dtype=torch.float16)}
    if isinstance(codec, Uniform):
        size, n_blocks = packed_size(dim, codec.bits), -(-dim // codec.block_size(dim))
        codes = torch.empty((*shape[:3], size), dtype=torch.uint8)
        return {"codes": codes, "scale": torch.empty((*shape[:3], n_blocks), dtype=torch.float16)}
    codes = torch.empty(shape, dtype=torch.int8)
    if isinstance(codec, Int8) and codec.granularity == "tensor":
        return {"codes": codes, "scale": torch.empty((1, 1, 1, 1), dtype=torch.float32)}
    scales = 1 if isinstance(codec, Int8) else -(-dim // BLOCK)
    return {"codes": codes, "scale": torch.empty((*shape[:3], scales), dtype=torch.float16)}


def struct_of(codec: Codec, packed: Packed) -> Any:
    """Reference to a PackedStruct with the addresses of the tensors of `packed`, which has to stay alive."""
    if isinstance(codec, TurboQuantLog | WaterfillKey):
        return ctypes.byref(_log_struct_of(codec, packed))
    codes = packed.tensors["values" if isinstance(codec, Identity) else "codes"]
    struct = PackedStruct(shape=packed.shape, codes=codes.data_ptr(), code_strides=strides(codes))
    if isinstance(codec, Identity):
        struct.kind, struct.dtype = EXACT, DTYPES[codes.dtype]
        return ctypes.byref(struct)
    if isinstance(codec, TurboQuantMSE):
        scale = packed.tensors["norm"]
        levels, boundaries = _codebook(codec.bits)
        struct.kind, struct.bits = TURBOQUANT, codec.bits
        struct.levels, struct.boundaries = levels.data_ptr(), boundaries.data_ptr()
        if codec.signs:
            struct.signs = _signs(packed.shape[3], codec.seed).data_ptr()
    else:
        scale = packed.tensors["scale"]
        struct.kind = _kind_of_scaled(codec)
        if isinstance(codec, Uniform):
            struct.bits, struct.block = codec.bits, codec.block_size(packed.shape[3])
    struct.scale, struct.scale_strides = scale.data_ptr(), strides(scale)
    return ctypes.byref(struct)


def _log_struct_of(codec: TurboQuantLog | WaterfillKey, packed: Packed) -> PackedStruct:
    """Of the codecs whose norms are 8-bit logarithms."""
    kept = packed.tensors
    codes, norm, dim = kept["codes"], kept["norm"], packed.shape[3]
    told = PackedStruct(shape=packed.shape, codes=codes.data_ptr(), code_strides=strides(codes))
    told.scale, told.scale_strides = norm.data_ptr(), strides(norm)
    levels, boundaries, norms = _log_tables()
    told.levels, told.boundaries = levels.data_ptr(), boundaries.data_ptr()
    told.log_values = norms.data_ptr()
    if isinstance(codec, TrellisKey | TrellisValue):
        told.trellis = _trellis_levels().data_ptr()
    told.largest = kept["largest"].data_ptr()
    if isinstance(codec, TurboQuantLog):
        told.kind, told.bits = TURBOQUANT_LOG, codec.bits
        told.signs = _signs(dim, codec.seed).data_ptr()
        return told
    told.kind, told.signs = WATERFILL, _signs(CHANNELS, codec.seed).data_ptr()
    told.channel_scale = kept["scale"].data_ptr()
    for name in ("mean", "block_rms", "order", "widths"):
        setattr(told, name, kept[name].data_ptr())
    told.set_rope(packed.context.rope)
    return told


def _kind_of_scaled(codec: Codec) -> int:
    if isinstance(codec, Int8):
        return INT8_TENSOR if codec.granularity == "tensor" else INT8_TOKEN
    return UNIFORM if isinstance(codec, Uniform) else Q8


@lru_cache
def _codebook(bits: int) -> tuple[Tensor, Tensor]:
    """Levels and boundaries in fp32, each zero-padded to 16 entries."""
    book = lloyd_max(bits)
    tables = torch.zeros(2, 16, dtype=torch.float32, device="cpu")
    tables[0, : len(book.levels)] = torch.tensor(book.levels)
    tables[1, : len(book.boundaries)] = torch.tensor(book.boundaries)
    return tables[0], tables[1]


@cache
def _log_tables() -> tuple[Tensor, Tensor, Tensor]:
    """Levels and boundaries of 0 to 7 bits (8, 128) in fp32, zero-padded, and the values (256,) of the norms' codes.

    Boundaries are in the order of rows.h: 1 that the first bit of a code depends on, then 2 for the second, 4, ...
    """
    levels, boundaries = torch.zeros(2, 8, 128, dtype=torch.float32, device="cpu")
    for bits in range(1, 8):
        book = lloyd_max(bits)
        levels[bits, : 1 << bits] = torch.tensor(book.levels)
        for i in range(bits):
            step = 1 << (bits - i)
            boundaries[bits, 1 << i : 2 << i] = torch.tensor(book.boundaries[step // 2 - 1 :: step])
    one = torch.ones(1, dtype=torch.float16, device="cpu")
    return levels, boundaries, log_values(torch.arange(256, device="cpu"), one)


@cache
def _trellis_levels() -> Tensor:
    """The levels of all widths, one after the other."""
    return torch.cat([levels_of(bits) for bits in range(1, WIDEST + 1)])


@cache
def _signs(dim: int, seed: int) -> Tensor:
    return random_signs(dim, seed)
