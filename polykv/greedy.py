"""Greedy answers: each next token is the likeliest one, whatever else the hub recommends for a model.

A loop of our own, because `generate(do_sample=False)` goes on applying the model's generation_config: penalties of
repetition (over the prefix's ids, which a cache does not have), suppressed tokens, least lengths. A
GenerationConfig passed to it does not help, whose unset values transformers takes from the model's.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel

from polykv.chat import end_of_turn
from polykv.supported import check_padding, check_rope


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    cache: Cache,
    prompts: Sequence[Tensor],
    limit: int,
    tokenizer: Any = None,
) -> list[Tensor]:
    """The ids (tokens,) that follow each row's prompt, up to an end token or `limit` of them.

    End tokens are those of the model and, where one is given, of the tokenizer (`end_tokens`).
    Each prompt (tokens,) continues its row of the cache, every token of which it sees. Afterwards the cache
    holds all but the last token.

    Raises:
        PolyKVError: prompts of different lengths for a model whose answers depend on their padding, or rotary
            frequencies that change on the way.
    """
    n_past, longest = cache.get_seq_length(), max(len(ids_T) for ids_T in prompts)
    check_rope(model.config, n_past, n_past + longest + limit, "an answer")
    ids_BT = torch.stack([F.pad(ids_T, (longest - len(ids_T), 0)) for ids_T in prompts])
    ids_BT = ids_BT.to(model.device)
    mask_BT = ids_BT.new_ones(len(prompts), n_past + longest)
    for row, ids_T in enumerate(prompts):
        mask_BT[row, n_past : n_past + longest - len(ids_T)] = 0
    # Models count positions in the cache, padding among them.
    padded = not mask_BT.all()
    if padded:
        check_padding(model.config)
    stops = torch.tensor(end_tokens(model, tokenizer), device=model.device)
    written: list[Tensor] = []
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    while len(written) < limit and not ended_B.all():
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)[:, -ids_BT.shape[1] :]
        logits_B1V = model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            past_key_values=cache,
            logits_to_keep=1,
            **({"position_ids": positions_BT} if padded else {}),
        ).logits
        ids_BT = logits_B1V[:, -1:].argmax(-1).to(model.device)
        written.append(ids_BT)
        ended_B |= torch.isin(ids_BT[:, 0], stops)
        mask_BT = F.pad(mask_BT, (0, 1), value=1)
    # A row that has ended is fed on until all have; what it says then is no answer.
    rows_BT = torch.cat(written, dim=1)
    is_end_BT = torch.isin(rows_BT, stops).long()
    n_ended_BT = is_end_BT.cumsum(-1) - is_end_BT
    answers = zip(rows_BT, n_ended_BT == 0, strict=True)
    return [ids_T[kept_T].cpu() for ids_T, kept_T in answers]


def end_tokens(model: PreTrainedModel, tokenizer: Any = None) -> list[int]:
    """The tokens that end an answer: one, several or none.

    A model read from GGUF has no generation_config of its own. Its tokenizer knows the end of a sequence, and its
    chat template that of a turn, which need not be the same.
    """
    stops = model.generation_config.eos_token_id
    found = set(stops if isinstance(stops, list) else [stops])
    if tokenizer is not None:
        found |= {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    return sorted(found - {None})
