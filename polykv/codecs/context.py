"""What a codec may know of a layer beside the tensor that it encodes.

A codec names the fields of LayerContext that it asks for (`Codec.needs`) and gets them as keyword arguments. Most
codecs ask for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """The rotation of a run of keys by their positions (RoPE, arXiv 2104.09864), as the model applies it.

    At token t, pair p of channels (a, b) = (first_P[p], second_P[p]) becomes (a cos - b sin, b cos + a sin); other
    channels do not change (partial rotary). cos_TP and sin_TP are fp32 and include the model's rounding and factor
    (YaRN), so that cos^2 + sin^2 need not be 1.
    """

    cos_TP: Tensor
    sin_TP: Tensor
    first_P: Tensor
    second_P: Tensor

    @property
    def n_tokens(self) -> int:
        """Tokens whose rotation it holds."""
        return len(self.cos_TP)

    def turn(self, x_BHTD: Tensor) -> Tensor:
        """fp32 vectors (.., T, D) rotated by their positions; (.., 1, D) rotated by all T positions."""
        x_BHTD = x_BHTD.float()
        a, b = x_BHTD[..., self.first_P], x_BHTD[..., self.second_P]
        out = x_BHTD.expand(*x_BHTD.shape[:-2], self.n_tokens, x_BHTD.shape[-1]).clone()
        out[..., self.first_P] = a * self.cos_TP - b * self.sin_TP
        out[..., self.second_P] = b * self.cos_TP + a * self.sin_TP
        return out

    def turn_back(self, k_BHTD: Tensor) -> Tensor:
        """The inverse of `turn`: fp32 keys (.., T, D) before RoPE."""
        return self.inverse().turn(k_BHTD)

    def inverse(self) -> Rope:
        """The rotation that undoes this one, as a table."""
        square_TP = self.cos_TP.square() + self.sin_TP.square()
        return replace(self, cos_TP=self.cos_TP / square_TP, sin_TP=-self.sin_TP / square_TP)

    def pair_mean(self, x: Tensor) -> Tensor:
        """(.., D) with both channels of each pair replaced by their mean."""
        out = x.clone()
        mean = (x[..., self.first_P] + x[..., self.second_P]) / 2
        out[..., self.first_P] = out[..., self.second_P] = mean
        return out

    def narrow(self, start: int, stop: int) -> Rope:
        """The rotation of tokens [start, stop), as views."""
        return replace(self, cos_TP=self.cos_TP[start:stop], sin_TP=self.sin_TP[start:stop])

    def join(self, other: Rope) -> Rope:
        """The rotation of these tokens followed by those of `other`."""
        cos_TP = torch.cat([self.cos_TP, other.cos_TP])
        return replace(self, cos_TP=cos_TP, sin_TP=torch.cat([self.sin_TP, other.sin_TP]))


LAST_QUERIES = 64


@dataclass(frozen=True)
class LayerContext:
    """What is known of a layer and a run of its tokens; None: unknown.

    rope: the rotation of the keys; None also for layers without RoPE.
    query_rms: root mean square of each channel of the queries of a kv head, (B, kv_heads, 1, D) in fp32, over the
        tokens of the prefill and the query heads of the group.
    queries: scaled queries of the last LAST_QUERIES tokens of the prefill, (B, heads, tokens, D).
    """

    rope: Rope | None = None
    query_rms: Tensor | None = None
    queries: Tensor | None = None

    def narrow(self, start: int, stop: int) -> LayerContext:
        """The context of tokens [start, stop)."""
        rope = None if self.rope is None else self.rope.narrow(start, stop)
        return replace(self, rope=rope)

    def join(self, other: LayerContext) -> LayerContext:
        """The context of these tokens followed by those of `other`, with the statistics of this one."""
        rope = self.rope and other.rope and self.rope.join(other.rope)
        return replace(self, rope=rope)


NOTHING = LayerContext()
