"""Prompts that a model replies to: GSM8K problems, requests for long texts, or a user's file."""

from pathlib import Path
from typing import Any

from torch import Tensor

from polykv import chat, digests, shipped, textfile
from polykv.documents import SLOT
from polykv.errors import PolyKVError
from polykv.evaluation import gsm8k
from polykv.tokens import encode

VERSION = 1  # of the ids of a prompt
GSM8K = "gsm8k"
SHIPPED = (GSM8K, "writing")


def load(name: str, n_prompts: int) -> list[str]:
    """The first prompts of a set of SHIPPED, or of the text file `name` with one prompt a line.

    Raises:
        PolyKVError: the file cannot be read, or there are too few prompts.
    """
    if name == GSM8K:
        gsm8k.check_available(None, n_prompts)
        return [problem.question for problem in gsm8k.load(None, n_prompts, seed=0)]
    text = shipped.read(name) if name in SHIPPED else textfile.read(_path(name), "prompts")
    found = textfile.lines(text)
    if n_prompts > len(found):
        raise PolyKVError(
            f"prompts={name} has {len(found)} prompts and n_prompts={n_prompts}; lower it"
        )
    return found[:n_prompts]


def digest(name: str) -> str:
    """Digest of the set's file, for a cell's identity."""
    return shipped.digest(name) if name in SHIPPED else digests.of_file(_path(name), "prompts")


def label(name: str) -> str:
    """The name of the set in rows: of a user's file, `file` and the file's name."""
    return name if name in SHIPPED else f"file {_path(name).name}"


def _path(name: str) -> Path:
    return Path(name).expanduser()


def ids_of(tokenizer: Any, text: str, style: str, template: str) -> Tensor:
    """Ids (tokens,) of a prompt.

    Args:
        style: as polykv.chat: the text is a user's turn, up to the assistant's header; or plain.
        template: of plain prompts, with SLOT where the text goes.
    """
    if chat.is_wanted(style, tokenizer):
        return encode(tokenizer, chat.turn(tokenizer, text))[0]
    return encode(tokenizer, template.replace(SLOT, text), begins=True)[0]
