"""Needles among near-duplicates: statements that differ in one word from several others."""

from dataclasses import dataclass
from itertools import product
from random import Random
from typing import ClassVar

from polykv.tasks.base import Asked, Content, Task, chosen, numbers
from polykv.tasks.words import NUMBERED, PEOPLE


@dataclass(frozen=True)
class NearNeedles(Task):
    """Numbers of people, "Clara's locker number is 4127."; each person has `n_kinds`, the same kinds for all."""

    digits: int
    n_kinds: int
    version: ClassVar[int] = 1
    tests: ClassVar[str] = "telling a statement from others that differ in one word"
    source: ClassVar[str] = "niah_multikey of RULER, arXiv 2404.06654"

    def write(self, draw: Random, n_questions: int) -> Content:
        """As many people as give `n_questions` statements or more."""
        kinds = chosen(draw, NUMBERED, self.n_kinds)
        people = chosen(draw, PEOPLE, -(-n_questions // self.n_kinds))
        pairs = list(product(people, kinds))
        draw.shuffle(pairs)
        statements, asked = [], []
        for i, number in enumerate(numbers(draw, len(pairs), self.digits)):
            person, kind = pairs[i]
            lead = f"{person}'s {kind} is"
            statements.append(f"{lead} {number}.")
            asked.append(Asked(f"What is {person}'s {kind}?", lead, number, (i,)))
        return Content(statements, draw.sample(asked, n_questions))
