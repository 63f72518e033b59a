"""Attention received and surprisal of a sender's tokens, computed by reading them once more.

Attention weights are recomputed and summed in chunks of queries next to SDPA, so that no T x T matrix exists. The last
window takes a forward pass over that window, the whole text another prefill.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from polykv.attention.observe import observe
from polykv.supported import check_attention, check_rope

CHUNK = 256  # tokens of one forward pass
SCORES = 1 << 22  # attention scores in memory at a time


def add_attention(received_T: Tensor, q_HQD: Tensor, k_hTD: Tensor, scaling: float) -> None:
    """Add the attention that the keys of one layer receive from causal queries, the last Q of the T tokens."""
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
        received_T[:n_keys] += scores_hgqT.softmax(-1).sum((0, 1, 2), dtype=torch.float64)


@torch.no_grad()
def replay(model: Any, cache: Cache, ids_T: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Read tokens [start, T) again after the cached tokens [0, start); `cache` is not modified.

    Returns the attention received per token and the surprisal in nats (NaN up to `start`), both (T,) in float64 on the
    CPU.

    Raises:
        PolyKVError: the model's attention cannot be replaced, or its rotary frequencies change along the tokens.
    """
    n_tokens = len(ids_T)
    check_attention(model.config, "use a policy without signals of attention or surprisal")
    check_rope(model.config, start or min(CHUNK, n_tokens), n_tokens, "reading the tokens again")
    past = DynamicCache(config=model.config)
    if start:
        past = DynamicCache(
            (layer.keys[:, :, :start], layer.values[:, :, :start]) for layer in cache.layers
        )
    ids_T = ids_T.to(model.device)
    surprisal_T = torch.full((n_tokens,), torch.nan, dtype=torch.float64, device=model.device)
    received_T = torch.zeros(n_tokens, dtype=torch.float64, device=model.device)

    def see(module: Any, query: Tensor, key: Tensor, scaling: float) -> None:
        add_attention(received_T, query[0], key[0], scaling)

    with observe(model, see):
        for i in range(start, n_tokens, CHUNK):
            j = min(i + CHUNK, n_tokens)
            logits_TV = model(input_ids=ids_T[None, i:j], past_key_values=past).logits[0]
            labels = ids_T[i + 1 : j + 1]
            log_probs = logits_TV[: len(labels)].float().log_softmax(-1)
            surprisal_T[i + 1 : j + 1] = -log_probs.gather(1, labels[:, None])[:, 0].double()
    return received_T.cpu(), surprisal_T.cpu()
