"""Tasks of a relay: problems in turns, each of which ends in a number."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polykv import targets
from polykv.errors import PolyKVError
from polykv.evaluation import gsm8k
from polykv.reference.problems import Operands, draw_relay
from polykv.reference.text import join_words
from polykv.reference.world import sample_world

VERSION = 2  # of the tasks


@dataclass(frozen=True)
class Task:
    """A task: one prompt per turn, the first of which states the problem, and the correct number after each.

    `messages`, if any, are the prompts as the user's turns of a chat.

    Raises:
        PolyKVError: a turn in which no token may be written.
    """

    prompts: tuple[str, ...]
    max_new_tokens: tuple[int, ...]
    answers: tuple[str, ...]
    messages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for limit in self.max_new_tokens:
            if not isinstance(limit, int) or limit < 1:
                raise PolyKVError(
                    f"relay.max_new_tokens={limit!r}; it takes a whole number from 1 up"
                )


def load_tasks(settings: Mapping[str, Any], n_problems: int, n_turns: int, seed: int) -> list[Task]:
    """The tasks of a relay, by the settings of a YAML of conf/relay: its `_target_` makes them from the others.

    Raises:
        PolyKVError: the data is not available, or there are too few problems.
    """
    return targets.find(settings["_target_"])(settings, n_problems, n_turns, seed)


def reference(settings: Mapping[str, Any], n_problems: int, n_turns: int, seed: int) -> list[Task]:
    """Held-out word problems of the reference generator: `n_facts` facts, a problem, then one step per further turn.

    A longer relay begins with the turns of a shorter one.
    """
    tasks: list[Task] = []
    draw = 0
    while len(tasks) < n_problems:
        rng = random.Random(f"handoff/{seed}/{draw}")
        draw += 1
        facts = sample_world(rng, settings["n_facts"], "heldout")
        relay = draw_relay(rng, Operands(facts), n_turns)
        if relay is None:
            continue
        told = join_words([word for fact in facts for word in fact.statement()])
        prompts = [turn.prompt for turn in relay.turns]
        numbers = (relay.problem.answer, *(step.result for step in relay.steps))
        limits = (settings["max_new_tokens"],) * n_turns
        answers = tuple(map(str, numbers))
        tasks.append(Task((told + prompts[0], *prompts[1:]), limits, answers))
    return tasks


def grade_school(
    settings: Mapping[str, Any], n_problems: int, n_turns: int, seed: int
) -> list[Task]:
    """GSM8K in turns: the first agent solves the problem, each later one checks and corrects what it was handed.

    Every agent is asked for the number, so that a longer relay begins with the turns of a shorter one. With `restate`
    later agents read the problem once more, before they are asked.
    """

    for style in ("chat", "plain"):
        if "{question}" not in settings[style]["first"]:
            raise PolyKVError(
                f"relay.{style}.first={settings[style]['first']!r} has no {{question}}, where the problem stands"
            )
    if not isinstance(settings["restate"], bool):
        raise PolyKVError(f"relay.restate={settings['restate']!r}; it takes true or false")

    def said(style: Mapping[str, str], question: str) -> tuple[str, ...]:
        later = style["next"]
        if settings["restate"]:
            asked = later.lstrip()
            later = f"{later.removesuffix(asked)}{question}\n\n{asked}"
        return (style["first"].replace("{question}", question), *[later] * (n_turns - 1))

    return [
        Task(
            said(settings["plain"], problem.question),
            (settings["max_new_tokens"],) * n_turns,
            (problem.answer,) * n_turns,
            said(settings["chat"], problem.question),
        )
        for problem in gsm8k.load(settings["path"], n_problems, seed)
    ]
