# ruff: noqa: ANN001, ANN201, ANN202  (Triton evaluates annotations; only constexpr is allowed)
"""Triton kernels that encode (in one pass: norm, rotation, quantization, packing) and decode TurboQuantMSE.

A code differs from the torch path's only where rounding moves a value across a decision boundary. Memory-bound:
every value is read once and every byte written once.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from polykv.codecs.base import Packed
from polykv.codecs.bitpack import packed_size
from polykv.codecs.codebook import lloyd_max
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.kernels.triton_bits import (
    level_table,
    n_multiprocessors,
    positive_boundaries,
    rotate,
    rows_contiguous,
    sign_matrix,
    tile_shape,
)  # fmt: skip
from polykv.kernels.triton_stream import codes_of, fetch, store_codes, words

PROGRAMS_PER_SM = 3  # of encoding: as many as fit into shared memory at head_dim 128


@triton.jit
def _encode(
    x, matrix, boundaries, codes, norm,
    stride_b, stride_h, stride_t, n_heads, n_tokens, n_tiles, matrix_scale, root_dim,
    DIM: tl.constexpr, PAD: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, PAD)
    rotation = tl.load(matrix + cols[:, None] * PAD + cols[None, :])
    tiles_per_head = tl.cdiv(n_tokens, ROWS)
    # The rotation is as large as a few tiles, so a fixed number of programs load it once and loop over tiles.
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        head = (tile // tiles_per_head).to(tl.int64)
        t = tile % tiles_per_head * ROWS + tl.arange(0, ROWS)
        source = x + head // n_heads * stride_b + head % n_heads * stride_h
        inside = (t < n_tokens)[:, None] & (cols < DIM)[None, :]
        x_TD = tl.load(source + t[:, None] * stride_t + cols[None, :], inside, 0.0)
        # The sign matrix lacks the factor matrix_scale, and so does y; the boundaries are scaled instead.
        y_TD = rotate(x_TD, rotation)
        norm_T = tl.sqrt(tl.sum(y_TD * y_TD, axis=1)) * matrix_scale
        tl.store(norm + head * n_tokens + t, norm_T.to(tl.float16), t < n_tokens)
        codes_TD = nearest_level(y_TD, boundaries, norm_T / (matrix_scale * root_dim), BITS)
        # Undo `mma_ordered`: (j, thread, i) -> (thread, j, i).
        codes_TJCI = tl.reshape(codes_TD, (ROWS, PAD // 8, 4, 2))
        codes_TG8 = tl.reshape(tl.permute(codes_TJCI, (0, 2, 1, 3)), (ROWS, PAD // 8, 8))
        row_T = codes + (head * n_tokens + t) * (DIM * BITS // 8)
        store_codes(row_T, codes_TG8, t < n_tokens, DIM, BITS)


@triton.jit
def nearest_level(y_TD, boundaries, unit_T, BITS: tl.constexpr):
    """Index of the level nearest to y / unit, in int32: binary search of |y| among the 2**(BITS-1) - 1 positive
    boundaries of the symmetric codebook, then mirrored by sign.
    """
    size_TD, unit_T1 = tl.abs(y_TD), unit_T[:, None]
    if BITS == 2:
        steps_TD = (size_TD > tl.load(boundaries) * unit_T1).to(tl.int32)
    elif BITS == 3:
        far_TD = size_TD > tl.load(boundaries + 1) * unit_T1
        next_TD = tl.where(far_TD, tl.load(boundaries + 2) * unit_T1, tl.load(boundaries) * unit_T1)
        steps_TD = tl.where(far_TD, 2, 0) + (size_TD > next_TD).to(tl.int32)
    else:
        far_TD = size_TD > tl.load(boundaries + 3) * unit_T1
        next_TD = tl.where(
            far_TD, tl.load(boundaries + 5) * unit_T1, tl.load(boundaries + 1) * unit_T1
        )
        half_TD = size_TD > next_TD
        near_TD = tl.where(
            half_TD, tl.load(boundaries + 2) * unit_T1, tl.load(boundaries) * unit_T1
        )
        next_TD = tl.where(
            half_TD, tl.load(boundaries + 6) * unit_T1, tl.load(boundaries + 4) * unit_T1
        )
        next_TD = tl.where(far_TD, next_TD, near_TD)
        steps_TD = (
            tl.where(far_TD, 4, 0) + tl.where(half_TD, 2, 0) + (size_TD > next_TD).to(tl.int32)
        )
    negative_TD = y_TD.to(tl.int32, bitcast=True) >> 31  # 0, or all ones
    return (steps_TD | (1 << (BITS - 1))) ^ (negative_TD & ((1 << BITS) - 1))


@triton.jit
def _decode(
    codes, norm, levels, out,
    stride_b, stride_h, stride_t, norm_b, norm_h, norm_t, n_heads, n_tokens, root_dim,
    DIM: tl.constexpr, PAD: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, PAD)
    head = tl.program_id(1).to(tl.int64)
    batch, kv_head = head // n_heads, head % n_heads
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    codes += batch * stride_b + kv_head * stride_h
    first, second, third = fetch(codes, t, stride_t, t < n_tokens, DIM, PAD, BITS)
    codes_TD = codes_of(words(first, second, third, BITS), BITS)
    norm_T = tl.load(norm + batch * norm_b + kv_head * norm_h + t * norm_t, t < n_tokens, 0.0)
    y_TD = tl.load(levels + codes_TD) * (norm_T.to(tl.float32) / root_dim)[:, None]
    inside_TD = (t < n_tokens)[:, None] & (cols < DIM)[None, :]
    tl.store(out + (head * n_tokens + t)[:, None] * DIM + cols[None, :], y_TD, inside_TD)


def encode(codec: TurboQuantMSE, x_BHTD: Tensor) -> Packed:
    """`codec.encode`, 2 to 4 bits; values that are not finite show in the norms, which the caller checks."""
    x_BHTD, (batch, heads, n_tokens, dim) = rows_contiguous(x_BHTD), x_BHTD.shape
    n_bytes = packed_size(dim, codec.bits)
    codes = x_BHTD.new_empty((batch, heads, n_tokens, n_bytes), dtype=torch.uint8)
    norm = x_BHTD.new_empty((batch, heads, n_tokens, 1), dtype=torch.float16)
    tile, block = tile_shape(dim), dim & -dim
    n_tiles = batch * heads * triton.cdiv(n_tokens, tile["ROWS"])
    _encode[(min(n_tiles, PROGRAMS_PER_SM * n_multiprocessors(x_BHTD.device)),)](
        x_BHTD, mma_ordered(dim, codec.seed if codec.signs else None, x_BHTD.device),
        positive_boundaries(codec.bits, x_BHTD.device), codes, norm, *x_BHTD.stride()[:3],
        heads, n_tokens, n_tiles, block**-0.5, dim**0.5, BITS=codec.bits, num_stages=2, **tile,
    )  # fmt: skip
    return Packed({"codes": codes, "norm": norm}, (batch, heads, n_tokens, dim), x_BHTD.dtype)


def decode_rotated(codec: TurboQuantMSE, packed: Packed) -> Tensor:
    """`codec.decode_rotated`, 2 to 4 bits."""
    batch, heads, n_tokens, dim = packed.shape
    codes, norm = packed.tensors["codes"], packed.tensors["norm"]
    out_BHTD = codes.new_empty(packed.shape, dtype=torch.float32)
    tile = tile_shape(dim)
    _decode[(triton.cdiv(n_tokens, tile["ROWS"]), batch * heads)](
        codes, norm, level_table(lloyd_max(codec.bits).levels, torch.float32, codes.device), out_BHTD,
        *codes.stride()[:3], *norm.stride()[:3], heads, n_tokens, dim**0.5, BITS=codec.bits, **tile,
    )  # fmt: skip
    return out_BHTD


@lru_cache
def mma_ordered(dim: int, seed: int | None, device: torch.device) -> Tensor:
    """`sign_matrix` with its columns permuted for the register layout of matrix products.

    Four threads share a row of an accumulator; thread c holds columns 8j + 2c and 8j + 2c + 1 for every j (PTX ISA, mma
    and wgmma). With the logical columns c * padded / 4 + 2j + i in these places a thread holds whole groups of eight
    codes and packs them without exchanging data. With another layout the result is the same, only slower.
    """
    matrix = sign_matrix(dim, seed, device)
    return matrix.unflatten(1, (4, -1, 2)).transpose(1, 2).flatten(1).contiguous()
