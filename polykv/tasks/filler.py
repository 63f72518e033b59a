"""Filler for retrieval tasks: sentences of WikiText-2's test articles, as plain English. Torch-free."""

import re
from collections.abc import Iterator
from functools import cache
from itertools import chain
from random import Random

from polykv import shipped
from polykv.windows import TITLE

SKIP = 12  # articles, on which the recipes of this project were designed (conf/document/wikitext2_evaluation.yaml)
WORDS = (6, 40)  # of a sentence
# What tokenised WikiText writes apart, and plain text together.
JOINED = (
    (re.compile(r" @(.)@ "), r"\1"),
    (re.compile(r" ([.,;:?!%)\]]|'s\b|n't\b)"), r"\1"),
    (re.compile(r"([(\[$]) "), r"\1"),
)


@cache
def articles() -> tuple[tuple[str, ...], ...]:
    """The sentences of each article, without titles and sentences that hold rare words (<unk>) or quotations."""
    text = shipped.read("wikitext2")
    starts = [found.start() for found in TITLE.finditer(text)][SKIP:]
    ends = [*starts[1:], len(text)]
    found = (tuple(_sentences(text[a:b])) for a, b in zip(starts, ends, strict=True))
    return tuple(sentences for sentences in found if sentences)


def sentences(draw: Random) -> Iterator[str]:
    """Endless sentences: whole articles one after the other, in a random order, again from the first after the last."""
    order = draw.sample(articles(), len(articles()))
    while True:
        yield from chain.from_iterable(order)


def _sentences(article: str) -> Iterator[str]:
    for line in article.split("\n"):
        if line.startswith(" ="):
            continue
        for sentence in line.split(" . "):
            words = sentence.split()
            if "<unk>" in words or '"' in words or not WORDS[0] <= len(words) <= WORDS[1]:
                continue
            plain = " ".join(words).removesuffix(" .") + "."
            for pattern, joined in JOINED:
                plain = pattern.sub(joined, plain)
            yield plain
