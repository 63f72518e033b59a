"""Whether a reply contains the expected answer. Torch-free."""

import re

from polykv.evaluation import numerals

VERSION = 1  # of `contains`, with numerals.py
ARTICLES = {"a", "an", "the"}
# Digits joined by one of JOINS are one word: "5" is not in "9:05" or "3,5".
WORD = re.compile(rf"(?P<number>{numerals.NUMBER})(?![^\W_])|\d+(?:{numerals.JOINS}\d+)+|[^\W_]+")


def contains(reply: str, answer: str) -> bool:
    """Whether `reply` contains the words of `answer` consecutively.

    Case, punctuation and articles are ignored, as in SQuAD's evaluation (Rajpurkar et al. 2016, arXiv 1606.05250), and
    so is the notation of numbers (polykv/evaluation/numerals.py); words and numbers match only as a whole. An answer
    without words is contained in no reply.
    """
    said, wanted = _words(reply), _words(answer)
    starts = range(len(said) - len(wanted) + 1)
    return bool(wanted) and any(said[i : i + len(wanted)] == wanted for i in starts)


def begins(reply: str, answer: str) -> bool:
    """Whether `reply` begins with the words of `answer`, compared as in `contains`."""
    wanted = _words(answer)
    return bool(wanted) and _words(reply)[: len(wanted)] == wanted


def _words(text: str) -> list[str]:
    words = [_word(found) for found in WORD.finditer(numerals.normalized(text.casefold()))]
    # "A" alone is an answer, not an article.
    return [word for word in words if word not in ARTICLES] or words


def _word(found: re.Match) -> str:
    value = numerals.value_of(found) if found["number"] else None
    return found[0] if value is None else numerals.canonical(value)
