"""Training of the levels of trellis codes: `python -m polykv.codecs.trellis_training` writes data/trellis.json.

From normal random levels, each is moved to the mean of the normal values that are coded by it, over and over.
"""

import json

import torch
from torch import Tensor

from polykv.codecs.trellis import LEVELS, SCALE, WIDEST, search, window, windows

SEEDS = 4  # of which the best is kept


def trained(bits: int, seed: int, rounds: int = 30, blocks: int = 4096) -> tuple[float, Tensor]:
    """(mean squared error, levels) after `rounds` over normal blocks of 16."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(1 << window(bits) - 1, generator=generator)
    levels = torch.cat([half, -half.flip(0)])
    for _ in range(rounds):
        y_NT = torch.randn(blocks, 16, generator=generator)
        codes = torch.cat([search(part, levels, bits) for part in y_NT.split(512)])
        of_N, y_N = windows(codes, bits).flatten(), y_NT.flatten()
        sums = torch.zeros(len(levels)).index_add_(0, of_N, y_N)
        counts = of_N.bincount(minlength=len(levels))
        sums, counts = sums - sums.flip(0), counts + counts.flip(0)
        error = (y_N - levels[of_N]).square().mean()
        levels = torch.where(counts > 0, sums / counts.clamp_min(1), levels)
    return float(error), levels


def main() -> None:
    """Write LEVELS."""
    found = {}
    for bits in range(1, WIDEST + 1):
        error, levels = min((trained(bits, seed) for seed in range(SEEDS)), key=lambda one: one[0])
        half = levels[: len(levels) // 2].mul(SCALE).round().int().tolist()
        found[bits] = half
        print(f"{bits} bits: mean squared error {error:.5f}", flush=True)
    text = ",\n".join(f'"{bits}": {json.dumps(half)}' for bits, half in found.items())
    LEVELS.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
