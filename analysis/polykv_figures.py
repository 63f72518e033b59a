"""PolyKV's three figures: memory by agents, perplexity by context, BERTScore by agents."""

import textwrap
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter

from analysis import published
from analysis.points import Point, having, points
from analysis.published import Figure
from analysis.render import describe
from analysis.statistics import BASELINE, Value
from analysis.style import (
    COLUMN,
    OPEN,
    PAGE,
    READ_IN_PLACE,
    READERS,
    Marks,
    Picture,
    absent,
    colours,
    family,
    legend,
    number_ticks,
    picture,
    plain_log,
    reaches,
    sheet,
    styled,
)
from polykv.evaluation.statistics import MIN_DOCUMENTS

Key = TypeVar("Key", bound=Hashable)
Panel = Callable[[Axes, Sequence[Point], Sequence[Figure], Sequence[str]], Axes]
STUDY = ("polykv_memory", "compare")
HEIGHT = 1.75  # inches of a panel
ACROSS = 2
TITLE = 48  # characters of a title above one of two panels
ACCOUNTINGS = {
    "paper": "paper accounting (fp32, computed)",
    "stored": "stored (bytes kept)",
    "resident": "resident (measured)",
}
IN_PLACE = "in_place"
SUFFIX = f", {READERS[IN_PLACE][0]}"
DASHED = f"the pool is read {READERS[IN_PLACE][0]} (white markers), not copied by each agent"
PER_GB = {"GB": 1.0, "MB": 1e3}
WIDE = 50.0  # percent; deltas beyond it need an axis that shows small ones too
LEAST_F1 = -1.0
ROOM = 1.3  # beyond the first and last context, for lines that stand side by side


@styled
def memory_agents(rows: pd.DataFrame) -> Picture | str | None:
    """One row of panels per model and context, one column per accounting, on one scale."""
    found = [p for p in having(points(rows), *ACCOUNTINGS) if p.n_agents and p.context_tokens]
    if not found:
        return None
    settings = _grouped(found, lambda p: f"{_run(p)}, {p.context_tokens:,} tokens")
    shown = [name for name in ACCOUNTINGS if having(found, name)]
    width = PAGE if len(shown) > 1 else COLUMN
    canvas, panels = sheet(list(settings), len(shown), HEIGHT, width, share_y=True)
    recipes, figures = _recipes(found), published.load("polykv")
    for axes, mine in zip(panels, settings.values(), strict=True):
        largest = max(p[name].value or 0 for p in mine for name in shown)
        unit, drawn = "GB" if largest >= 0.1 else "MB", []
        for ax, name in zip(axes, shown, strict=True):
            ax.set_title(ACCOUNTINGS[name])
            if of := having(mine, name):
                beside = _beside(figures, name, of)
                drawn.append(_memory(ax, of, name, beside, recipes, unit))
            else:
                absent(ax, mine[0][name].note)
        drawn[0].tick_params(labelleft=True)
        for ax in drawn[1:]:
            ax.set_ylabel("")
    shows = "KV memory by number of agents and recipe"
    marks = Marks(panels=True, dashed=DASHED, more=_open(canvas, "paper", found))
    return picture(legend(canvas), shows, _describe(rows, "kv_memory"), marks)


@styled
def perplexity_context(rows: pd.DataFrame) -> Picture | str | None:
    """One panel per model and document."""
    every = having(points(rows), "perplexity_delta")
    found = [p for p in every if p.recipe != BASELINE and p.context_tokens]
    if not found:
        return "no compressed recipe has a perplexity delta" if every else None
    canvas = _wrapped(
        _grouped(found, lambda p: f"{_run(p)}\n{p.document}"),
        _perplexity_delta,
        "perplexity_delta",
    )
    shows = "Perplexity against the uncompressed cache, by context and recipe"
    marks = Marks(dashed=DASHED, more=_open(canvas, "perplexity_delta", found))
    return picture(canvas, shows, _describe(rows, "nll_delta"), marks)


@styled
def bertscore_agents(rows: pd.DataFrame) -> Picture | str | None:
    """One panel per model, document, context and scoring model in which a score differs from the others."""
    every = having(points(rows), "bertscore_f1")
    found = [p for p in every if p.recipe != BASELINE and p.n_agents]
    if not found:
        return "no compressed recipe has a BERTScore" if every else None

    def title(p: Point) -> str:
        length = f"{p.context_tokens:,} tokens" if p.context_tokens else "whole text"
        return f"{_run(p)}\n{p.document}, {length}; scored by {p.scorer}"

    settings = {name: mine for name, mine in _grouped(found, title).items() if _differ(mine)}
    if not settings:
        return "every recipe's answers score 1.0000, as the uncompressed cache's do"
    canvas = _wrapped(settings, _bertscore, "bertscore_f1")
    more = (
        "Floor: mean F1 of mismatched pairs. Left out: settings in which every score is 1.0000, and intervals over "
        f"fewer than {MIN_DOCUMENTS} answers. {_open(canvas, 'bertscore_f1', found)}"
    )
    shows = (
        "BERTScore F1 of answers from the pool against those from the uncompressed cache, by agents"
    )
    about = _describe(rows, "bertscore_f1", "bertscore_floor")
    return picture(canvas, shows, about, Marks(dashed=DASHED, more=more))


