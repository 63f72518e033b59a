"""Task: facts that are stated in filler text, and the questions that they answer.

A task is a frozen dataclass in a module of its own: its fields are the options of its YAML in conf/document, and
`write` makes the facts of one document. This module places them. A document has a plain text of exactly `context`
tokens (with BOS, if the tokenizer adds one); in chat format the template's own tokens come on top. Every document has
N_QUESTIONS questions or more, so that as many agents ask different questions of one pool.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from random import Random
from typing import Any, ClassVar, Self

from omegaconf import DictConfig
from torch import Tensor

from polykv import chat, windows
from polykv.documents import (
    N_QUESTIONS,
    SLOT,
    Document,
    Question,
    prefix_tokens,
    question_template,
)
from polykv.errors import PolyKVError
from polykv.tasks import filler
from polykv.tokens import encode, opened, opening

MARGIN = 8  # tokens at the end without a statement: cutting the text to its length cuts filler
LEAST_FILLER = 0.2  # share of the tokens


@dataclass(frozen=True)
class Asked:
    """A question about the statements of a document.

    Attributes:
        lead: begins the reply, as in RULER (arXiv 2404.06654), so that small models and models without a chat format
            answer in the form that is scored; the answer follows it after a space.
        needs: indices of the statements that answer it; its depth is that of the first.
    """

    question: str
    lead: str
    answer: str
    needs: tuple[int, ...]


@dataclass(frozen=True)
class Content:
    """What a document states, in its order, and what is asked."""

    statements: Sequence[str]
    asked: Sequence[Asked]


@dataclass(frozen=True)
class Task(ABC):
    """A kind of document with questions; its fields are options.

    Attributes:
        tests: what a right answer takes.
        source: where the task is from.
        rule: when an answer is right.
        version: raised when the same options give other documents.
    """

    version: ClassVar[int] = 1
    tests: ClassVar[str]
    source: ClassVar[str]
    rule: ClassVar[str] = (
        "the reply contains the answer's words one after the other (polykv.evaluation.answers.contains)"
    )

    @abstractmethod
    def write(self, draw: Random, n_questions: int) -> Content:
        """The statements and at least `n_questions` questions of one document."""

    @classmethod
    def from_config(cls, cfg: DictConfig) -> Self:
        """The task with the options of a YAML of conf/document."""
        return cls(**{field.name: cfg[field.name] for field in fields(cls)})

    def documents(self, cfg: DictConfig, tokenizer: Any) -> list[Document]:
        """`cfg.n_documents` documents; the same for the same settings and tokenizer.

        Raises:
            PolyKVError: no context, or one without room for the statements and some filler between them.
        """
        name, context = cfg.document.name, cfg.context
        if context is None:
            raise PolyKVError(f"document={name} has no length of its own; set context=1024, say")
        n_own = windows.own_tokens(tokenizer, context)
        found = []
        for number in range(cfg.n_documents):
            draw = Random(f"{name}/{cfg.seed}/{number}")
            content = self.write(draw, max(N_QUESTIONS, cfg.n_agents))
            text, depths = placed(tokenizer, draw, content.statements, n_own, f"document={name}")
            questions = [
                Question(one.lead, one.answer, one.question, min(depths[i] for i in one.needs))
                for one in content.asked
            ]
            own_BT = encode(tokenizer, text)[:, :n_own]
            found.append(with_questions(cfg, tokenizer, own_BT, questions))
        return found


def chosen(draw: Random, words: Sequence[str], n: int) -> list[str]:
    """`n` different words in random order.

    Raises:
        PolyKVError: there are fewer.
    """
    if n > len(words):
        raise PolyKVError(
            f"a document asks at most {len(words)} questions of this kind, not {n}; lower n_agents"
        )
    return draw.sample(words, n)


def numbers(draw: Random, n: int, digits: int) -> list[str]:
    """`n` different numbers of so many digits, as text."""
    return [str(number) for number in draw.sample(range(10 ** (digits - 1), 10**digits), n)]


def placed(
    tokenizer: Any, draw: Random, statements: Sequence[str], n_own: int, about: str
) -> tuple[str, list[float]]:
    """A text of at least `n_own` tokens with the statements spread over filler, and the depth of each from 0 to 1.

    There is one statement in each of as many equal parts of the filler, at a random place.

    Raises:
        PolyKVError: too few tokens.
    """
    sizes = [_count(tokenizer, statement) for statement in statements]
    room = n_own - sum(sizes)
    if room < LEAST_FILLER * n_own:
        raise PolyKVError(
            f"{about} states facts of {sum(sizes)} tokens, and the text has {n_own}: too little filler between them; "
            "raise context"
        )
    sentences: list[str] = []
    ends = [0]  # tokens of filler up to each sentence
    for sentence in filler.sentences(draw):
        sentences.append(sentence)
        ends.append(ends[-1] + _count(tokenizer, sentence))
        if ends[-1] > room:
            break
    n = len(statements)
    places = ((room - MARGIN) * (i + draw.random()) / n for i in range(n))
    before = [bisect_right(ends, place) - 1 for place in places]  # which sentence
    parts: list[str] = []
    for number, sentence in enumerate(sentences):
        parts += [statements[i] for i in range(n) if before[i] == number]
        parts.append(sentence)
    stated = accumulate(sizes, initial=0)
    depths = [(ends[at] + n_stated) / n_own for at, n_stated in zip(before, stated, strict=False)]
    return " ".join(parts), depths


def _count(tokenizer: Any, sentence: str) -> int:
    return encode(tokenizer, f" {sentence}").shape[1]


def with_questions(
    cfg: DictConfig, tokenizer: Any, own_BT: Tensor, questions: Sequence[Question]
) -> Document:
    """The document of a text (1, tokens), without BOS, all of which agents share.

    `questions` have the beginning of the reply as their prompt. The document's have the question before it, in the
    model's format.
    """
    ids_BT = opened(tokenizer, own_BT)
    if chat.is_wanted(cfg.model.get("question_style", "plain"), tokenizer):
        shared = chat.Chat(tokenizer, chat.text_of(tokenizer, own_BT[0]))
        prompts = [shared.prompt(one.text) + one.prompt for one in questions]
        asked_BT = shared.ids_BT
    else:
        template = question_template(cfg)
        prompts = [
            f"{template.replace(SLOT, one.text)} {one.prompt}".rstrip(" ") for one in questions
        ]
        asked_BT = ids_BT
    asked = tuple(
        replace(one, prompt=prompt) for one, prompt in zip(questions, prompts, strict=True)
    )
    n_prefix = prefix_tokens(cfg.context, cfg.prefix_fraction)
    name = cfg.document.name
    return Document(name, ids_BT, n_prefix, asked, asked_BT, len(opening(tokenizer)))
