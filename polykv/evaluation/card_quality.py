"""Divergence and perplexity of a receiver that continues a text from a card.

The card holds the beginning of the text. The receiver reads its own turn and the scored text in one forward pass, once
from the card and once from the uncompressed cache, in the same read mode; the two are compared token by token
(polykv/evaluation/continuation.py). The transport of a card does not matter, as it does not change the content.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from polykv.attention.cascade import attend_in_place
from polykv.errors import PolyKVError
from polykv.evaluation.continuation import Comparison, compare, score_rest
from polykv.evaluation.ttft import seal
from polykv.handoff.card import CacheCard
from polykv.handoff.policy import Policy
from polykv.pool import SharedKVPool, prefill
from polykv.recipe import load_recipe

# Keys: (policy, or None for the uncompressed cache; read mode).
Scored = dict[tuple[str | None, str], Comparison]


@torch.no_grad()
def score_cards(
    model: PreTrainedModel,
    tokenizer: Any,
    ids_T: Tensor,
    n_known: int,
    n_scored: int,
    policies: Iterable[Policy],
    readers: Sequence[str],
    budget_bits: float,
    backend: str = "auto",
) -> Scored:
    """Scores of the last `n_scored` tokens of a text, read from a card against read from the uncompressed cache.

    The entries (None, reader) are the cost of a read mode itself: the uncompressed cache, against `dequantize`.

    Args:
        ids_T: (tokens,) of the text: `n_known` in the card, the receiver's own turn, the scored ones.

    Raises:
        PolyKVError: the receiver's turn, from which the first scored token is predicted, would be empty.
    """
    if not 0 < n_scored < len(ids_T) - n_known:
        raise PolyKVError(
            f"{len(ids_T)} tokens with {n_known} in the card leave too few to score {n_scored}; "
            "give a longer text"
        )
    known_T, rest_BT = ids_T[:n_known], ids_T[None, n_known:]
    scored_BT = rest_BT[:, -n_scored - 1 :]
    cache = prefill(model, known_T[None])
    full = SharedKVPool.from_cache(cache, load_recipe("full"), backend)

    def score(reader: str, kept: SharedKVPool | CacheCard) -> Tensor:
        in_place = reader == "in_place"
        received = kept.reader(1) if in_place else kept.dequantize()
        with attend_in_place(model) if in_place else nullcontext():
            return score_rest(model, received, rest_BT)[-n_scored:]

    full_TV = {reader: score(reader, full) for reader in {"dequantize", *readers}}
    found: dict[tuple[str | None, str], Comparison] = {
        (None, reader): compare(full_TV["dequantize"], full_TV[reader], scored_BT)
        for reader in readers
        if reader != "dequantize"
    }
    for policy in policies:
        card = seal(model, tokenizer, cache, known_T, policy, budget_bits, backend)
        for reader in readers:
            other_TV = score(reader, card)
            found[policy.name, reader] = compare(full_TV[reader], other_TV, scored_BT)
    return found