FIGURES = {
    "memory_agents": memory_agents,
    "perplexity_context": perplexity_context,
    "bertscore_agents": bertscore_agents,
}


def _memory(
    ax: Axes,
    found: Sequence[Point],
    measure: str,
    figures: Sequence[Figure],
    recipes: Sequence[str],
    unit: str,
) -> Axes:
    """Memory in `unit` against agents, log y; `figures` (published kv_memory of this setting) as open markers.

    Only resident memory depends on who reads: the others have one line a recipe.
    """
    for name, mine in _lines(found, by_reader=measure == "resident").items():
        line = sorted({p.n_agents: p[measure].value * PER_GB[unit] for p in mine}.items())
        ax.plot(*zip(*line, strict=True), label=name, **_look(name, recipes))
    _published(ax, figures, recipes, PER_GB[unit])
    ax.margins(x=0.08, y=0.12)
    _agents_axis(ax, found, figures)
    ax.set_ylabel(f"KV memory, {unit}")
    return plain_log(ax)


def _perplexity_delta(
    ax: Axes, found: Sequence[Point], figures: Sequence[Figure], recipes: Sequence[str]
) -> Axes:
    """Percent against context (log x) with intervals; published ones of this model and text open."""
    top, lines = 0.0, _lines(found)
    for place, (name, mine) in enumerate(lines.items()):
        shift = 2 ** (0.05 * (place - (len(lines) - 1) / 2))  # side by side, not on each other
        values = sorted({(p.context_tokens, p["perplexity_delta"]) for p in mine}, key=_by_place)
        means = [v.value for _, v in values]
        at = [context * shift for context, _ in values]
        spread, look = reaches([v for _, v in values]), _look(name, recipes)
        ax.errorbar(at, means, yerr=spread, elinewidth=0.9, label=name, **look)
        top = max(top, *map(abs, means))
    spots = sorted({(f.document_tokens, f.value.value) for f in figures})
    if spots:
        ax.plot(*zip(*spots, strict=True), marker="o", color=_colour("polykv", recipes), **OPEN)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_xscale("log", base=2)
    if top > WIDE:
        ax.set_yscale("symlog", linthresh=1)
    ax.margins(y=0.12)
    contexts = {p.context_tokens for p in found} | {f.document_tokens for f in figures}
    ax.set_xlim(min(contexts) / ROOM, max(contexts) * ROOM)
    number_ticks(ax, _thinned(sorted(contexts)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:+g}" if number else "0"))
    ax.set_xlabel("context, tokens")
    ax.set_ylabel("perplexity delta, %" + (" (log beyond 1)" if top > WIDE else ""))
    return ax


def _bertscore(
    ax: Axes, found: Sequence[Point], figures: Sequence[Figure], recipes: Sequence[str]
) -> Axes:
    """F1 against agents with the intervals that the answers support; published figures open.

    The floor, far below, is named and not drawn: on one axis with it no two recipes differ.
    """
    for name, mine in _lines(found).items():
        line = sorted(((p.n_agents, p["bertscore_f1"]) for p in mine), key=_by_place)
        values = [v for _, v in line]
        ax.errorbar(
            [n for n, _ in line], [v.value for v in values],
            yerr=reaches([v if _supported(v) else Value(v.value) for v in values]),
            elinewidth=0.9, label=name, **_look(name, recipes),
        )  # fmt: skip
    _published(ax, figures, recipes)
    ax.margins(x=0.08, y=0.12)
    ax.ticklabel_format(axis="y", useOffset=False)
    _agents_axis(ax, found, figures)
    floors = [p["bertscore_floor"].value for p in found]
    ends = sorted(f"{floor:.2f}" for floor in floors if floor is not None)
    said = f"\n(floor {' to '.join(dict.fromkeys((ends[0], ends[-1])))})" if ends else ""
    ax.set_ylabel("BERTScore F1" + said)
    return ax


def _wrapped(settings: Mapping[str, list[Point]], panel: Panel, metric: str) -> Canvas:
    """One panel under each title, two beside each other; one alone fits a column."""
    across = min(ACROSS, len(settings))
    down = -(-len(settings) // across)
    canvas, rows = sheet([""] * down, across, HEIGHT + 0.3, PAGE if across > 1 else COLUMN)
    panels = [ax for row in rows for ax in row]
    for ax in panels[len(settings) :]:
        ax.remove()
    recipes = _recipes([p for mine in settings.values() for p in mine])
    for ax, (title, mine) in zip(panels, settings.items(), strict=False):
        panel(ax, mine, _beside(published.load("polykv"), metric, mine), recipes)
        ax.set_title("\n".join(textwrap.fill(line, TITLE) for line in title.split("\n")))
    return legend(canvas)


def _beside(figures: Iterable[Figure], measure: str, found: Sequence[Point]) -> list[Figure]:
    return [f for f in figures if any(published.is_beside(f, measure, p) for p in found)]


def _open(canvas: Canvas, measure: str, found: Sequence[Point]) -> str:
    """What open markers are, or why none are drawn."""
    if not any(line.get_fillstyle() == "none" for ax in canvas.axes for line in ax.lines):
        return "Published figures are of other models or settings: not drawn, but in table published_polykv"
    models = (f.model for f in _beside(published.load("polykv"), measure, found))
    return f"Open markers: published, on {' and '.join(dict.fromkeys(models))}"


def _describe(rows: pd.DataFrame, *metrics: str) -> str:
    return describe(rows[rows["metric"].isin(metrics) & rows["value"].notna()])


def _differ(found: Sequence[Point]) -> bool:
    """Whether, in the digits that tables give, a score is not that of the uncompressed cache's own answers."""
    return any(round(p["bertscore_f1"].value, 4) != 1 for p in found)


def _grouped(found: Sequence[Point], key: Callable[[Point], Key]) -> dict[Key, list[Point]]:
    groups: dict[Key, list[Point]] = {}
    for p in found:
        groups.setdefault(key(p), []).append(p)
    return groups


def _run(p: Point) -> str:
    return f"{p.model} ({p.weights} weights), {p.device}, {p.dtype}"


def _supported(f1: Value) -> bool:
    """Whether there were answers enough for an interval: one that is cut at the least F1 says nothing."""
    return f1.low is not None and f1.low > LEAST_F1 and (f1.n or 0) >= MIN_DOCUMENTS


def _published(
    ax: Axes, figures: Sequence[Figure], recipes: Sequence[str], scale: float = 1
) -> None:
    for recipe in dict.fromkeys(f.recipe for f in figures):
        mine = [(f.n_agents, f.value.value * scale) for f in figures if f.recipe == recipe]
        ax.plot(*zip(*mine, strict=True), marker="o", color=_colour(recipe, recipes), **OPEN)


def _recipes(found: Sequence[Point]) -> list[str]:
    """The names that lines of the whole figure are about, so that each looks alike in every panel."""
    names = (*_lines(found, by_reader=False), *_lines(found))
    return list(dict.fromkeys(name.removesuffix(SUFFIX) for name in names))


def _look(name: str, recipes: Sequence[str]) -> dict[str, object]:
    """Later recipes are thinner and their markers smaller, so that equal ones still all show."""
    recipe = name.removesuffix(SUFFIX)
    thin = max(0.35, 0.78 ** recipes.index(recipe))
    look = {"color": _colour(recipe, recipes), "marker": family(recipe)[2]}
    look |= {"markersize": 6 * thin, "linewidth": 2.2 * thin}
    return look | (READ_IN_PLACE if name.endswith(SUFFIX) else {})


def _colour(recipe: str, recipes: Sequence[str]) -> str:
    return colours([*recipes, recipe])[recipe]


def _lines(found: Sequence[Point], by_reader: bool = True) -> dict[str, list[Point]]:
    """A line for each recipe; those who read its pool in place may have one of their own, after the others.

    Where several backends read in place, each has one.
    """
    lines: dict[str, list[Point]] = {}
    several = len({p.backend for p in found if p.reader == IN_PLACE}) > 1
    for p in found:
        name = p.name
        if by_reader and p.reader == IN_PLACE:
            name += f" ({p.backend})" * several + SUFFIX
        lines.setdefault(name, []).append(p)
    return dict(sorted(lines.items(), key=lambda line: line[0].endswith(SUFFIX)))


def _by_place(pair: tuple[int, Value]) -> tuple:
    return pair[0], pair[1].value


def _agents_axis(ax: Axes, found: Sequence[Point], figures: Sequence[Figure]) -> None:
    number_ticks(ax, [x.n_agents for x in (*found, *figures)])
    ax.set_xlabel("agents")


def _thinned(contexts: Sequence[int]) -> list[int]:
    """Ticks at least a factor of 1.3 apart, so that their labels do not touch."""
    kept: list[int] = []
    for context in contexts:
        if not kept or context > 1.3 * kept[-1]:
            kept.append(context)
    return kept
