"""KVarN: tiles of 128 tokens, rotated, and normalized along tokens and channels before uniform rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from polykv.codecs.affine import affine_codes, affine_values
from polykv.codecs.base import Codec, Shape
from polykv.codecs.bitpack import pack, packed_size, unpack
from polykv.codecs.rotation import rotation
from polykv.errors import PolyKVError

ITERATIONS = 16
# Of a standard deviation in one iteration, and of the logarithm of a scale after it.
SMALLEST_STD, LARGEST_STD = 1e-3, 1e3
LOWEST_LOG, HIGHEST_LOG = -0.3, 10.0


@dataclass(frozen=True)
class KVarN(Codec):
    """Hadamard along head_dim, then a scale along one axis of each tile and affine rounding along the other.

    Source: arXiv 2606.03458, and the reference in its public code (huawei-csl/KVarN, test of the store kernel). Per
    head and tile of `group` tokens, rows are what is rounded together: channels over the tile's tokens for keys
    (`rows` "channels"), tokens over head_dim for values ("tokens"). `column_scales` finds a scale for each column; each
    row of tile / scale is rounded between its minimum and maximum to 2**bits levels. The row scales of the method
    cancel out in that, and are not stored. Stored per vector: ceil(bits * head_dim / 8) bytes of codes; and in fp16
    per tile a step, a minimum (rows) and a scale (columns): 48/128 bits per value at head_dim and group 128.

    Left open or different here: the code's first tile in fp16 is the recipe's exemption `sinks`; its last tile stays in
    fp16 until it is full, ours is quantized with the statistics of the tokens it has. Codes are computed from the fp16
    step, minimum and scale. No random signs. The bounds of `column_scales` are not relative: tiles with a standard
    deviation far below 1 are hardly normalized.
    """

    version = 1

    bits: int = 4
    rows: str = "channels"
    group: int = 128

    def __post_init__(self) -> None:
        if (
            self.bits not in range(1, 9)
            or self.rows not in ("channels", "tokens")
            or self.group < 1
        ):
            raise PolyKVError(
                f"KVarN has no bits={self.bits} with rows={self.rows} and group={self.group}; choose 1 to "
                "8 bits, 'channels' or 'tokens', and a group of at least 1 token"
            )

    def payload_bits(self, dtype: torch.dtype) -> float:
        return float(self.bits)

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        batch, heads, n_tokens, dim = shape
        channels = ceil(n_tokens / self.group) * dim
        rows, columns = (channels, n_tokens) if self.rows == "channels" else (n_tokens, channels)
        return batch * heads * (n_tokens * packed_size(dim, self.bits) + 4 * rows + 2 * columns)

    def rotation(self, dim: int, device: torch.device) -> Tensor:
        return rotation(dim, None, device)

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        y_BHTD = self.rotate(x_BHTD.float(), {})
        tail = y_BHTD.shape[2] % self.group
        full_BHTD, tail_BHTD = y_BHTD.split([y_BHTD.shape[2] - tail, tail], dim=2)
        tiles = full_BHTD.unflatten(2, (-1, self.group)), tail_BHTD.unsqueeze(2)
        parts = [self._tiles(tiles_BHnSD) for tiles_BHnSD in tiles if tiles_BHnSD.numel()]
        return {name: torch.cat([part[name] for part in parts], dim=2) for name in parts[0]}

    def _tiles(self, tiles_BHnSD: Tensor) -> dict[str, Tensor]:
        """Stored tensors of n tiles of S tokens."""
        along = -2 if self.rows == "channels" else -1
        scale = column_scales(tiles_BHnSD, along).half()
        codes, step, low = affine_codes(tiles_BHnSD / scale.float(), self.bits, along)
        kept = {"codes": pack(codes, self.bits), "step": step, "minimum": low, "scale": scale}
        return {name: tensor.flatten(2, 3) for name, tensor in kept.items()}

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        codes_BHTD = unpack(tensors["codes"], self.bits, dim)
        n_tokens = codes_BHTD.shape[2]
        rows, columns = ("tile", "token") if self.rows == "channels" else ("token", "tile")

        def of_tokens(name: str, per: str) -> Tensor:
            x = tensors[name]
            repeated = x if per == "token" else x.repeat_interleave(self.group, dim=2)
            return repeated[:, :, :n_tokens]

        step, low = of_tokens("step", rows), of_tokens("minimum", rows)
        return affine_values(codes_BHTD, step, low).mul_(of_tokens("scale", columns).float())


def column_scales(tiles: Tensor, along: int) -> Tensor:
    """fp32 scales of the columns of fp32 tiles (..., S, D), kept as size 1 across the rows, which extend along `along`.

    Sinkhorn's iteration on standard deviations: divide columns, then rows, by theirs, and repeat; scales are kept as
    logarithms. Of all iterations the scales count that leave the least imbalance, which is the largest over the
    smallest standard deviation of columns, plus that of rows.
    """
    across = -3 - along
    deviations = _std(tiles, across), _std(tiles, along)
    best = log_columns = torch.zeros_like(deviations[0])
    log_rows, least = torch.zeros_like(deviations[1]), _imbalance(*deviations)
    for _ in range(ITERATIONS):
        log_columns = _advanced(log_columns, deviations[0])
        balanced = tiles / (log_columns + log_rows).exp()
        log_rows = _advanced(log_rows, _std(balanced, along))
        balanced = tiles / (log_columns + log_rows).exp()
        deviations = _std(balanced, across), _std(balanced, along)
        imbalance = _imbalance(*deviations)
        better = imbalance <= least
        best = torch.where(better, log_columns, best)
        least = torch.where(better, imbalance, least)
    return best.exp()


def _std(tiles: Tensor, dim: int) -> Tensor:
    """Sample standard deviation; of a single value 0."""
    return tiles.std(dim, correction=min(1, tiles.shape[dim] - 1), keepdim=True)


def _advanced(log_scale: Tensor, deviation: Tensor) -> Tensor:
    step = deviation.clamp(SMALLEST_STD, LARGEST_STD).log()
    return (log_scale + step).clamp(LOWEST_LOG, HIGHEST_LOG)


def _imbalance(*deviations: Tensor) -> Tensor:
    """Of each tile: (..., 1, 1)."""
    pairs = [(one.amax((-2, -1), True), one.amin((-2, -1), True)) for one in deviations]
    columns, rows = (largest / smallest.clamp_min(1e-8) for largest, smallest in pairs)
    return columns + rows
