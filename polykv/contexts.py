"""Contexts with questions of their own, a JSON object a line: SCBench's, LongBench's, and files in their forms.

SCBench (arXiv 2412.10319) asks several questions of one context: `context` and `multi_turns`, a list of `input` and
`answer`. LongBench (arXiv 2308.14508) has one question a line: `context`, `input` and `answers`; lines with the same
context are put together. Longer contexts lose their middle, as in LongBench's evaluation (section 4.1).
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from polykv import hub, windows
from polykv.documents import Document, Question
from polykv.errors import PolyKVError
from polykv.evaluation.answers import contains
from polykv.tasks.base import with_questions
from polykv.tokens import encode

VERSION = 1  # of the documents and questions that a file gives
HUB = "hf://datasets/"


def load(cfg: DictConfig, tokenizer: Any) -> list[Document]:
    """Up to `cfg.n_documents` documents of `cfg.context` tokens, each with `cfg.n_agents` questions or more.

    Contexts of fewer tokens are left out, and so are questions whose answer stood in the part that was cut out.

    Raises:
        PolyKVError: no context, a file that cannot be read or has another form, or no document with questions enough.
    """
    name, context = cfg.document.name, cfg.context
    if context is None:
        raise PolyKVError(
            f"document={name} has contexts of different lengths; set context=4096, say"
        )
    n_own = windows.own_tokens(tokenizer, context)
    found, longest, most = [], 0, 0
    for text, questions in asked_of(_file(cfg.document)).items():
        ids_T = encode(tokenizer, text)[0]
        longest = max(longest, len(ids_T) + context - n_own)
        if len(ids_T) < n_own:
            continue
        own_T = torch.cat([ids_T[: -(-n_own // 2)], ids_T[len(ids_T) - n_own // 2 :]])
        kept = _still_answered(questions, text, tokenizer.decode(own_T))
        most = max(most, len(kept))
        if len(kept) >= cfg.n_agents:
            found.append(with_questions(cfg, tokenizer, own_T[None], kept))
        if len(found) == cfg.n_documents:
            break
    if not found:
        raise PolyKVError(
            f"document={name} has no context of context={context} tokens with n_agents={cfg.n_agents} questions: its "
            f"longest has {longest} tokens, and at most {most} questions of one are left at this length; "
            "change context, or lower n_agents"
        )
    return found


def _still_answered(questions: list[Question], whole: str, kept: str) -> list[Question]:
    """The questions but those whose answers are all in `whole` alone; answers in neither are not verbatim."""
    return [
        question
        for question in questions
        if any(contains(kept, text) for text in question.accepted)
        or not any(contains(whole, text) for text in question.accepted)
    ]


def _file(document: DictConfig) -> str:
    """The file or URL to read.

    Raises:
        PolyKVError: the hub cannot be reached.
    """
    if document.path is not None:
        return str(Path(document.path).expanduser())
    url = document.url.format(task=document.task)
    repo, _, rest = url.split(HUB)[1].partition("@")
    remedy = "give a copy of the file: document.path=/path/to/file.jsonl"
    hub.check_reachable(repo, "dataset", remedy, rest.split("/")[0])
    return url


@lru_cache(maxsize=4)
def asked_of(path: str) -> dict[str, list[Question]]:
    """The questions of each context of a file; `path` may be a URL of fsspec's.

    Raises:
        PolyKVError: a file that cannot be read, or a line of another form.
    """
    from datasets import load_dataset  # takes seconds to import
    from datasets.exceptions import DatasetGenerationError

    try:
        lines = load_dataset("json", data_files=path, split="train")
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise PolyKVError(f"{path} is not JSON, one object a line: {error}") from None
    found: dict[str, list[Question]] = {}
    for number, line in enumerate(lines, 1):
        try:
            turns = line["multi_turns"] if line.get("multi_turns") else [line]
            asked = [_asked(turn) for turn in turns]
            found.setdefault(line["context"], []).extend(asked)
        except (KeyError, TypeError, IndexError):
            raise PolyKVError(
                f"line {number} of {path} has no `context` with `multi_turns`, a list of `input` and "
                "`answer`, nor with `input` and `answers`"
            ) from None
    return found


def _asked(turn: dict[str, Any]) -> Question:
    told = turn["answers"] if turn.get("answers") else turn["answer"]
    first, *others = [told] if isinstance(told, str) else told
    return Question("", first, turn["input"].strip(), also=tuple(others))
