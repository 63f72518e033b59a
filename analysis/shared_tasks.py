"""Retrieval from a shared pool: right answers by task, length, depth and recipe, against the uncompressed cache."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis import style
from analysis.points import run_text, settings_text
from analysis.render import Column, Row, Table, describe, fixed, keys, settings_columns
from analysis.retrieval import (
    CEILING,
    DEPTHS,
    FLOOR,
    METRICS,
    Task,
    alike,
    bits_of,
    by_depth,
    by_run,
    left_out,
    together,
)
from analysis.statistics import ALPHA, BASELINE, Measure, Value
from polykv.evaluation.statistics import holm
from polykv.tasks.given import DOCUMENT, NOTHING, OTHER

CONTROLS = {OTHER: "another document's pool", NOTHING: "no document"}
RULE = (
    f"A task at one length counts if the uncompressed cache has at least {CEILING:.0f} % right and at most "
    f"{FLOOR:.0f} % are right without the document; the others cannot separate recipes and are in no ranking"
)
SPEED = Measure("questions_per_minute")
GREY = "0.85"
ACROSS = 4  # heat maps beside each other
LIGHT = 60  # percent from which the colours are light
ITSELF = Value(None, note="it is the uncompressed cache")
COLUMNS = [
    Column("bits", "stored bits", fixed(2)),
    Column("right", "right % [95 %]", fixed(1), interval=True),
    Column("apart", "minus full [95 %]", fixed(1, "+"), interval=True),
    Column("p", "p, Holm", fixed(4)),
    Column("detectable", "detectable", fixed(1)),
    Column("logprob", "log-prob, minus full [95 %]", fixed(3, "+"), interval=True),
    Column("chosen", "chosen %", fixed(1)),
]
LEGEND = (
    "right: the reply contains the answer. minus full: points of accuracy less the uncompressed cache's on the same "
    "questions (Agresti and Min's interval for pairs, questions taken as independent); p: McNemar's exact test, with "
    "Holm's correction over the recipes; detectable: the difference in points that so many questions show in 4 of 5 "
    "samples after that correction. log-prob: change of the right answer's log-probability in nats, interval over "
    "documents. chosen: the right answer is likelier than wrong ones from the same document. stored bits: all bytes "
    "kept, per value of the document's cache"
)  # fmt: skip


def table(rows: pd.DataFrame) -> Table:
    """Every recipe and control at every task and length."""
    lines: list[Row] = []
    for run, tasks in by_run(rows):
        for task in tasks:
            line = dict(task.about) | {"section": _heading(run), "task": task.about["document"]}
            line |= {"counts": task.why_not or "yes"}
            lines += [line | {"recipe": name} | shown for name, shown in _compared([task]).items()]
            for given, name in CONTROLS.items():
                if answers := task.answers(BASELINE, given):
                    control = {"right": answers.right, "chosen": answers.chosen}
                    lines.append(line | {"recipe": f"{BASELINE}, {name}"} | control)
    columns = [
        *keys("task", "context_tokens", "recipe"),
        *settings_columns(rows),
        *COLUMNS,
        Column("counts", "counts"),
    ]
    return Table(
        "shared_tasks",
        f"Questions to one shared pool. {about(rows)}",
        columns,
        lines,
        f"{LEGEND}. {RULE}",
    )


def recipes(rows: pd.DataFrame) -> Table | None:
    """Recipes over all tasks and lengths that count, most right answers first; a section for each set of questions."""
    lines: list[Row] = []
    for run, heading, part in _ranked(rows):
        speed = {
            name: SPEED.of(mine, ["cell"]) for name, mine in _of_run(rows, run).groupby("recipe")
        }
        shown = _compared(part)
        for name in sorted(shown, key=lambda name: -shown[name]["right"].value):
            n = {"n": shown[name]["right"].n, "speed": speed[name]}
            lines.append({"section": heading, "recipe": name} | shown[name] | n)
    if not lines:
        return None
    columns = [
        *keys("recipe"),
        *COLUMNS,
        Column("n", "questions"),
        Column("speed", "questions / min", fixed(0)),
    ]
    caption = f"Recipes by right answers, over the tasks and lengths that count. {about(rows)}"
    return Table("shared_tasks_recipes", caption, columns, lines, f"{LEGEND}. {RULE}")


def about(rows: pd.DataFrame) -> str:
    """What was measured, for a caption; n: questions of a cell."""
    told = rows[rows["metric"].isin(METRICS)]
    counts = told[told["given"] == DOCUMENT].groupby(["cell", "metric"])["value"].transform("size")
    return describe(told.assign(n=counts.reindex(told.index).astype("Int64")))


def _heading(run: Row) -> str:
    agents = f"{run['n_agents']:g} agents, reader {run['reader']}"
    return f"{run_text(run)}, {agents}{settings_text(run)}"


def _of_run(rows: pd.DataFrame, run: Row) -> pd.DataFrame:
    return rows[np.logical_and.reduce([rows[name] == value for name, value in run.items()])]


def _ranked(rows: pd.DataFrame) -> Iterator[tuple[Row, str, list[Task]]]:
    """(run, heading, tasks that count), once for each set of questions that recipes answered in a run."""
    for run, tasks in by_run(rows):
        counting = [task for task in tasks if not task.why_not]
        heading = f"{_heading(run)}; {len(counting)} of {len(tasks)} tasks and lengths count"
        parts = alike(counting)
        for part in parts:
            told = ""
            if len(parts) > 1:
                n = sum(len(task.full) for task in part)
                told = f"; {n:,} questions of {', '.join(task.name for task in part)}"
            yield run, heading + told, part


def _compared(tasks: Sequence[Task]) -> dict[str, Row]:
    """The columns of each recipe over these tasks; p values are corrected over the recipes."""
    names = dict.fromkeys(name for task in tasks for name in task.recipes)
    found = {name: answers for name in names if (answers := together(tasks, name))}
    others = [name for name in found if name != BASELINE]
    corrected = dict(zip(others, holm([found[name].p for name in others]), strict=True))
    shown: dict[str, Row] = {}
    for name, answers in found.items():
        shown[name] = {
            "bits": bits_of(tasks, name),
            "right": answers.right,
            "chosen": answers.chosen,
        }
        if name == BASELINE:
            shown[name] |= dict.fromkeys(("apart", "p", "detectable", "logprob"), ITSELF)
        else:
            shown[name] |= {"apart": answers.apart, "p": Value(corrected[name])}
            shown[name] |= {"detectable": answers.detectable, "logprob": answers.logprob}
    return shown


@style.styled
def figure(rows: pd.DataFrame) -> style.Picture | str:
    """Right answers against stored bits, a panel for each model and set of questions."""
    ranked = [*_ranked(rows)]
    if not ranked:
        return "no task counts at any length"
    canvas, panels = style.sheet([heading for _, heading, _ in ranked], 1, 2.4)
    names = dict.fromkeys(name for *_, tasks in ranked for task in tasks for name in task.recipes)
    looks = style.looks(names)
    for (ax,), (*_, tasks) in zip(panels, ranked, strict=True):
        for name, (tint, marker) in looks.items():
            if answers := together(tasks, name):
                spot = [(bits_of(tasks, name).value, answers.right)]
                style.series(
                    ax, spot, fmt=marker, color=tint, label=name, elinewidth=0.8, markersize=5
                )
        full = together(tasks, BASELINE)
        ax.axhline(full.right.value, color="0.6", linestyle="--", linewidth=0.8, zorder=0)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda bits, _: f"{bits:g}")
        ax.set_xlabel("stored bits per value of the document's cache (every byte kept)")
        ax.set_ylabel("right answers, %")
        ax.set_ylim(0, 103)
    shows = "Right answers of agents that share one pool, against its stored bits"
    marks = style.Marks(lines="Markers", dashed="the uncompressed cache", more=RULE)
    return style.picture(style.legend(canvas), shows, about(rows), marks)


@style.styled
def depth_figure(rows: pd.DataFrame) -> style.Picture | str:
    """Heat maps of right answers by depth and length: a panel for each recipe."""
    runs = list(by_run(rows))
    panels_of = []
    for run, tasks in runs:
        names = list(dict.fromkeys(name for task in tasks for name in task.recipes))
        panels_of += [
            (_heading(run) if not start else "", tasks, names[start : start + ACROSS])
            for start in range(0, len(names), ACROSS)
        ]
    canvas, panels = style.sheet([heading for heading, *_ in panels_of], ACROSS, 1.6)
    for row, (_, tasks, names) in zip(panels, panels_of, strict=True):
        for ax, name in zip(row, names, strict=False):
            _heat(ax, tasks, name)
            ax.set_title(name)
        row[0].set_ylabel("depth, %")
        style.keep(row, len(names))
    shows = "Right answers in percent by depth of the answer and length of the document, all tasks together"
    more = (
        f"Grey: no task counts there, as the uncompressed cache has less than {CEILING:.0f} % right at this depth, or "
        f"more than {FLOOR:.0f} % are right without the document; other tasks are left out in the same way."
    )
    return style.picture(canvas, shows, about(rows), style.Marks(more=more))


def _heat(ax: Axes, tasks: Sequence[Task], recipe: str) -> None:
    """One recipe: the deeper the answer, the lower."""
    lengths, shown = by_depth(tasks, recipe)
    ax.set_facecolor(GREY)
    ax.imshow(shown, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for (part, column), value in np.ndenumerate(shown):
        if np.isfinite(value):
            tint = "white" if value < LIGHT else "black"
            place = {"ha": "center", "va": "center", "fontsize": style.SIZE}
            ax.text(column, part, f"{value:.0f}", color=tint, **place)
    ax.grid(visible=False)
    ax.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    ax.set_yticks(range(DEPTHS), [f"{100 * (part + 0.5) / DEPTHS:.0f}" for part in range(DEPTHS)])
    ax.set_xlabel("tokens")


def findings(rows: pd.DataFrame) -> dict[str, list[str]]:
    """For each model: which recipes answer as often as the uncompressed cache, and what would have shown."""
    said = {}
    for run, tasks in by_run(rows):
        lines = [left_out(tasks)]
        for part in alike([task for task in tasks if not task.why_not]):
            shown = _compared(part)
            full = shown.pop(BASELINE)["right"]
            lines.append(
                f"The uncompressed cache answers {full.text('.1f')} % of {full.n} questions."
            )
            lines += [_told(name, row) for name, row in shown.items()]
        said[f"Answers from a shared pool: {_heading(run)}"] = lines
    return said


def _told(name: str, shown: Row) -> str:
    sure = shown["p"].value < ALPHA
    outcome = ("better" if shown["apart"].value > 0 else "worse") if sure else "no difference shown"
    limit = shown["detectable"]
    tail = f" ({limit.value:.1f} points would have shown)" if not sure and limit.value else ""
    return (
        f"{name}, at {shown['bits'].value:.2f} bits: {shown['right'].value:.1f} % right, {shown['apart'].text('+.1f')} "
        f"points against the uncompressed cache, **{outcome}**{tail}; the right answer's log-probability changes by "
        f"{shown['logprob'].text('+.3f')} nats."
    )


TABLES = {"shared_tasks": table, "shared_tasks_recipes": recipes}
FIGURES = {"shared_tasks": figure, "shared_tasks_depth": depth_figure}
FINDINGS = findings
