"""What a codec may know of the layer whose keys or values it gets, beside the tensor itself.

A codec names what it asks for (`Codec.needs`: fields of LayerContext) and gets these by name. Most ask for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """How positions turn the keys of a run of tokens (RoPE, arXiv 2104.09864), with the model's own numbers.

    Pair p of channels (a, b) = (first_P[p], second_P[p]) turns at token t to (a cos - b sin, b cos + a sin); other
    channels stay as they are (partial rotary). cos_TP and sin_TP are fp32 and hold what the model applies, with its
    rounding and its factor (YaRN), so cos^2 + sin^2 is not always 1.
    """

    cos_TP: Tensor
    sin_TP: Tensor
    first_P: Tensor
    second_P: Tensor

    def turn(self, x_BHTD: Tensor) -> Tensor:
        """fp32 vectors (.., T, D), or (.., 1, D) at all T positions, as keys of these tokens."""
        x_BHTD = x_BHTD.float()
        a, b = x_BHTD[..., self.first_P], x_BHTD[..., self.second_P]
        out = x_BHTD.expand(*x_BHTD.shape[:-2], len(self.cos_TP), x_BHTD.shape[-1]).clone()
        out[..., self.first_P] = a * self.cos_TP - b * self.sin_TP
        out[..., self.second_P] = b * self.cos_TP + a * self.sin_TP
        return out

    def turn_back(self, k_BHTD: Tensor) -> Tensor:
        """The inverse: fp32 keys (.., T, D) as they were before their positions turned them."""
        return self.inverse().turn(k_BHTD)

    def inverse(self) -> Rope:
        """The rotation that undoes this one."""
        square_TP = self.cos_TP.square() + self.sin_TP.square()
        return replace(self, cos_TP=self.cos_TP / square_TP, sin_TP=-self.sin_TP / square_TP)

    def pair_mean(self, x: Tensor) -> Tensor:
        """(.., D) with both channels of each pair at their mean."""
        out = x.clone()
        mean = (x[..., self.first_P] + x[..., self.second_P]) / 2
        out[..., self.first_P] = out[..., self.second_P] = mean
        return out

    def narrow(self, start: int, stop: int) -> Rope:
        """That of tokens [start, stop), as views."""
        return replace(self, cos_TP=self.cos_TP[start:stop], sin_TP=self.sin_TP[start:stop])

    def join(self, other: Rope) -> Rope:
        """That of these tokens and the ones of `other` after them."""
        cos_TP = torch.cat([self.cos_TP, other.cos_TP])
        return replace(self, cos_TP=cos_TP, sin_TP=torch.cat([self.sin_TP, other.sin_TP]))


@dataclass(frozen=True)
class LayerContext:
    """What is known of a layer and a run of its tokens. A codec must do without what is None.

    rope: how the keys were turned by their positions; None where they were not, or nobody knows.
    query_rms: the root mean square of each channel of the queries that meet a kv head's keys, (B, kv_heads, 1, D) in
        fp32, over the tokens of the prefill and the query heads of the group.
    """

    rope: Rope | None = None
    query_rms: Tensor | None = None

    def narrow(self, start: int, stop: int) -> LayerContext:
        """That of tokens [start, stop)."""
        rope = None if self.rope is None else self.rope.narrow(start, stop)
        return LayerContext(rope, self.query_rms)

    def join(self, other: LayerContext) -> LayerContext:
        """That of these tokens and the ones of `other` after them; statistics stay this one's."""
        rope = self.rope and other.rope and self.rope.join(other.rope)
        return LayerContext(rope, self.query_rms)


NOTHING = LayerContext()
