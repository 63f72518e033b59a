"""Words to text and back, and when an answer counts as right."""

import re

from polykv.evaluation import numerals
from polykv.evaluation.answers import begins

KEY_PHRASE = r"'s \w+ (?:number|is)\b|The (?:price of )?\w+ (?:is|starts)\b"
WORD = rf"{KEY_PHRASE}|<[a-z]+>|[QA]:|'s|#+|\w+|[^\w\s]"
ATTACHED = re.compile(r" ([.,?]|'s)(?= |$)")


def join_words(words: list[str]) -> str:
    """Write words as text: one space between them, none before a mark or a possessive."""
    return ATTACHED.sub(r"\1", " ".join(words))


def split_words(text: str) -> list[str]:
    """The words of a text, as the tokenizer cuts them; inverse of `join_words`."""
    return re.findall(WORD, text)


def matches(answer_text: str, expected: str) -> bool:
    """Whether an answer is right: up to the end of the turn it begins with the same words.

    An expected answer that ends in `#### N` is right when the first number that the answer marks so is N, whatever
    the steps were.
    """
    answer, wanted = (text.split("<eot>")[0] for text in (answer_text, expected))
    if numerals.n_marks(wanted):
        return numerals.marked_numbers(answer)[:1] == [numerals.gold(wanted)]
    return begins(answer, wanted)
