# ruff: noqa: ANN001, ANN201, ANN202  (Triton reads annotations as its own: only constexpr is one)
"""Triton: what the kernels share: the rotation as an exact product, and the lookup of levels."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

from polykv.codecs.codebook import lloyd_max
from polykv.codecs.rotation import rotation
from polykv.kernels.triton_stream import codes_of

# The interpreter knows no PTX, and would multiply bf16 as integers; both are told apart when triton loads.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total):
    """total + a @ b, summed in fp32; of fp32 operands at least 21 bits count."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def rotate(x, matrix):
    """x (rows, D) @ matrix (D, D) of +-1 and 0 in bf16: exact products, summed in fp32.

    The tensor cores take 16-bit operands. bf16 and fp16 go in as they are; fp32 goes in as the sum of three
    bf16 terms, which hold its 24 bits between them.
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
    """Words of eight codes -> their levels (T, D) in DTYPE; `table` is what `load_table` gave.

    The lookup bounds the speed of attention. A 16-bit level is two bytes, and PRMT picks four bytes at once
    from a table of eight, by the low 3 bits of four nibbles: two of them look four codes up, two more put
    the bytes together, and nothing goes through memory.
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
    else:  # an even codebook: 8 magnitudes, mirrored where the code's high bit is not set
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
    # Floats only at the end: Triton 3.9 otherwise carries the reshape into shared memory, and fails there.
    halves = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    levels = tl.reshape(
        tl.permute(halves, (1, 0, 2, 3, 4)), (word_GT.shape[1], word_GT.shape[0] * 8)
    )
    return levels.to(DTYPE, bitcast=True)


@triton.jit
def spread(word, BITS: tl.constexpr, LANES: tl.constexpr):
    """One of three steps from BITS bits a code to four: every second run of LANES codes moves up."""
    STARTS: tl.constexpr = 0xFFFFFFFF // (
        (1 << (8 * LANES)) - 1
    )  # a one where a pair of runs starts
    KEPT: tl.constexpr = ((1 << (BITS * LANES)) - 1) * STARTS
    return (word & KEPT) | ((word << ((4 - BITS) * LANES)) & (KEPT << (4 * LANES)))


@triton.jit
def four_levels(index_GT, low_a, low_b, high_a, high_b):
    """The 16-bit levels of four nibbles below 8, as two int32 of two levels each."""
    low_GT = byte_perm(low_a, low_b, index_GT)
    high_GT = byte_perm(high_a, high_b, index_GT)
    return byte_perm(low_GT, high_GT, 0x5140), byte_perm(low_GT, high_GT, 0x7362)


@triton.jit
def two_signs(nibbles_GT):
    """The high bits of the two lowest nibbles, moved to the sign bits of two 16-bit floats."""
    return ((nibbles_GT << 12) & 0x8000) | ((nibbles_GT << 24) & -0x80000000)


@triton.jit
def byte_perm(a, b, selector):
    """PRMT: byte i of the result is the byte of b:a that nibble i of the selector (0 to 7) names."""
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
    """What `levels_of` looks up in: fp32 levels in memory, or the bytes of 16-bit levels in four registers."""
    if tl.float32 == DTYPE:
        return table
    else:
        return tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)


def padded(dim: int) -> int:
    """head_dim as a tile's width: Triton's shapes are powers of two, and its products take 16 or more."""
    return max(16, triton.next_power_of_2(dim))


@lru_cache
def sign_matrix(dim: int, seed: int | None, device: torch.device) -> Tensor:
    """The signs of `rotation` (dim, dim), +-1 and 0, exact in bf16, within a (padded, padded) square of 0."""
    matrix = torch.zeros((padded(dim), padded(dim)), dtype=torch.bfloat16, device=device)
    matrix[:dim, :dim] = rotation(dim, seed, device).sign()
    return matrix


@lru_cache
def level_table(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The table of an even codebook for `levels_of`: fp32 levels; or, for 16-bit levels, the low bytes of the first
    eight as two int32, then their high bytes. 4 bits keep the positive half only.
    """
    table = torch.tensor(levels, dtype=dtype, device=device)
    if dtype == torch.float32:
        return table
    eight = table.new_zeros(8)
    eight[: min(len(levels), 8)] = table[-8:]
    return eight.view(torch.uint8).view(8, 2).T.contiguous().view(torch.int32).flatten()


@lru_cache
def positive_boundaries(bits: int, device: torch.device) -> Tensor:
    """The codebook's boundaries above zero, ascending, in fp32; the others are their mirror image."""
    above = [boundary for boundary in lloyd_max(bits).boundaries if boundary > 1e-9]
    return torch.tensor(above, dtype=torch.float32, device=device)


@lru_cache
def n_multiprocessors(device: torch.device) -> int:
    """Of the GPU; the interpreter runs programs one after the other, so that a few are enough."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile_shape(dim: int) -> dict[str, int]:
    """A program's tile: 64 values a thread, and at least the 64 rows that four warps multiply at once."""
    rows = max(64, 8192 // padded(dim))
    return {"DIM": dim, "PAD": padded(dim), "ROWS": rows, "num_warps": rows * padded(dim) // 2048}


def rows_contiguous(x_BHTD: Tensor) -> Tensor:
    return x_BHTD if x_BHTD.stride(3) == 1 else x_BHTD.contiguous()
