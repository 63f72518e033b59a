"""Variable tracking: a number that is passed on from one name to the next."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from polykv.tasks.base import Asked, Content, Task, chosen, numbers
from polykv.tasks.words import PEOPLE


@dataclass(frozen=True)
class Variables(Task):
    """A chain for each question, of `hops` steps from the name asked for to the number.

    With one hop: "Clara's number is the number of Ivan.", and elsewhere "The number of Ivan is 4127.".
    """

    digits: int
    hops: int
    version: ClassVar[int] = 1
    tests: ClassVar[str] = "following a reference to another statement"
    source: ClassVar[str] = "variable tracking of RULER, arXiv 2404.06654"

    def write(self, draw: Random, n_questions: int) -> Content:
        """All steps of all chains in random order."""
        names = chosen(draw, PEOPLE, n_questions * (self.hops + 1))
        values = numbers(draw, n_questions, self.digits)
        links: list[tuple[int, str]] = []  # question, statement
        asked: list[tuple[str, str]] = []
        for i, value in enumerate(values):
            chain = names[i * (self.hops + 1) :][: self.hops + 1]
            links += [
                (i, f"{a} has the same number as {b}.")
                for a, b in zip(chain, chain[1:], strict=False)
            ]
            links.append((i, f"{chain[-1]} has the number {value}."))
            asked.append((chain[0], value))
        draw.shuffle(links)
        needs = [tuple(at for at, (i, _) in enumerate(links) if i == q) for q in range(n_questions)]
        return Content(
            [statement for _, statement in links],
            [
                Asked(f"Which number does {name} have?", f"{name} has the number", value, needs[i])
                for i, (name, value) in enumerate(asked)
            ],
        )
