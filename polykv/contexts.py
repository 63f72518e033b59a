"""Contexts with questions of their own, a JSON object a line: SCBench's, LongBench's, and files in their forms.

SCBench (arXiv 2412.10319) asks several questions of one context: `context` and `multi_turns`, a list of `input` and
`answer`. LongBench (arXiv 2308.14508) has one question a line: `context`, `input` and `answers`; lines with the same
context are put together. Longer contexts lose their middle, as in LongBench's evaluation (section 4.1).
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import fsspec
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
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
    """The file to read, or the URL of one in an archive; from the hub it is downloaded once.

    Raises:
        PolyKVError: the hub cannot be reached.
    """
    if document.path is not None:
        return str(Path(document.path).expanduser())
    archive, place, file = document.url.format(task=document.task).partition(HUB)
    if not place:
        return archive
    user, repo, name = file.split("/", 2)
    repo, _, revision = repo.partition("@")
    remedy = "give a copy of the file: document.path=/path/to/file.jsonl"
    hub.check_reachable(f"{user}/{repo}", "dataset", remedy, revision)
    try:
        local = hf_hub_download(f"{user}/{repo}", name, repo_type="dataset", revision=revision)
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise PolyKVError(f"cannot download {place}{file} ({error}); {remedy}") from None
    return archive + local


@lru_cache(maxsize=4)
def asked_of(path: str) -> dict[str, list[Question]]:
    """The questions of each context of a file; `path` may be a URL of fsspec's.

    Raises:
        PolyKVError: a file that cannot be read, or a line of another form.
    """
    try:
        with fsspec.open(path, "rt", encoding="utf-8") as file:
            lines = file.readlines()
    except (OSError, UnicodeDecodeError, BadZipFile) as error:
        raise PolyKVError(f"cannot read {path}: {error}") from None
    found: dict[str, list[Question]] = {}
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            turns = line["multi_turns"] if line.get("multi_turns") else [line]
            asked = [_asked(turn) for turn in turns]
            found.setdefault(line["context"], []).extend(asked)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise PolyKVError(
                f"line {number} of {path} is no JSON object with `context` and `multi_turns`, a list of `input` and "
                "`answer`, nor with `context`, `input` and `answers`"
            ) from None
    return found


def _asked(turn: dict[str, Any]) -> Question:
    told = turn["answers"] if turn.get("answers") else turn["answer"]
    found = told if isinstance(told, list) else [told]
    if not all(isinstance(answer, str | int | float) for answer in found):
        raise TypeError
    first, *others = map(str, found)
    return Question("", first, turn["input"].strip(), also=tuple(others))
