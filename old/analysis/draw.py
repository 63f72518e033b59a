"""One panel each: a draw function takes an Axes and points and returns the Axes. No layout here.

`recipes` are those of the whole figure (`recipes_of`), so that each looks alike in every panel.
"""

from collections.abc import Sequence

from analysis.apart import without_settings
from analysis.colours import READERS, colours, family
from analysis.layout import number_ticks, plain_log
from analysis.published import Figure
from analysis.reduce import Point, Value
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from polykv.evaluation.statistics import MIN_DOCUMENTS

OPEN = {"fillstyle": "none", "linestyle": "none", "markersize": 8, "markeredgewidth": 0.9}
IN_PLACE = f", {READERS['cascade'][0]}"
READ_IN_PLACE = {"linestyle": "--", "markerfacecolor": "white"}
PER_GB = {"GB": 1.0, "MB": 1e3}
WIDE = 50.0  # percent; deltas beyond it need an axis that shows small ones too
LEAST_F1 = -1.0
ROOM = 1.3  # beyond the first and last context, for lines that stand side by side


def memory(
    ax: Axes,
    points: Sequence[Point],
    measure: str,
    figures: Sequence[Figure],
    recipes: Sequence[str],
    unit: str = "GB",
) -> Axes:
    """Memory in `unit` against agents, log y; `figures` (published kv_memory of this setting) as open markers.

    Only resident memory depends on who reads: the others have one line a recipe.
    """
    for name, mine in _lines(points, by_reader=measure == "resident").items():
        line = sorted({p.n_agents: p[measure].value * PER_GB[unit] for p in mine}.items())
        ax.plot(*zip(*line, strict=True), label=name, **_look(name, recipes))
    _published(ax, figures, recipes, PER_GB[unit])
    ax.margins(x=0.08, y=0.12)
    _agents_axis(ax, points, figures)
    ax.set_ylabel(f"KV memory, {unit}")
    return plain_log(ax)


def perplexity_delta(
    ax: Axes, points: Sequence[Point], figures: Sequence[Figure], recipes: Sequence[str]
) -> Axes:
    """Percent against context (log x) with intervals; published ones of this model and text open."""
    top = 0.0
    lines = _lines(points)
    for place, (name, mine) in enumerate(lines.items()):
        shift = 2 ** (0.05 * (place - (len(lines) - 1) / 2))  # side by side, not on each other
        values = sorted({(p.context_tokens, p["perplexity_delta"]) for p in mine}, key=_by_context)
        at = [context * shift for context, _ in values]
        means = [v.value for _, v in values]
        look = _look(name, recipes)
        spread = reaches([v for _, v in values])
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
    contexts = {p.context_tokens for p in points} | {f.document_tokens for f in figures}
    ax.set_xlim(min(contexts) / ROOM, max(contexts) * ROOM)
    number_ticks(ax, _thinned(sorted(contexts)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:+g}" if number else "0"))
    ax.set_xlabel("context, tokens")
    ax.set_ylabel("perplexity delta, %" + (" (log beyond 1)" if top > WIDE else ""))
    return ax


def bertscore(
    ax: Axes, points: Sequence[Point], figures: Sequence[Figure], recipes: Sequence[str]
) -> Axes:
    """F1 against agents with the intervals that the answers support; published figures open.

    The floor, far below, is named and not drawn: on one axis with it no two recipes differ.
    """
    for name, mine in _lines(points).items():
        line = sorted(((p.n_agents, p["bertscore_f1"]) for p in mine), key=_by_context)
        values = [v for _, v in line]
        ax.errorbar(
            [n for n, _ in line], [v.value for v in values],
            yerr=reaches([v if _supported(v) else Value(v.value) for v in values]),
            elinewidth=0.9, label=name, **_look(name, recipes),
        )  # fmt: skip
    _published(ax, figures, recipes)
    ax.margins(x=0.08, y=0.12)
    ax.ticklabel_format(axis="y", useOffset=False)
    _agents_axis(ax, points, figures)
    floors = [p["bertscore_floor"].value for p in points]
    ends = sorted(f"{floor:.2f}" for floor in floors if floor is not None)
    said = f"\n(floor {' to '.join(dict.fromkeys((ends[0], ends[-1])))})" if ends else ""
    ax.set_ylabel("BERTScore F1" + said)
    return ax


def recipes_of(points: Sequence[Point]) -> list[str]:
    """The recipes that lines of these points are about, in their order."""
    names = (*_lines(points, by_reader=False), *_lines(points))
    return list(dict.fromkeys(name.removesuffix(IN_PLACE) for name in names))


def reaches(values: Sequence[Value]) -> list[list[float]]:
    """Intervals as matplotlib takes them: distances below and above; 0 where there is none."""
    lows = [v.value if v.low is None else v.low for v in values]
    highs = [v.value if v.high is None else v.high for v in values]
    pairs = list(zip(values, lows, highs, strict=True))
    return [
        [max(0.0, v.value - x) for v, x, _ in pairs],
        [max(0.0, x - v.value) for v, _, x in pairs],
    ]


def _supported(f1: Value) -> bool:
    """Whether there were answers enough for an interval: one that is cut at the least F1 says nothing."""
    return f1.low is not None and f1.low > LEAST_F1 and (f1.n or 0) >= MIN_DOCUMENTS


def _published(
    ax: Axes, figures: Sequence[Figure], recipes: Sequence[str], scale: float = 1
) -> None:
    for recipe in dict.fromkeys(f.recipe for f in figures):
        mine = [(f.n_agents, f.value.value * scale) for f in figures if f.recipe == recipe]
        ax.plot(*zip(*mine, strict=True), marker="o", color=_colour(recipe, recipes), **OPEN)


def _look(name: str, recipes: Sequence[str]) -> dict[str, object]:
    """Later recipes are thinner and their markers smaller, so that equal ones still all show."""
    recipe = name.removesuffix(IN_PLACE)
    thin = max(0.35, 0.78 ** recipes.index(recipe))
    look = {"color": _colour(recipe, recipes), "marker": family(recipe)[2]}
    look |= {"markersize": 6 * thin, "linewidth": 2.2 * thin}
    return look | (READ_IN_PLACE if name.endswith(IN_PLACE) else {})


def _colour(recipe: str, recipes: Sequence[str]) -> str:
    return colours([*recipes, recipe])[recipe]


def _lines(points: Sequence[Point], by_reader: bool = True) -> dict[str, list[Point]]:
    """A line for each recipe; those who read its pool in place may have one of their own, after the others."""
    lines: dict[str, list[Point]] = {}
    for p in points:
        reader = without_settings(p.reader)
        backend = p.reader.removeprefix(reader)  # where several read in place
        name = p.recipe + backend + IN_PLACE if by_reader and reader == "cascade" else p.recipe
        lines.setdefault(name, []).append(p)
    return dict(sorted(lines.items(), key=lambda line: line[0].endswith(IN_PLACE)))


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
