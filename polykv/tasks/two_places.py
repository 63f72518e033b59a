"""Two places: an answer that is made of two statements in different parts of the document."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from polykv.tasks.base import Asked, Content, Task, chosen
from polykv.tasks.words import CITIES, PEOPLE, PETS


@dataclass(frozen=True)
class TwoPlaces(Task):
    """Homes and pets of people: "Clara's home is in Oslo." and "Clara's pet is a fox."; a question asks for both."""

    version: ClassVar[int] = 1
    tests: ClassVar[str] = "putting together what two places say"
    source: ClassVar[str] = "niah_multiquery of RULER, arXiv 2404.06654"

    def write(self, draw: Random, n_questions: int) -> Content:
        """Two statements for each question, all in random order."""
        people = chosen(draw, PEOPLE, n_questions)
        homes, pets = chosen(draw, CITIES, n_questions), chosen(draw, PETS, n_questions)
        places = draw.sample(range(2 * n_questions), 2 * n_questions)
        statements, asked = [""] * len(places), []
        for i, (person, home, pet) in enumerate(zip(people, homes, pets, strict=True)):
            a, b = places[2 * i : 2 * i + 2]
            statements[a], statements[b] = (
                f"{person}'s home is in {home}.",
                f"{person}'s pet is a {pet}.",
            )
            question = f"Where is {person}'s home, and what is {person}'s pet?"
            lead, answer = f"{person}'s home and pet are", f"{home} and a {pet}"
            asked.append(Asked(question, lead, answer, (a, b)))
        return Content(statements, asked)
