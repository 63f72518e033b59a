"""Attention of agents to their own tokens on the CPU, merged with their attention to the prefix: one call of C++."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from polykv.kernels.cpu_layout import DTYPES, struct_of
from polykv.segment import Segment

MAX_ROWS = 16  # as in csrc/suffix.h; beyond it torch's matrix products are faster


class Suffix(ctypes.Structure):
    """`Suffix` of suffix.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("queries", "seen")),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("agents", "heads", "rows", "group", "tokens", "dim")),
        ("seen_strides", ctypes.c_int64 * 3),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("other", "other_lse")),
        *((name, ctypes.c_int64 * 2) for name in ("other_strides", "other_lse_strides")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),  # set by polykv_attend_suffix
    ]


def attend(
    library: Any,
    q_BHRD: Tensor,
    own: Segment,
    mask_B1QT: Tensor,
    scaling: float,
    other: tuple[Tensor, Tensor] | None,
    threads: int,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, R, D) and log-sum-exp (B, H, R), both fp32, of rows that fit MAX_ROWS.

    `other` is what attention to other keys gave, with dense rows; None: there are no others.
    """
    batch, heads, n_rows, dim = q_BHRD.shape
    q_BHRD = q_BHRD.contiguous()
    mask_BQT = mask_B1QT[:, 0].expand(batch, -1, -1)
    told = Suffix(q_BHRD.data_ptr(), mask_BQT.data_ptr(), DTYPES[q_BHRD.dtype])
    told.agents, told.heads, told.rows, told.dim = q_BHRD.shape
    told.group, told.tokens = n_rows // mask_BQT.shape[1], own.n_tokens
    told.seen_strides, told.scaling = mask_BQT.stride(), scaling
    if other is not None:
        told.other, told.other_lse = (tensor.data_ptr() for tensor in other)
        told.other_strides, told.other_lse_strides = (tensor.stride()[:2] for tensor in other)
    out_BHRD = torch.empty(q_BHRD.shape, dtype=torch.float32)
    lse_BHR = torch.empty(q_BHRD.shape[:3], dtype=torch.float32)
    library.polykv_attend_suffix(
        ctypes.byref(told),
        struct_of(own.key_codec, own.key),
        struct_of(own.value_codec, own.value),
        out_BHRD.data_ptr(),
        lse_BHR.data_ptr(),
        threads,
    )
    return out_BHRD, lse_BHR
