"""Attention of each agent to its own tokens: masked, in chunks, merged with its attention to the prefix.

torch's scaled_dot_product_attention does not return the log-sum-exp, which merging needs.
"""

import torch
from torch import Tensor

from polykv import kernels
from polykv.attention.scratch import scratch
from polykv.attention.softmax import OnlineSoftmax, capped, merge
from polykv.codecs.identity import Identity
from polykv.segment import Segment

MAX_TOKENS = 512  # keys in a chunk
CHUNK_BYTES = 2 << 20  # fp32 copies of keys or values, and scores, on a CPU (see `scratch`)


def attend_suffix(
    q_BHRD: Tensor,
    own: Segment,
    mask_B1QT: Tensor,
    scaling: float,
    softcap: float | None = None,
    other: tuple[Tensor, Tensor] | None = None,
    backend: str = kernels.TORCH,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, R, D) and log-sum-exp of the scaled scores (B, H, R), both fp32.

    H counts kv heads; a row R is (query token, query head of the group), token-major. `own` are the agents' tokens
    (B, H, T, D). `mask_B1QT` is True where a query token sees a key. Rows that see no key give 0 and -inf. `softcap`:
    see `capped`. `other` is what attention of the same rows to other keys gave; the result is then that of attention to
    all of them.
    """
    if softcap is None:
        done = kernels.attend_suffix(q_BHRD, own, mask_B1QT, scaling, other, backend)
        if done is not None:
            return done
    alone = _attend_torch(q_BHRD, own, mask_B1QT, scaling, softcap)
    return alone if other is None else merge(alone, other)


def _attend_torch(
    q_BHRD: Tensor,
    own: Segment,
    mask_B1QT: Tensor,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`attend_suffix` in plain torch, without merging."""
    batch, heads, n_rows, dim = q_BHRD.shape
    n_queries, n_tokens = mask_B1QT.shape[2:]
    group = n_rows // n_queries
    q_BHRD = q_BHRD.float() * scaling
    softmax = OnlineSoftmax(q_BHRD.shape[:3], dim, q_BHRD.device)
    # Scores of one query token, or the fp32 copies of one key and one value, whichever is larger.
    stored = own.key.tensors["values"].dtype if isinstance(own.key_codec, Identity) else None
    copied = 0 if stored == torch.float32 else 2 * dim
    per_token = batch * heads * max(group, copied) * 4
    n_bytes = scratch(CHUNK_BYTES, q_BHRD.device)
    step = min(max(n_bytes // per_token, 1), MAX_TOKENS, n_tokens)
    block = max(n_bytes // (batch * heads * group * step * 4), 1)
    for start in range(0, n_tokens, step):
        stop = min(start + step, n_tokens)
        keys, values = (
            codec.unrotate(codec.decode_rotated(packed.narrow(start, stop)), packed.tensors)
            for codec, packed in ((own.key_codec, own.key), (own.value_codec, own.value))
        )
        for first in range(0, n_queries, block):
            last = min(first + block, n_queries)
            scores = capped(q_BHRD[:, :, first * group : last * group] @ keys.mT, softcap)
            hidden_B1Q1T = ~mask_B1QT[:, :, first:last, start:stop].unsqueeze(3)
            scores.unflatten(2, (-1, group)).masked_fill_(hidden_B1Q1T, -torch.inf)
            softmax.add(scores, values, first * group, last * group)
    return softmax.result()
