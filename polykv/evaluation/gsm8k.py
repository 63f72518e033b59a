"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): problems and the two extractions. Torch-free.

Strict takes the number after `####`, as the data set writes it; flexible takes the last number of the answer.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polykv import hub
from polykv.errors import PolyKVError
from polykv.evaluation.statistics import wilson
from polykv.results import Rows

NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
_STRICT = re.compile(rf"####\s*\$?({NUMBER})")
_ANY = re.compile(NUMBER)
REPO, REVISION = "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866"
EXTRACTIONS = ("strict", "flexible")
VERDICTS = "verdicts "  # opens the note of an accuracy row; `of_note` reads it back


@dataclass(frozen=True)
class Problem:
    """A question and the number that answers it."""

    question: str
    answer: str


def load(path: str | None, n_problems: int, seed: int) -> list[Problem]:
    """`n_problems` drawn with a fixed seed from a local JSONL (`question`, `answer`) or the hub's test split.

    Raises:
        PolyKVError: no file and no hub, a line that is no problem, or too few of them.
    """
    rows = _local(path) if path is not None else _hub()
    if n_problems > len(rows):
        raise PolyKVError(f"there are {len(rows)} problems and n_problems={n_problems}; lower it")
    picked = random.Random(seed).sample(range(len(rows)), n_problems)
    return [rows[index] for index in sorted(picked)]


def check_available(path: str | None) -> None:
    """What can be refused before a model is loaded.

    Raises:
        PolyKVError: as `load`.
    """
    if path is not None:
        _local(path)
    else:
        mend = "give a local JSONL with relay.path=/path/to/test.jsonl, or use relay=reference"
        hub.check_reachable(REPO, "dataset", mend, REVISION)


def extract(text: str, how: str) -> str | None:
    """The answer's number in one spelling (no commas, no trailing zeros), or None where there is none."""
    found = _STRICT.findall(text) if how == "strict" else _ANY.findall(text)
    return _spelled(found[-1]) if found else None


def add_rows(rows: Rows, texts: Sequence[str], answers: Sequence[str], protocol: str) -> None:
    """Accuracy in percent with Wilson interval, per extraction; the verdicts stand in the note, in order.

    An answer without a number, or without any text, is wrong.
    """
    for how in EXTRACTIONS:
        pairs = zip(texts, answers, strict=True)
        right = [extract(text, how) == _spelled(answer) for text, answer in pairs]
        if not right:
            about = {"protocol": f"{how}; {protocol}", "note": "no problem was answered"}
            rows.add("accuracy", None, "percent", n=0, **about)
            continue
        low, high = wilson(sum(right), len(right))
        rows.add(
            "accuracy",
            100 * sum(right) / len(right),
            "percent",
            ci=(100 * low, 100 * high),
            n=len(right),
            protocol=f"{how}; {protocol}",
            note=VERDICTS + "".join("01"[verdict] for verdict in right),
        )


def of_note(note: str) -> list[bool] | None:
    """The verdicts that `add_rows` wrote."""
    return [mark == "1" for mark in note.removeprefix(VERDICTS)] if VERDICTS in note else None


def _spelled(number: str) -> str:
    plain = number.replace(",", "")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def _local(path: str) -> list[Problem]:
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        return [_problem(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PolyKVError(
            f"cannot read problems from {path} ({type(error).__name__}: {error}); give a JSONL whose "
            "lines have question and answer, the answer ending in #### and a number"
        ) from error


def _hub() -> list[Problem]:
    check_available(None)
    from datasets import load_dataset  # seconds to import, needed here only

    rows = load_dataset(REPO, "main", split="test", revision=REVISION)
    return [_problem(row) for row in rows]


def _problem(row: dict) -> Problem:
    answer = extract(row["answer"], "strict")
    if answer is None:
        raise ValueError(f"no #### in {row['answer'][-40:]!r}")
    return Problem(row["question"], answer)
