"""Exact match of the reference model's answers, and the restated values of a document.

Exact match is teacher-forced: all tokens of the correct answer and the end-of-turn token have to be the model's most
probable ones, which is equivalent to a correct greedy answer. Problems are matched by their whole solution, including
all steps.
"""

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from polykv import tokens
from polykv.reference.documents import Question
from polykv.reference.vocabulary import MONTHS, PAD, SURNAMES

VERSION = 1  # of exact match and restated values


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text, without special tokens."""
    return tokens.encode(tokenizer, text)[0].tolist()


@torch.no_grad()
def exact_matches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    cache: DynamicCache | None = None,
) -> list[bool]:
    """Whether each question is answered exactly after a cache of batch size 1, which is modified (None: no cache)."""
    asked = [encode(tokenizer, question.prompt) for question in questions]
    answers = [encode(tokenizer, q.answer) + [tokenizer.eos_token_id] for q in questions]
    length = max(len(a) + len(b) for a, b in zip(asked, answers, strict=True))
    pad = tokenizer.convert_tokens_to_ids(PAD)
    rows = [(a + b + [pad] * length)[:length] for a, b in zip(asked, answers, strict=True)]
    ids_NT = torch.tensor(rows, device=model.device)
    if cache is not None:
        cache.batch_repeat_interleave(len(rows))
    right_NT = model(ids_NT, past_key_values=cache).logits[:, :-1].argmax(-1) == ids_NT[:, 1:]
    return [
        bool(right_NT[i, len(a) - 1 : len(a) + len(b) - 1].all())
        for i, (a, b) in enumerate(zip(asked, answers, strict=True))
    ]


def restated_values(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Indices of the scored tokens `ids[1:]` that are values stated before."""
    words = tokenizer.convert_ids_to_tokens(ids)
    return [i for i, pair in enumerate(zip(words[:-1], words[1:], strict=True)) if is_value(*pair)]


def is_value(last: str, word: str) -> bool:
    """Whether a word of a restated fact is (part of) the fact's value, given the word before it."""
    return last.endswith((" is", " number", " starts")) or last in MONTHS or word in SURNAMES
