"""Segment: a run of compressed tokens, the unit of which pools and cards consist and that attention reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polykv.codecs.base import Codec, Packed, saturated
from polykv.codecs.channels import Channels
from polykv.codecs.identity import Identity

SIDES = ("keys", "values")


@dataclass(frozen=True)
class Segment:
    """A run of a layer's tokens under one pair of codecs.

    `channels`: the normalization of keys before encoding; None if there was none.
    """

    key_codec: Codec
    value_codec: Codec
    key: Packed
    value: Packed
    channels: Channels | None = None

    @classmethod
    def uncompressed(cls, k_BHTD: Tensor, v_BHTD: Tensor) -> "Segment":
        """Keys and values as they are: references, not copies."""
        batch, heads, n_tokens, dim = k_BHTD.shape
        shape = (batch, heads, n_tokens, dim)
        key, value = (Packed({"values": x}, shape, x.dtype) for x in (k_BHTD, v_BHTD))
        return cls(Identity(), Identity(), key, value)

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes

    @property
    def n_tokens(self) -> int:
        return self.key.shape[2]

    def decode(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each (batch, kv_heads, tokens, head_dim)."""
        keys = self.key_codec.decode(self.key)
        if self.channels:
            keys = saturated(self.channels.denormalize(keys.float()), keys.dtype)
        return keys, self.value_codec.decode(self.value)


def decode_segments(segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    """A layer's keys and values, each (batch, kv_heads, tokens, head_dim)."""
    if len(segments) == 1:
        return segments[0].decode()
    keys, values = zip(*(segment.decode() for segment in segments), strict=True)
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)
