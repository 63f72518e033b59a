"""One panel each: a draw function takes an Axes and points and returns the Axes. No layout here."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from analysis.apart import without_settings
from analysis.colours import colours
from analysis.labels import label_ends
from analysis.layout import number_ticks, plain_log
from analysis.published import Figure
from analysis.reduce import Point, Value

OPEN = {"fillstyle": "none", "linestyle": "none", "markersize": 8, "markeredgewidth": 0.9}
IN_PLACE = ", cascade"
WIDE = 50.0  # percent; deltas beyond it need an axis that shows small ones too
GREY = "0.35"


def memory(ax: Axes, points: Sequence[Point], measure: str, figures: Sequence[Figure]) -> Axes:
    """GB against agents, log y; `figures` (published kv_memory of this setting) as open markers.

    Only resident memory depends on who reads: the others have one line a recipe.
    """
    ends = []
    largest = max(p[measure].value for p in points)
    unit, scale = ("GB", 1) if largest >= 0.1 else ("MB", 1e3)
    lines = _lines(points, by_reader=measure == "resident")
    for place, (name, mine) in enumerate(lines.items()):
        line = sorted({p.n_agents: p[measure].value * scale for p in mine}.items())
        look = _look(place, name, lines)
        ax.plot(*zip(*line, strict=True), **look)
        ends.append((line[-1][1], name, look["color"]))
    _published(ax, figures, lines, scale)
    plain_log(ax)
    ax.margins(x=0.08, y=0.12)
    _agents_axis(ax, points, figures)
    ax.set_ylabel(f"KV memory, {unit}")
    return label_ends(ax, ends)


def perplexity_delta(ax: Axes, points: Sequence[Point], figures: Sequence[Figure]) -> Axes:
    """Percent against context (log x) with intervals; published ones of this model and text open."""
    ends, top = [], 0.0
    lines = _lines(points)
    for place, (name, mine) in enumerate(lines.items()):
        shift = 2 ** (0.05 * (place - (len(lines) - 1) / 2))  # side by side, not on each other
        values = sorted({(p.context_tokens, p["perplexity_delta"]) for p in mine}, key=_by_context)
        tint = _colour(name, lines)
        at = [context * shift for context, _ in values]
        means = [v.value for _, v in values]
        ax.errorbar(at, means, yerr=reaches([v for _, v in values]), fmt="o-", color=tint)
        ends.append((means[-1], name, tint))
        top = max(top, *map(abs, means))
    spots = sorted({(f.document_tokens, f.value.value) for f in figures})
    if spots:
        ax.plot(*zip(*spots, strict=True), marker="o", color=_colour("polykv", lines), **OPEN)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_xscale("log", base=2)
    if top > WIDE:
        ax.set_yscale("symlog", linthresh=1)
    ax.margins(x=0.1, y=0.12)
    contexts = {p.context_tokens for p in points} | {f.document_tokens for f in figures}
    number_ticks(ax, _thinned(sorted(contexts)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:+g}" if number else "0"))
    ax.set_xlabel("context, tokens")
    ax.set_ylabel("perplexity delta, %" + (" (log beyond 1)" if top > WIDE else ""))
    return label_ends(ax, ends)


def bertscore(ax: Axes, points: Sequence[Point], figures: Sequence[Figure]) -> Axes:
    """F1 against agents with intervals, and each recipe's floor (dashed); published figures open."""
    ends, floors = [], []
    lines = _lines(points)
    for place, (name, mine) in enumerate(lines.items()):
        look = _look(place, name, lines)
        line = sorted(((p.n_agents, p["bertscore_f1"]) for p in mine), key=_by_context)
        values = [v for _, v in line]
        at = [n for n, _ in line]
        ax.errorbar(at, [v.value for v in values], yerr=reaches(values), **look)
        ends.append((values[-1].value, name, look["color"]))
        floor = [(p.n_agents, p["bertscore_floor"].value) for p in mine]
        floor = sorted(spot for spot in floor if spot[1] is not None)
        if floor:
            ax.plot(*zip(*floor, strict=True), "_--", markersize=8, color=look["color"])
            floors.append(floor[-1][1])
    if floors:
        ends.append((sum(floors) / len(floors), "floor", GREY))
    _published(ax, figures, lines)
    ax.margins(x=0.08, y=0.12)
    _agents_axis(ax, points, figures)
    ax.set_ylabel("BERTScore F1")
    return label_ends(ax, ends)


def reaches(values: Sequence[Value]) -> list[list[float]]:
    """Intervals as matplotlib takes them: distances below and above; 0 where there is none."""
    lows = [v.value if v.low is None else v.low for v in values]
    highs = [v.value if v.high is None else v.high for v in values]
    pairs = list(zip(values, lows, highs, strict=True))
    return [
        [max(0.0, v.value - x) for v, x, _ in pairs],
        [max(0.0, x - v.value) for v, _, x in pairs],
    ]


def _published(
    ax: Axes, figures: Sequence[Figure], lines: dict[str, list[Point]], scale: float = 1
) -> None:
    for recipe in dict.fromkeys(f.recipe for f in figures):
        mine = [(f.n_agents, f.value.value * scale) for f in figures if f.recipe == recipe]
        ax.plot(*zip(*mine, strict=True), marker="o", color=_colour(recipe, lines), **OPEN)


def _look(place: int, name: str, lines: dict[str, list[Point]]) -> dict[str, object]:
    """Later lines are thinner and their markers smaller, so that equal ones still all show."""
    thin = 0.8**place
    look = {"linestyle": "--" if name.endswith(IN_PLACE) else "-", "marker": "o"}
    look |= {"markersize": 4.5 * thin, "linewidth": 1.8 * thin}
    return {**look, "color": _colour(name, lines)}


def _colour(name: str, lines: dict[str, list[Point]]) -> str:
    recipes = [line.removesuffix(IN_PLACE) for line in lines]
    return colours([*recipes, name.removesuffix(IN_PLACE)])[name.removesuffix(IN_PLACE)]


def _lines(points: Sequence[Point], by_reader: bool = True) -> dict[str, list[Point]]:
    """A line for each recipe; those who read its pool in place may have one of their own."""
    lines: dict[str, list[Point]] = {}
    for p in points:
        reader = without_settings(p.reader)
        backend = p.reader.removeprefix(reader)  # where several read in place
        name = p.recipe + backend + IN_PLACE if by_reader and reader == "cascade" else p.recipe
        lines.setdefault(name, []).append(p)
    return lines


def _by_context(pair: tuple) -> tuple:
    return pair[0], pair[1].value


def _agents_axis(ax: Axes, points: Sequence[Point], figures: Sequence[Figure]) -> None:
    number_ticks(ax, [x.n_agents for x in (*points, *figures)])
    ax.set_xlabel("agents")


def _thinned(contexts: Sequence[int]) -> list[int]:
    """Ticks at least a factor of 1.3 apart, so that their labels do not touch."""
    kept: list[int] = []
    for context in contexts:
        if not kept or context > 1.3 * kept[-1]:
            kept.append(context)
    return kept
