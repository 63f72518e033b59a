"""Word problems of two to five steps with a unique answer, and relays for handoff.

The answer of a problem restates the facts that it needs, then has one operation per step, then `#### N`. The facts are
given before the question (`alone`) or only in the document.
"""

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from polykv.reference.documents import Question
from polykv.reference.text import join_words
from polykv.reference.world import Fact

LIMIT = 100  # numbers below it are a single token


@dataclass(frozen=True)
class Step:
    """One operation, `left op right = result`; a division with remainder has the result -1."""

    left: int
    op: str
    right: int

    @property
    def result(self) -> int:
        if self.op == "/" and self.left % self.right:
            return -1
        operations = {
            "+": self.left + self.right,
            "-": self.left - self.right,
            "*": self.left * self.right,
            "/": self.left // self.right,
        }
        return operations[self.op]

    def words(self) -> list[str]:
        return [str(self.left), self.op, str(self.right), "=", str(self.result), "."]


@dataclass(frozen=True)
class Problem:
    """A problem: the `facts` that the question does not state, and the `steps` to its answer, the last result."""

    template: str
    facts: tuple[Fact, ...]
    question: tuple[str, ...]
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    def solution(self) -> list[str]:
        """The words of the solution: facts, steps, `#### N`."""
        words = [word for fact in self.facts for word in fact.statement()]
        words += [word for step in self.steps for word in step.words()]
        return [*words, "####", str(self.answer)]

    def ask(self) -> Question:
        """The problem as a question about a document that states its facts."""
        prompt = " " + join_words(["Q:", *self.question, "A:"])
        return Question(prompt, " " + join_words(self.solution()), self.template, self.facts)

    def alone(self, rng: random.Random) -> Question:
        """The problem with its facts in random order before the question."""
        facts = rng.sample(self.facts, len(self.facts))
        told = [word for fact in facts for word in fact.statement()]
        question = self.ask()
        return replace(question, prompt=join_words(told) + question.prompt)


class Operands:
    """The facts of a document, grouped for drawing the operands of a problem."""

    def __init__(self, facts: list[Fact] | tuple[Fact, ...]) -> None:
        counts = [fact for fact in facts if fact.kind == "count"]
        prices = [fact for fact in facts if fact.kind == "price"]
        by_item, by_owner = defaultdict(list), defaultdict(list)
        for fact in counts:
            by_item[fact.attribute].append(fact)
            by_owner[fact.subject].append(fact)
        roles = [
            [fact, count] for fact in facts if fact.kind == "role" for count in by_owner[fact.value]
        ]
        self.groups = {
            "count": (1, [[fact] for fact in counts]),
            "two_owners": (2, [group for group in by_item.values() if len(group) >= 2]),
            "three_owners": (3, [group for group in by_item.values() if len(group) >= 3]),
            "two_items": (2, [group for group in by_owner.values() if len(group) >= 2]),
            "price": (1, [[fact] for fact in prices]),
            "two_prices": (2, [prices] if len(prices) >= 2 else []),
            "role_and_count": (None, roles),
        }

    def draw(self, rng: random.Random, name: str) -> tuple[Fact, ...] | None:
        """Draw operands of the kind `name`; None if the facts have none."""
        size, groups = self.groups[name]
        if not groups:
            return None
        group = rng.choice(groups)
        return tuple(rng.sample(group, size) if size else group)


@dataclass(frozen=True)
class Template:
    """A kind of problem.

    `operands` names the group from which Operands draws the values a, b, c. The question states small numbers k, m, n,
    j, i. Steps are operations on these and on the results r1, r2, ... of previous steps.
    """

    question: str
    operands: str
    steps: tuple[str, ...]


