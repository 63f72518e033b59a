"""What a receiver loses that gets a card in place of the text: divergence and perplexity on real text.

The card holds the tokens that the receiver does not read itself. The receiver then reads its own turn and the
text that follows in one forward pass, once from the card and once from the uncompressed cache, and the two are
compared token by token (polykv/evaluation/continuation.py). How a card travels does not change its content.
"""

import copy
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from polykv.attention.cascade import attend_in_place
from polykv.errors import PolyKVError
from polykv.evaluation import missing
from polykv.evaluation.continuation import Comparison, compare, score_rest, why_not_finite
from polykv.evaluation.statistics import document_interval, interval_name
from polykv.evaluation.ttft import seal
from polykv.handoff.policy import Policy
from polykv.pool import prefill
from polykv.results import Rows

METRICS = {"kl_mean": "nats", "perplexity_delta": "percent"}


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
) -> dict[tuple[str, str], Comparison]:
    """By (policy, reader), the last `n_scored` tokens of one text read from a card against the uncompressed cache.

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
    full_TV = score_rest(model, copy.deepcopy(cache), rest_BT)[-n_scored:]
    found = {}
    for policy in policies:
        card = seal(model, tokenizer, cache, known_T, policy, budget_bits, backend)
        for reader in readers:
            in_place = reader == "cascade"
            received = card.reader() if in_place else DynamicCache(card.decode())
            with attend_in_place(model) if in_place else nullcontext():
                other_TV = score_rest(model, received, rest_BT)[-n_scored:]
            found[policy.name, reader] = compare(full_TV, other_TV, scored_BT)
    return found


@np.errstate(invalid="ignore", over="ignore")  # what is not finite is found by `missing.add`
def add_rows(rows: Rows, comparisons: list[Comparison], **columns: Any) -> None:
    """Mean KL divergence and perplexity delta over all documents, each with its interval.

    Raises:
        PolyKVError: not one token was scored.
    """
    differences = [c.nll - c.nll_full for c in comparisons]
    if not sum(map(len, differences)):
        raise PolyKVError("no token was scored, so nothing can be compared; give more text")
    kl = [c.kl for c in comparisons]
    told = {"why": why_not_finite(comparisons), "n": sum(map(len, kl))}
    told["protocol"] = f"continuation after the card; {interval_name(kl)}"
    interval = document_interval(kl, (0, np.inf))
    missing.add(
        *(rows, "kl_mean", np.concatenate(kl).mean(), METRICS["kl_mean"]),
        ci=interval, **told, **columns,
    )  # fmt: skip
    ends = document_interval(differences)
    missing.add(
        *(rows, "perplexity_delta", _percent(np.concatenate(differences).mean())),
        METRICS["perplexity_delta"],
        ci=ends and (_percent(ends[0]), _percent(ends[1])), **told, **columns,
    )  # fmt: skip


def _percent(mean_difference: float) -> float:
    """The ratio of two perplexities, less 1, from the mean difference of log-probabilities."""
    return 100 * float(np.expm1(mean_difference))
