"""The figures of recipes at equal stored bits, and of their trends over context and agents."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, FuncFormatter

from analysis.frontier import (
    Standing,
    about,
    by_setting,
    compared,
    composed,
    deltas_of,
    measured,
    over_agents,
    over_contexts,
    scores,
)
from analysis.statistics import Value
from analysis.style import (
    COLUMN,
    CONTRAST,
    SIZE,
    Marks,
    Picture,
    colours,
    contrast,
    ink,
    legend,
    looks,
    number_ticks,
    picture,
    reaches,
    sheet,
    styled,
)

STUDY = "compare"
LETTERS = 32  # of a line of the frontier's legend
HEADING = 44  # letters of a heading over one column
Line = Sequence[tuple[float, Value]]


@styled
def recipe_frontier(rows: pd.DataFrame) -> Picture | str | None:
    """KL against stored bits, the Pareto front marked; one panel per setting."""
    found = compared(rows)
    if not found:
        return None
    canvas, panels = sheet([comparison.heading for comparison in found], 1, 5.2)
    for (ax,), comparison in zip(panels, found, strict=True):
        _frontier(ax, [s for s in comparison.standings if s.spot[1] > 0])
    return picture(
        canvas,
        "Mean KL divergence to the uncompressed cache against stored bits per value",
        about(scores(rows)),
        Marks(
            lines="Markers",
            more="One colour a family of recipes; filled, and joined by the grey line: the Pareto front. Recipes whose "
            "markers coincide stand apart in figure recipe_ranking.",
        ),
    )


def _frontier(ax: Axes, standings: Sequence[Standing]) -> None:
    """The legend has every recipe under its family; those on the front are filled, since others lie over each other."""
    found = {s.recipe: s for s in standings}
    for recipe, (tint, marker) in _looks(standings).items():
        s = found[recipe]
        ax.errorbar(
            *s.spot, yerr=reaches([s["kl_mean"]]), fmt=marker, color=tint, elinewidth=0.9, markersize=6,
            markeredgewidth=1, markerfacecolor=tint if s.on_front else "none", label=recipe,
        )  # fmt: skip
    front = sorted(s.spot for s in standings if s.on_front)
    bits, kl = zip(*front, strict=True)
    ax.step(bits, kl, where="post", color="0.55", linewidth=1, zorder=0)
    ax.set_yscale("log")
    ax.margins(x=0.08, y=0.08)
    ax.set_xlabel("stored bits per value (every byte kept)")
    ax.set_ylabel("mean KL divergence, nats")
    handles, names = ax.get_legend_handles_labels()
    points = [container[0] for container in handles]  # without their intervals
    names = [textwrap.fill(name, LETTERS) for name in names]
    ax.legend(points, names, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1)


@styled
def recipe_ranking(rows: pd.DataFrame) -> Picture | str | None:
    """Recipes from best to worst with intervals: KL and perplexity delta side by side."""
    found = compared(rows)
    if not found:
        return None
    n = max(len(comparison.standings) for comparison in found)
    canvas, panels = sheet([c.heading for c in found], 2, 0.17 * n + 0.5)
    for (left, right), comparison in zip(panels, found, strict=True):
        _ranking(left, comparison.standings, "kl_mean", "mean KL divergence, nats")
        left.set_xscale("log")
        _name(left, comparison.standings)
        _ranking(right, comparison.standings, "perplexity_delta", "perplexity delta, %")
        right.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        right.set_yticklabels([])
    return picture(
        canvas,
        "Recipes by mean KL divergence, and their perplexity against the uncompressed cache",
        about(scores(rows)),
        Marks(
            more="Bold: on the Pareto front of stored bits and KL. A range of ranks is a tie: paired t on log KL of "
            "the same documents, Holm over all pairs, 5 %."
        ),
    )


def _ranking(ax: Axes, standings: Sequence[Standing], metric: str, title: str) -> None:
    """One line per recipe, best on top, with its interval."""
    look = _looks(standings)
    for place, s in enumerate(standings):
        (tint, marker), value = look[s.recipe], s[metric]
        if value.value is not None:
            ax.errorbar(
                value.value, place, xerr=reaches([value]), fmt=marker, color=tint, elinewidth=0.9
            )
    ax.yaxis.set_major_locator(FixedLocator(range(len(standings))))
    ax.set_ylim(len(standings) - 0.4, -0.6)
    ax.grid(axis="x")
    ax.set_xlabel(title)


def _name(ax: Axes, standings: Sequence[Standing]) -> None:
    """The recipes' names, stored bits and ranks beside the first panel of a ranking."""
    ax.set_yticklabels([f"{s.recipe}   {s.spot[0]:.2f} bits   rank {s.rank}" for s in standings])
    look = _looks(standings)
    for tick, s in zip(ax.get_yticklabels(), standings, strict=True):
        tick.set_color(ink(look[s.recipe][0]))
        tick.set_fontweight("bold" if s.on_front else "normal")


