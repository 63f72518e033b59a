"""Documents: token ids to pool and to score, and the agents' questions.

Functions that take a `cfg` take the settings of a cell, as run.py composes them from conf/: `document` and `model` (the
YAMLs of these groups), `context`, `n_documents`, `prefix_fraction`, `n_agents`, `seed`.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from polykv import chat, hub, shipped, targets, textfile, windows
from polykv.errors import PolyKVError
from polykv.reference.documents import generate_document
from polykv.reference.text import join_words
from polykv.tokens import encode, opening

VERSION = 1  # of documents made from a text, with windows.py and chat.py
# As many as the paper's agents, so that documents are the same for every n_agents.
N_QUESTIONS = 15
SLOT = "{question}"  # the placeholder of a template; other braces are literal


@dataclass(frozen=True)
class Question:
    """A question of one agent.

    Attributes:
        prompt: continues the document's `asked_BT` (encoded by polykv.tokens.encode).
        answer: the correct answer, if known.
        text: the question without template.
        depth: where the document answers it, from 0 (its start) to 1, if known.
        also: other answers that are right.
    """

    prompt: str
    answer: str | None
    text: str
    depth: float | None = None
    also: tuple[str, ...] = ()

    @property
    def accepted(self) -> tuple[str, ...]:
        """All answers that are right; none if none is known."""
        return () if self.answer is None else (self.answer, *self.also)


@dataclass(frozen=True, eq=False)
class Document:
    """A document: token ids whose first part is pooled and whose rest is scored, and questions about it.

    Attributes:
        ids_BT: (1, tokens) of a plain text: the first `n_prefix` are prefilled and pooled, the rest is scored.
        asked_BT: (1, tokens) that agents share for questions: the plain prefix (None), or the same text in chat format
            (polykv/chat.py).
        n_opening: number of ids at the start that the tokenizer adds to a text (BOS).
    """

    name: str
    ids_BT: Tensor
    n_prefix: int
    questions: tuple[Question, ...]
    asked_BT: Tensor | None = None
    n_opening: int = 0

    def __post_init__(self) -> None:
        if self.asked_BT is None:
            object.__setattr__(self, "asked_BT", self.prefix_BT)

    @property
    def n_tokens(self) -> int:
        return self.ids_BT.shape[1]

    @property
    def bos(self) -> bool:
        """Whether it begins with the tokenizer's BOS."""
        return self.n_opening > 0

    @property
    def asked_bos(self) -> bool:
        """Whether `asked_BT` begins with BOS: a chat template may leave it out."""
        opening_BT = self.ids_BT[:, : self.n_opening]
        return self.bos and torch.equal(self.asked_BT[:, : self.n_opening], opening_BT)

    @cached_property
    def digest(self) -> str:
        """`digest_of` its ids: two documents of one text share it, whatever the seed."""
        return digest_of(self.ids_BT)

    @cached_property
    def prefix_BT(self) -> Tensor:
        return self.ids_BT[:, : self.n_prefix]

    @property
    def rest_BT(self) -> Tensor:
        return self.ids_BT[:, self.n_prefix :]


def digest_of(ids_BT: Tensor) -> str:
    """8 hex digits of the SHA-256 of token ids."""
    return hashlib.sha256(ids_BT.cpu().numpy().astype("<i8").tobytes()).hexdigest()[:8]


def prefix_tokens(context: int, prefix_fraction: float) -> int:
    """Number of tokens to prefill, rounded down as in PolyKV (1,837 x 0.7 -> 1,285).

    Raises:
        PolyKVError: no token to prefill, or less than two after it (the first of them is not scored).
    """
    # Products with decimal fractions can be just below an integer (600 x 0.7).
    n_prefix = int(round(context * prefix_fraction, 6))
    if n_prefix < 1 or context - n_prefix < 2:
        raise PolyKVError(
            f"context={context} with prefix_fraction={prefix_fraction} leaves {n_prefix} tokens to "
            f"prefill and {context - n_prefix} to score; give a longer context or another fraction"
        )
    return n_prefix


