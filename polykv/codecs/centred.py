"""Another codec on keys minus the mean key of their head, taken before or after RoPE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polykv.codecs.base import Codec, Shape
from polykv.codecs.context import Rope
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.errors import PolyKVError


@dataclass(frozen=True)
class Centred(Codec):
    """`codec` applied to keys minus their mean over the tokens, which is stored once per head in fp16.

    x'_t = codec(x_t - R_t mean) + R_t mean. before_rope: the mean of the keys with RoPE undone, which R_t rotates to
    the position of token t; this removes all that a bias of the key projection adds (keys before RoPE: KVQuant, arXiv
    2401.18079, section 3.2). Otherwise, or if the layer has no RoPE or it is unknown, R_t is 1. Granularity is that
    of `codec`; stored: 16 * head_dim bits more per head. Appended tokens use the same mean.
    """

    version = 1

    codec: Codec = field(default_factory=lambda: TurboQuantMSE(bits=4))
    before_rope: bool = True

    def __post_init__(self) -> None:
        shares = type(self.codec)._statistics is not Codec._statistics
        if self.codec.group != 1 or shares or self.codec.needs:
            raise PolyKVError(
                f"Centred cannot wrap {type(self.codec).__name__}, whose tokens share metadata; "
                "choose a codec with its metadata per token"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("rope",) if self.before_rope else ()

    def payload_bits(self, dtype: torch.dtype) -> float:
        return self.codec.payload_bits(dtype)

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        batch, heads, _, dim = shape
        return self.codec.stored_bytes(shape, torch.float32) + 2 * batch * heads * dim

    def _statistics(self, chunks: Sequence[Tensor], rope: Rope | None = None) -> dict[str, Tensor]:
        return {"mean": mean_of(chunks, rope)}

    def _quantize(
        self, x_BHTD: Tensor, shared: Mapping[str, Tensor], rope: Rope | None = None
    ) -> dict[str, Tensor]:
        centred = x_BHTD.float() - turned_mean(shared["mean"], rope)
        return self.codec._quantize(centred, {})

    def _dequantize(
        self, tensors: Mapping[str, Tensor], dim: int, rope: Rope | None = None
    ) -> Tensor:
        mean_BHTD = turned_mean(tensors["mean"], rope)
        return self.codec._dequantize(tensors, dim) + self.codec.rotate(mean_BHTD, tensors)

    def rotate(self, x_BHTD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.codec.rotate(x_BHTD, tensors)

    def unrotate(self, y_BHTD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.codec.unrotate(y_BHTD, tensors)


def mean_of(chunks: Sequence[Tensor], rope: Rope | None) -> Tensor:
    """The mean (B, H, 1, D) in fp16 of all tokens of the chunks, with RoPE undone.

    Summed in fp64, so that rounding does not depend on the size of the chunks.
    """
    total: Tensor | None = None
    for x_BHTD, part in with_rope(chunks, rope):
        flat = x_BHTD.float() if part is None else part.turn_back(x_BHTD)
        added = flat.sum(2, keepdim=True, dtype=torch.float64)
        total = added if total is None else total + added
    return (total / sum(x_BHTD.shape[2] for x_BHTD in chunks)).half()


def turned_mean(mean_BH1D: Tensor, rope: Rope | None) -> Tensor:
    """R_t mean in fp32: (B, H, T, D), or (B, H, 1, D) without RoPE."""
    return mean_BH1D.float() if rope is None else rope.turn(mean_BH1D)


def with_rope(chunks: Iterable[Tensor], rope: Rope | None) -> Iterator[tuple[Tensor, Rope | None]]:
    """Each chunk with the RoPE of its tokens."""
    start = 0
    for chunk in chunks:
        stop = start + chunk.shape[2]
        yield chunk, None if rope is None else rope.narrow(start, stop)
        start = stop
