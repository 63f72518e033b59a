# ruff: noqa: ANN001, ANN201, ANN202  (Triton evaluates annotations; only constexpr is allowed)
"""Triton: attention of all agents' queries against one packed prefix.

Flash-decoding (Dao et al. 2023): the prefix is cut into enough splits to keep the device busy; each program streams
the codes of one split past a tile of queries, and a second kernel merges the splits by their log-sum-exp. Codes are
dequantized in registers (triton_sides.py); the prefix never exists in full precision. If a token has a single scale or
norm, it is applied to the score or the weight instead of the codes. Values of a rotating codec are accumulated in the
rotated domain, and the merged output is rotated back once.
"""

from dataclasses import dataclass
from itertools import chain
from math import log

import torch
import triton
import triton.language as tl
from torch import Tensor

from polykv.codecs.turboquant import TurboQuantMSE
from polykv.kernels.triton_bits import (
    dot,
    load_table,
    n_multiprocessors,
    padded,
    rotate,
    sign_matrix,
)  # fmt: skip
from polykv.kernels.triton_sides import Side, load_codes, numbers
from polykv.segment import Segment

LN_2 = tl.constexpr(log(2))
LEAST_SCALE = tl.constexpr(2.0**-126)  # all-zero keys have scale 0, and -inf * 0 is NaN
MERGED_ROWS = 16


