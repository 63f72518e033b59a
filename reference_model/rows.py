"""Training rows: a document and what is asked of it, each word with its role in the loss.

One row is one world, cut to the row's length: no padding, and no mask between documents.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from polykv.reference.documents import restatements
from polykv.reference.exact_match import is_value
from polykv.reference.problems import (
    TEMPLATES,
    Operands,
    Problem,
    Step,
    draw_problem,
    draw_relay,
)
from polykv.reference.text import split_words
from polykv.reference.vocabulary import END_OF_TURN
from polykv.reference.world import DEFAULT, Difficulty, Fact, sample_world

FREE, FORM, OPERAND, VALUE, RESULT = range(5)
"""Roles: drawn at random; form of an answer; number of a step that was just told; value of a fact
that must be found (binding); result of a step."""

ROLE_WEIGHTS = (0.03, 0.3, 0.5, 1.0, 1.0)
"""Share of each role in the loss: what nobody can predict teaches little."""

TOKENS_PER_FACT = 4

Tagged = list[tuple[str, int]]


@dataclass(frozen=True)
class RowKind:
    """What a row holds.

    length: tokens of the row.
    stated: smallest and largest share of the row that first states facts (of a row of problems
        alone: the size of the world that they draw from, as if it were stated).
    facts_per_person: smallest and largest.
    worlds: the other knobs of the world.
    plain: share of rows that only restate; the others ask.
    problems: share of problems among what is asked of a document.
    alone: share of rows of stand-alone problems.
    templates: the templates of stand-alone problems (None: all).
    """

    length: int
    stated: tuple[float, float] = (0.2, 0.7)
    facts_per_person: tuple[int, int] = (2, 5)
    worlds: Difficulty = DEFAULT
    plain: float = 0.25
    problems: float = 0.0
    alone: float = 0.0
    templates: tuple[str, ...] | None = None


def write_row(
    rng: random.Random, kind: RowKind, split: str = "train"
) -> tuple[list[str], list[int]]:
    """Write one row: `length` words and their roles."""
    alone = rng.random() < kind.alone
    share = rng.uniform(*kind.stated)
    n_facts = max(3, round(kind.length * share / TOKENS_PER_FACT))
    difficulty = replace(kind.worlds, facts_per_person=rng.randint(*kind.facts_per_person))
    facts = sample_world(rng, n_facts, split, difficulty)
    while alone and not any(fact.kind == "count" for fact in facts):
        facts = sample_world(rng, n_facts, split, difficulty)
    tagged: Tagged = []
    if alone:
        parts = _problems_alone(rng, facts, kind.templates or tuple(TEMPLATES))
    else:
        for fact in facts:
            tagged += [(word, FREE) for word in fact.statement()]
        parts = _restated(rng, facts) if rng.random() < kind.plain else _asked(rng, facts, kind)
    for part in parts:
        if len(tagged) >= kind.length:
            break
        tagged += part
    words, roles = zip(*tagged[: kind.length], strict=True)
    return list(words), list(roles)


def _tag_fact(fact: Fact, key_role: int) -> Tagged:
    *key, dot = fact.statement()
    n_value = len(fact.value.split())
    tags = [(word, key_role) for word in key[:-n_value]]
    return [*tags, *((word, VALUE) for word in key[-n_value:]), (dot, FORM)]


def _restated(rng: random.Random, facts: list[Fact]) -> Iterator[Tagged]:
    for words in restatements(rng, facts):
        before = ["", *words[:-1]]
        yield [(word, role_of(last, word)) for last, word in zip(before, words, strict=True)]


def role_of(last: str, word: str) -> int:
    if is_value(last, word):
        return VALUE
    if last == "=":
        return RESULT
    return OPERAND if last in ("so", "+") else FREE


def _turn(question: list[str], answer: Tagged) -> Tagged:
    asked = [(word, FREE) for word in ("Q:", *question, "A:")]
    return [*asked, *answer, (END_OF_TURN, FORM)]


def _tag_solution(problem: Problem) -> Tagged:
    tags = [tag for fact in problem.facts for tag in _tag_fact(fact, FORM)]
    for step in problem.steps:
        tags += _tag_step(step)
    return [*tags, ("####", FORM), (str(problem.answer), OPERAND)]


def _tag_step(step: Step) -> Tagged:
    roles = (OPERAND, FORM, OPERAND, FORM, RESULT, FORM)
    return list(zip(step.words(), roles, strict=True))


def _asked(rng: random.Random, facts: list[Fact], kind: RowKind) -> Iterator[Tagged]:
    operands = Operands(facts)
    templates = list(TEMPLATES)
    while True:
        if rng.random() < kind.problems:
            if rng.random() < 0.15:
                yield from _relay(rng, operands)
            elif problem := draw_problem(rng, operands, rng.choice(templates)):
                yield _turn(list(problem.question), _tag_solution(problem))
        else:
            fact = rng.choice(facts)
            yield _turn(fact.question(), _tag_fact(fact, FORM))


def _problems_alone(
    rng: random.Random, facts: list[Fact], templates: tuple[str, ...]
) -> Iterator[Tagged]:
    operands = Operands(facts)
    while True:
        if problem := draw_problem(rng, operands, rng.choice(templates)):
            told = rng.sample(problem.facts, len(problem.facts))
            tagged = [(word, FREE) for fact in told for word in fact.statement()]
            yield tagged + _turn(list(problem.question), _tag_solution(problem))


def _relay(rng: random.Random, operands: Operands) -> Iterator[Tagged]:
    relay = draw_relay(rng, operands, rng.randint(2, 4))
    if relay is None:
        return
    yield _turn(list(relay.problem.question), _tag_solution(relay.problem))
    for turn, step in zip(relay.turns[1:], relay.steps, strict=True):
        answer = [*_tag_step(step), ("####", FORM), (str(step.result), OPERAND)]
        yield _turn(split_words(turn.prompt)[1:-1], answer)
