"""One panel each: a draw function takes an Axes and points and returns the Axes. No layout here."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from analysis.published import Figure
from analysis.reduce import RECIPES, Point

OPEN = {"fillstyle": "none", "linestyle": "none", "markersize": 9}
MARKERS = "osD^v"
LABEL_GAP = 0.065  # of the panel's height: about one line of text
HIGHEST = 0.95  # a label above it would touch the title
IN_PLACE = ", cascade"
WIDE = 50.0  # percent; deltas beyond it need an axis that shows small ones too


def memory(ax: Axes, points: Sequence[Point], measure: str, figures: Sequence[Figure]) -> Axes:
    """GB against agents, log y; `figures` (published kv_memory of this setting) as open markers."""
    ends = []
    largest = max(p[measure].value for p in points)
    unit, scale = ("GB", 1) if largest >= 0.1 else ("MB", 1e3)
    for place, (recipe, mine) in enumerate(_by_recipe(points)):
        line = sorted((p.n_agents, p[measure].value * scale) for p in mine)
        ax.plot(*zip(*line, strict=True), **_look(place, recipe))
        ends.append((line[-1][1], recipe, colour(recipe)))
    for recipe in dict.fromkeys(f.recipe for f in figures):
        mine = [(f.n_agents, f.value.value * scale) for f in figures if f.recipe == recipe]
        ax.plot(*zip(*mine, strict=True), marker="o", color=colour(recipe), **OPEN)
    ax.set_yscale("log")
    ax.margins(x=0.08, y=0.12)
    _agents_axis(ax, [p.n_agents for p in points] + [f.n_agents for f in figures])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    ax.set_ylabel(f"KV memory, {unit}")
    return label_ends(ax, ends)


def perplexity_delta(ax: Axes, points: Sequence[Point], figures: Sequence[Figure]) -> Axes:
    """Percent against context (log x) with intervals; published ones open, one marker a model."""
    ends, top = [], 0.0
    recipes = _by_recipe(points)
    for place, (recipe, mine) in enumerate(recipes):
        shift = 2 ** (0.05 * (place - (len(recipes) - 1) / 2))  # side by side, not on each other
        values = sorted({(p.context_tokens, p["perplexity_delta"]) for p in mine}, key=_by_context)
        at = [context * shift for context, _ in values]
        means = [v.value for _, v in values]
        below = [v.value - (v.value if v.low is None else v.low) for _, v in values]
        above = [(v.value if v.high is None else v.high) - v.value for _, v in values]
        ax.errorbar(
            at,
            means,
            yerr=[below, above],
            fmt="o-",
            capsize=2.5,
            elinewidth=1,
            color=colour(recipe),
        )
        ends.append((means[-1], recipe, colour(recipe)))
        top = max(top, *map(abs, means))
    for marker, model in zip(MARKERS, dict.fromkeys(f.model for f in figures), strict=False):
        spots = {(f.document_tokens, f.value.value) for f in figures if f.model == model}
        ax.plot(*zip(*sorted(spots), strict=True), marker=marker, color="0.35", **OPEN)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_xscale("log", base=2)
    if top > WIDE:
        ax.set_yscale("symlog", linthresh=1)
    ax.margins(x=0.1, y=0.12)
    contexts = {p.context_tokens for p in points} | {f.document_tokens for f in figures}
    _ticks(ax, _thinned(sorted(contexts)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:+g}" if number else "0"))
    ax.set_xlabel("context, tokens")
    ax.set_ylabel("perplexity delta, %" + (" (log beyond 1)" if top > WIDE else ""))
    return label_ends(ax, ends)


def bertscore(ax: Axes, points: Sequence[Point], figures: Sequence[Figure]) -> Axes:
    """F1 against agents, with each recipe's floor (dashed); published figures as open markers."""
    ends = []
    floors = []
    for place, (recipe, mine) in enumerate(_by_recipe(points)):
        line = sorted((p.n_agents, p["bertscore_f1"].value) for p in mine)
        ax.plot(*zip(*line, strict=True), **_look(place, recipe))
        ends.append((line[-1][1], recipe, colour(recipe)))
        floor = [(p.n_agents, p["bertscore_floor"].value) for p in mine]
        floor = sorted(spot for spot in floor if spot[1] is not None)
        if floor:
            dashes = {"marker": "_", "markersize": 10, "linestyle": "--"}
            ax.plot(*zip(*floor, strict=True), **dashes, color=colour(recipe))
            floors.append(floor[-1][1])
    if floors:
        ends.append((sum(floors) / len(floors), "floor", "0.35"))
    for recipe in dict.fromkeys(f.recipe for f in figures):
        mine = [(f.n_agents, f.value.value) for f in figures if f.recipe == recipe]
        ax.plot(*zip(*mine, strict=True), marker="o", color=colour(recipe), **OPEN)
    ax.margins(x=0.08, y=0.12)
    _agents_axis(ax, [p.n_agents for p in points] + [f.n_agents for f in figures])
    ax.set_ylabel("BERTScore F1")
    return label_ends(ax, ends)


