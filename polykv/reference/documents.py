"""Generated documents of any length that first state facts, then restate and recombine them.

The first `prefix_fraction` of the tokens, which is prefilled, states all facts that questions ask about. The rest, on
which perplexity is scored, only restates and recombines them, so that its values can be predicted from the prefix.
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polykv.errors import PolyKVError
from polykv.reference.text import join_words, matches
from polykv.reference.world import Fact, sample_world

VERSION = 1  # of generated documents, with world.py and problems.py
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Document", "Question", "generate_document", "matches", "restatements"]


@dataclass(frozen=True)
class Question:
    """A question; `prompt` directly follows the document's prefix, `answer` is the complete correct answer."""

    prompt: str
    answer: str
    kind: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Document:
    """A text of exactly `n_tokens` tokens, the first `n_prefix` of which state all `facts`."""

    text: str
    n_tokens: int
    n_prefix: int
    facts: tuple[Fact, ...]
    questions: list[Question]


def ask(fact: Fact) -> Question:
    """The question that is answered by the fact's statement."""
    prompt = " " + join_words(["Q:", *fact.question(), "A:"])
    return Question(prompt, " " + join_words(fact.statement()), fact.kind, (fact,))


def recombine(first: Fact, second: Fact) -> list[str] | None:
    """A sentence that joins two facts, with their sum if they count the same thing; None if they are unrelated."""
    head, tail = first.statement()[:-1], second.statement()
    if first.kind == second.kind == "count" and first.attribute == second.attribute:
        total = int(first.value) + int(second.value)
        sum_ = [first.value, "+", second.value, "=", str(total)]
        return [*head, "and", *tail[:-1], ",", "so", *sum_, "."]
    if first.kind == "role" and second.subject == first.value:
        return [*head, "and", *tail]
    return None


def restatements(rng: random.Random, facts: list[Fact]) -> Iterator[list[str]]:
    """Endless sentences that restate the facts, some of which join two of them."""
    counts_of, facts_about = defaultdict(list), defaultdict(list)
    for fact in facts:
        facts_about[fact.subject].append(fact)
        if fact.kind == "count":
            counts_of[fact.attribute].append(fact)
    while True:
        for fact in rng.sample(facts, len(facts)):
            near = facts_about[fact.value] if fact.kind == "role" else counts_of[fact.attribute]
            other = rng.choice(near) if near and rng.random() < 0.5 else fact
            joined = recombine(fact, other) if other is not fact else None
            yield joined or fact.statement()


def generate_document(
    tokenizer: "PreTrainedTokenizerBase",
    n_tokens: int,
    seed: int,
    split: str = "heldout",
    n_questions: int = 15,
    prefix_fraction: float = 0.7,
) -> Document:
    """Generate a document of exactly `n_tokens` tokens of `tokenizer`, without special tokens.

    The last sentence is cut where the tokens end. There are at most as many questions as facts in the prefix.

    Raises:
        PolyKVError: the document is too short to state two facts.
    """
    rng = random.Random(f"document/{split}/{n_tokens}/{seed}")
    n_prefix = int(prefix_fraction * n_tokens)
    stated, used = [], 0
    sentences: list[str] = []
    for fact in sample_world(rng, n_prefix // 3 + 4, split):
        sentence = join_words(fact.statement())
        cost = _count(tokenizer, " " * bool(sentences) + sentence)
        if used + cost > n_prefix:
            break
        stated.append(fact)
        sentences.append(sentence)
        used += cost
    if len(stated) < 2:
        raise PolyKVError(
            f"a document of {n_tokens} tokens is too short to state two facts; use 32 tokens or more"
        )
    for words in restatements(rng, stated):
        if used >= n_tokens + 2:
            break
        sentences.append(join_words(words))
        used += _count(tokenizer, " " + sentences[-1])
    text = _cut(tokenizer, " ".join(sentences), n_tokens)
    chosen = rng.sample(stated, min(n_questions, len(stated)))
    return Document(text, n_tokens, n_prefix, tuple(stated), [ask(fact) for fact in chosen])


def _count(tokenizer: "PreTrainedTokenizerBase", text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _cut(tokenizer: "PreTrainedTokenizerBase", text: str, n_tokens: int) -> str:
    """Cut the text to `n_tokens`. Nearby ends are tried too, since a cut within a word can change the tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [end for _, end in encoded["offset_mapping"]]
    for end in range(ends[n_tokens - 1], ends[min(n_tokens + 1, len(ends) - 1)] + 1):
        if _count(tokenizer, text[:end]) == n_tokens:
            return text[:end]
    raise PolyKVError(
        f"the document cannot be cut to exactly {n_tokens} tokens of this tokenizer; "
        "use one token more or less"
    )
