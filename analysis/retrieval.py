"""Questions to shared pools (study shared_tasks): every recipe's answers beside the uncompressed cache's, by task.

A task at one length can separate recipes only if the uncompressed cache answers and no answer comes without the
document: the ceiling and floor rule (`Task.why_not`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.handoff_accuracy import difference
from analysis.points import RUN, groups
from analysis.statistics import ALPHA, BASELINE, BYTES, Value, newest, once_per_frame
from polykv.evaluation.statistics import detectable, mcnemar, skewed_interval, wilson
from polykv.tasks.given import DOCUMENT, NOTHING

CEILING, FLOOR = 60.0, 20.0  # percent
DEPTHS = 5  # parts of a document
METRICS = ("contains", "answer_logprob", "choice_right")
# Answers under other values of these are to the same questions, and are not pooled.
OF_RUN = (*RUN, "n_agents", "reader")
PLACE = ("document", "context_tokens")
KEY = ["document", "context_tokens", "seed", "text", "agent"]  # of a question


@dataclass(frozen=True)
class Answers:
    """Answers to the same questions under one recipe and under the uncompressed cache.

    Attributes:
        own, full: by question (KEY), with columns METRICS and `depth`; the same questions in the same order.
        n_compared: recipes whose p values are corrected together, this one among them.
    """

    own: pd.DataFrame
    full: pd.DataFrame
    n_compared: int = 1

    @property
    def right(self) -> Value:
        """Percent right, with Wilson's interval."""
        return share(self.own["contains"])

    @property
    def chosen(self) -> Value:
        """Percent whose right answer is likelier than the wrong ones."""
        return share(self.own["choice_right"])

    @property
    def apart(self) -> Value:
        """Points of accuracy less the uncompressed cache's, with Agresti and Min's interval for pairs."""
        return Value(*difference(*self._verdicts), n=len(self.own), over="questions")

    @property
    def p(self) -> float:
        """McNemar's exact test against the uncompressed cache."""
        return mcnemar(*self._verdicts)[2]

    @property
    def detectable(self) -> Value:
        """The smallest difference in points that so many questions show after the correction."""
        only_own, only_full, _ = mcnemar(*self._verdicts)
        least = detectable(len(self.own), only_own + only_full, ALPHA / self.n_compared)
        return Value(least and 100 * least, note="" if least else "no difference is, among so few")

    @property
    def logprob(self) -> Value:
        """Change of the right answer's log-probability in nats; documents are the interval's sample."""
        change = self.own["answer_logprob"] - self.full["answer_logprob"]
        if change.isna().any():
            return Value(None, note="a log-probability is missing")
        units = change.groupby(level=[*KEY[:-1]]).mean().to_numpy()
        interval = skewed_interval(units) or (None, None)
        return Value(float(change.mean()), *interval, n=len(change), over="documents")

    @property
    def _verdicts(self) -> tuple[list[bool], list[bool]]:
        return tuple([*(side["contains"] == 1)] for side in (self.own, self.full))


@dataclass(frozen=True)
class Task:
    """One task at one length on one model.

    Attributes:
        about: the values of PLACE and of OF_RUN beyond RUN, and of settings in which cells differ.
        rows: of METRICS by recipe and `given`.
        bits: stored bits per cached value of the document, by recipe.
    """

    about: Mapping[str, Any]
    rows: pd.DataFrame
    bits: Mapping[str, Value]

    @property
    def name(self) -> str:
        """The task and its length."""
        return f"{self.about['document']} at {self.about['context_tokens']:,}"

    @cached_property
    def full(self) -> pd.DataFrame:
        """The uncompressed cache's answers."""
        return self.given(BASELINE, DOCUMENT)

    def given(self, recipe: str, given: str) -> pd.DataFrame:
        """The answers under a recipe when this was given, by question."""
        return self._by_recipe.get((recipe, given), self._indexed[:0])[[*METRICS, "depth"]]

    @cached_property
    def _indexed(self) -> pd.DataFrame:
        return self.rows.set_index(KEY).sort_index()

    @cached_property
    def _by_recipe(self) -> dict[tuple[str, str], pd.DataFrame]:
        return dict(iter(self._indexed.groupby(["recipe", "given"])))

    @cached_property
    def recipes(self) -> list[str]:
        """The recipes, most stored bits first."""
        found = self.rows["recipe"].unique()
        return sorted(found, key=lambda recipe: (-(self.bits[recipe].value or 0), recipe))

    def answers(self, recipe: str, given: str = DOCUMENT) -> Answers | None:
        """A recipe's answers to the questions that the uncompressed cache was asked too; None without any."""
        own = self.given(recipe, given)
        both = own.index.intersection(self.full.index)
        return Answers(own.loc[both], self.full.loc[both]) if len(both) else None

    @cached_property
    def compared(self) -> set[str]:
        """The recipes that are compared with the uncompressed cache."""
        return {name for name in self.recipes if name != BASELINE and self.answers(name)}

    def only(self, questions: frozenset, recipes: Sequence[str]) -> "Task | None":
        """The task with these questions, these recipes and the uncompressed cache; None if it has no such question."""
        asked = pd.MultiIndex.from_frame(self.rows[KEY]).isin(questions)
        rows = self.rows[asked & self.rows["recipe"].isin([BASELINE, *recipes])]
        return Task(self.about, rows, self.bits) if len(rows) else None

    @cached_property
    def why_not(self) -> str:
        """Why this task cannot separate recipes, "" if it can."""
        return why_not(self.full, self.given(BASELINE, NOTHING))


