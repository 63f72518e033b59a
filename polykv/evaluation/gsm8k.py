"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): problems and the extractions. Torch-free.

The problems are the test split's in one drawn order; the package brings the first 300 of it, the hub the rest.

Strict takes the first number that stands after `####`, as the data set writes it, last_mark the last such number;
flexible takes the last number of the answer. Right answers and replies are read by the same parser
(polykv/evaluation/numerals.py).
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

VERSION = 1  # of the problems and of what counts as a right answer, with numerals.py
REPO, REVISION = "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866"
ORDER = 2110_14168  # the seed of the order in which the test split's problems are taken
EXTRACTIONS = ("strict", "flexible", "last_mark")


@dataclass(frozen=True)
class Problem:
    """A question and the number that answers it, in one spelling."""

    question: str
    answer: str


def load(path: str | None, n_problems: int, seed: int) -> list[Problem]:
    """The first `n_problems` of the test split in its drawn order, whatever the seed; or, with the seed, drawn from
    a local JSONL (`question`, `answer`).

    Raises:
        PolyKVError: a line that is no problem, too few of them, or more than the package brings and no hub.
    """
    rows = _local(path) if path is not None else _in_order(n_problems)
    if n_problems > len(rows):
        raise PolyKVError(f"there are {len(rows)} problems and n_problems={n_problems}; lower it")
    if path is None:
        return rows[:n_problems]
    picked = random.Random(seed).sample(range(len(rows)), n_problems)
    return [rows[index] for index in sorted(picked)]


def check_available(path: str | None, n_problems: int) -> None:
    """What can be refused before a model is loaded.

    Raises:
        PolyKVError: as `load`.
    """
    if path is not None:
        _local(path)
    elif n_problems > (n_shipped := len(_shipped())):
        mend = (
            f"use n_problems={n_shipped} or fewer, which the package brings, or give a local JSONL with "
            "relay.path=/path/to/test.jsonl"
        )
        hub.check_reachable(REPO, "dataset", mend, REVISION)


def order(n_problems: int) -> list[int]:
    """The indices of a split of `n_problems` in the order in which they are taken."""
    indices = list(range(n_problems))
    random.Random(ORDER).shuffle(indices)
    return indices


def check_same(split: Sequence[Mapping[str, str]]) -> None:
    """The shipped problems are those of the hub's split, by their indices in it.

    Raises:
        PolyKVError: names the first that is not.
    """
    for row in _shipped():
        index, mine = row["index"], (row["question"], row["answer"])
        if index >= len(split) or mine != (split[index]["question"], split[index]["answer"]):
            raise PolyKVError(
                f"problem {index} of the hub's {REPO} is not the one that this package brings; "
                f"use n_problems={len(_shipped())} or fewer"
            )


def extract(text: str, how: str) -> Decimal | None:
    """The answer's number under an extraction, or None where there is none."""
    if how == "flexible":
        found = numerals.everywhere(text)[-1:]
    else:
        marked = numerals.marked(text)
        found = marked[:1] if how == "strict" else marked[-1:]
    return found[0] if found else None


def right(texts: Sequence[str], answers: Sequence[object]) -> dict[str, list[bool]]:
    """Extraction -> whether each text's number is that of the right answer. A text without a number is wrong.

    Raises:
        PolyKVError: a right answer that cannot be read whole; names it.
    """
    gold = [numerals.gold(answer) for answer in answers]
    return {
        how: [extract(text, how) == number for text, number in zip(texts, gold, strict=True)]
        for how in EXTRACTIONS
    }


def has_several_marks(text: str) -> bool:
    """Whether `####` stands in it more than once, so that strict and last_mark may differ."""
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
    return textfile.read_jsonl(Path(path).expanduser(), "relay.path", _problem)


def _hub() -> list[dict]:
    from datasets import load_dataset  # seconds to import, needed here only

    return list(load_dataset(REPO, "main", split="test", revision=REVISION))


def _problem(row: Mapping[str, str]) -> Problem:
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
        raise PolyKVError(
            "a problem has a question and an answer, the answer ending in #### and a number"
        )
    return Problem(question, numerals.spelled(numerals.gold(answer)))
