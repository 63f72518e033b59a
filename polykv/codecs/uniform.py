"""Uniform quantization along head_dim, of whole vectors or blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from polykv.codecs.affine import affine_codes, affine_values
from polykv.codecs.base import Codec, Shape, padded_blocks
from polykv.codecs.bitpack import pack, packed_size, unpack
from polykv.errors import PolyKVError


@dataclass(frozen=True)
class Uniform(Codec):
    """2**bits evenly spaced levels per token, head and block of `block` channels (None: head_dim).

    symmetric: absmax. Levels from -absmax to absmax, with one fp16 step (the `scale`) per block: code =
    round(x / scale + (2**bits - 1) / 2). There is no level at 0, so that 2 bits give four levels rather than three.
    Stored: bits + 16/block bits per value, 4.125 at 4 bits and head_dim 128.

    not symmetric: levels from the minimum to the maximum, with step and minimum in fp16, as KIVI quantizes values
    (arXiv 2402.02750, section 3, blocks of 32) and as vLLM's TurboQuant presets do (whole vectors). Stored: bits +
    32/block bits per value, 3 at 2 bits and blocks of 32.

    Codes are bit-packed per vector. A shorter last block has its own metadata.
    """

    version = 1

    bits: int = 4
    block: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9) or (self.block is not None and self.block < 1):
            raise PolyKVError(
                f"Uniform has no bits={self.bits} with block={self.block}; choose 2 to 8 bits and a "
                "block of at least 1 channel, or null for whole vectors"
            )

    def payload_bits(self, dtype: torch.dtype) -> float:
        return float(self.bits)

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        per_block = 2 if self.symmetric else 4
        n_blocks = ceil(shape[3] / self.block_size(shape[3]))
        return prod(shape[:3]) * (packed_size(shape[3], self.bits) + per_block * n_blocks)

    @property
    def relative_error(self) -> float:
        """Mean squared error of `symmetric` in units of absmax^2, for values uniform within a step: step^2 / 12."""
        return 1 / (3 * (2**self.bits - 1) ** 2)

    def block_size(self, dim: int) -> int:
        """Values that share a scale."""
        return min(self.block or dim, dim)

    def _blocks(self, x_BHTD: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, H, T, blocks, block), padded with the last channel."""
        return padded_blocks(x_BHTD, self.block_size(x_BHTD.shape[-1]))

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        blocks, dim = self._blocks(x_BHTD.float()), x_BHTD.shape[-1]
        if not self.symmetric:
            codes, step, low = affine_codes(blocks, self.bits, dim=-1)
            kept = {"step": step.squeeze(-1), "minimum": low.squeeze(-1)}
        else:
            top = 2**self.bits - 1
            scale = (blocks.abs().amax(dim=-1, keepdim=True) * (2 / top)).half()
            # The scale is zero where all values are zero (or vanish in fp16): any divisor does.
            divisor = torch.where(scale > 0, scale, 1).float()
            codes = (blocks / divisor).add_(top / 2).round_().clamp_(0, top).to(torch.uint8)
            kept = {"scale": scale.squeeze(-1)}
        return {"codes": pack(codes.flatten(-2)[..., :dim].contiguous(), self.bits), **kept}

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        codes = self._blocks(unpack(tensors["codes"], self.bits, dim))
        if self.symmetric:
            steps = codes.float().sub_((2**self.bits - 1) / 2)
            blocks = steps.mul_(tensors["scale"].float().unsqueeze(-1))
        else:
            blocks = affine_values(codes, *(tensors[n].unsqueeze(-1) for n in ("step", "minimum")))
        return blocks.flatten(-2)[..., :dim]
