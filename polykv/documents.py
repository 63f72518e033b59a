"""Documents: what the pool holds, what perplexity scores, and what the agents ask."""

import hashlib
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

VERSION = 1  # of the documents that are made of a text, with windows.py and chat.py
# As many as the paper has agents, so that a sweep over n_agents asks the same documents.
N_QUESTIONS = 15
SLOT = "{question}"  # where a template takes the question; other braces are its text


@dataclass(frozen=True)
class Question:
    """What one agent asks: the prompt that follows what agents share, the right answer where known, the bare question.

    `prompt` goes on behind the document's `asked_BT` (polykv.tokens.encode).
    """

    prompt: str
    answer: str | None
    text: str


@dataclass(frozen=True, eq=False)
class Document:
    """Token ids (1, tokens) of a plain text: the first `n_prefix` are prefilled and pooled, the rest is scored.

    `asked_BT` (1, tokens) is what agents share when they are asked: the plain prefix itself (None says so), or the
    same text in a chat (polykv/chat.py). The first `n_opening` ids are what the tokenizer puts before a text (BOS).
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
        """Whether it begins as the tokenizer has a text begin, where that takes a token."""
        return self.n_opening > 0

    @property
    def asked_bos(self) -> bool:
        """The same of `asked_BT`: a chat template may leave it out."""
        opening_BT = self.ids_BT[:, : self.n_opening]
        return self.bos and torch.equal(self.asked_BT[:, : self.n_opening], opening_BT)

    @cached_property
    def digest(self) -> str:
        """8 hex digits of the SHA-256 of its token ids: two documents of one text share it, whatever the seed."""
        return hashlib.sha256(self.ids_BT.cpu().numpy().astype("<i8").tobytes()).hexdigest()[:8]

    @cached_property
    def prefix_BT(self) -> Tensor:
        return self.ids_BT[:, : self.n_prefix]

    @property
    def rest_BT(self) -> Tensor:
        return self.ids_BT[:, self.n_prefix :]


def prefix_tokens(context: int, prefix_fraction: float) -> int:
    """Tokens that are prefilled: PolyKV cuts down (1,837 x 0.7 -> 1,285).

    Raises:
        PolyKVError: a part would be empty; the rest needs two tokens, as the first is not scored.
    """
    # The product of a decimal fraction can fall just below a whole number (600 x 0.7).
    n_prefix = int(round(context * prefix_fraction, 6))
    if n_prefix < 1 or context - n_prefix < 2:
        raise PolyKVError(
            f"context={context} with prefix_fraction={prefix_fraction} leaves {n_prefix} tokens to "
            f"prefill and {context - n_prefix} to score; give a longer context or another fraction"
        )
    return n_prefix


def load_documents(cfg: DictConfig, tokenizer: Any) -> list[Document]:
    """Documents of `cfg.context` tokens each (null: one, the whole text): of `generated` `cfg.n_documents`, of a text
    as many as fit, up to that.

    Raises:
        PolyKVError: missing file, too short a text, fewer questions than agents, no hub, or no chat template that
            could be shared.
    """
    return targets.find(cfg.document._target_)(cfg, tokenizer)


def generated(cfg: DictConfig, tokenizer: Any) -> list[Document]:
    """Held-out documents of the reference generator; every answer is known."""
    if cfg.context is None:
        raise PolyKVError("document=generated has no length of its own; set context=512 or so")
    documents, n_opening = [], len(opening(tokenizer))
    for index in range(cfg.n_documents):
        made = generate_document(
            tokenizer,
            cfg.context - n_opening,
            # Any seed of a sweep has documents of its own.
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
    """A text of this project's with questions of its own."""
    content = yaml.safe_load(shipped.read(cfg.document.name))
    questions = [(item["question"], item["answer"]) for item in content["questions"]]
    return _consecutive(cfg, tokenizer, content["text"], questions)


def file(cfg: DictConfig, tokenizer: Any) -> list[Document]:
    """A text file of the user's, with questions of their own or general ones."""
    text = read_text(cfg.document, "path")
    questions = _generic_questions()
    if cfg.document.get("questions") is not None:
        lines = textfile.lines(read_text(cfg.document, "questions"))
        questions = [(line.strip(), None) for line in lines]
    return _consecutive(cfg, tokenizer, text, questions)


def wikitext2(cfg: DictConfig, tokenizer: Any) -> list[Document]:
    """WikiText-2's test split as the package brings it: tokenised, rare words as <unk>."""
    return _articles(cfg, tokenizer, shipped.read("wikitext2"))


def wikitext2_raw(cfg: DictConfig, tokenizer: Any) -> list[Document]:
    """Its raw variant, from a local file or the hub."""
    if cfg.document.path is not None:
        return _articles(cfg, tokenizer, read_text(cfg.document, "path"))
    return _articles(cfg, tokenizer, hub_wikitext2(cfg.document.revision))


WIKITEXT = "Salesforce/wikitext"


@lru_cache(maxsize=1)
def hub_wikitext2(revision: str) -> str:
    """The raw test split as its file has it (`wiki.test.raw`), whose blank lines the hub stores empty.

    Raises:
        PolyKVError: the hub cannot be reached.
    """
    mend = "use document=wikitext2, which needs none, or a local copy: document.path=/path/to/wiki.test.raw"
    hub.check_reachable(WIKITEXT, "dataset", mend, revision)
    from datasets import load_dataset  # seconds to import, needed here only

    split = load_dataset(WIKITEXT, "wikitext-2-raw-v1", split="test", revision=revision)
    return "".join(line or " \n" for line in split["text"])


def read_text(document: DictConfig, key: str) -> str:
    """The text of the file that a document's setting names.

    Raises:
        PolyKVError: not set, not there, not UTF-8, or empty.
    """
    if OmegaConf.is_missing(document, key):
        raise PolyKVError(f"document={document.name} needs document.{key}=/path/to/a/text/file")
    return textfile.read(Path(document[key]).expanduser(), f"document.{key}")


def question_template(cfg: DictConfig) -> str:
    r"""The text that plain questions are put into. On a command line, `\n` in it is a newline.

    Raises:
        PolyKVError: it has no place for the question.
    """
    template = cfg.model.question_template
    if not isinstance(template, str) or SLOT not in template:
        raise PolyKVError(
            f"model.question_template={template!r} has no {SLOT}; put that where the question goes"
        )
    return template.replace(r"\n", "\n")


def check_document(cfg: DictConfig) -> None:
    """What can be refused before a model is loaded.

    Raises:
        PolyKVError: a file that is not there, a hub that cannot be reached, an empty split, or a template without
            a question.
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


def _consecutive(
    cfg: DictConfig, tokenizer: Any, text: str, questions: list[tuple[str, str | None]]
) -> list[Document]:
    found = windows.consecutive(tokenizer, text, cfg.context, cfg.n_documents)
    return _documents(cfg, tokenizer, text, found, questions)


def _articles(cfg: DictConfig, tokenizer: Any, text: str) -> list[Document]:
    if cfg.context is None:
        raise PolyKVError(
            f"document={cfg.document.name} has articles of many lengths; set context=1024 or so"
        )
    found = windows.of_articles(tokenizer, text, cfg.context, cfg.n_documents)
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
            "lower n_agents, or bring more with document.questions"
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
