# ruff: noqa: ANN001, ANN201, ANN202  (Triton evaluates annotations; only constexpr is allowed)
"""Triton: loading and storing of bit-packed codes.

Shapes are powers of two: D is the padded head_dim, G = D / 8 the number of groups of eight codes, which are whole bytes
at every width. Packed rows are addressed (G, T), groups first: Triton assigns neighbouring threads along the first
dimension, so that a warp reads whole rows of packed bytes.
"""

import triton
import triton.language as tl


@triton.jit
def fetch(codes, t, stride_t, here_T, DIM: tl.constexpr, PAD: tl.constexpr, BITS: tl.constexpr):
    """Issue the loads of the packed rows of tokens `t`; `words` combines them later.

    2 and 4 bits take one load of 2 or 4 bytes per group. 32 codes of 3 bits take three loads of 4 bytes, which Triton
    can pipeline (cp.async takes 4 bytes or more); if a row is not made of whole words, eight codes take three loads of
    one byte.
    """
    if BITS == 3 and DIM % 32 == 0:
        units = tl.arange(0, PAD // 32)
        stream_UT = (codes + t[None, :] * stride_t + units[:, None] * 12).to(
            tl.pointer_type(tl.uint32)
        )
        here_UT = here_T[None, :] & (units < DIM // 32)[:, None]
        first, second = tl.load(stream_UT, here_UT, 0), tl.load(stream_UT + 1, here_UT, 0)
        third = tl.load(stream_UT + 2, here_UT, 0)
    else:
        groups = tl.arange(0, PAD // 8)
        stream_GT = codes + t[None, :] * stride_t + groups[:, None] * BITS
        here_GT = here_T[None, :] & (groups < DIM // 8)[:, None]
        if BITS == 3:
            first, second = tl.load(stream_GT, here_GT, 0), tl.load(stream_GT + 1, here_GT, 0)
            third = tl.load(stream_GT + 2, here_GT, 0)
        else:
            KIND: tl.constexpr = tl.uint16 if BITS == 2 else tl.int32
            first = tl.load(stream_GT.to(tl.pointer_type(KIND)), here_GT, 0)
            second, third = first, first
    return first, second, third


@triton.jit
def words(first, second, third, BITS: tl.constexpr):
    """Eight codes per int32 (G, T), from the result of `fetch`. Bits above the codes are arbitrary."""
    if BITS == 3 and first.dtype == tl.uint32:
        # Bits 0 to 23, 24 to 47, 48 to 71 and 72 to 95.
        pair_ac = tl.join(first, (second >> 16) | (third << 16))
        pair_bd = tl.join((first >> 24) | (second << 8), third >> 8)
        word_UT22 = tl.join(pair_ac, pair_bd).to(tl.int32, bitcast=True)
        return tl.reshape(tl.permute(word_UT22, (0, 2, 3, 1)), (first.shape[0] * 4, first.shape[1]))
    else:
        word_GT = first.to(tl.int32)
        if BITS == 3:
            word_GT |= (second.to(tl.int32) << 8) | (third.to(tl.int32) << 16)
        return word_GT


@triton.jit
def codes_of(word_GT, BITS: tl.constexpr):
    """Words of eight codes -> codes (T, D) in int32. A group stays in one thread, and all shifts are constants."""
    codes = tl.join(word_GT, word_GT >> (4 * BITS))
    codes = tl.join(codes, codes >> (2 * BITS))
    codes = tl.join(codes, codes >> BITS) & ((1 << BITS) - 1)
    return tl.reshape(tl.permute(codes, (1, 0, 2, 3, 4)), (word_GT.shape[1], word_GT.shape[0] * 8))


@triton.jit
def store_codes(row_T, codes_TG8, here_T, DIM: tl.constexpr, BITS: tl.constexpr):
    """Pack codes (T, G, 8) in int32 and store them; `row_T` points to the first byte of each row."""
    N_TOKENS: tl.constexpr = codes_TG8.shape[0]
    N_GROUPS: tl.constexpr = codes_TG8.shape[1]
    word_TG = tl.sum(codes_TG8 << (BITS * tl.arange(0, 8))[None, None, :], axis=2)
    if BITS == 3 and DIM % 32 == 0:  # four words of 24 bits take three stores, not twelve
        units = tl.arange(0, N_GROUPS // 4)
        stream_TU = (row_T[:, None] + units[None, :] * 12).to(tl.pointer_type(tl.int32))
        here_TU = here_T[:, None] & (units < DIM // 32)[None, :]
        even_TU2, odd_TU2 = tl.split(tl.reshape(word_TG, (N_TOKENS, N_GROUPS // 4, 2, 2)))
        a, c = tl.split(even_TU2)
        b, d = tl.split(odd_TU2)
        tl.store(stream_TU, a | (b << 24), here_TU)
        tl.store(stream_TU + 1, (b >> 8) | (c << 16), here_TU)
        tl.store(stream_TU + 2, (c >> 16) | (d << 8), here_TU)
    else:
        groups = tl.arange(0, N_GROUPS)
        stream_TG = row_T[:, None] + groups[None, :] * BITS
        here_TG = here_T[:, None] & (groups < DIM // 8)[None, :]
        if BITS == 3:
            for byte in tl.static_range(3):
                tl.store(stream_TG + byte, (word_TG >> (8 * byte)).to(tl.uint8), here_TG)
        elif BITS == 2:
            tl.store(stream_TG.to(tl.pointer_type(tl.int16)), word_TG.to(tl.int16), here_TG)
        else:
            tl.store(stream_TG.to(tl.pointer_type(tl.int32)), word_TG, here_TG)
