"""Two tests of the reference model on generated documents: exact match of answers, and the restated values of a text.

Exact match uses teacher forcing: an answer counts if each of its tokens, and the end-of-turn token after it, is the
model's most probable next token. That is equivalent to generating the correct answer greedily. For problems the answer
is the whole solution, with all its steps.

A document first states facts ("Ada's pet is hen.") and then restates them (polykv/reference/documents.py). The values
in the restatements ("hen") are the tokens that a model can only predict from the statements.
"""

import torch
from torch.nn.utils.rnn import pad_sequence
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
    """Whether the model answers each question exactly, given the document's `cache` (None: without the document).

    `cache` has batch size 1. It is modified: it gets a row per question, to which the question and answer are appended.
    """
    prompts = [encode(tokenizer, question.prompt) for question in questions]
    answers = [encode(tokenizer, q.answer) + [tokenizer.eos_token_id] for q in questions]
    # No attention mask is needed: the padding comes last, and attention is causal.
    rows = [torch.tensor(p + a) for p, a in zip(prompts, answers, strict=True)]
    pad = tokenizer.convert_tokens_to_ids(PAD)
    ids_NT = pad_sequence(rows, batch_first=True, padding_value=pad).to(model.device)
    if cache is not None:
        cache.batch_repeat_interleave(len(rows))
    logits_NTV = model(ids_NT, past_key_values=cache).logits
    # right_NT[:, t]: whether the token at t + 1 was predicted.
    right_NT = logits_NTV[:, :-1].argmax(-1) == ids_NT[:, 1:]
    return [
        bool(right_T[len(prompt) - 1 : len(prompt) + len(answer) - 1].all())
        for right_T, prompt, answer in zip(right_NT, prompts, answers, strict=True)
    ]


def restated_value_indices(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Which predictions are of values, for a text `ids` of restatements: index i stands for the token `ids[i + 1]`."""
    words = tokenizer.convert_ids_to_tokens(ids)
    pairs = zip(words[:-1], words[1:], strict=True)
    return [i for i, (previous, word) in enumerate(pairs) if is_value(previous, word)]


def is_value(previous: str, word: str) -> bool:
    """Whether `word` of a restated fact belongs to the fact's value, given the word before it.

    Values follow the phrases that FORMS (polykv/reference/world.py) puts before them, each one word of the vocabulary
    ("'s pet is", "'s coin number", "The fair starts"). Two kinds have a second word: a date's day, after its month, and
    a person's surname, which counts in a subject as well.
    """
    follows_phrase = previous.endswith((" is", " number", " starts"))
    return follows_phrase or previous in MONTHS or word in SURNAMES
