"""First mention: of several statements about one person, the earliest counts."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from polykv.tasks.base import Asked, Content, Task, chosen
from polykv.tasks.words import CITIES, PEOPLE


@dataclass(frozen=True)
class FirstMention(Task):
    """Visits of people to cities, "Clara visited Oslo."; each person has `mentions` of them, of different cities."""

    mentions: int
    version: ClassVar[int] = 1
    tests: ClassVar[str] = "the order of statements about one entity"
    source: ClassVar[str] = "this project, after the entity questions of SCBench, arXiv 2412.10319"

    def write(self, draw: Random, n_questions: int) -> Content:
        """All visits in random order."""
        people = chosen(draw, PEOPLE, n_questions)
        visits = [
            (person, city) for person in people for city in chosen(draw, CITIES, self.mentions)
        ]
        draw.shuffle(visits)
        asked = []
        for person in people:
            at = next(i for i, (who, _) in enumerate(visits) if who == person)
            question = f"Which city did {person} visit first?"
            asked.append(Asked(question, f"{person} first visited", visits[at][1], (at,)))
        return Content([f"{person} visited {city}." for person, city in visits], asked)
