"""Conversion of words to text and back, and grading of answers."""

import re

from polykv.evaluation import numerals
from polykv.evaluation.answers import begins

KEY_PHRASE = r"'s \w+ (?:number|is)\b|The (?:price of )?\w+ (?:is|starts)\b"
WORD = rf"{KEY_PHRASE}|<[a-z]+>|[QA]:|'s|#+|\w+|[^\w\s]"
ATTACHED = re.compile(r" ([.,?]|'s)(?= |$)")


def join_words(words: list[str]) -> str:
    """Join words with spaces, without a space before punctuation or a possessive."""
    return ATTACHED.sub(r"\1", " ".join(words))


def split_words(text: str) -> list[str]:
    """The words of a text, as the tokenizer splits it; the inverse of `join_words`."""
    return re.findall(WORD, text)


def matches(answer_text: str, expected: str) -> bool:
    """Whether an answer is correct: up to its end of turn, it begins with the words of the expected answer.

    If the expected answer ends in `#### N`, an answer is correct if its first number after `####` is N, regardless of
    the steps.
    """
    answer, wanted = (text.split("<eot>")[0] for text in (answer_text, expected))
    if numerals.n_marks(wanted):
        return numerals.marked_numbers(answer)[:1] == [numerals.gold(wanted)]
    return begins(answer, wanted)
