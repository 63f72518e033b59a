"""Attention of stacked queries to a compressed prefix, chunk by chunk: the reference implementation, in torch.

The queries of all agents are stacked, so each chunk of the prefix is decoded once for all of them. Queries are rotated
into the domain in which a codec keeps its codes and outputs are rotated back once (sum_t p_t R^T v_t =
R^T sum_t p_t v_t). At any time only one chunk of one layer exists in full precision.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from math import lcm

from torch import Tensor, inf

from polykv import kernels
from polykv.attention.scratch import scratch
from polykv.attention.softmax import OnlineSoftmax, capped, merge
from polykv.codecs.base import Codec, Packed
from polykv.codecs.rotated import Rotated
from polykv.segment import Segment

# Bytes of temporaries per chunk on a CPU (see `scratch`): of a decoding codec, which takes at most BYTES_PER_VALUE for
# codes, indices and fp32 values together, and of the scores of a block of queries.
DECODE_BYTES = 3 << 20
BYTES_PER_VALUE = 16
SCORE_BYTES = 1 << 20


def attend_prefix(
    q_HQD: Tensor,
    segments: Sequence[Segment],
    scaling: float,
    backend: str,
    seen_QT: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query to the tokens of the segments.

    `q_HQD` is (kv_heads, queries, head_dim) in any float dtype, where queries are all agents x query tokens x query
    heads that share a kv head. `seen_QT` is True where a query sees a token of the segments, in their order; None: all
    do. `softcap`: see `capped`. Returns the output (kv_heads, queries, head_dim) and the log-sum-exp of the scaled
    scores (kv_heads, queries), both fp32. Temporary memory does not grow with the prefix.
    """
    parts, start = [], 0
    for segment in segments:
        stop = start + segment.n_tokens
        seen = None if seen_QT is None else seen_QT[:, start:stop]
        parts.append(_attend(q_HQD, segment, scaling, backend, seen, softcap))
        start = stop
    return reduce(merge, parts)


def _attend(
    q_HQD: Tensor,
    segment: Segment,
    scaling: float,
    backend: str,
    seen_QT: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`attend_prefix` for one segment.

    The transforms in front of the codecs (channels, Rotated) are applied to queries and outputs here, so that kernels
    need to know the inner codecs only. Kernels neither mask nor cap: for those segments the torch code is used.
    """
    key, value, channels = segment.key_codec, segment.value_codec, segment.channels
    inner = replace(segment, key_codec=_inner(key), value_codec=_inner(value))
    q = q_HQD if channels is None else q_HQD.float() * channels.spread[0].float()
    q = key.turned(q) if isinstance(key, Rotated) else q
    # q.k = (q spread).((k - mean) / spread) + q.mean. The last term is the same for all tokens of the segment, so
    # it only shifts the segment's log-sum-exp, unless the scores are capped.
    shift_HQ = None
    if channels is not None:
        shift_HQ = scaling * (q_HQD.float() @ channels.mean[0].float().mT).squeeze(-1)
    plain = seen_QT is None and softcap is None
    done = kernels.attend(q, inner, scaling, backend) if plain else None
    if done is None:
        before_HQ = None if softcap is None else shift_HQ
        done = attend_torch(q, inner, scaling, seen_QT, softcap, before_HQ)
    if shift_HQ is None and not isinstance(value, Rotated):
        return done
    out_HQD, lse_HQ = done
    if isinstance(value, Rotated):
        out_HQD = value.turned_back(out_HQD)
    if shift_HQ is not None and softcap is None:
        lse_HQ = lse_HQ + shift_HQ
    return out_HQD, lse_HQ


def _inner(codec: Codec) -> Codec:
    return codec.codec if isinstance(codec, Rotated) else codec


def attend_torch(
    q_HQD: Tensor,
    segment: Segment,
    scaling: float,
    seen_QT: Tensor | None = None,
    softcap: float | None = None,
    shift_HQ: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend_prefix` for one segment, in plain torch; `shift_HQ` is added to the scores before they are capped."""
    key_codec, value_codec = segment.key_codec, segment.value_codec
    n_queries = q_HQD.shape[1]
    q_BHQD = key_codec.rotate(q_HQD.unsqueeze(0).float() * scaling, segment.key.tensors)
    softmax: OnlineSoftmax | None = None
    first = 0
    for key, value in chunks(segment, scratch(DECODE_BYTES, q_HQD.device)):
        last = first + key.shape[2]
        v_BHTD = value_codec.decode_rotated(value)
        if softmax is None:
            softmax = OnlineSoftmax(q_BHQD.shape[:3], v_BHTD.shape[3], q_HQD.device)
        for start, stop in _query_blocks(n_queries, key, scratch(SCORE_BYTES, q_HQD.device)):
            scores = key_codec.scores(q_BHQD[:, :, start:stop], key)
            if shift_HQ is not None:
                scores += shift_HQ[:, start:stop, None]
            scores = capped(scores, softcap)
            if seen_QT is not None:
                scores.masked_fill_(~seen_QT[start:stop, first:last], -inf)
            softmax.add(scores, v_BHTD, start, stop)
        first = last
    out_BHQD, lse_BHQ = softmax.result()
    return value_codec.unrotate(out_BHQD, segment.value.tensors).squeeze(0), lse_BHQ.squeeze(0)


def chunks(segment: Segment, n_bytes: int) -> Iterator[tuple[Packed, Packed]]:
    """Keys and values of consecutive tokens, in whole groups, that decode to about `n_bytes` each."""
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
