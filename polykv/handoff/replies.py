"""Greedy replies of several agents in one batch, each of whom continues a cache of its own length."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from polykv.greedy import Decoding, end_tokens
from polykv.supported import check_every_token

# Finished rows keep decoding, and their further tokens are discarded, until so large a part of the batch has finished:
# to leave the batch, the caches of the others are copied.
LEAVING = 0.25


@torch.no_grad()
def replies(
    model: PreTrainedModel,
    tokenizer: Any,
    caches: Sequence[Cache],
    prompts: Sequence[Tensor],
    limits: Sequence[int],
    on_reply: Callable[[], None] = lambda: None,
) -> list[tuple[Tensor, Cache]]:
    """For each row the ids (tokens,) of its reply, and its cache with prompt and reply, the last token included.

    Args:
        caches: of one row each, all of them empty or none.
        prompts: ids (tokens,) that each row reads first.
        limits: tokens that each row may write.
        on_reply: called after each finished reply.

    Raises:
        PolyKVError: rows of different lengths for a model whose outputs depend on padding.
    """
    lengths = [cache.get_seq_length() for cache in caches]
    decoding = Decoding(model, _stacked(model, caches), prompts, lengths)
    stops = set(end_tokens(model, tokenizer))
    written: list[list[int]] = [[] for _ in prompts]
    ended: set[int] = set()
    found: dict[int, tuple[Tensor, Cache]] = {}
    rows = list(range(len(prompts)))  # of the batch -> number of the prompt
    while rows:
        for number, token in zip(rows, decoding.step().tolist(), strict=True):
            if number in ended:
                continue
            written[number].append(token)
            if token in stops or len(written[number]) == limits[number]:
                ended.add(number)
                on_reply()
        going = [row for row, number in enumerate(rows) if number not in ended]
        if len(going) > (1 - LEAVING) * len(rows):
            continue
        for row, number in enumerate(rows):
            if number in ended:
                n_tokens = lengths[number] + len(prompts[number]) + len(written[number])
                own, reply_T = decoding.cache_of(row, n_tokens), torch.tensor(written[number])
                if own.get_seq_length() < n_tokens:  # its last token has not been read
                    model(input_ids=reply_T[None, -1:].to(model.device), past_key_values=own)
                found[number] = reply_T, own
        decoding.keep(going)
        rows = [rows[row] for row in going]
    return [found[number] for number in range(len(prompts))]


def _stacked(model: PreTrainedModel, caches: Sequence[Cache]) -> DynamicCache:
    """One cache of all rows, padded on the left."""
    longest = max(cache.get_seq_length() for cache in caches)
    check_every_token(model.config, "a batch of replies")
    if not longest:
        return DynamicCache(config=model.config)
    return DynamicCache(
        [
            tuple(
                torch.cat([F.pad(x, (0, 0, longest - x.shape[2], 0)) for x in rows])
                for rows in zip(*((one.keys, one.values) for one in layer), strict=True)
            )
            for layer in zip(*(cache.layers for cache in caches), strict=True)
        ]
    )
