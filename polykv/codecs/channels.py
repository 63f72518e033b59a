"""Per-channel normalization of keys in front of a codec: centring, and partial equalization of the scales.

In models with biased keys a few channels have large offsets (280 in Qwen2.5-Coder-0.5B, where the others vary by 5 to
19), and RoPE turns part of an offset into variation that remains after the mean is subtracted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from polykv.errors import PolyKVError

LEAST_SPREAD = 2**-6  # bounds the gain of channels that hardly vary


class Channels(NamedTuple):
    """Mean and scale of each channel of the quantized keys, each (1, layers * heads, 1, D) in fp16.

    A key is encoded as (key - mean) / spread. `spread` is the square root of the channel's RMS over the mean RMS of its
    head: it equalizes channels half-way (geometrically), as the queries' channels differ in scale as well.
    """

    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, k_BHTD: Tensor) -> Channels:
        """The channels of keys (1, layers * heads, tokens, D).

        Raises:
            PolyKVError: the mean does not fit fp16.
        """
        mean = k_BHTD.float().mean(2, keepdim=True).half()
        if not mean.isfinite().all():
            raise PolyKVError("the mean of the keys overflows fp16; use policy full")
        rms = (k_BHTD.float() - mean.float()).square().mean(2, keepdim=True).sqrt()
        level = rms.mean(3, keepdim=True)
        # A head whose keys are all equal has no scale.
        spread = torch.where(level > 0, rms / level, 1).sqrt().clamp_min(LEAST_SPREAD)
        return cls(mean, spread.half())

    @property
    def nbytes(self) -> int:
        return self.mean.nbytes + self.spread.nbytes

    def normalize(self, k_BHTD: Tensor) -> Tensor:
        """(keys - mean) / spread, in fp32."""
        return (k_BHTD.float() - self.mean.float()) / self.spread.float()

    def denormalize(self, y_BHTD: Tensor) -> Tensor:
        """The inverse of `normalize`, in fp32."""
        return y_BHTD * self.spread.float() + self.mean.float()

    def heads(self, span: slice) -> Channels:
        """The channels of a slice of the heads of all layers, as views."""
        return Channels(self.mean[:, span], self.spread[:, span])
