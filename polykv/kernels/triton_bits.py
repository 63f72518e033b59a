# ruff: noqa: ANN001, ANN201, ANN202  (Triton evaluates annotations; only constexpr is allowed)
"""Triton helpers shared by the kernels: the rotation as an exact matrix product, and the lookup of levels."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

from polykv.codecs.codebook import lloyd_max
from polykv.codecs.rotation import rotation
from polykv.kernels.triton_stream import codes_of

# The interpreter does not support PTX or bf16 products. Read once, when triton is imported.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total):
    """total + a @ b, accumulated in fp32; fp32 operands keep at least 21 bits."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def rotate(x, matrix):
    """x (rows, D) @ matrix (D, D) of +-1 and 0 in bf16: exact products, accumulated in fp32.

    Tensor cores take 16-bit operands. bf16 and fp16 are passed as they are; fp32 is split into a sum of three bf16
    terms, which together hold its 24 bits.
    """
    y = tl.zeros(x.shape, dtype=tl.float32)
    if x.dtype == tl.float32:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return dot(high, matrix, dot(middle, matrix, dot(low, matrix, y)))
    else:
        return dot(x, matrix.to(tl.float32).to(x.dtype), y)


@triton.jit
def levels_of(word_GT, table, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Words of eight codes -> their levels (T, D) in DTYPE; `table` comes from `load_table`.

    This lookup limits the speed of attention. A 16-bit level is two bytes, and PRMT selects four bytes at once from a
    table of eight by the low 3 bits of four nibbles: two PRMT look up four codes, two more combine the bytes, without
    any memory access.
    """
    if tl.float32 == DTYPE:
        return tl.load(table + codes_of(word_GT, BITS))
    else:
        return levels_by_bytes(word_GT, table, BITS, DTYPE)


@triton.jit
def levels_by_bytes(word_GT, table, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """`levels_of` in a 16-bit DTYPE."""
    low_a, low_b, high_a, high_b = table
    if BITS != 4:
        index_GT = spread(spread(spread(word_GT, BITS, 4), BITS, 2), BITS, 1)
    else:  # a symmetric codebook: 8 magnitudes, negated where the code's high bit is 0
        negative_GT = ~word_GT & -0x77777778  # 0x88888888 as int32
        index_GT = (word_GT ^ (negative_GT - ((negative_GT >> 3) & 0x11111111))) & 0x77777777
    pair_01, pair_23 = four_levels(index_GT, low_a, low_b, high_a, high_b)
    pair_45, pair_67 = four_levels(index_GT >> 16, low_a, low_b, high_a, high_b)
    if BITS == 4:
        pair_01 ^= two_signs(negative_GT)
        pair_23 ^= two_signs(negative_GT >> 8)
        pair_45 ^= two_signs(negative_GT >> 16)
        pair_67 ^= two_signs(negative_GT >> 24)
    pairs = tl.join(tl.join(pair_01, pair_45), tl.join(pair_23, pair_67))
    # Cast to floats last: otherwise Triton 3.9 does the reshape in shared memory, and fails.
    halves = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    levels = tl.reshape(
        tl.permute(halves, (1, 0, 2, 3, 4)), (word_GT.shape[1], word_GT.shape[0] * 8)
    )
    return levels.to(DTYPE, bitcast=True)


@triton.jit
def spread(word, BITS: tl.constexpr, LANES: tl.constexpr):
    """One of three steps that widen codes from BITS to four bits: shifts every second run of LANES codes up."""
    STARTS: tl.constexpr = 0xFFFFFFFF // ((1 << (8 * LANES)) - 1)  # bit 0 of every pair of runs
    KEPT: tl.constexpr = ((1 << (BITS * LANES)) - 1) * STARTS
    return (word & KEPT) | ((word << ((4 - BITS) * LANES)) & (KEPT << (4 * LANES)))


@triton.jit
def four_levels(index_GT, low_a, low_b, high_a, high_b):
    """The 16-bit levels of four nibbles below 8, as two int32 with two levels each."""
    low_GT = byte_perm(low_a, low_b, index_GT)
    high_GT = byte_perm(high_a, high_b, index_GT)
    return byte_perm(low_GT, high_GT, 0x5140), byte_perm(low_GT, high_GT, 0x7362)


@triton.jit
def two_signs(nibbles_GT):
    """The high bits of the two lowest nibbles, as the sign bits of two 16-bit floats."""
    return ((nibbles_GT << 12) & 0x8000) | ((nibbles_GT << 24) & -0x80000000)


@triton.jit
def byte_perm(a, b, selector):
    """PRMT: byte i of the result is the byte of b:a selected by nibble i (0 to 7) of the selector."""
    if INTERPRETED:
        picked = tl.zeros_like(selector + a)
        for i in tl.static_range(4):
            nibble = (selector >> (4 * i)) & 7
            byte = (tl.where(nibble < 4, a, b) >> (8 * (nibble & 3))) & 255
            picked |= byte << (8 * i)
        return picked
    else:
        return libdevice.byte_perm(a, b, selector)


@triton.jit
def load_table(table, DTYPE: tl.constexpr):
    """The table of `levels_of`: a pointer to fp32 levels, or the bytes of 16-bit levels in four registers."""
    if tl.float32 == DTYPE:
        return table
    else:
        return tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)


def padded(dim: int) -> int:
    """head_dim rounded up to a tile width: a power of two, at least 16 for matrix products."""
    return max(16, triton.next_power_of_2(dim))


@lru_cache
def sign_matrix(dim: int, seed: int | None, device: torch.device) -> Tensor:
    """The signs of `rotation` (+-1 and 0, exact in bf16), zero-padded to (padded, padded)."""
    matrix = torch.zeros((padded(dim), padded(dim)), dtype=torch.bfloat16, device=device)
    matrix[:dim, :dim] = rotation(dim, seed, device).sign()
    return matrix


@lru_cache
def level_table(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The table of a symmetric codebook for `levels_of`: fp32 levels; or, for 16-bit levels, the low bytes of the last
    eight as two int32, then their high bytes (of 4-bit codebooks that is the positive half).
    """
    table = torch.tensor(levels, dtype=dtype, device=device)
    if dtype == torch.float32:
        return table
    eight = table.new_zeros(8)
    eight[: min(len(levels), 8)] = table[-8:]
    return eight.view(torch.uint8).view(8, 2).T.contiguous().view(torch.int32).flatten()


@lru_cache
def positive_boundaries(bits: int, device: torch.device) -> Tensor:
    """The codebook's positive boundaries, ascending, in fp32; the negative ones mirror them."""
    above = [boundary for boundary in lloyd_max(bits).boundaries if boundary > 1e-9]
    return torch.tensor(above, dtype=torch.float32, device=device)


@lru_cache
def n_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU; 2 under the interpreter, which runs programs sequentially."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile_shape(dim: int) -> dict[str, int]:
    """A program's tile: 64 values per thread, and at least 64 rows, the size of a product of four warps."""
    rows = max(64, 8192 // padded(dim))
    return {"DIM": dim, "PAD": padded(dim), "ROWS": rows, "num_warps": rows * padded(dim) // 2048}


def rows_contiguous(x_BHTD: Tensor) -> Tensor:
    return x_BHTD if x_BHTD.stride(3) == 1 else x_BHTD.contiguous()