def _looks(standings: Sequence[Standing]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each recipe, by family and then stored bits."""
    return looks(s.recipe for s in sorted(standings, key=lambda s: (s.spot[0], s.recipe)))


@styled
def kv_asymmetry(rows: pd.DataFrame) -> Picture | str | None:
    """Heat map of KL, key bits x value bits; one panel per setting."""
    found = scores(rows)
    found = found[composed(found)]
    grids = {heading: _grid(mine) for heading, mine in by_setting(found)}
    grids = {heading: grid for heading, grid in grids.items() if grid.size}
    if not grids:
        return None
    canvas, panels = sheet([*map(_short, grids)], 1, 2.7, COLUMN)
    for (ax,), grid in zip(panels, grids.values(), strict=True):
        _heat_map(ax, grid)
    return picture(
        canvas,
        "Mean KL divergence of one recipe at key bits by value bits",
        about(found),
        Marks(more="Log colour scale."),
    )


def _grid(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean KL, key bits down and value bits across, the most first."""
    cells = rows.groupby(["key_bits", "value_bits"])
    kl = pd.Series({bits: measured(part, "kl_mean").value for bits, part in cells}, dtype=float)
    grid = kl[kl > 0].unstack()
    return grid.sort_index(ascending=False).sort_index(axis=1, ascending=False)


def _heat_map(ax: Axes, grid: pd.DataFrame) -> None:
    """The grid in a log colour scale, each cell with its number."""
    norm = LogNorm(np.nanmin(grid.values), np.nanmax(grid.values))
    image = ax.imshow(grid.values, norm=norm, cmap="viridis_r", aspect="auto")
    for (down, across), value in np.ndenumerate(grid.values):
        dark = contrast(image.cmap(norm(value))) > CONTRAST
        ax.text(
            across, down, f"{value:.1e}", ha="center", va="center", fontsize=SIZE,
            color="white" if dark else "black",
        )  # fmt: skip
    for axis, bits, name in ((ax.xaxis, grid.columns, "value"), (ax.yaxis, grid.index, "key")):
        axis.set_major_locator(FixedLocator(range(len(bits))))
        axis.set_ticklabels([f"{n}" for n in bits])
        axis.set_label_text(f"{name} bits")
    ax.grid(False)
    ax.figure.colorbar(image, ax=ax, label="mean KL divergence, nats")


@styled
def context_scaling(rows: pd.DataFrame) -> Picture | str | None:
    """Perplexity delta by context, with intervals and every document; one panel per setting."""
    return _scaling(
        over_contexts(rows),
        "context_tokens",
        "context, tokens",
        "Perplexity against the uncompressed cache, by context",
        dots=True,
    )


@styled
def agent_scaling(rows: pd.DataFrame) -> Picture | str | None:
    """Perplexity delta by number of agents; one panel per setting."""
    return _scaling(
        over_agents(rows),
        "n_agents",
        "agents that read the pool",
        "Perplexity against the uncompressed cache of the last of N agents that read one pool",
    )


def _scaling(
    found: Iterable[tuple[str, str, pd.DataFrame]],
    axis: str,
    label: str,
    shows: str,
    dots: bool = False,
) -> Picture | None:
    """A panel for each setting of `found` (setting, recipe, rows): a line for each recipe over `axis`."""
    settings: dict[str, dict[str, pd.DataFrame]] = {}
    for setting, recipe, mine in found:
        settings.setdefault(setting, {})[recipe] = mine
    if not settings:
        return None
    canvas, panels = sheet([*map(_short, settings)], 1, 2.3, COLUMN)
    for (ax,), recipes in zip(panels, settings.values(), strict=True):
        lines = {
            recipe: [(at, measured(part, "perplexity_delta")) for at, part in mine.groupby(axis)]
            for recipe, mine in recipes.items()
        }
        lines = {name: [s for s in line if s[1].value is not None] for name, line in lines.items()}
        _over(ax, lines, {name: deltas_of(mine) for name, mine in recipes.items()} if dots else {})
        ax.set_xlabel(label)
    used = pd.concat([mine for recipes in settings.values() for mine in recipes.values()])
    marks = Marks(dots="single documents")
    return picture(legend(canvas), shows, about(used), marks)


def _over(ax: Axes, lines: Mapping[str, Line], dots: Mapping[str, pd.Series]) -> None:
    """Perplexity delta over contexts or agents (log x) with intervals; single documents as dots."""
    tints = colours(lines)
    for place, (recipe, line) in enumerate(lines.items()):
        shift = 1.07 ** (place - (len(lines) - 1) / 2)
        if recipe in dots:
            own = dots[recipe]
            ax.plot(
                own.index.to_numpy(float) * shift, own, ".", color=tints[recipe], alpha=0.3, markersize=3,
                markeredgewidth=0,
            )  # fmt: skip
        found = [value for _, value in line]
        ax.errorbar(
            [at * shift for at, _ in line], [v.value for v in found], yerr=reaches(found), fmt="o-",
            markersize=3.5, color=tints[recipe], label=recipe,
        )  # fmt: skip
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_xscale("log", base=2)
    number_ticks(ax, [at for line in lines.values() for at, _ in line])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:+g}" if number else "0"))
    ax.set_ylabel("perplexity delta, %")


def _short(heading: str) -> str:
    """A setting as the heading of one column."""
    return textwrap.fill(heading, HEADING)


FIGURES = {
    figure.__name__: figure
    for figure in (recipe_frontier, recipe_ranking, kv_asymmetry, context_scaling, agent_scaling)
}
