"""KIVI's keys, quantized per channel over groups of tokens (its values are `Uniform` with blocks)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from polykv.codecs.affine import affine_codes, affine_values
from polykv.codecs.base import Codec, Shape
from polykv.codecs.bitpack import pack, packed_size, unpack
from polykv.errors import PolyKVError


@dataclass(frozen=True)
class KiviKey(Codec):
    """KIVI's per-channel quantization of keys (arXiv 2402.02750, section 3).

    For each channel of each head, over `group` consecutive tokens: minimum and step = (max - min) / (2**bits - 1) in
    fp16; codes bit-packed. The last group may hold fewer tokens. The paper's residual window of full-precision tokens
    is the recipe's exemption `recent`. A token of zeros need not decode to zeros, since it shares the minimum of
    its group. Stored: bits + 32/group bits per value, 3 at 2 bits and groups of 32.
    """

    version = 1

    bits: int = 2
    group: int = 32

    def __post_init__(self) -> None:
        if self.bits not in range(1, 9) or self.group < 1:
            raise PolyKVError(
                f"KiviKey has no bits={self.bits} with group={self.group}; choose 1 to 8 bits and a "
                "group of at least 1 token"
            )

    def payload_bits(self, dtype: torch.dtype) -> float:
        return float(self.bits)

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        batch, heads, n_tokens, dim = shape
        metadata = batch * heads * ceil(n_tokens / self.group) * dim * 2 * 2
        return prod(shape[:3]) * packed_size(dim, self.bits) + metadata

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        n_tokens, group = x_BHTD.shape[2], min(self.group, x_BHTD.shape[2])
        x_BHTD = x_BHTD.float()
        if missing := -n_tokens % group:  # pad the last group with its last token
            last = x_BHTD[:, :, -1:].expand(-1, -1, missing, -1)
            x_BHTD = torch.cat([x_BHTD, last], dim=2)
        codes, step, low = affine_codes(x_BHTD.unflatten(2, (-1, group)), self.bits, dim=3)
        codes_BHTD = codes.flatten(2, 3)[:, :, :n_tokens]
        return {
            "codes": pack(codes_BHTD, self.bits),
            "step": step.squeeze(3),
            "minimum": low.squeeze(3),
        }

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        codes_BHTD = unpack(tensors["codes"], self.bits, dim)
        n_tokens = codes_BHTD.shape[2]
        padded = F.pad(codes_BHTD, (0, 0, 0, -n_tokens % self.group))
        groups = padded.unflatten(2, (-1, self.group))
        step, low = tensors["step"].unsqueeze(3), tensors["minimum"].unsqueeze(3)
        return affine_values(groups, step, low).flatten(2, 3)[:, :, :n_tokens]