def label_ends(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> Axes:
    """Name each line (last y, text, colour) right of the panel, apart where they would overlap."""
    low, high = (ax.transScale.transform((1, y))[1] for y in ax.get_ylim())
    wanted = [
        ((ax.transScale.transform((1, y))[1] - low) / (high - low), *rest) for y, *rest in ends
    ]
    wanted.sort(key=lambda end: end[0])
    heights: list[float] = []
    for height, *_ in wanted:
        heights.append(max(height, heights[-1] + LABEL_GAP if heights else height))
    limit = HIGHEST
    for height, (_, text, tint) in reversed(list(zip(heights, wanted, strict=True))):
        place = {"transform": ax.transAxes, "va": "center", "fontsize": 7.5}
        ax.text(1.02, min(height, limit), text, color=tint, **place)
        limit = min(height, limit) - LABEL_GAP  # only those that are pushed from above move down
    return ax


def colour(line: str) -> str:
    """The same recipe has the same colour in every figure; recipes not in RECIPES share the rest."""
    recipe = line.removesuffix(IN_PLACE)
    palette = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    if recipe in RECIPES:
        return palette[RECIPES.index(recipe)]
    rest = palette[len(RECIPES) :]
    return rest[sum(map(ord, recipe)) % len(rest)]


def _look(place: int, recipe: str) -> dict[str, object]:
    """Later lines are thinner and their markers smaller, so that equal ones still all show."""
    thin = 0.8**place
    look = {
        "linestyle": "--" if recipe.endswith(IN_PLACE) else "-",
        "marker": "o",
        "markersize": 6.5 * thin,
        "linewidth": 2.4 * thin,
    }
    return {**look, "color": colour(recipe)}


def _by_recipe(points: Sequence[Point]) -> list[tuple[str, list[Point]]]:
    """A line for each recipe; those who read its pool in place have one of their own."""
    lines: dict[str, list[Point]] = {}
    for p in points:
        lines.setdefault(p.recipe + IN_PLACE * (p.reader == "cascade"), []).append(p)
    return list(lines.items())


def _by_context(pair: tuple) -> tuple:
    return pair[0], pair[1].value


def _agents_axis(ax: Axes, agents: Sequence[int]) -> None:
    _ticks(ax, sorted(set(agents)))
    ax.set_xlabel("agents")


def _ticks(ax: Axes, places: Sequence[int]) -> None:
    ax.xaxis.set_major_locator(FixedLocator(list(places)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.0f}"))


def _thinned(contexts: Sequence[int]) -> list[int]:
    """Ticks at least a factor of 1.3 apart, so that their labels do not touch."""
    kept: list[int] = []
    for context in contexts:
        if not kept or context > 1.3 * kept[-1]:
            kept.append(context)
    return kept
