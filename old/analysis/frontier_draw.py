"""Panels of the frontier figures: a draw function takes an Axes and what to draw, and returns the Axes."""

import textwrap
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from analysis.colours import colours, contrast, ink, looks
from analysis.draw import reaches
from analysis.frontier import Standing
from analysis.layout import SIZE, number_ticks
from analysis.reduce import Value
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, FuncFormatter

LETTERS = 32  # of a line of the frontier's legend


def frontier(ax: Axes, standings: Sequence[Standing], metric: str = "kl_mean") -> Axes:
    """KL against stored bits, log y, with intervals, and the Pareto front as a step.

    The legend has every recipe under its family; those on the front are filled, since others lie over each other.
    """
    drawn = [s for s in standings if (s[metric].value or 0) > 0]
    found = {s.recipe: s for s in drawn}
    for recipe, (tint, marker) in _looks(standings).items():
        if s := found.get(recipe):
            ax.errorbar(
                s["stored_bits"].value, s[metric].value, yerr=reaches([s[metric]]), fmt=marker,
                color=tint, elinewidth=0.9, markersize=6, markeredgewidth=1,
                markerfacecolor=tint if s.on_front else "none", label=recipe,
            )  # fmt: skip
    front = sorted((s["stored_bits"].value, s[metric].value) for s in drawn if s.on_front)
    if front:
        corners = [(right, y) for (_, y), (right, _) in zip(front, front[1:], strict=False)]
        steps = [spot for pair in zip(front, [*corners, front[-1]], strict=True) for spot in pair]
        ax.plot(*zip(*steps, strict=True), color="0.55", linewidth=1, zorder=0)
    ax.set_yscale("log")
    ax.margins(x=0.08, y=0.08)
    ax.set_xlabel("stored bits per value (every byte kept)")
    ax.set_ylabel("mean KL divergence, nats")
    handles, names = ax.get_legend_handles_labels()
    points = [container[0] for container in handles]  # without their intervals
    names = [textwrap.fill(name, LETTERS) for name in names]
    ax.legend(points, names, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1)
    return ax


def ranking(ax: Axes, standings: Sequence[Standing], metric: str, title: str) -> Axes:
    """One line per recipe, best on top, with its interval; KL log, perplexity deltas linear."""
    look = _looks(standings)
    for place, s in enumerate(standings):
        (tint, marker), value = look[s.recipe], s[metric]
        if value.value is None:
            continue
        ax.errorbar(
            value.value, place, xerr=reaches([value]), fmt=marker, color=tint, elinewidth=0.9,
        )  # fmt: skip
    if metric.startswith("kl"):
        ax.set_xscale("log")
    else:
        ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.yaxis.set_major_locator(FixedLocator(range(len(standings))))
    ax.set_ylim(len(standings) - 0.4, -0.6)
    ax.grid(axis="x")
    ax.set_xlabel(title)
    return ax


def ranking_names(ax: Axes, standings: Sequence[Standing]) -> Axes:
    """The recipes' names, ranks and stored bits beside the first panel of a ranking."""
    ax.set_yticklabels(
        [f"{s.recipe}   {s['stored_bits'].value:.2f} bits   rank {s.rank}" for s in standings]
    )
    look = _looks(standings)
    for tick, s in zip(ax.get_yticklabels(), standings, strict=True):
        tick.set_color(ink(look[s.recipe][0]))
        tick.set_fontweight("bold" if s.on_front else "normal")
    return ax


def _looks(standings: Sequence[Standing]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each recipe, by family and then stored bits."""
    by_bits = sorted(standings, key=lambda s: (s["stored_bits"].value or 0, s.recipe))
    return looks(s.recipe for s in by_bits)


def heat_map(ax: Axes, grid: pd.DataFrame, note: Callable[[float], str]) -> Axes:
    """`grid` (key bits down, value bits across) in a log colour scale, each cell with its number."""
    norm = LogNorm(np.nanmin(grid.values), np.nanmax(grid.values))
    image = ax.imshow(grid.values, norm=norm, cmap="viridis_r", aspect="auto")
    for (down, across), value in np.ndenumerate(grid.values):
        dark = contrast(image.cmap(norm(value))) > 4.5
        ax.text(
            across, down, note(value), ha="center", va="center", fontsize=SIZE,
            color="white" if dark else "black",
        )  # fmt: skip
    ax.xaxis.set_major_locator(FixedLocator(range(grid.shape[1])))
    ax.yaxis.set_major_locator(FixedLocator(range(grid.shape[0])))
    ax.set_xticklabels([f"{bits:g}" for bits in grid.columns])
    ax.set_yticklabels([f"{bits:g}" for bits in grid.index])
    ax.grid(False)
    ax.set_xlabel("value bits")
    ax.set_ylabel("key bits")
    ax.figure.colorbar(image, ax=ax, label="mean KL divergence, nats")
    return ax


def by_layer(
    ax: Axes,
    lines: dict[str, pd.DataFrame],
    label: str,
    heads: dict[str, pd.DataFrame] | None = None,
    log: bool = True,
) -> Axes:
    """One line per recipe over the layers, with intervals where there are any; single heads as dots."""
    tints = colours(lines)
    for place, (recipe, mine) in enumerate(lines.items()):
        mine = mine.sort_values("layer")
        shift = 0.05 * (place - (len(lines) - 1) / 2)
        spread = [mine["value"] - mine["ci_low"], mine["ci_high"] - mine["value"]]
        ax.errorbar(
            mine["layer"] + shift, mine["value"], yerr=None if mine["ci_low"].isna().any() else spread,
            fmt="o-", elinewidth=0.8, markersize=3, linewidth=1, color=tints[recipe],
            label=recipe,
        )  # fmt: skip
        if heads:
            own = heads[recipe]
            ax.plot(own["layer"] + shift, own["value"], ".", markersize=2.5, color=tints[recipe])
    if log:
        ax.set_yscale("log")
    n_layers = int(max(mine["layer"].max() for mine in lines.values())) + 1
    number_ticks(ax, range(0, n_layers, max(1, n_layers // 8)))
    ax.set_xlabel("layer")
    ax.set_ylabel(label)
    return ax


def over(
    ax: Axes, axis: str, lines: dict[str, list[tuple[float, Value]]], dots: dict[str, pd.DataFrame]
) -> Axes:
    """Perplexity delta over contexts or agents (log x) with intervals; single documents as dots."""
    tints = colours(lines)
    for place, (recipe, spots) in enumerate(lines.items()):
        shift = 1.07 ** (place - (len(lines) - 1) / 2)
        found = [value for _, value in spots]
        means = [value.value for value in found]
        if recipe in dots:
            own = dots[recipe]
            ax.plot(
                own["context_tokens"] * shift, own["value"], ".", color=tints[recipe], alpha=0.3,
                markersize=3, markeredgewidth=0,
            )  # fmt: skip
        ax.errorbar(
            [x * shift for x, _ in spots], means, yerr=reaches(found), fmt="o-", markersize=3.5,
            color=tints[recipe], label=recipe,
        )  # fmt: skip
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_xscale("log", base=2)
    number_ticks(ax, [x for spots in lines.values() for x, _ in spots])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:+g}" if number else "0"))
    ax.set_xlabel(axis)
    ax.set_ylabel("perplexity delta, %")
    return ax
