"""Answers of agents that ask different questions of one pool: log-probabilities of right and wrong ones.

All questions are read in one batch, padded on the left; then each candidate answer is read after its question and
dropped again.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedModel

from polykv.attention.cache import CascadeCache
from polykv.documents import Question
from polykv.supported import check_attends, check_padding
from polykv.tokens import last_places

VERSION = 1  # of candidates and their log-probabilities


def candidates(questions: Sequence[Question], n_wrong: int) -> list[list[str]]:
    """For each question its right answer, then those to the `n_wrong` next questions that have another one.

    They are all in the document, so that knowing what an answer looks like does not help. Questions with fewer others
    have fewer candidates.
    """
    answers = [question.answer for question in questions]
    found = []
    for i, right in enumerate(answers):
        others = dict.fromkeys(answers[i + 1 :] + answers[:i])
        found.append([right, *(other for other in others if other != right)][: n_wrong + 1])
    return found


def as_continued(answer: str) -> str:
    """The text of an answer after its prompt: apart from it by a space."""
    return answer if answer[:1].isspace() else f" {answer}"


@torch.no_grad()
def log_probs(
    model: PreTrainedModel,
    cache: Cache,
    questions: Sequence[Tensor],
    answers: Sequence[Sequence[Tensor]],
) -> list[list[float]]:
    """Log-probability (nats, all tokens of the answer) of each candidate answer after its question.

    Args:
        cache: a row per question; grows by the questions. A read mode other than the model's own takes its context.
        questions: ids (tokens,) of each.
        answers: ids (tokens,) of the candidates of each question.

    Raises:
        PolyKVError: a model whose outputs depend on padding, or whose states cannot drop an answer.
    """
    n_past, longest = cache.get_seq_length(), max(map(len, questions))
    check_attends(model.config, "reading one answer after another")
    check_padding(model.config, unshared=n_past > 0 and not isinstance(cache, CascadeCache))
    ids_BT = torch.stack([F.pad(ids_T, (longest - len(ids_T), 0)) for ids_T in questions])
    mask_BT = torch.ones(len(questions), n_past + longest, dtype=torch.long)
    for row, ids_T in enumerate(questions):
        mask_BT[row, n_past : n_past + longest - len(ids_T)] = 0
    first_B1V = _read(model, cache, ids_BT, mask_BT, n_last=1)
    found: list[list[float]] = [[] for _ in questions]
    for number in range(max(map(len, answers))):
        # A question with fewer candidates reads its last one again.
        read = [of[min(number, len(of) - 1)] for of in answers]
        labels_BT = pad_sequence(list(read), batch_first=True).to(first_B1V.device)
        told_BTV = first_B1V
        if n_more := labels_BT.shape[1] - 1:
            mask_more_BT = F.pad(mask_BT, (0, n_more), value=1)
            more_BTV = _read(model, cache, labels_BT[:, :-1], mask_more_BT, n_last=n_more)
            cache.crop(-n_more)
            told_BTV = torch.cat([first_B1V, more_BTV], dim=1)
        own_BT = told_BTV.gather(2, labels_BT.unsqueeze(2)).squeeze(2)
        for row, ids_T in enumerate(read):
            if number < len(answers[row]):
                found[row].append(float(own_BT[row, : len(ids_T)].sum()))
    return found


def _read(
    model: PreTrainedModel, cache: Cache, ids_BT: Tensor, mask_BT: Tensor, n_last: int
) -> Tensor:
    """Log-probabilities (rows, n_last, vocabulary) in fp32 after the last of these tokens."""
    n_tokens = ids_BT.shape[1]
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)[:, -n_tokens:]
    logits_BTV = model(
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        position_ids=positions_BT.to(model.device),
        past_key_values=cache,
        logits_to_keep=last_places(ids_BT, n_last).to(model.device),
    ).logits
    return logits_BTV.float().log_softmax(-1)
