"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): problems, and extraction of answers. Torch-free.

Problems are those of the test split in a fixed random order; the package contains the first 300 of it, the hub all.

Three extractions: `strict` takes the first number after a `####`, `last_mark` the last such number, `flexible` the last
number of the reply. Gold answers and replies are parsed by the same code (polykv/evaluation/numerals.py).
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from polykv import hub, shipped, textfile
from polykv.errors import PolyKVError
from polykv.evaluation import numerals

VERSION = 1  # of the problems and of what counts as correct, with numerals.py
REPO, REVISION = "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866"
ORDER = 2110_14168  # seed of the order of the test split's problems
EXTRACTIONS = ("strict", "flexible", "last_mark")


@dataclass(frozen=True)
class Problem:
    """A question and its answer, a number in canonical notation."""

    question: str
    answer: str


def load(path: str | None, n_problems: int, seed: int) -> list[Problem]:
    """The first `n_problems` of the test split in our order, or a sample by `seed` from a local JSONL at `path`.

    Lines of the JSONL have a `question` and an `answer`. The seed has no effect on the test split.

    Raises:
        PolyKVError: an invalid line, too few problems, or more than the package contains and no hub.
    """
    rows = _local(path) if path is not None else _in_order(n_problems)
    if n_problems > len(rows):
        raise PolyKVError(f"there are {len(rows)} problems and n_problems={n_problems}; lower it")
    if path is None:
        return rows[:n_problems]
    picked = random.Random(seed).sample(range(len(rows)), n_problems)
    return [rows[index] for index in sorted(picked)]


def check_available(path: str | None, n_problems: int) -> None:
    """Check, without loading anything, that `load` will find the problems.

    Raises:
        PolyKVError: as `load`.
    """
    if path is not None:
        _local(path)
    elif n_problems > (n_shipped := len(_shipped())):
        remedy = (
            f"use n_problems={n_shipped} or fewer, which the package contains, or give a local JSONL with "
            "relay.path=/path/to/test.jsonl"
        )
        hub.check_reachable(REPO, "dataset", remedy, REVISION)


def order(n_problems: int) -> list[int]:
    """Our order of a split of `n_problems`, as indices."""
    indices = list(range(n_problems))
    random.Random(ORDER).shuffle(indices)
    return indices


def check_same(split: Sequence[Mapping[str, str]]) -> None:
    """Check that the packaged problems are those at their indices in the hub's split.

    Raises:
        PolyKVError: names the first that differs.
    """
    for row in _shipped():
        index, mine = row["index"], (row["question"], row["answer"])
        if index >= len(split) or mine != (split[index]["question"], split[index]["answer"]):
            raise PolyKVError(
                f"problem {index} of the hub's {REPO} differs from the one in this package; "
                f"use n_problems={len(_shipped())} or fewer"
            )


def extract(text: str, how: str) -> Decimal | None:
    """The number of a reply under an extraction, or None if there is none."""
    if how == "flexible":
        found = numerals.all_numbers(text)[-1:]
    else:
        marked = numerals.marked_numbers(text)
        found = marked[:1] if how == "strict" else marked[-1:]
    return found[0] if found else None


def right(texts: Sequence[str], answers: Sequence[object]) -> dict[str, list[bool]]:
    """Extraction -> whether each text's number equals the gold answer. A text without a number is wrong.

    Raises:
        PolyKVError: a gold answer that cannot be parsed; names it.
    """
    gold = [numerals.gold(answer) for answer in answers]
    return {
        how: [extract(text, how) == number for text, number in zip(texts, gold, strict=True)]
        for how in EXTRACTIONS
    }


def has_several_marks(text: str) -> bool:
    """Whether a text has more than one `####`, so that strict and last_mark may differ."""
    return numerals.n_marks(text) > 1


def _in_order(n_problems: int) -> list[Problem]:
    rows: Sequence[Mapping[str, str]] = _shipped()
    if n_problems > len(rows):
        split = _hub()
        check_same(split)
        rows = [split[index] for index in order(len(split))]
    return [_problem(row) for row in rows]


def _shipped() -> list[dict]:
    return [json.loads(line) for line in textfile.lines(shipped.read("gsm8k"))]


def _local(path: str) -> list[Problem]:
    problems = textfile.read_jsonl(Path(path).expanduser(), "relay.path", _problem)
    first: dict[str, int] = {}
    for number, problem in enumerate(problems, start=1):
        if first.setdefault(problem.question, number) != number:
            raise PolyKVError(
                f"problems {first[problem.question]} and {number} of relay.path={path} are the same; remove one: they "
                "would count as two, and one would be the control of the other"
            )
    return problems


def _hub() -> list[dict]:
    from datasets import load_dataset  # seconds to import, needed here only

    return list(load_dataset(REPO, "main", split="test", revision=REVISION))


def _problem(row: Mapping[str, str]) -> Problem:
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
        raise PolyKVError(
            "a problem needs a question and an answer, and the answer has to end in #### and a number"
        )
    return Problem(question, numerals.canonical(numerals.gold(answer)))
