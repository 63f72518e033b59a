"""Attention received, surprisal and entropy of a sender's tokens, computed by reading them once more.

Attention weights are recomputed and summed in chunks of queries next to SDPA, so that no T x T matrix exists. The last
window takes a forward pass over that window, the whole text another prefill.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from polykv.attention.observe import observe
from polykv.supported import check_attention, check_every_token, check_rope

CHUNK = 256  # tokens of one forward pass
SCORES = 1 << 22  # attention scores in memory at a time
# Tokens whose probabilities are in memory at a time: mapping the memory for those of a whole chunk takes twice as long
# as computing them.
ROWS = 16


class Reading(NamedTuple):
    """What reading tokens [start, T) found out about all T tokens; (T,) float64 on the CPU.

    Attributes:
        received_T: attention probability received, summed over layers, heads and the queries that were read.
        squared_T: the same sum of squared probabilities.
        surprisal_T: -log p of the token in nats; NaN up to `start`, which nothing read predicts.
        entropy_T: entropy in nats of the prediction made after reading the token; NaN before `start`.
    """

    received_T: Tensor
    squared_T: Tensor
    surprisal_T: Tensor
    entropy_T: Tensor


def add_attention(sums_2T: Tensor, q_HQD: Tensor, k_hTD: Tensor, scaling: float) -> None:
    """Add what the keys of one layer receive from causal queries, the last Q of the T tokens.

    `sums_2T`: sums of attention probabilities, and of their squares.
    """
    n_queries, n_keys = q_HQD.shape[1], k_hTD.shape[1]
    q_hgQD = q_HQD.unflatten(0, (k_hTD.shape[0], -1))
    positions_T = torch.arange(n_keys, device=k_hTD.device)
    step = max(1, SCORES // (q_HQD.shape[0] * n_keys))
    for start in range(0, n_queries, step):
        part_hgqD = q_hgQD[:, :, start : start + step]
        scores = (part_hgqD.flatten(1, 2) @ k_hTD.transpose(1, 2)).float() * scaling
        scores_hgqT = scores.unflatten(1, part_hgqD.shape[1:3])
        own_q = n_keys - n_queries + start + torch.arange(part_hgqD.shape[2], device=k_hTD.device)
        scores_hgqT.masked_fill_(positions_T > own_q[:, None], -torch.inf)
        probs_hgqT = scores_hgqT.softmax(-1)
        sums_2T[0, :n_keys] += probs_hgqT.sum((0, 1, 2), dtype=torch.float64)
        sums_2T[1, :n_keys] += probs_hgqT.square_().sum((0, 1, 2), dtype=torch.float64)


def add_nats(nats_2T: Tensor, ids_T: Tensor, first: int, logits_TV: Tensor) -> None:
    """Set the surprisal of the tokens that these logits predict, and the entropy after those that they follow.

    `first`: the place of the token that the first logits follow. `nats_2T`: surprisals and entropies.
    """
    last = first + len(logits_TV)
    labels = ids_T[first + 1 : last + 1]
    log_probs = logits_TV.float().log_softmax(-1)
    nats_2T[0, first + 1 : last + 1] = -log_probs[: len(labels)].gather(1, labels[:, None])[:, 0]
    nats_2T[1, first:last] = torch.special.entr(log_probs.exp_()).sum(-1)


@torch.no_grad()
def replay(model: Any, cache: Cache, ids_T: Tensor, start: int) -> Reading:
    """Read tokens [start, T) again after the cached tokens [0, start); `cache` is not modified.

    Raises:
        PolyKVError: the model's attention cannot be replaced, or its rotary frequencies change along the tokens.
    """
    n_tokens = len(ids_T)
    check_attention(model.config, "use a policy without signals of attention or surprisal")
    check_every_token(model.config, "reading tokens again")
    check_rope(model.config, start or min(CHUNK, n_tokens), n_tokens, "reading the tokens again")
    past = DynamicCache(config=model.config)
    if start:
        past = DynamicCache(
            (layer.keys[:, :, :start], layer.values[:, :, :start]) for layer in cache.layers
        )
    ids_T = ids_T.to(model.device)
    nats_2T = torch.full((2, n_tokens), torch.nan, dtype=torch.float64, device=model.device)
    sums_2T = torch.zeros((2, n_tokens), dtype=torch.float64, device=model.device)

    def see(module: Any, query: Tensor, key: Tensor, scaling: float) -> None:
        add_attention(sums_2T, query[0], key[0], scaling)

    with observe(model, see):
        for i in range(start, n_tokens, CHUNK):
            j = min(i + CHUNK, n_tokens)
            logits_TV = model(input_ids=ids_T[None, i:j], past_key_values=past).logits[0]
            for first, rows in zip(range(i, j, ROWS), logits_TV.split(ROWS), strict=True):
                add_nats(nats_2T, ids_T, first, rows)
    return Reading(*sums_2T.cpu(), *nats_2T.cpu())