TEMPLATES = {
    "gain_lose": Template(
        "{s} gets {k} {a} and loses {m} . How many {a} has {s} ?", "count", ("a + k", "r1 - m")
    ),
    "pool_give": Template(
        "{s} and {t} pool all {a} and give away {k} . How many {a} remain ?",
        "two_owners",
        ("a + b", "r1 - k"),
    ),
    "pool_three": Template(
        "{s} , {t} and {u} pool all {a} . How many {a} is that ?",
        "three_owners",
        ("a + b", "r1 + c"),
    ),
    "share": Template(
        "{s} gets {k} {a} and packs all {a} in bags of {m} . How many bags is that ?",
        "count",
        ("a + k", "r1 / m"),
    ),
    "double": Template(
        "{s} doubles all {a} and loses {k} . How many {a} has {s} ?", "count", ("a * 2", "r1 - k")
    ),
    "compare": Template(
        "{s} gets {k} {a} . How many more {a} has {s} than {t} ?", "two_owners", ("a + k", "r1 - b")
    ),
    "move": Template(
        "{s} gives {k} {a} to {t} , then {t} doubles all {a} . How many {a} has {t} ?",
        "two_owners",
        ("a - k", "b + k", "r2 * 2"),
    ),
    "both": Template(
        "How many {a} and {b} has {s} in all after losing {k} ?", "two_items", ("a + b", "r1 - k")
    ),
    "chain": Template(
        "{s} gets {k} {a} , loses {m} , gets {n} and loses {j} . How many {a} has {s} ?",
        "count",
        ("a + k", "r1 - m", "r2 + n", "r3 - j"),
    ),
    "long_chain": Template(
        "{s} gets {k} {a} , loses {m} , gets {n} , loses {j} and gets {i} . How many {a} has {s} ?",
        "count",
        ("a + k", "r1 - m", "r2 + n", "r3 - j", "r4 + i"),
    ),
    "change": Template(
        "{s} pays for {k} {a} with 99 coins . How much change is that ?",
        "price",
        ("a * k", "99 - r1"),
    ),
    "basket": Template(
        "How much are {k} {a} and {m} {b} ?", "two_prices", ("a * k", "b * m", "r1 + r2")
    ),
    "sale": Template(
        "The price of {a} falls by {k} . How much are {m} {a} then ?", "price", ("a - k", "r1 * m")
    ),
    "two_hop": Template(
        "The {r} gets {k} {a} and loses {m} . How many {a} has the {r} ?",
        "role_and_count",
        ("a + k", "r1 - m"),
    ),
    "three_step": Template(
        "{s} loses {k} {a} , doubles the rest and gets {m} . How many {a} has {s} ?",
        "count",
        ("a - k", "r1 * 2", "r2 + m"),
    ),
}

SMALL = {"share": range(2, 6), "change": range(2, 5), "basket": range(2, 5)}
TRIES = 12


def draw_problem(rng: random.Random, operands: Operands, template: str) -> Problem | None:
    """Draw a problem of a template with all numbers in 1 ... 99.

    None if the facts have no such operands, or after TRIES unsuccessful draws.
    """
    form = TEMPLATES[template]
    for _ in range(TRIES):
        facts = operands.draw(rng, form.operands)
        if facts is None:
            return None
        counted = [fact for fact in facts if fact.kind != "role"]
        told = {name: rng.choice(SMALL.get(template, range(2, 10))) for name in "kmnji"}
        steps = _work(form.steps, told | _name("abc", [int(fact.value) for fact in counted]))
        if steps is None:
            continue
        blanks = told | _name("stu", [fact.subject for fact in counted])
        blanks |= _name("ab", dict.fromkeys(fact.attribute for fact in counted))
        blanks["r"] = facts[0].attribute
        question = tuple(form.question.format(**blanks).split())
        return Problem(template, facts, question, steps)
    return None


def _name(names: str, things: Iterable) -> dict:
    """Assign one-letter names to things."""
    return dict(zip(names, things, strict=False))


def _work(forms: tuple[str, ...], numbers: dict[str, int]) -> tuple[Step, ...] | None:
    steps = []
    for form in forms:
        left, op, right = form.split()
        step = Step(numbers.get(left) or int(left), op, numbers.get(right) or int(right))
        if not 0 < step.result < LIMIT:
            return None
        steps.append(step)
        numbers[f"r{len(steps)}"] = step.result
    return tuple(steps)


TURNS = {
    "+": "Q: Then {k} more come . How many now ? A:",
    "-": "Q: Then {k} are lost . How many now ? A:",
    "*": "Q: Then they double . How many now ? A:",
}


@dataclass(frozen=True)
class Relay:
    """A chain of turns on one number: turn 1 is a problem, each later turn applies one of `steps` to its result.

    Each turn's prompt follows the previous answer and its end-of-turn token.
    """

    problem: Problem
    steps: tuple[Step, ...]
    turns: tuple[Question, ...]


def draw_relay(rng: random.Random, operands: Operands, n_turns: int) -> Relay | None:
    """Draw a relay of `n_turns` turns; None if the facts have no problem to start with."""
    problem = draw_problem(rng, operands, rng.choice(("gain_lose", "pool_give", "both")))
    if problem is None:
        return None
    turns, steps, number = [problem.ask()], [], problem.answer
    while len(turns) < n_turns:
        op, k = rng.choice("+-*"), rng.choice(range(2, 10))
        step = Step(number, op, 2 if op == "*" else k)
        if not 0 < step.result < LIMIT:
            continue
        steps.append(step)
        number = step.result
        prompt = " " + join_words(TURNS[op].format(k=k).split())
        answer = " " + join_words([*step.words(), "####", str(number)])
        turns.append(Question(prompt, answer, "relay", ()))
    return Relay(problem, tuple(steps), tuple(turns))
