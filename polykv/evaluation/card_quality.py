"""What a receiver loses that gets a card in place of the text: divergence and perplexity on real text.

The card holds the tokens that the receiver does not read itself. The receiver then reads its own turn and the
text that follows in one forward pass, once from the card and once from the uncompressed cache, both by the same
reader, and the two are compared token by token (polykv/evaluation/continuation.py). How a card travels does not
change its content.
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

# By policy (None: the uncompressed cache) and reader.
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
    """By (policy, reader), the last `n_scored` tokens of one text read from a card against the uncompressed cache.

    By (None, reader), what a reader other than `dequantize` costs by itself: the uncompressed cache read by both.

    Args:
        ids_T: (tokens,) of the text: `n_known` that the card holds, the receiver's own turn, the scored ones.

    Raises:
        PolyKVError: no token between the card's and the scored ones, from which the first is predicted.
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
