"""Backends with faster kernels for encoding, decoding and attention, and the choice between them.

The torch code (polykv/codecs, polykv/attention) runs everywhere and is the reference implementation. A kernel module
computes the same faster for the inputs it supports and returns None for others, which then take the torch path. Kernel
modules are imported (and compiled) on first use.
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
from polykv.codecs.context import NOTHING, LayerContext
from polykv.errors import PolyKVError
from polykv.segment import Segment

TORCH, CPU = "torch", "cpu"
# Device type -> kernel module.
FAST = {"cpu": CPU, "cuda": "triton"}
BACKENDS = (TORCH, *FAST.values())


def check_backend(name: str) -> None:
    """Validate a backend's name.

    Raises:
        PolyKVError: an unknown name; lists the known ones.
    """
    if name not in ("auto", *BACKENDS):
        raise PolyKVError(f"no backend named {name!r}; there are: auto, {', '.join(BACKENDS)}")


def pick_backend(name: str, device: torch.device) -> str:
    """The backend to use on `device`: "auto" is the fast one, or torch (with a warning) if that is not available.

    Raises:
        PolyKVError: an unknown name, or a backend requested by name that is not available on this machine.
    """
    check_backend(name)
    if name == TORCH or (name == "auto" and device.type not in FAST):
        return TORCH
    wanted = FAST[device.type] if name == "auto" else name
    reason = _why_not(wanted, device.type)
    if reason is None:
        return wanted
    if name != "auto":
        raise PolyKVError(f"backend={name} is not available: {reason}; use backend=auto or torch")
    _warn_once(f"backend {wanted} is not available ({reason}); using torch, which is slower")
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


def encode(codec: Codec, x_BHTD: Tensor, backend: str, context: LayerContext = NOTHING) -> Packed:
    """`codec.encode(x_BHTD, context)`; codes may differ where rounding moves a value across a decision boundary."""
    packed = None if backend == TORCH else _module(backend).encode(codec, x_BHTD, context)
    return codec.encode(x_BHTD, context) if packed is None else packed


def decode_rotated(codec: Codec, packed: Packed, backend: str) -> Tensor:
    """`codec.decode_rotated(packed)`: fp32 (B, H, T, D) in the codec's rotated domain."""
    y_BHTD = None if backend == TORCH else _module(backend).decode_rotated(codec, packed)
    return codec.decode_rotated(packed) if y_BHTD is None else y_BHTD


def attend(
    q_HQD: Tensor, segment: Segment, scaling: float, backend: str
) -> tuple[Tensor, Tensor] | None:
    """Attention of all queries to a whole segment, or None if there is no kernel for its codec pair.

    `q_HQD` is (kv_heads, queries, head_dim), contiguous. Returns the output (kv_heads, queries, head_dim), rotated
    back, and the natural log of the sum of exp(scaling * q.k) (kv_heads, queries), both fp32.
    """
    return None if backend == TORCH else _module(backend).attend(q_HQD, segment, scaling)


def attend_suffix(
    q_BHRD: Tensor,
    own: Segment,
    mask_B1QT: Tensor,
    scaling: float,
    other: tuple[Tensor, Tensor] | None,
    backend: str,
) -> tuple[Tensor, Tensor] | None:
    """`polykv.attention.suffix.attend_suffix`, or None if there is no kernel for it."""
    if backend != CPU:
        return None
    return _module(backend).attend_suffix(q_BHRD, own, mask_B1QT, scaling, other)
