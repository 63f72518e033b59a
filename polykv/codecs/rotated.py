"""A rotation in front of any other codec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polykv.codecs.base import Codec, Packed, Shape
from polykv.codecs.rotation import rotation
from polykv.codecs.uniform import Uniform
from polykv.errors import PolyKVError


@dataclass(frozen=True)
class Rotated(Codec):
    """Signed Hadamard along head_dim, then `codec`, as QuaRot does (arXiv 2404.00456, section 4.2).

    x' = unrotate(codec(rotate(x))). The rotation is orthonormal, so the squared error is that of `codec` on the rotated
    vectors, in which outlier channels are spread over all channels. Granularity and stored bits are those of `codec`;
    the signs are derived from `seed` and not stored.
    """

    version = 1

    codec: Codec = field(default_factory=Uniform)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.codec.group != 1 or type(self.codec)._statistics is not Codec._statistics:
            raise PolyKVError(
                f"Rotated cannot wrap {type(self.codec).__name__}, whose tokens share metadata; "
                "choose a codec with its metadata per token"
            )

    def payload_bits(self, dtype: torch.dtype) -> float:
        return self.codec.payload_bits(dtype)

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return self.codec.stored_bytes(shape, torch.float32)

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.codec._quantize(self.turned(x_BHTD), shared)

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        return self.codec._dequantize(tensors, dim)

    def turned(self, x_BHTD: Tensor) -> Tensor:
        """Vectors rotated, in fp32, as `codec` encodes them."""
        return x_BHTD.float() @ rotation(x_BHTD.shape[-1], self.seed, x_BHTD.device)

    def turned_back(self, y_BHTD: Tensor) -> Tensor:
        """The inverse of `turned`, for vectors that `codec` decodes or sums of them."""
        return y_BHTD.float() @ rotation(y_BHTD.shape[-1], self.seed, y_BHTD.device).T

    def rotate(self, x_BHTD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        # `codec` may have a rotation of its own.
        return self.codec.rotate(self.turned(x_BHTD), tensors)

    def unrotate(self, y_BHTD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.turned_back(self.codec.unrotate(y_BHTD, tensors))

    def scores(self, q_BHQD: Tensor, packed: Packed) -> Tensor:
        return self.codec.scores(q_BHQD, packed)
