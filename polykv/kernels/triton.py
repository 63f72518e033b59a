"""Triton kernels for NVIDIA GPUs: which codecs and shapes they support, and whether they are available.

The kernels are in triton_*.py, which import triton and are therefore imported on first use. Where a function returns
None, the caller takes the torch path, which also raises the errors. There are no kernels for WaterfillKey and
TurboQuantLog: on a GPU, the waterfill recipes are encoded and read in place by torch.
"""

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from polykv.codecs.base import INPUT_DTYPES, Codec, Packed
from polykv.codecs.context import NOTHING, LayerContext
from polykv.codecs.identity import Identity
from polykv.codecs.int8 import Int8
from polykv.codecs.q8_0 import Q8_0
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.codecs.uniform import Uniform
from polykv.segment import Segment

# Bits -> alignment of loads in bytes. At 3 bits, words of 4 bytes if a row is whole words, else single bytes.
ALIGNMENT = {2: 2, 3: 4, 4: 4}
MAX_DIM = 256
LEAST_CAPABILITY = (8, 0)  # matrix products in bf16


def available() -> str | None:
    """None if the kernels can run (on a GPU, or under TRITON_INTERPRET=1 anywhere), else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _interpreted():
        return None
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "its kernels need an NVIDIA GPU"
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return "its kernels need compute capability 8.0 (Ampere) or newer"
    return None


def encode(codec: Codec, x_BHTD: Tensor, context: LayerContext = NOTHING) -> Packed | None:
    """`codec.encode` in one pass; None for another codec or shape, or values that cannot be encoded."""
    if x_BHTD.dtype not in INPUT_DTYPES or x_BHTD.ndim != 4 or 0 in x_BHTD.shape:
        return None
    dim = x_BHTD.shape[3]
    if not _takes(codec, dim, x_BHTD):
        return None
    if isinstance(codec, TurboQuantMSE) and dim > 128 and not _holds_rotation(x_BHTD.device):
        return None
    with torch.cuda.device_of(x_BHTD):
        packed = _kernels(codec).encode(codec, x_BHTD)
        metadata = packed.tensors["norm" if isinstance(codec, TurboQuantMSE) else "scale"]
        # The torch path raises the error for values that are not finite.
        return packed if metadata.isfinite().all() else None


def decode_rotated(codec: Codec, packed: Packed) -> Tensor | None:
    """`codec.decode_rotated`: fp32 (batch, kv_heads, tokens, head_dim), or None for another codec or shape."""
    codes = packed.tensors.get("codes")
    if codes is None or not _takes(codec, packed.shape[3], codes):
        return None
    with torch.cuda.device_of(codes):
        return _kernels(codec).decode_rotated(codec, packed)


def attend(q_HQD: Tensor, segment: Segment, scaling: float) -> tuple[Tensor, Tensor] | None:
    """Output (kv_heads, queries, head_dim) and log-sum-exp (kv_heads, queries), both fp32; no mask.

    Queries are fp32, bf16 or fp16. None for other codec pairs, shapes, or batches. With TurboQuant keys, fp16 queries
    that overflow fp16 when rotated (a norm of 65,504 or more) give NaN.
    """
    if segment.key.shape[0] != 1 or scaling <= 0:
        return None
    if not isinstance(segment.value_codec, TurboQuantMSE | Uniform | Identity):
        return None
    if not (
        _attends(segment.key_codec, segment.key) and _attends(segment.value_codec, segment.value)
    ):
        return None
    from polykv.kernels import triton_attend

    with torch.cuda.device_of(q_HQD):
        return triton_attend.attend(q_HQD, segment, scaling)


def _attends(codec: Codec, packed: Packed) -> bool:
    if type(codec) is Identity:
        return packed.shape[3] <= MAX_DIM and _reachable(packed.tensors["values"])
    codes = packed.tensors.get("codes")
    return codes is not None and _takes(codec, packed.shape[3], codes)


def _reachable(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" or _interpreted()


def _takes(codec: Codec, dim: int, tensor: Tensor) -> bool:
    if not _reachable(tensor):
        return False
    if type(codec) is TurboQuantMSE:  # not isinstance: a subclass may quantize differently
        alignment = ALIGNMENT.get(codec.bits)
        if alignment is None or dim % 8 or dim > MAX_DIM:
            return False
        if codec.bits == 3 and dim % 32:
            alignment = 1
        return tensor.data_ptr() % alignment == 0
    if type(codec) is Uniform:
        return dim <= MAX_DIM and tensor.data_ptr() % 4 == 0 and _kernels(codec).takes(codec, dim)
    return type(codec) in (Int8, Q8_0) and dim <= MAX_DIM


def _holds_rotation(device: torch.device) -> bool:
    """Whether the 256 x 256 rotation and the tiles fit into shared memory, as on Hopper."""
    if device.type != "cuda":
        return True
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin >= 200 * 1024


def _kernels(codec: Codec) -> ModuleType:
    name = {TurboQuantMSE: "turboquant", Uniform: "uniform"}.get(type(codec), "int8")
    return importlib.import_module(f"polykv.kernels.triton_{name}")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