@triton.jit
def _attend_splits(
    q, k_codes, k_scale, k_levels, v_codes, v_scale, v_levels, out, lse,
    k_h, k_t, ks_h, ks_t, v_h, v_t, vs_h, vs_t, n_queries, n_tokens, split_tokens, k_factor,
    DIM: tl.constexpr, PAD: tl.constexpr, KEYS: tl.constexpr, K_BITS: tl.constexpr, K_BLOCK: tl.constexpr,
    VALUES: tl.constexpr, V_BITS: tl.constexpr, V_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    # Programs of the same tokens and different query tiles are adjacent, so that all but the first hit L2.
    tile, split, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    cols = tl.arange(0, PAD)
    rows = tile * QUERIES + tl.arange(0, QUERIES)
    asked_QD = (rows < n_queries)[:, None] & (cols < DIM)[None, :]
    q_QD = tl.load(q + (head * n_queries + rows)[:, None] * DIM + cols[None, :], asked_QD, 0.0)
    k_codes, k_scale = k_codes + head * k_h, k_scale + head * ks_h
    v_codes, v_scale = v_codes + head * v_h, v_scale + head * vs_h
    if KEYS == "tensor":
        k_factor *= tl.maximum(tl.load(k_scale), LEAST_SCALE)
    k_table, v_table = k_levels, v_levels
    if K_BITS < 8:
        k_table = load_table(k_levels, q_QD.dtype)
    if V_BITS < 8:
        v_table = load_table(v_levels, weights_dtype(q_QD.dtype, VALUES))
    m_Q = tl.full((QUERIES,), float("-inf"), tl.float32)
    l_Q = tl.zeros((QUERIES,), tl.float32)
    o_QD = tl.zeros((QUERIES, PAD), tl.float32)
    first, stop = split * split_tokens, tl.minimum((split + 1) * split_tokens, n_tokens)
    whole = first + (stop - first) // TOKENS * TOKENS
    for start in range(first, whole, TOKENS):
        m_Q, l_Q, o_QD = _step(
            q_QD, m_Q, l_Q, o_QD, start, stop, k_codes, k_scale, k_table, v_codes, v_scale, v_table,
            k_t, ks_t, v_t, vs_t, k_factor, DIM, PAD, KEYS, K_BITS, K_BLOCK, VALUES, V_BITS, V_BLOCK, TOKENS, False,
        )  # fmt: skip
    if whole < stop:
        m_Q, l_Q, o_QD = _step(
            q_QD, m_Q, l_Q, o_QD, whole, stop, k_codes, k_scale, k_table, v_codes, v_scale, v_table,
            k_t, ks_t, v_t, vs_t, k_factor, DIM, PAD, KEYS, K_BITS, K_BLOCK, VALUES, V_BITS, V_BLOCK, TOKENS, True,
        )  # fmt: skip
    row_Q = (split * tl.num_programs(2) + head) * n_queries + rows
    tl.store(lse + row_Q, m_Q * k_factor + tl.log2(l_Q), rows < n_queries)
    tl.store(out + row_Q[:, None] * DIM + cols[None, :], o_QD / l_Q[:, None], asked_QD)


@triton.jit
def _step(
    q_QD, m_Q, l_Q, o_QD, start, stop, k_codes, k_scale, k_table, v_codes, v_scale, v_table,
    k_t, ks_t, v_t, vs_t, k_factor,
    DIM: tl.constexpr, PAD: tl.constexpr, KEYS: tl.constexpr, K_BITS: tl.constexpr, K_BLOCK: tl.constexpr,
    VALUES: tl.constexpr, V_BITS: tl.constexpr, V_BLOCK: tl.constexpr, TOKENS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The online softmax's update for one block of tokens; scores in units of 1 / k_factor, base-2 exponentials."""
    t = tl.arange(0, TOKENS)
    here_T = t < (stop - start if MASKED else TOKENS)
    # Only base pointers depend on the loop index, so that offsets are computed once outside the loop.
    k_codes, k_scale = k_codes + start * k_t, k_scale + start * ks_t
    v_codes, v_scale = v_codes + start * v_t, v_scale + start * vs_t
    # Issued early; needed only after the scores.
    v_first, v_second, v_third = load_codes(v_codes, t, v_t, here_T, DIM, PAD, V_BITS)
    if VALUES == "token":
        v_scale_T = tl.load(v_scale + t * vs_t, here_T, 0.0).to(tl.float32)
    k_first, k_second, k_third = load_codes(k_codes, t, k_t, here_T, DIM, PAD, K_BITS)
    k_TD = numbers(
        k_first, k_second, k_third, k_table, k_scale, t, ks_t, here_T,
        KEYS, K_BITS, K_BLOCK, DIM, PAD, q_QD.dtype,
    )  # fmt: skip
    s_QT = dot(q_QD, tl.trans(k_TD), tl.zeros((q_QD.shape[0], TOKENS), tl.float32))
    if KEYS == "token":
        s_QT *= tl.load(k_scale + t * ks_t, here_T, 0.0).to(tl.float32)[None, :]
    if MASKED:
        s_QT = tl.where(here_T[None, :], s_QT, float("-inf"))
    top_Q = tl.maximum(m_Q, tl.max(s_QT, axis=1))
    p_QT = tl.exp2(s_QT * k_factor - (top_Q * k_factor)[:, None])
    shrink_Q = tl.exp2((m_Q - top_Q) * k_factor)
    l_Q = l_Q * shrink_Q + tl.sum(p_QT, axis=1)
    WEIGHTS: tl.constexpr = weights_dtype(q_QD.dtype, VALUES)
    v_TD = numbers(
        v_first, v_second, v_third, v_table, v_scale, t, vs_t, here_T,
        VALUES, V_BITS, V_BLOCK, DIM, PAD, WEIGHTS,
    )  # fmt: skip
    if VALUES == "token":
        p_QT *= v_scale_T[None, :]
    return top_Q, l_Q, dot(p_QT.to(WEIGHTS), v_TD, o_QD * shrink_Q[:, None])


@triton.constexpr_function
def weights_dtype(dtype, values):
    """The dtype in which weights are multiplied with values: fp16 suffices for a weight times a norm or scale, which
    are fp16 themselves; values that are not scaled by token need the queries' range."""
    return tl.float16 if values == "token" and dtype != tl.float32 else dtype


@triton.jit
def _merge_splits(
    parts, part_lse, matrix, out, lse, n_queries, n_splits, matrix_scale,
    DIM: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    tile, head, n_heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    cols, rows = tl.arange(0, PAD), tile * ROWS + tl.arange(0, ROWS)
    asked_Q, asked_QD = rows < n_queries, (rows < n_queries)[:, None] & (cols < DIM)[None, :]
    m_Q = tl.full((ROWS,), float("-inf"), tl.float32)
    l_Q = tl.zeros((ROWS,), tl.float32)
    o_QD = tl.zeros((ROWS, PAD), tl.float32)
    # Steps are small and programs few: use as many pipeline stages as fit into 48 KiB of shared memory to hide L2's
    # latency.
    for split in tl.range(0, n_splits, num_stages=768 // PAD):
        row_Q = (split * n_heads + head) * n_queries + rows
        part_Q = tl.load(part_lse + row_Q, asked_Q, 0.0)
        part_QD = tl.load(parts + row_Q[:, None] * DIM + cols[None, :], asked_QD, 0.0)
        top_Q = tl.maximum(m_Q, part_Q)
        shrink_Q, weight_Q = tl.exp2(m_Q - top_Q), tl.exp2(part_Q - top_Q)
        m_Q, l_Q = top_Q, l_Q * shrink_Q + weight_Q
        o_QD = o_QD * shrink_Q[:, None] + part_QD * weight_Q[:, None]
    o_QD /= l_Q[:, None]
    if ROTATED:
        rotation = tl.trans(tl.load(matrix + cols[:, None] * PAD + cols[None, :]))
        o_QD = rotate(o_QD, rotation) * matrix_scale
    row_Q = head * n_queries + rows
    tl.store(out + row_Q[:, None] * DIM + cols[None, :], o_QD, asked_QD)
    tl.store(lse + row_Q, (m_Q + tl.log2(l_Q)) * LN_2, asked_Q)


@dataclass(frozen=True)
class Launch:
    """Launch parameters: queries and tokens per step, warps, pipeline stages, and programs per multiprocessor."""

    queries: int
    tokens: int
    num_warps: int
    num_stages: int
    programs_per_sm: int

    @classmethod
    def of(cls, n_queries: int, dim: int, dtype: torch.dtype) -> "Launch":
        """Parameters that fit most GPUs (99 KiB of shared memory), and on Hopper do not spill in 16 bits.

        `benchmarks/gpu/attention_kernels.py --sweep` times the alternatives.
        """
        row_bytes, wide = padded(dim) * dtype.itemsize, dtype == torch.float32
        most = 2**14 // row_bytes if wide else 128 if row_bytes <= 256 else 64
        queries = max(16, min(triton.next_power_of_2(n_queries), most))
        if queries == 32 and not wide:
            queries = 64  # one wgmma of four warps; mma with 32 rows is slower, and spills at head_dim 256
        tokens = min(64, 2**14 // row_bytes)
        return cls(queries, tokens, 8 if queries == 128 else 4, 2 if wide else 3, 2)


def attend(
    q_HQD: Tensor, segment: Segment, scaling: float, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """Output (kv_heads, queries, head_dim), rotated back, and log-sum-exp (kv_heads, queries), both fp32.

    Keys may be of any codec of triton.py, values of TurboQuantMSE, Uniform or Identity. Temporary memory is that of the
    splits' outputs, which is bounded by the number of programs and does not grow with the tokens.
    """
    q_HQD, (heads, n_queries, dim) = q_HQD.contiguous(), q_HQD.shape
    device, n_tokens, v_codec = q_HQD.device, segment.key.shape[2], segment.value_codec
    launch = launch or Launch.of(n_queries, dim, q_HQD.dtype)
    run = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    keys = Side.of(segment.key_codec, segment.key, q_HQD.dtype, q_HQD.dtype)
    # The dtype in which the kernel multiplies values (`weights_dtype`).
    token_dtype = torch.float32 if q_HQD.dtype == torch.float32 else torch.float16
    values = Side.of(v_codec, segment.value, q_HQD.dtype, token_dtype)
    factor = scaling / log(2)  # the kernel uses base-2 exponentials
    if isinstance(segment.key_codec, TurboQuantMSE):
        q_HQD = segment.key_codec.rotate(q_HQD.float(), segment.key.tensors).to(q_HQD.dtype)
        factor *= dim**-0.5
    n_tiles = triton.cdiv(n_queries, launch.queries)
    wanted = max(1, launch.programs_per_sm * n_multiprocessors(device) // (heads * n_tiles))
    split_tokens = triton.cdiv(triton.cdiv(n_tokens, wanted), launch.tokens) * launch.tokens
    n_splits = triton.cdiv(n_tokens, split_tokens)
    parts = q_HQD.new_empty((n_splits, heads, n_queries, dim), dtype=torch.float32)
    part_lse = q_HQD.new_empty((n_splits, heads, n_queries), dtype=torch.float32)
    strides = (x.stride()[1:3] for x in (keys.codes, keys.scale, values.codes, values.scale))
    _attend_splits[(n_tiles, n_splits, heads)](
        q_HQD, keys.codes, keys.scale, keys.table, values.codes, values.scale, values.table, parts, part_lse,
        *chain.from_iterable(strides), n_queries, n_tokens, split_tokens, factor,
        DIM=dim, PAD=padded(dim), KEYS=keys.kind, K_BITS=keys.bits, K_BLOCK=keys.block,
        VALUES=values.kind, V_BITS=values.bits, V_BLOCK=values.block,
        QUERIES=launch.queries, TOKENS=launch.tokens, **run,
    )  # fmt: skip
    out_HQD, lse_HQ = torch.empty_like(parts[0]), torch.empty_like(part_lse[0])
    rotated, matrix, matrix_scale = isinstance(v_codec, TurboQuantMSE), parts, 1.0
    if isinstance(v_codec, TurboQuantMSE):
        matrix = sign_matrix(dim, v_codec.seed if v_codec.signs else None, device)
        matrix_scale = ((dim & -dim) * dim) ** -0.5
    _merge_splits[(triton.cdiv(n_queries, MERGED_ROWS), heads)](
        parts, part_lse, matrix, out_HQD, lse_HQ, n_queries, n_splits, matrix_scale,
        DIM=dim, PAD=padded(dim), ROWS=MERGED_ROWS, ROTATED=rotated, num_warps=max(4, padded(dim) // 32),
    )  # fmt: skip
    return out_HQD, lse_HQ
