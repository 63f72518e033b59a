"""Trellis-coded keys and values: the level of a code depends on the next codes as well.

A block of 16 normal values has 16 codes, as with a scalar quantizer. A value's level is looked up by `window(bits)`
bits: its own code and, above it, the codes after it; the first code follows the last. This is the bitshift trellis of
QTIP (Tseng et al., arXiv 2406.11235, section 3.1) with its bits in reverse; trellis-coded quantization is Marcellin and
Fischer's (IEEE Trans. Comm. 38(1), 1990). Every value can be decoded alone. The encoder looks for the least squared
error by Viterbi's algorithm, in two passes because the block is a ring (as QTIP, section 3.2).

The levels are in data/trellis.json (polykv/codecs/trellis_training.py). Inverted bits give the negative level.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from polykv.codecs.turboquant_log import TurboQuantLog
from polykv.codecs.waterfill import BLOCK, WaterfillKey

LEVELS = Path(__file__).parents[1] / "data" / "trellis.json"
SCALE = 10_000  # levels are stored as integers
WIDEST = 6  # bits
REACH = 3.5  # the largest value of a token, over what its blocks are divided by
COSTS = 1 << 17  # computed at once, but no more than half as many as values to encode


def window(bits: int) -> int:
    """Bits that a level depends on."""
    return max(8, bits + 5)


@dataclass(frozen=True)
class TrellisKey(WaterfillKey):
    """WaterfillKey whose blocks are trellis-coded, in as many bytes, and whose outliers are not clipped.

    The norm of a token is its largest value over 3.5, if that is more than its RMS: on Gemma-3-270M, whose heads have
    16 blocks, a few tokens have values of 8 times their RMS in the blocks that matter most.

    No block has more than 6 bits. The squared error of normal values at 2, 3 and 4 bits is .76, .66 and .62 times that
    of Lloyd-Max levels.
    """

    version = 2
    most_bits = WIDEST

    @property
    def widest(self) -> int:
        return WIDEST

    def _norms(self, y_BHTnb: Tensor) -> Tensor:
        largest = y_BHTnb.abs().amax((-2, -1)).unsqueeze(-1)
        return torch.maximum(super()._norms(y_BHTnb), largest / REACH)

    def _codes(self, y: Tensor, bits: int) -> Tensor:
        return encode(y, bits)

    def _levels(self, codes: Tensor, bits: int) -> Tensor:
        return decode(codes, bits)


@dataclass(frozen=True)
class TrellisValue(TurboQuantLog):
    """TurboQuantLog whose vectors are trellis-coded in blocks of 16 coordinates, in as many bytes.

    If head_dim is not a multiple of 16, a vector is one block; if it is shorter than a window (head_dim 1 to 7), its
    codes are scalar.
    """

    version = 1
    most_bits = WIDEST

    def _codes(self, y_BHTD: Tensor) -> Tensor:
        size = self._block(y_BHTD.shape[-1])
        if not size:
            return super()._codes(y_BHTD)
        return encode(y_BHTD.unflatten(-1, (-1, size)), self.bits).flatten(-2)

    def _levels(self, codes_BHTD: Tensor) -> Tensor:
        size = self._block(codes_BHTD.shape[-1])
        if not size:
            return super()._levels(codes_BHTD)
        return decode(codes_BHTD.unflatten(-1, (-1, size)), self.bits).flatten(-2)

    def _block(self, dim: int) -> int:
        """Coordinates of a block, 0 if those of a vector are fewer than a window needs."""
        size = dim if dim % BLOCK else BLOCK
        return size if size * self.bits >= window(self.bits) else 0


def decode(codes: Tensor, bits: int) -> Tensor:
    """fp32 levels (..., T) of uint8 codes (..., T)."""
    levels = levels_of(bits).to(codes.device)
    return levels.index_select(0, windows(codes, bits).flatten()).view(codes.shape)


def windows(codes: Tensor, bits: int) -> Tensor:
    """The window (..., T) of each code (..., T)."""
    found = codes.int()
    for back in range(1, -(-window(bits) // bits)):
        found |= codes.roll(-back, -1).int() << back * bits
    return found & (1 << window(bits)) - 1


def encode(y: Tensor, bits: int) -> Tensor:
    """uint8 codes (..., T) of nearly the least squared error, in bounded memory."""
    levels = levels_of(bits).to(y.device)
    y_NT = y.float().reshape(-1, y.shape[-1])
    codes = torch.empty(y_NT.shape, dtype=torch.uint8, device=y.device)
    step = max(min(COSTS, y_NT.numel() // 2) >> window(bits), 1)
    for start in range(0, len(y_NT), step):
        codes[start : start + step] = search(y_NT[start : start + step], levels, bits)
    return codes.view(y.shape)


def search(y_NT: Tensor, levels: Tensor, bits: int) -> Tensor:
    """The codes (N, T) of a few blocks under these levels.

    The block is searched twice in a row, free at both ends. The bits that its first copy leaves are those that the last
    search begins and ends with.
    """
    y_NT = y_NT.flip(1)  # a window's other codes come before
    twice_NT = _path(y_NT.repeat(1, 2), levels, bits)
    seam_N = twice_NT[:, y_NT.shape[1] - 1] % (len(levels) >> bits)
    codes_NT = _path(y_NT, levels, bits, seam_N) % (1 << bits)
    return codes_NT.flip(1).to(torch.uint8)


def _path(y_NT: Tensor, levels: Tensor, bits: int, seam_N: Tensor | None = None) -> Tensor:
    """The windows (N, T) of least squared error; with `seam_N` the bits before the first and at the end are these."""
    # A window is (key, code): the key is what the window before left, its lower bits are what it leaves. So those that
    # leave a key k are k, k + n_keys, k + 2 * n_keys, ...
    n, n_keys = len(y_NT), len(levels) >> bits
    cost = y_NT.new_zeros(n, n_keys)
    if seam_N is not None:
        cost = cost.fill_(torch.inf).scatter_(1, seam_N.unsqueeze(1), 0)
    choices = []
    for y_N in y_NT.unbind(1):
        error = (y_N.unsqueeze(1) - levels).square_()
        error.view(n, n_keys, -1).add_(cost.unsqueeze(2))
        cost, choice = error.view(n, -1, n_keys).min(1)
        choices.append(choice.to(torch.uint8))
    key = cost.argmin(1, keepdim=True) if seam_N is None else seam_N.unsqueeze(1)
    windows = []
    for choice in reversed(choices):
        windows.append(key + choice.gather(1, key).long() * n_keys)
        key = windows[-1] >> bits
    return torch.cat(windows[::-1], 1)


@lru_cache
def levels_of(bits: int) -> Tensor:
    """The fp32 levels (2**window,) by window."""
    half = json.loads(LEVELS.read_text(encoding="utf-8"))[str(bits)]
    levels = torch.tensor(half, dtype=torch.float32, device="cpu") / SCALE
    return torch.cat([levels, -levels.flip(0)])
