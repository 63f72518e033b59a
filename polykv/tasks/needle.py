"""Single needles: every question has one statement, unlike all others, at one depth of the document."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from polykv.tasks.base import Asked, Content, Task, chosen, numbers
from polykv.tasks.words import NUMBERED, PEOPLE


@dataclass(frozen=True)
class Needle(Task):
    """Numbers of people, each of a kind of its own: "Clara's locker number is 4127."."""

    digits: int
    version: ClassVar[int] = 1
    tests: ClassVar[str] = "finding one statement in a text, at any depth"
    source: ClassVar[str] = (
        "G. Kamradt, Needle in a haystack (2023); niah_single of RULER, arXiv 2404.06654"
    )

    def write(self, draw: Random, n_questions: int) -> Content:
        """A statement for each question."""
        kinds, people = chosen(draw, NUMBERED, n_questions), chosen(draw, PEOPLE, n_questions)
        facts = zip(people, kinds, numbers(draw, n_questions, self.digits), strict=True)
        statements, asked = [], []
        for i, (person, kind, number) in enumerate(facts):
            lead = f"{person}'s {kind} is"
            statements.append(f"{lead} {number}.")
            asked.append(Asked(f"What is {person}'s {kind}?", lead, number, (i,)))
        return Content(statements, asked)
