"""Quantization of vectors that are nearly normal after a rotation: Lloyd-Max codes, and norms as 8-bit logarithms.

The RMS of a vector (a token of a head) is stored as a code c, which stands for 2**((c - TOP) / STEPS) times the largest
RMS of the head, an fp16 number; code 0 is a vector of zeros. A step is 2.9 %, so that rounding errs by at most 1.5 %.
Appended tokens may be up to 4 times as large as the largest RMS (codes above TOP); larger ones are clipped to that.
"""

import torch
from torch import Tensor

from polykv.codecs.codebook import lloyd_max

STEPS = 24  # codes an octave
TOP = 255 - 2 * STEPS  # the code of the largest RMS
SMALLEST = 2.0**-24  # in fp16


def codes_of(y: Tensor, bits: int) -> Tensor:
    """uint8 codes of the nearest of the 2**bits Lloyd-Max levels of N(0, 1)."""
    boundaries = y.new_tensor(lloyd_max(bits).boundaries)
    return torch.bucketize(y.contiguous(), boundaries, out_int32=True).to(torch.uint8)


def levels_of(codes: Tensor, bits: int) -> Tensor:
    """The fp32 levels of uint8 codes."""
    levels = torch.tensor(lloyd_max(bits).levels, dtype=torch.float32, device=codes.device)
    return levels.index_select(0, codes.int().flatten()).view(codes.shape)


def log_codes(rms_BHT1: Tensor, largest_BH11: Tensor) -> Tensor:
    """uint8 codes of fp32 RMS values; TOP is the code of `largest`, in fp16."""
    octaves = (rms_BHT1 / largest_BH11.float().clamp_min(SMALLEST)).clamp_min(1e-30).log2()
    codes = (octaves * STEPS).round().add(TOP).clamp(1, 255)
    return torch.where(rms_BHT1 > 0, codes, 0).to(torch.uint8)


def log_values(codes_BHT1: Tensor, largest_BH11: Tensor) -> Tensor:
    """The fp32 RMS values of these codes."""
    values = ((codes_BHT1.float() - TOP) / STEPS).exp2() * largest_BH11.float()
    return torch.where(codes_BHT1 > 0, values, 0)
