"""Key-value lookup: random identifiers with random numbers, which no knowledge of words helps to find."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from polykv.tasks.base import Asked, Content, Task, numbers
from polykv.tasks.words import CITIES, PETS


@dataclass(frozen=True)
class Lookup(Task):
    """Records of random identifiers, "Record fox-Oslo-58: 4127."; `n_others` of them are not asked for."""

    digits: int
    n_others: int
    version: ClassVar[int] = 1
    tests: ClassVar[str] = "exact lookup of a random identifier among others of its form"
    source: ClassVar[str] = (
        "key-value retrieval of Lost in the Middle, arXiv 2307.03172; SCBench, arXiv 2412.10319"
    )

    def write(self, draw: Random, n_questions: int) -> Content:
        """A record for each question, and the others."""
        n = n_questions + self.n_others
        places, ends = numbers(draw, n, 2), numbers(draw, n, self.digits)
        statements, asked = [], []
        for i, (place, number) in enumerate(zip(places, ends, strict=True)):
            key = f"{draw.choice(PETS)}-{draw.choice(CITIES)}-{place}"
            statements.append(f"Record {key}: {number}.")
            asked.append(
                Asked(f"Which number does record {key} hold?", f"Record {key}:", number, (i,))
            )
        return Content(statements, draw.sample(asked, n_questions))