def load_documents(cfg: DictConfig, tokenizer: Any) -> list[Document]:
    """Up to `cfg.n_documents` documents of `cfg.context` tokens each (None: one document, the whole text).

    `cfg.document._target_` names the function that makes them, one of those below or a user's own, or a task's class
    (polykv/tasks).

    Raises:
        PolyKVError: a missing file, a text that is too short, fewer questions than agents, an unreachable hub, or a
            chat template without a common prefix.
    """
    made = targets.find(cfg.document._target_)
    if task := getattr(made, "from_config", None):
        return task(cfg.document).documents(cfg, tokenizer)
    return made(cfg, tokenizer)


def generated(cfg: DictConfig, tokenizer: Any) -> list[Document]:
    """Held-out documents of the reference generator, with known answers."""
    if cfg.context is None:
        raise PolyKVError("document=generated has no length of its own; set context=512, say")
    documents, n_opening = [], len(opening(tokenizer))
    for index in range(cfg.n_documents):
        made = generate_document(
            tokenizer,
            cfg.context - n_opening,
            # Every seed has documents of its own.
            seed=cfg.seed * 100_003 + index,
            n_questions=max(N_QUESTIONS, cfg.n_agents),
            prefix_fraction=cfg.prefix_fraction,
        )
        documents.append(
            Document(
                name=cfg.document.name,
                ids_BT=encode(tokenizer, made.text, begins=True),
                n_prefix=prefix_tokens(cfg.context, cfg.prefix_fraction),
                questions=tuple(
                    Question(q.prompt, q.answer, join_words(q.facts[0].question()))
                    for q in made.questions
                ),
                n_opening=n_opening,
            )
        )
    return documents


def own(cfg: DictConfig, tokenizer: Any) -> list[Document]:
    """A text written for this project, with questions and answers."""
    content = yaml.safe_load(shipped.read(cfg.document.name))
    questions = [(item["question"], item["answer"]) for item in content["questions"]]
    return of_text(cfg, tokenizer, content["text"], questions)


def file(cfg: DictConfig, tokenizer: Any) -> list[Document]:
    """A user's text file, with their questions or generic ones."""
    text = read_text(cfg.document, "path")
    questions = _generic_questions()
    if cfg.document.get("questions") is not None:
        lines = textfile.lines(read_text(cfg.document, "questions"))
        questions = [(line.strip(), None) for line in lines]
    return of_text(cfg, tokenizer, text, questions)


def wikitext2(cfg: DictConfig, tokenizer: Any) -> list[Document]:
    """WikiText-2's test split from this package: tokenised, with rare words as <unk>."""
    return _articles(cfg, tokenizer, shipped.read("wikitext2"))


def gsm8k(cfg: DictConfig, tokenizer: Any) -> list[Document]:
    """GSM8K problems with their solutions, one after the other; consecutive windows of the text."""
    problems = map(json.loads, shipped.read("gsm8k").splitlines())
    text = "\n\n".join(f"Question: {p['question']}\nAnswer: {p['answer']}" for p in problems)
    return of_text(cfg, tokenizer, text, _generic_questions())


def wikitext2_raw(cfg: DictConfig, tokenizer: Any) -> list[Document]:
    """WikiText-2's raw test split, from a local file or the hub."""
    if cfg.document.path is not None:
        return _articles(cfg, tokenizer, read_text(cfg.document, "path"))
    return _articles(cfg, tokenizer, hub_wikitext2(cfg.document.revision))


WIKITEXT = "Salesforce/wikitext"


@lru_cache(maxsize=1)
def hub_wikitext2(revision: str) -> str:
    """The raw test split as in its original file `wiki.test.raw` (the hub stores its blank lines as empty strings).

    Raises:
        PolyKVError: the hub cannot be reached.
    """
    remedy = "use document=wikitext2, which needs none, or a local copy: document.path=/path/to/wiki.test.raw"
    hub.check_reachable(WIKITEXT, "dataset", remedy, revision)
    from datasets import load_dataset  # takes seconds to import

    split = load_dataset(WIKITEXT, "wikitext-2-raw-v1", split="test", revision=revision)
    return "".join(line or " \n" for line in split["text"])


def read_text(document: DictConfig, key: str) -> str:
    """The text of the file that a setting of the document names.

    Raises:
        PolyKVError: the setting is missing, or the file is missing, not UTF-8, or empty.
    """
    if OmegaConf.is_missing(document, key):
        raise PolyKVError(f"document={document.name} needs document.{key}=/path/to/a/text/file")
    return textfile.read(Path(document[key]).expanduser(), f"document.{key}")


