"""Bit packing of codes of 1 to 8 bits along the last dimension.

Format: the codes of one vector are a little-endian bit stream, zero-padded to whole bytes: code i starts at bit
i * bits, counted from the least significant bit of byte 0.

Eight codes, one per byte, are viewed as one 64-bit word whose lanes are merged pairwise in three steps. Packing so
takes a few passes at any width, one byte of temporary memory per code, and runs over all tokens at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_size(n_codes: int, bits: int) -> int:
    """Bytes that `n_codes` codes of `bits` bits take."""
    return -(-n_codes * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (..., D), each below 2**bits -> uint8 bytes (..., packed_size(D, bits))."""
    if bits == 8:
        return codes
    n_codes = codes.shape[-1]
    words = F.pad(codes, (0, -n_codes % 8)).contiguous().view(torch.int64)
    for lanes in (1, 2, 4):  # merge pairs of lanes of `lanes` codes each
        width, low = bits * lanes, _low_lanes(bits, lanes)
        words = (words & low) | ((words >> (8 * lanes - width)) & (low << width))
    stream = words.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)
    return stream[..., : packed_size(n_codes, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n_codes: int) -> Tensor:
    """The inverse: uint8 bytes (..., packed_size(n_codes, bits)) -> uint8 codes (..., n_codes)."""
    if bits == 8:
        return packed
    n_words = -(-n_codes // 8)
    stream = F.pad(packed, (0, n_words * bits - packed.shape[-1])).unflatten(-1, (n_words, bits))
    words = F.pad(stream, (0, 8 - bits)).view(torch.int64)
    for lanes in (4, 2, 1):
        width, low = bits * lanes, _low_lanes(bits, lanes)
        words = (words & low) | ((words & (low << width)) << (8 * lanes - width))
    return words.view(torch.uint8).flatten(-2)[..., :n_codes]


def _low_lanes(bits: int, lanes: int) -> int:
    """Mask of the payload (bits * lanes wide) in every second lane of a 64-bit word."""
    field = (1 << bits * lanes) - 1
    return sum(field << shift for shift in range(0, 64, 16 * lanes))
