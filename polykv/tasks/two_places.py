"""Two places: an answer that is made of two statements in different parts of the document."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from polykv.tasks.base import Asked, Content, Task, chosen, numbers
from polykv.tasks.words import NUMBERED, PEOPLE


@dataclass(frozen=True)
class TwoPlaces(Task):
    """Numbers of people, as in task `needle`; every question asks for two of them."""

    digits: int
    version: ClassVar[int] = 2
    tests: ClassVar[str] = "putting together what two places say"
    source: ClassVar[str] = "niah_multiquery of RULER, arXiv 2404.06654"

    def write(self, draw: Random, n_questions: int) -> Content:
        """A statement more than questions: each question asks for neighbours in a random order of them."""
        n = n_questions + 1
        pairs = zip(chosen(draw, PEOPLE, n), chosen(draw, NUMBERED, n), strict=True)
        facts = [f"{person}'s {kind}" for person, kind in pairs]
        told = numbers(draw, n, self.digits)
        order = draw.sample(range(n), n)
        asked = []
        for a, b in zip(order, order[1:], strict=False):
            both = f"{facts[a]} and {facts[b]}"
            answer = f"{told[a]} and {told[b]}"
            asked.append(Asked(f"What are {both}?", f"{both} are", answer, (a, b)))
        statements = [f"{fact} is {number}." for fact, number in zip(facts, told, strict=True)]
        return Content(statements, asked)
