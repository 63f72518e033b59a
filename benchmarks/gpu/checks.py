"""Correctness of the kernels in fp64, on inputs that are drawn afresh for every check."""

from dataclasses import replace

import common  # noqa: F401  (a checkout that is not installed will do)
import torch
from torch import Tensor

from polykv import kernels
from polykv.codecs.base import Codec, Packed
from polykv.codecs.bitpack import unpack
from polykv.codecs.codebook import lloyd_max
from polykv.codecs.ggml import BLOCK
from polykv.codecs.q8_0 import Q8_0
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.segment import Segment

# How far from a decision boundary a value may lie, in steps of the codes, and still go to the other side. Q8_0
# rounds against its scale in fp32 and keeps it in fp16, from which this check has to start: 127 * 2**-11.
NEAR = 1e-3
NEAR_Q8_0 = 127 * 2**-11


def fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, int]:
    """Gaussian values with some outlier channels, and the seed that they came from."""
    seed = torch.seed() % 2**31
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=device)
    x[..., ::29] *= 8
    return x.to(dtype), seed


def wrong_codes(codec: Codec, x_BHTD: Tensor, packed: Packed) -> int:
    """Codes that are not those of the value in fp64; at a decision boundary both of its sides are right."""
    dim = x_BHTD.shape[3]
    codes = packed.tensors["codes"]
    if isinstance(codec, TurboQuantMSE):
        y = _rotated(codec, x_BHTD)
        boundaries = torch.tensor(lloyd_max(codec.bits).boundaries, device=y.device).double()
        expected = torch.bucketize(y, boundaries)
        distance = torch.stack([(y - boundary).abs() for boundary in boundaries]).amin(dim=0)
        codes = unpack(codes, codec.bits, dim).long()
    else:
        codes = codes.long()
        scale = packed.tensors["scale"].double()
        if isinstance(codec, Q8_0):
            scale = scale.repeat_interleave(BLOCK, dim=3)[..., :dim]
        y = x_BHTD.double() / torch.where(scale > 0, scale, 1)
        expected = y.round().clamp(-127, 127)
        distance = 0.5 - (y - y.round()).abs()
    near = NEAR_Q8_0 if isinstance(codec, Q8_0) else NEAR
    off = (codes - expected).abs()
    return int(((off > 1) | (off == 1) & (distance > near)).sum())


def _rotated(codec: TurboQuantMSE, x_BHTD: Tensor) -> Tensor:
    """What TurboQuantMSE rounds to its levels, in fp64."""
    x, dim = x_BHTD.double(), x_BHTD.shape[3]
    norm = x.norm(dim=-1, keepdim=True)
    return x @ codec.rotation(dim, x.device).double() * dim**0.5 / torch.where(norm > 0, norm, 1)


def decode_error(codec: Codec, packed: Packed, y_BHTD: Tensor) -> float:
    """Largest error of a decoded tensor against fp64, relative to the largest value."""
    codes, dim = packed.tensors["codes"], packed.shape[3]
    if isinstance(codec, TurboQuantMSE):
        levels = torch.tensor(lloyd_max(codec.bits).levels, device=codes.device).double()
        expected = levels[unpack(codes, codec.bits, dim).long()]
        expected *= packed.tensors["norm"].double() / dim**0.5
    else:
        scale = packed.tensors["scale"].double()
        if isinstance(codec, Q8_0):
            scale = scale.repeat_interleave(BLOCK, dim=3)[..., :dim]
        expected = codes.double() * scale
    return float((y_BHTD.double() - expected).abs().max() / expected.abs().max())


def attention_error(q_HQD: Tensor, segment: Segment, scaling: float, backend: str) -> float:
    """|found - right| / |right|, right being fp64 attention over the decoded segment.

    Relative, for the mean of many random values is small: at 32,768 tokens zeros would be off by 0.04 only.
    """
    found = kernels.attend(q_HQD, segment, scaling, backend)
    if found is None:
        raise RuntimeError(f"backend {backend} has no kernel for this segment")
    k, v = (
        codec.decode(replace(packed, dtype=torch.float32))[0].double()
        for codec, packed in (
            (segment.key_codec, segment.key),
            (segment.value_codec, segment.value),
        )
    )
    wrong = right = 0.0
    for head in range(q_HQD.shape[0]):  # one at a time: fp64 scores of all would take gigabytes
        weights = (scaling * q_HQD[head].double() @ k[head].T).softmax(dim=-1)
        expected = weights @ v[head]
        wrong += float((found[0][head].double() - expected).square().sum())
        right += float(expected.square().sum())
    return (wrong / right) ** 0.5
