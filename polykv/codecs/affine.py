"""Affine quantization between a minimum and a maximum, with step and minimum in fp16 (as in KIVI)."""

from __future__ import annotations

import torch
from torch import Tensor


def affine_codes(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes of fp32 `x`, and step and minimum along `dim` (kept as size 1) in fp16.

    Codes are computed from the fp16 step and minimum, so that their rounding adds no error; values that it moves out
    of range saturate. `x` is not modified.
    """
    low, high = x.aminmax(dim=dim, keepdim=True)
    low, step = low.half(), ((high - low) / (2**bits - 1)).half()
    # The step is zero where all values are equal (or vanish in fp16): any divisor gives code 0.
    divisor = torch.where(step > 0, step, 1).float()
    codes = (x - low.float()).div_(divisor).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), step, low


def affine_values(codes: Tensor, step: Tensor, low: Tensor) -> Tensor:
    """Dequantized fp32 values."""
    return codes * step.float() + low.float()
