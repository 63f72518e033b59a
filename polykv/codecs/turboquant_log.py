"""TurboQuant-MSE with 8-bit logarithmic norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from polykv.codecs.base import Codec, Shape
from polykv.codecs.bitpack import pack, packed_size, unpack
from polykv.codecs.normal import SMALLEST, codes_of, levels_of, log_codes, log_values
from polykv.codecs.rotation import rotation
from polykv.errors import PolyKVError


@dataclass(frozen=True)
class TurboQuantLog(Codec):
    """TurboQuant without inner-product residual (arXiv 2504.19874, Algorithm 1), with one byte per norm.

    As TurboQuantMSE with signs, but the RMS of a token of a head is an 8-bit logarithm relative to the largest RMS of
    the head (polykv/codecs/normal.py): x' = rms * unrotate(levels[codes]). Stored: 8 * ceil(head_dim * bits / 8) + 8
    bits per vector and 16 per head; bits + 8/head_dim per value if the codes fill whole bytes.
    """

    version = 1
    most_bits: ClassVar[int] = 7

    bits: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits not in range(1, self.most_bits + 1):
            raise PolyKVError(
                f"{type(self).__name__} has no bits={self.bits}; choose a whole number from 1 to {self.most_bits}"
            )

    def payload_bits(self, dtype: torch.dtype) -> float:
        return float(self.bits)

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        batch, heads, n_tokens, dim = shape
        token = heads * (self.code_bytes(heads, dim) + 1)
        return batch * (n_tokens * token + 2 * heads)

    def code_bytes(self, heads: int, dim: int) -> int:
        """Bytes of codes of a token and head."""
        return packed_size(dim, self.bits)

    def rotation(self, dim: int, device: torch.device) -> Tensor:
        return rotation(dim, self.seed, device)

    def _statistics(self, chunks: Sequence[Tensor]) -> dict[str, Tensor]:
        largest = torch.stack([_rms(chunk).amax(2, keepdim=True) for chunk in chunks]).amax(0)
        return {"largest": largest.half()}

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        norm = log_codes(_rms(x_BHTD), shared["largest"])
        y_BHTD = self.rotate(x_BHTD.float(), {})
        y_BHTD /= log_values(norm, shared["largest"]).clamp_min(SMALLEST)
        return {"codes": pack(self._codes(y_BHTD), self.bits), "norm": norm}

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        y_BHTD = self._levels(unpack(tensors["codes"], self.bits, dim))
        return y_BHTD.mul_(log_values(tensors["norm"], tensors["largest"]))

    def _codes(self, y_BHTD: Tensor) -> Tensor:
        return codes_of(y_BHTD, self.bits)

    def _levels(self, codes_BHTD: Tensor) -> Tensor:
        return levels_of(codes_BHTD, self.bits)


def _rms(x_BHTD: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x_BHTD.float(), dim=-1, keepdim=True)
    return norm / x_BHTD.shape[-1] ** 0.5
