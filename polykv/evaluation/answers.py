"""Does a reply say the right answer? Torch-free."""

import re

ARTICLES = {"a", "an", "the"}
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# Between two digits some of it is part of a number or a time: "5" is not in "2.5" or "9:05".
PUNCTUATION = re.compile(r"(?!(?<=\d)[.:/]\d)[^\w\s]|_")


def contains(reply: str, answer: str) -> bool:
    """Whether the words of `answer` stand one after the other in `reply`.

    Case, punctuation, articles and the commas of thousands do not count, as in SQuAD's evaluation (Rajpurkar et al.
    2016, arXiv 1606.05250); words are whole. An answer of no word at all is in no reply.
    """
    wanted = " ".join(_words(answer))
    return bool(wanted) and f" {wanted} " in f" {' '.join(_words(reply))} "


def _words(text: str) -> list[str]:
    words = PUNCTUATION.sub(" ", THOUSANDS.sub("", text.casefold())).split()
    # "A" alone is an answer and no article.
    return [word for word in words if word not in ARTICLES] or words
