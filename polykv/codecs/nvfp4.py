"""NVIDIA's NVFP4: 4-bit floating point in blocks of 16 channels, with a scale for each block and one for the tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from polykv.codecs.base import Codec, Shape, fp32_scale, padded_blocks
from polykv.codecs.bitpack import pack, packed_size, unpack

BLOCK = 16
# E2M1 by its code without the sign: 2 bits of exponent (bias 1), 1 of mantissa (OCP Microscaling Formats v1.0, 5.3.3).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


@dataclass(frozen=True)
class NVFP4(Codec):
    """E2M1 elements, an E4M3 scale for each block of 16 channels of a vector, and an fp32 scale for the layer tensor.

    tensor_scale = absmax / (6 * 448) over all heads and tokens; block_scale = E4M3(absmax of the block / (6 *
    tensor_scale)); code = sign and E2M1(|x| / (block_scale * tensor_scale)), rounded to nearest, ties to the even code,
    as the instruction cvt.rn.satfinite.e2m1x2 does; x' = E2M1 * block_scale * tensor_scale. The even channel is in the
    low nibble. (Definition: docs of Intel Neural Compressor, "NVFP4 Quantization", and of NVIDIA Model Optimizer,
    `NVFP4QTensor`; as a KV cache: NVIDIA's developer blog of 8 December 2025.)

    Left open there: engines calibrate the scale of a KV cache or set it to 1, and we take it from the encoded tokens;
    appended tokens use it as it is and saturate. A block whose scale rounds to zero (absmax below 2e-6 of the
    tensor's) decodes to zeros. A shorter last block has its own scale. Stored: 4.5 bits per value (head_dim a multiple
    of 16), and 4 bytes per layer tensor.
    """

    version = 1

    def payload_bits(self, dtype: torch.dtype) -> float:
        return 4.0

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return prod(shape[:3]) * (packed_size(shape[3], 4) + ceil(shape[3] / BLOCK)) + 4

    def _statistics(self, chunks: Sequence[Tensor]) -> dict[str, Tensor]:
        absmax = torch.stack([chunk.abs().amax().float() for chunk in chunks]).amax()
        return {"tensor_scale": fp32_scale(absmax, E2M1[-1] * E4M3_MAX).view(1, 1, 1, 1)}

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        blocks, dim = padded_blocks(x_BHTD.float(), BLOCK), x_BHTD.shape[-1]
        tensor_scale = shared["tensor_scale"]
        # A scale is zero where all values are zero (or vanish in it): any divisor does.
        divisor = torch.where(tensor_scale > 0, tensor_scale, 1)
        wanted = blocks.abs().amax(-1) / (E2M1[-1] * divisor)
        block_scale = wanted.clamp_(max=E4M3_MAX).to(E4M3)
        step = block_scale.float() * divisor
        blocks = blocks / torch.where(step > 0, step, 1).unsqueeze(-1)
        codes = pack(e2m1_codes(blocks).flatten(-2)[..., :dim].contiguous(), 4)
        return {"codes": codes, "block_scale": block_scale.view(torch.uint8)}

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        scale = tensors["block_scale"].view(E4M3).float() * tensors["tensor_scale"]
        elements = e2m1_values(padded_blocks(unpack(tensors["codes"], 4, dim), BLOCK))
        return elements.mul_(scale.unsqueeze(-1)).flatten(-2)[..., :dim]


def e2m1_codes(x: Tensor) -> Tensor:
    """uint8 codes below 16 of the nearest E2M1 values, the sign in bit 3; ties go to the even code."""
    magnitude = x.abs()
    codes = (x < 0).to(torch.uint8).mul_(8)
    for code, (low, high) in enumerate(zip(E2M1, E2M1[1:], strict=False)):
        middle = (low + high) / 2
        codes += magnitude > middle if code % 2 == 0 else magnitude >= middle
    return codes


def e2m1_values(codes: Tensor) -> Tensor:
    """The fp32 values of E2M1 codes."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    return table.index_select(0, codes.int().flatten()).view(codes.shape)