def question_template(cfg: DictConfig) -> str:
    r"""The template of plain questions. `\n` in it, as from a command line, becomes a newline.

    Raises:
        PolyKVError: it has no placeholder for the question.
    """
    template = cfg.model.question_template
    if not isinstance(template, str) or SLOT not in template:
        raise PolyKVError(
            f"model.question_template={template!r} has no {SLOT}; put it where the question goes"
        )
    return template.replace(r"\n", "\n")


def check_document(cfg: DictConfig) -> None:
    """Check, before a model is loaded, what `load_documents` needs.

    Raises:
        PolyKVError: a missing file, an unreachable hub, an empty part, or a template without placeholder.
    """
    question_template(cfg)
    if cfg.context is not None:
        prefix_tokens(cfg.context, cfg.prefix_fraction)
    if cfg.document.name == "file" or cfg.document.get("path") is not None:
        read_text(cfg.document, "path")
        if cfg.document.get("questions") is not None:
            read_text(cfg.document, "questions")
    elif cfg.document.name == "wikitext2_raw":
        hub_wikitext2(cfg.document.revision)


def of_text(
    cfg: DictConfig, tokenizer: Any, text: str, questions: list[tuple[str, str | None]]
) -> list[Document]:
    """Consecutive windows of a text, each with all questions: pairs of a bare question and its answer, if known.

    Raises:
        PolyKVError: the text is too short, there are fewer questions than agents, or no chat template can be shared.
    """
    found = windows.consecutive(tokenizer, text, cfg.context, cfg.n_documents)
    return _documents(cfg, tokenizer, text, found, questions)


def _articles(cfg: DictConfig, tokenizer: Any, text: str) -> list[Document]:
    if cfg.context is None:
        raise PolyKVError(
            f"document={cfg.document.name} has articles of different lengths; set context=1024, say"
        )
    skip = cfg.document.get("skip_articles", 0)
    found = windows.of_articles(tokenizer, text, cfg.context, cfg.n_documents, skip)
    return _documents(cfg, tokenizer, text, found, _generic_questions())


def _documents(
    cfg: DictConfig,
    tokenizer: Any,
    text: str,
    found: list[Tensor],
    questions: list[tuple[str, str | None]],
) -> list[Document]:
    name = cfg.document.name
    if not found:
        n_tokens = encode(tokenizer, text, begins=True).shape[1]
        raise PolyKVError(
            f"document={name} has {n_tokens} tokens under this tokenizer, fewer than "
            f"context={cfg.context}; lower context, or use context=null for the whole text"
        )
    if cfg.n_agents > len(questions):
        raise PolyKVError(
            f"document={name} has {len(questions)} questions and n_agents={cfg.n_agents}; "
            "lower n_agents, or give more with document.questions"
        )
    n_prefix = prefix_tokens(found[0].shape[1], cfg.prefix_fraction)
    if chat.is_wanted(cfg.model.get("question_style", "plain"), tokenizer):
        return [_in_chat(name, tokenizer, ids_BT, n_prefix, questions) for ids_BT in found]
    template = question_template(cfg)
    asked = tuple(Question(template.replace(SLOT, q), answer, q) for q, answer in questions)
    n_opening = len(opening(tokenizer))
    return [Document(name, ids_BT, n_prefix, asked, n_opening=n_opening) for ids_BT in found]


def _in_chat(
    name: str,
    tokenizer: Any,
    ids_BT: Tensor,
    n_prefix: int,
    questions: list[tuple[str, str | None]],
) -> Document:
    n_opening = len(opening(tokenizer))
    shared = chat.Chat(tokenizer, chat.text_of(tokenizer, ids_BT[0, n_opening:n_prefix]))
    asked = tuple(Question(shared.prompt(q), answer, q) for q, answer in questions)
    return Document(name, ids_BT, n_prefix, asked, shared.ids_BT, n_opening)


def _generic_questions() -> list[tuple[str, str | None]]:
    text = textfile.read(shipped.TEXTS / "generic_questions.txt", "the package's questions")
    return [(line, None) for line in textfile.lines(text)]
