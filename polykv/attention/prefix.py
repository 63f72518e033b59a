"""Attention of stacked queries to a compressed prefix, chunk by chunk: the torch path, which defines the truth.

All agents' queries are stacked, so each chunk of the prefix is read once for all of them. Queries rotate into
the domain in which a codec keeps its codes, outputs rotate back once (sum_t p_t R^T v_t = R^T sum_t p_t v_t), and
what of the prefix exists in full precision at any time is one chunk of one layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from math import lcm

from torch import Tensor

from polykv import kernels
from polykv.attention.scratch import scratch
from polykv.attention.softmax import OnlineSoftmax, merge
from polykv.codecs.base import Codec, Packed
from polykv.codecs.rotated import Rotated
from polykv.segment import Segment

# What one chunk's temporaries take, on a CPU (`scratch`): a codec's while it decodes (at most this many bytes a
# value, codes, indices and fp32 values together), and the scores of a block of queries.
DECODE_BYTES = 3 << 20
BYTES_PER_VALUE = 16
SCORE_BYTES = 1 << 20


def attend_prefix(
    q_HQD: Tensor, segments: Sequence[Segment], scaling: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention of every query to every token of the segments; no mask.

    `q_HQD` is (kv_heads, queries, head_dim), in any float dtype: the queries of all agents, their tokens and the
    query heads that share a kv head. Gives the output (kv_heads, queries, head_dim) and the log-sum-exp of the
    scaled scores (kv_heads, queries), both fp32. Temporaries do not grow with the prefix.
    """
    return reduce(merge, (_attend(q_HQD, segment, scaling, backend) for segment in segments))


def _attend(q_HQD: Tensor, segment: Segment, scaling: float, backend: str) -> tuple[Tensor, Tensor]:
    """One segment. What was done to keys and values before a codec falls to queries and outputs: kernels see the
    codec alone.
    """
    key, value, channels = segment.key_codec, segment.value_codec, segment.channels
    inner = replace(segment, key_codec=_inner(key), value_codec=_inner(value))
    q = q_HQD if channels is None else q_HQD.float() * channels.spread[0].float()
    q = key.turned(q) if isinstance(key, Rotated) else q
    done = kernels.attend(q, inner, scaling, backend)
    done = attend_torch(q, inner, scaling) if done is None else done
    if channels is None and not isinstance(value, Rotated):
        return done
    out_HQD, lse_HQ = done
    if isinstance(value, Rotated):
        out_HQD = value.turned_back(out_HQD)
    if channels is not None:
        # q.k = (q spread).((k - mean) / spread) + q.mean, and the last is the same for all tokens: it moves no
        # weight within the segment, only the segment's against others.
        lse_HQ = lse_HQ + scaling * (q_HQD.float() @ channels.mean[0].float().mT).squeeze(-1)
    return out_HQD, lse_HQ


def _inner(codec: Codec) -> Codec:
    return codec.codec if isinstance(codec, Rotated) else codec


def attend_torch(q_HQD: Tensor, segment: Segment, scaling: float) -> tuple[Tensor, Tensor]:
    """`attend_prefix` for one segment, in plain torch."""
    key_codec, value_codec = segment.key_codec, segment.value_codec
    n_queries = q_HQD.shape[1]
    q_BHQD = key_codec.rotate(q_HQD.unsqueeze(0).float() * scaling, segment.key.tensors)
    softmax: OnlineSoftmax | None = None
    for key, value in _chunks(segment, scratch(DECODE_BYTES, q_HQD.device)):
        v_BHTD = value_codec.decode_rotated(value)
        if softmax is None:
            softmax = OnlineSoftmax(q_BHQD.shape[:3], v_BHTD.shape[3], q_HQD.device)
        for start, stop in _query_blocks(n_queries, key, scratch(SCORE_BYTES, q_HQD.device)):
            softmax.add(key_codec.scores(q_BHQD[:, :, start:stop], key), v_BHTD, start, stop)
    out_BHQD, lse_BHQ = softmax.result()
    return value_codec.unrotate(out_BHQD, segment.value.tensors).squeeze(0), lse_BHQ.squeeze(0)


def _chunks(segment: Segment, n_bytes: int) -> Iterator[tuple[Packed, Packed]]:
    _, heads, n_tokens, dim = segment.key.shape
    group = lcm(segment.key.group, segment.value.group)
    tokens = n_bytes // (heads * dim * BYTES_PER_VALUE)
    step = max(tokens // group, 1) * group
    for start in range(0, n_tokens, step):
        stop = min(start + step, n_tokens)
        yield segment.key.narrow(start, stop), segment.value.narrow(start, stop)


def _query_blocks(n_queries: int, key: Packed, n_bytes: int) -> Iterator[tuple[int, int]]:
    _, heads, n_tokens, _ = key.shape
    block = max(n_bytes // (heads * n_tokens * 4), 1)
    for start in range(0, n_queries, block):
        yield start, min(start + block, n_queries)
