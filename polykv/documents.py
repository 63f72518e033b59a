"""Documents: what the pool holds, what perplexity scores, and what the agents ask."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from polykv import hub
from polykv.errors import PolyKVError
from polykv.reference.documents import generate_document

TEXTS = Path(__file__).parent / "texts"
# As many as the paper has agents, so that a sweep over n_agents asks the same documents.
N_QUESTIONS = 15


@dataclass(frozen=True)
class Question:
    """What one agent asks: the text that follows the prefix, and the right answer where it is known."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True, eq=False)
class Document:
    """Token ids (1, tokens): the first `n_prefix` are prefilled and pooled, the rest is scored."""

    name: str
    ids_BT: Tensor
    n_prefix: int
    questions: tuple[Question, ...]

    @property
    def n_tokens(self) -> int:
        return self.ids_BT.shape[1]

    @property
    def prefix_BT(self) -> Tensor:
        return self.ids_BT[:, : self.n_prefix]

    @property
    def asked_BT(self) -> Tensor:
        return self.prefix_BT

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
    """`cfg.n_documents` documents of `cfg.context` tokens each (null: the whole text).

    Raises:
        PolyKVError: missing file, too short a text, fewer questions than agents, or no hub.
    """
    return get_method(cfg.document._target_)(cfg, tokenizer)


def generated(cfg: DictConfig, tokenizer: Any) -> list[Document]:
    """Held-out documents of the reference generator; every answer is known."""
    if cfg.context is None:
        raise PolyKVError("document=generated has no length of its own; set context=512 or so")
    documents = []
    for index in range(cfg.n_documents):
        made = generate_document(
            tokenizer,
            cfg.context,
            # Any seed of a sweep has documents of its own.
            seed=cfg.seed * 100_003 + index,
            n_questions=max(N_QUESTIONS, cfg.n_agents),
            prefix_fraction=cfg.prefix_fraction,
        )
        documents.append(
            Document(
                name=cfg.document.name,
                ids_BT=_encode(tokenizer, made.text),
                n_prefix=prefix_tokens(cfg.context, cfg.prefix_fraction),
                questions=tuple(Question(q.prompt, q.answer) for q in made.questions),
            )
        )
    return documents


def shipped(cfg: DictConfig, tokenizer: Any) -> list[Document]:
    """A text of polykv/texts with its own questions."""
    content = yaml.safe_load((TEXTS / f"{cfg.document.name}.yaml").read_text(encoding="utf-8"))
    questions = [(item["question"], item["answer"]) for item in content["questions"]]
    return _windows(cfg, tokenizer, content["text"], questions)


def wikitext2(cfg: DictConfig, tokenizer: Any) -> list[Document]:
    """WikiText-2's test split: the raw variant from the hub, or a local file."""
    if cfg.document.path is not None:
        return file(cfg, tokenizer)
    return _windows(cfg, tokenizer, hub_wikitext2(), _generic_questions())


def file(cfg: DictConfig, tokenizer: Any) -> list[Document]:
    """A text file of the user's, with questions of their own or general ones."""
    text = read_text(cfg.document, "path")
    questions = _generic_questions()
    if cfg.document.get("questions") is not None:
        lines = read_text(cfg.document, "questions").splitlines()
        questions = [(line.strip(), None) for line in lines if line.strip()]
    return _windows(cfg, tokenizer, text, questions)


WIKITEXT, REVISION = "Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3"


@lru_cache(maxsize=1)
def hub_wikitext2() -> str:
    """The raw test split as one text.

    Raises:
        PolyKVError: the hub cannot be reached.
    """
    mend = "give a local copy with document.path=/path/to/wikitext2.txt, or use document=generated"
    hub.check_reachable(WIKITEXT, "dataset", mend, REVISION)
    from datasets import load_dataset  # seconds to import, needed here only

    split = load_dataset(WIKITEXT, "wikitext-2-raw-v1", split="test", revision=REVISION)
    return "\n\n".join(split["text"])


def read_text(document: DictConfig, key: str) -> str:
    """The text of the file that a document's setting names.

    Raises:
        PolyKVError: not set, not there, not UTF-8, or empty.
    """
    if OmegaConf.is_missing(document, key):
        raise PolyKVError(f"document={document.name} needs document.{key}=/path/to/a/text/file")
    path = Path(document[key]).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PolyKVError(
            f"cannot read document.{key}={path} ({error.strerror}); give the path of a text file"
        ) from error
    except UnicodeDecodeError as error:
        raise PolyKVError(f"{path} is not UTF-8 text ({error.reason}); convert it first") from error
    if not text.strip():
        raise PolyKVError(f"{path} is empty; give a file with text")
    return text


def check_document(cfg: DictConfig) -> None:
    """What can be refused before a model is loaded.

    Raises:
        PolyKVError: a file that is not there, a hub that cannot be reached, or an empty split.
    """
    if cfg.context is not None:
        prefix_tokens(cfg.context, cfg.prefix_fraction)
    if cfg.document.get("path", default_value=None) is not None or cfg.document.name == "file":
        read_text(cfg.document, "path")
        if cfg.document.get("questions") is not None:
            read_text(cfg.document, "questions")
    elif cfg.document.name == "wikitext2":
        hub_wikitext2()


def _windows(
    cfg: DictConfig, tokenizer: Any, text: str, questions: list[tuple[str, str | None]]
) -> list[Document]:
    """Documents are consecutive windows of the text's tokens, from its start."""
    name, ids_BT = cfg.document.name, _encode(tokenizer, text)
    context = cfg.context or ids_BT.shape[1] // cfg.n_documents
    if context * cfg.n_documents > ids_BT.shape[1]:
        raise PolyKVError(
            f"document={name} has {ids_BT.shape[1]} tokens under this tokenizer, and "
            f"{cfg.n_documents} x context={context} were asked for; lower context or n_documents, "
            "or use context=null for the whole text"
        )
    if cfg.n_agents > len(questions):
        raise PolyKVError(
            f"document={name} has {len(questions)} questions and n_agents={cfg.n_agents}; "
            "lower n_agents, or bring more with document.questions"
        )
    template = cfg.model.question_template
    asked = tuple(Question(template.format(question=q), a) for q, a in questions)
    n_prefix = prefix_tokens(context, cfg.prefix_fraction)
    return [
        Document(name, ids_BT[:, start : start + context], n_prefix, asked)
        for start in range(0, context * cfg.n_documents, context)
    ]


def _encode(tokenizer: Any, text: str) -> Tensor:
    # verbose=False: a text longer than the model is fine here, windows are cut from it.
    return tokenizer(
        text, return_tensors="pt", add_special_tokens=False, verbose=False
    ).input_ids.to(torch.long)


def _generic_questions() -> list[tuple[str, str | None]]:
    lines = (TEXTS / "generic_questions.txt").read_text(encoding="utf-8").splitlines()
    return [(line, None) for line in lines]