def why_not(full: pd.DataFrame, nothing: pd.DataFrame) -> str:
    """Why questions with these answers cannot separate recipes, "" if they can: the ceiling and floor rule."""
    if full.empty or nothing.empty:
        return f"recipe {BASELINE} was not asked"
    ceiling, floor = (share(side["contains"]).value for side in (full, nothing))
    if ceiling < CEILING:
        return f"the uncompressed cache has {ceiling:.0f} % right, less than {CEILING:.0f}"
    if floor > FLOOR:
        return f"without the document {floor:.0f} % are right, more than {FLOOR:.0f}"
    return ""


def share(right: pd.Series) -> Value:
    """The percentage of ones, with Wilson's interval over questions."""
    n, n_right = len(right), int(right.sum())
    found = Value(n_right / n, *(wilson(n_right, n) or (None, None)), n=n, over="questions")
    return found.map(lambda x: 100 * x)


def together(tasks: Sequence[Task], recipe: str) -> Answers | None:
    """A recipe's answers in all of these tasks."""
    found = [answers for task in tasks if (answers := task.answers(recipe))]
    if not found:
        return None
    own, full = (pd.concat([getattr(one, side) for one in found]) for side in ("own", "full"))
    return Answers(own, full, len(set().union(*(task.compared for task in tasks))))


def alike(tasks: Sequence[Task]) -> list[list[Task]]:
    """Parts of these tasks in which all recipes answered the same questions, most questions first.

    Each has the recipes that answered exactly these, and the uncompressed cache: recipes compare within one part only.
    """
    names = dict.fromkeys(name for task in tasks for name in task.recipes if name != BASELINE)
    recipes_of: dict[frozenset, list[str]] = {}
    for name in names:
        if answers := together(tasks, name):
            recipes_of.setdefault(frozenset(answers.own.index), []).append(name)
    if not recipes_of:
        return [[*tasks]] if tasks else []
    found = sorted(recipes_of.items(), key=lambda pair: -len(pair[0]))
    return [[part for task in tasks if (part := task.only(*pair))] for pair in found]


def bits_of(tasks: Sequence[Task], recipe: str) -> Value:
    """Mean stored bits of the tasks in which the recipe was measured."""
    found = [task.bits[recipe].value for task in tasks if recipe in task.bits]
    return Value(float(np.mean(found)), n=len(found))


def by_depth(tasks: Sequence[Task], recipe: str) -> tuple[list[int], np.ndarray]:
    """The lengths, and percent right (DEPTHS, lengths) by the place of the answer; NaN where no task counts."""
    lengths = sorted({task.about["context_tokens"] for task in tasks})
    found = np.full((DEPTHS, len(lengths)), np.nan)
    for column, length in enumerate(lengths):
        mine = [task for task in tasks if task.about["context_tokens"] == length]
        for part in range(DEPTHS):
            right = [verdicts for task in mine if len(verdicts := _in_part(task, recipe, part))]
            if right:
                found[part, column] = share(pd.concat(right)).value
    return lengths, found


def _in_part(task: Task, recipe: str, part: int) -> pd.Series:
    """Verdicts on the questions that this part of the document answers; none where they separate nothing."""

    def within(found: pd.DataFrame) -> pd.DataFrame:
        place = np.minimum(found["depth"].to_numpy(float) * DEPTHS, DEPTHS - 1)
        return found[np.floor(place) == part]

    own = within(task.given(recipe, DOCUMENT))["contains"]
    counts = not why_not(within(task.full), within(task.given(BASELINE, NOTHING)))
    return own if counts else own[:0]


def left_out(tasks: Sequence[Task]) -> str:
    """A sentence: how many tasks and lengths can separate recipes, and why the others cannot."""
    grey = [f"{task.name} ({task.why_not})" for task in tasks if task.why_not]
    tail = f" Left out: {'; '.join(grey)}." if grey else ""
    return f"{len(tasks) - len(grey)} of {len(tasks)} tasks and lengths can separate recipes.{tail}"


@once_per_frame
def by_run(rows: pd.DataFrame) -> list[tuple[dict[str, Any], list[Task]]]:
    """(OF_RUN and settings in which cells differ, tasks by name and length) of each run; of cells alike the newest."""
    found = []
    for run, mine in groups(rows, *OF_RUN):
        settings = {name: value for name, value in run.items() if name not in RUN}
        tasks = [_task(about | settings, part) for about, part in groups(mine, *PLACE, sort=True)]
        found.append((run, tasks))
    return found


def _task(about: Mapping[str, Any], rows: pd.DataFrame) -> Task:
    current = pd.concat([newest(part, ["seed"]) for _, part in rows.groupby("recipe")])
    bits = {
        recipe: BYTES["stored_bits"].of(part, ["seed"])
        for recipe, part in current.groupby("recipe")
    }
    told = current[current["metric"].isin(METRICS)]
    by = ["recipe", "given", *KEY]
    wide = told.pivot(index=by, columns="metric", values="value").reindex(columns=list(METRICS))
    depth = told.drop_duplicates(by).set_index(by)["depth"]
    return Task(about, wide.assign(depth=depth).reset_index(), bits)
