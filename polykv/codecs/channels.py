"""Channels of keys made alike before a codec sees them: centred, and half the way to equal spread.

In models with biased keys a few channels stand far off (Qwen2.5-Coder-0.5B: 280 against content of 5 to 19), and
what the rotation of positions leaves of a bias after its mean is taken still drowns the other channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from polykv.errors import PolyKVError

LEAST_SPREAD = 2**-6  # channels that hardly vary are not blown up


class Channels(NamedTuple):
    """What is kept once of each channel of the quantized keys, each (1, layers * heads, 1, D) in fp16.

    A key is encoded as (key - mean) / spread. `spread` is the root of the channel's RMS over the mean RMS of
    its head: half the way to equal channels, the other half stays with the queries that meet them.
    """

    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, k_BHTD: Tensor) -> Channels:
        """Of keys (1, layers * heads, tokens, D).

        Raises:
            PolyKVError: the mean does not fit fp16.
        """
        mean = k_BHTD.float().mean(2, keepdim=True).half()
        if not mean.isfinite().all():
            raise PolyKVError("the mean key does not fit fp16; use policy full")
        rms = (k_BHTD.float() - mean.float()).square().mean(2, keepdim=True).sqrt()
        level = rms.mean(3, keepdim=True)
        # A head whose keys are all the same has nothing to even out.
        spread = torch.where(level > 0, rms / level, 1).sqrt().clamp_min(LEAST_SPREAD)
        return cls(mean, spread.half())

    @property
    def nbytes(self) -> int:
        return self.mean.nbytes + self.spread.nbytes

    def taken_off(self, k_BHTD: Tensor) -> Tensor:
        """fp32 keys as they are encoded."""
        return (k_BHTD.float() - self.mean.float()) / self.spread.float()

    def put_back(self, y_BHTD: Tensor) -> Tensor:
        """The inverse of `taken_off`."""
        return y_BHTD * self.spread.float() + self.mean.float()

    def heads(self, span: slice) -> Channels:
        """Some of the heads of all layers, as views."""
        return Channels(self.mean[:, span], self.spread[:, span])
