"""Fast paths for encoding, decoding and attending, and the choice between them.

The torch path (polykv/codecs, polykv/attention) runs everywhere and defines the truth. A kernel module does
the same work faster where it can, and answers None where it cannot: then the torch path does it. Modules load
on first use, so that nobody waits for a compiler whose kernels are not asked for.
"""

from __future__ import annotations

import importlib
import os
import warnings
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from polykv.codecs.base import Codec, Packed
from polykv.errors import PolyKVError
from polykv.segment import Segment

TORCH = "torch"
# The kernel module made for a type of device.
FAST = {"cpu": "cpu", "cuda": "triton"}
BACKENDS = (TORCH, *FAST.values())


def check_backend(name: str) -> None:
    """Refuse a name that is no backend.

    Raises:
        PolyKVError: lists those that are.
    """
    if name not in ("auto", *BACKENDS):
        raise PolyKVError(f"no backend named {name!r}; there are: auto, {', '.join(BACKENDS)}")


def pick_backend(name: str, device: torch.device) -> str:
    """The backend to use on `device`. "auto" is the fast one, or torch (with one warning) where that is missing.

    Raises:
        PolyKVError: an unknown name, or a named backend that cannot be had here.
    """
    check_backend(name)
    if name == TORCH or (name == "auto" and device.type not in FAST):
        return TORCH
    wanted = FAST[device.type] if name == "auto" else name
    reason = _why_not(wanted, device.type)
    if reason is None:
        return wanted
    if name != "auto":
        raise PolyKVError(f"backend={name} cannot be had: {reason}; use backend=auto or torch")
    _warn_once(f"backend {wanted} cannot be had ({reason}); using torch, which is slower")
    return TORCH


def _why_not(backend: str, device_type: str) -> str | None:
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if FAST.get(device_type) != backend and not interpreted:
        return f"it does not run on {device_type}"
    try:
        return _module(backend).available()
    except ImportError as error:
        return str(error)


@lru_cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"polykv.kernels.{backend}")


def encode(codec: Codec, x_BHTD: Tensor, backend: str) -> Packed:
    """`codec.encode(x_BHTD)`; codes may differ where a value lies within rounding of a decision boundary."""
    packed = None if backend == TORCH else _module(backend).encode(codec, x_BHTD)
    return codec.encode(x_BHTD) if packed is None else packed


def decode_rotated(codec: Codec, packed: Packed, backend: str) -> Tensor:
    """`codec.decode_rotated(packed)`: fp32 (B, H, T, D) in the domain in which the codec keeps its codes."""
    y_BHTD = None if backend == TORCH else _module(backend).decode_rotated(codec, packed)
    return codec.decode_rotated(packed) if y_BHTD is None else y_BHTD


def attend(
    q_HQD: Tensor, segment: Segment, scaling: float, backend: str
) -> tuple[Tensor, Tensor] | None:
    """Attention of all queries to a whole segment, or None where there is no kernel for its codec pair.

    `q_HQD` is (kv_heads, queries, head_dim), contiguous. Gives the output (kv_heads, queries, head_dim) in fp32,
    rotated back to the model's domain, and the natural log of the sum of exp(scaling * q.k), fp32.
    """
    return None if backend == TORCH else _module(backend).attend(q_HQD, segment, scaling)
