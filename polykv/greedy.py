"""Greedy decoding without a model's generation_config.

`generate(do_sample=False)` still applies the model's generation_config: repetition penalties (over ids of the prefix,
which a cache does not have), suppressed tokens, minimum lengths. Passing another GenerationConfig does not help, since
transformers fills its unset values from the model's.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from polykv.attention.cache import CascadeCache
from polykv.chat import end_of_turn
from polykv.supported import check_padding, check_rope


def greedy(
    model: PreTrainedModel,
    cache: Cache,
    prompts: Sequence[Tensor],
    limit: int,
    tokenizer: Any = None,
    stops: Sequence[int] | None = None,
    until: Sequence[str] = (),
) -> list[Tensor]:
    """Generate greedily after each row's prompt; ids (tokens,) per row, up to an end token or `limit` tokens.

    Args:
        cache: a row per prompt, all of whose tokens the prompt attends to; grows by all tokens but the last.
        prompts: ids (tokens,) per row.
        tokenizer: if given, its end tokens count too (`end_tokens`).
        stops: the end tokens; None: those of the model and the tokenizer. Without any, answers have `limit` tokens.
        until: texts, which may be special tokens; the token that completes one in an answer ends it as well.

    Raises:
        PolyKVError: prompts of different lengths for a model whose outputs depend on padding, or rotary frequencies
            that change along the tokens.
    """
    n_past, longest = cache.get_seq_length(), max(len(ids_T) for ids_T in prompts)
    check_rope(model.config, n_past, n_past + longest + limit, "an answer")
    decoding = Decoding(model, cache, prompts)
    stops = end_tokens(model, tokenizer) if stops is None else stops
    stops_S = torch.tensor(stops, dtype=torch.long, device=model.device)
    written: list[Tensor] = []
    ends: list[Tensor] = []  # of each row, whether it ends with this step
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    while len(written) < limit and not ended_B.all():
        written.append(decoding.step())
        ends.append(torch.isin(written[-1], stops_S))
        if until:
            said = tokenizer.batch_decode(torch.stack(written, dim=1))
            ends[-1] |= ended_B.new_tensor([any(text in one for text in until) for one in said])
        ended_B |= ends[-1]
    # Finished rows keep decoding until all rows have finished; their further tokens are discarded.
    rows_BT = torch.stack(written, dim=1)
    is_end_BT = torch.stack(ends, dim=1).long()
    n_ended_BT = is_end_BT.cumsum(-1) - is_end_BT
    answers = zip(rows_BT, n_ended_BT == 0, strict=True)
    return [ids_T[kept_T].cpu() for ids_T, kept_T in answers]


class Decoding:
    """Greedy decoding of a batch, step by step. Prompts, and caches of different lengths, are padded on the left.

    Args:
        cache: a row per prompt; grows by the tokens that have been read, which are all but those of the last step.
        prompts: ids (tokens,) per row.
        lengths: tokens that each row of the cache has, its last ones; None: all of them.

    Raises:
        PolyKVError: rows of different lengths for a model whose outputs depend on padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        prompts: Sequence[Tensor],
        lengths: Sequence[int] | None = None,
    ) -> None:
        self._model, self._cache = model, cache
        n_past, longest = cache.get_seq_length(), max(len(ids_T) for ids_T in prompts)
        ids_BT = torch.stack([F.pad(ids_T, (longest - len(ids_T), 0)) for ids_T in prompts])
        self._ids_BT = ids_BT.to(model.device)  # to be read next
        mask_BT = self._ids_BT.new_ones(len(prompts), n_past + longest)
        for row, ids_T in enumerate(prompts):
            mask_BT[row, : n_past - lengths[row] if lengths else 0] = 0
            mask_BT[row, n_past : n_past + longest - len(ids_T)] = 0
        self._mask_BT = mask_BT  # of the cache and of `_ids_BT`
        self._last = torch.tensor([-1], device=model.device)
        # By default positions count all tokens of the cache, padding included.
        self._padded = not mask_BT.all()
        if self._padded:
            # Padding before all tokens of a row changes no distance between them.
            between = bool((mask_BT[:, 1:] < mask_BT[:, :-1]).any())
            check_padding(model.config, unshared=between and not isinstance(cache, CascadeCache))

    @torch.no_grad()
    def step(self) -> Tensor:
        """The next token of each row, (rows,)."""
        positions_BT = (self._mask_BT.cumsum(-1) - 1).clamp_min(0)[:, -self._ids_BT.shape[1] :]
        logits_B1V = self._model(
            input_ids=self._ids_BT,
            attention_mask=self._mask_BT,
            past_key_values=self._cache,
            # As an index, since the slice that a number gives is not contiguous: torch would copy the output layer's
            # weights once per row.
            logits_to_keep=self._last,
            **({"position_ids": positions_BT} if self._padded else {}),
        ).logits
        self._ids_BT = logits_B1V[:, -1:].argmax(-1).to(self._model.device)
        self._mask_BT = F.pad(self._mask_BT, (0, 1), value=1)
        return self._ids_BT[:, 0]

    def cache_of(self, row: int, n_tokens: int) -> DynamicCache:
        """The first `n_tokens` tokens of a row without padding, or as many as have been read."""
        (places_T,) = self._mask_BT[row, : self._cache.get_seq_length()].nonzero(as_tuple=True)
        places_T = places_T[:n_tokens]
        layers = self._cache.layers
        return DynamicCache(
            [tuple(x[row : row + 1, :, places_T] for x in (one.keys, one.values)) for one in layers]
        )

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        rows_B = torch.tensor(rows, dtype=torch.long, device=self._model.device)
        self._cache.batch_select_indices(rows_B)
        self._ids_BT, self._mask_BT = self._ids_BT[rows_B], self._mask_BT[rows_B]


def end_tokens(model: PreTrainedModel, tokenizer: Any = None) -> list[int]:
    """Ids of the tokens that end an answer, possibly none.

    A GGUF model has no generation_config; its tokenizer has an end-of-sequence token, and its chat template an
    end-of-turn token, which may differ.
    """
    stops = model.generation_config.eos_token_id
    found = set(stops if isinstance(stops, list) else [stops])
    if tokenizer is not None:
        found |= {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    return sorted(found - {None})
