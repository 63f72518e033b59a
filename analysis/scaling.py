"""A recipe's damage by context, by number of agents and by bits of keys and values, with PolyKV's claims on them."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from scipy import stats

from analysis import style
from analysis.catalog import INCONCLUSIVE, NOT_MEASURED, NOT_REPRODUCED, REPRODUCED, Claim
from analysis.frontier import (
    QUALITY_COLUMNS,
    SETTING,
    about,
    by_setting,
    composed,
    measured,
    p_text,
    scores,
    table_of,
)
from analysis.render import Column, Table, fixed, keys, significant
from analysis.statistics import ALPHA, Value, pairs_of, percent, samples_of

STUDY = "compare"
HEADING = 44  # letters of a heading over one column
Line = tuple[str, str, pd.DataFrame]  # setting, recipe, rows
PAPER, TABLE, RECIPE = "polykv", "quality", "polykv"
TREND = "run experiment=context_scaling with three contexts (context=) of n_documents=8"
MORE = "; more documents (n_documents=) would tell"
PRINTED = 0.01  # a perplexity delta's last printed digit, in percent
SAME_NATS = 0.01  # of one token's log-probability; rounding is a hundred times less
_BITS, _KL = QUALITY_COLUMNS[0], QUALITY_COLUMNS[2]
_DELTA = Column("perplexity_delta", "Δppl % [95 %]", fixed(3, "+"), interval=True)


def trend(contexts: Sequence[float], deltas: Sequence[float]) -> Value:
    """Least-squares slope of the delta per doubling of the context, with its 95 % interval.

    Long contexts spread far less than short ones, so each has its own variance, as in Welch's test: the
    slope is a weighted sum of the contexts' means, its degrees of freedom are Satterthwaite's (1946).
    """
    if len(set(contexts)) < 3:
        return Value(None, note="fewer than three contexts were run")
    x, y = np.log2(contexts), np.asarray(deltas, dtype=float)
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slope = float(weights @ y)
    groups = [x == at for at in np.unique(x)]
    if min(group.sum() for group in groups) < 2:
        return Value(slope, note="a context has one document only, which shows no spread")
    parts = np.array([(weights[g] ** 2).sum() * y[g].var(ddof=1) for g in groups])
    freedom = np.array([g.sum() - 1 for g in groups])
    if not (variance := parts.sum()):
        return Value(slope, slope, slope)
    reach = stats.t.ppf(0.975, variance**2 / (parts**2 / freedom).sum()) * math.sqrt(variance)
    return Value(slope, float(slope - reach), float(slope + reach))


def deltas_of(rows: pd.DataFrame) -> pd.Series:
    """One recipe's perplexity delta of each document in percent, by context."""
    return samples_of(rows, "nll_delta", ["context_tokens"]).dropna().droplevel("text").map(percent)


def over_contexts(rows: pd.DataFrame) -> list[Line]:
    """The lines of what was measured at several contexts."""
    found = by_setting(scores(rows), [name for name in SETTING if name != "context_tokens"])
    each = [(setting, *own) for setting, part in found for own in part.groupby("recipe")]
    return [line for line in each if line[2]["context_tokens"].nunique() > 1]


def over_agents(rows: pd.DataFrame) -> list[Line]:
    """The lines of agents that scored together."""
    found = by_setting(scores(rows, together=True))
    return [(setting, *own) for setting, part in found for own in part.groupby("recipe")]


def _values(rows: pd.DataFrame, columns: Sequence[Column]) -> dict[str, Value]:
    return {column.name: measured(rows, column.name) for column in columns}


def kv_asymmetry(rows: pd.DataFrame) -> Table | None:
    """Scores of one recipe by key bits and value bits."""
    found = scores(rows)
    found = found[composed(found)]
    lines = [
        {"section": setting, "recipe": recipe} | _values(part, QUALITY_COLUMNS)
        for setting, mine in by_setting(found)
        for recipe, part in mine.groupby("recipe")
    ]
    lines.sort(key=lambda line: (line["section"], line["stored_bits"].value or 0))
    columns = [Column("recipe", "key and value bits", key=True), *QUALITY_COLUMNS]
    caption = "One recipe at key bits x value bits, by stored bits."
    return table_of("kv_asymmetry", caption, found, columns, lines)


def context_scaling(rows: pd.DataFrame) -> Table | None:
    """Perplexity delta by context, and its slope."""
    columns, lines = [_DELTA, _KL, _BITS], []
    none = dict.fromkeys(("kl_mean", "stored_bits"), Value(None, note="no slope is fitted"))
    for section, recipe, mine in over_contexts(rows):
        line = {"section": section, "recipe": recipe}
        for context, part in mine.groupby("context_tokens"):
            lines.append(line | {"context": f"{context:,}"} | _values(part, columns))
        deltas = deltas_of(mine)
        slope = trend(deltas.index.to_numpy(float), deltas.to_numpy())
        lines.append(line | none | {"context": "per doubling", "perplexity_delta": slope})
    caption = (
        "Perplexity delta by context. Per doubling: least-squares slope of the documents' deltas over log2 of the "
        "context, every context with a variance of its own (Welch); the delta shrinks where it points to 0 with its "
        "whole interval."
    )
    columns = [*keys("recipe", "context"), *columns]
    return table_of("context_scaling", caption, scores(rows), columns, lines)


def agent_scaling(rows: pd.DataFrame) -> Table | None:
    """Perplexity delta by number of agents, and how far any agent is from a single reader."""
    spread = Column("agent_spread", "largest difference to a single reader, nats", significant)
    columns = [_DELTA, _KL, spread]
    lines = [
        {"section": section, "recipe": recipe, "agents": int(n)} | _values(part, columns)
        for section, recipe, mine in over_agents(rows)
        for n, part in mine.groupby("n_agents")
    ]
    caption, used = "Quality of the last of N agents that read one pool.", scores(rows, True)
    return table_of("agent_scaling", caption, used, [*keys("recipe", "agents"), *columns], lines)


@style.styled
def asymmetry_figure(rows: pd.DataFrame) -> style.Picture | str | None:
    """Heat map of KL, key bits x value bits; one panel per setting."""
    found = scores(rows)
    found = found[composed(found)]
    grids = {}  # mean KL, key bits down and value bits across, the most first
    for heading, mine in by_setting(found):
        cells = mine.groupby(["key_bits", "value_bits"])
        kl = {bits: measured(part, "kl_mean").value for bits, part in cells}
        kl = pd.Series({bits: value for bits, value in kl.items() if value}, dtype=float)
        if len(kl):
            grids[heading] = kl.unstack().sort_index(ascending=False)
    if not grids:
        return None
    canvas, panels = style.sheet([*map(_short, grids)], 1, 2.7, style.COLUMN)
    for (ax,), grid in zip(panels, grids.values(), strict=True):
        _heat_map(ax, grid)
    shows = "Mean KL divergence of one recipe at key bits by value bits"
    return style.picture(canvas, shows, about(found), style.Marks(more="Log colour scale."))


def _heat_map(ax: Axes, grid: pd.DataFrame) -> None:
    """The grid in a log colour scale, each cell with its number."""
    grid = grid.sort_index(axis=1, ascending=False)
    norm = LogNorm(np.nanmin(grid.values), np.nanmax(grid.values))
    image = ax.imshow(grid.values, norm=norm, cmap="viridis_r", aspect="auto")
    for (down, across), value in np.ndenumerate(grid.values):
        dark = style.contrast(image.cmap(norm(value))) > style.CONTRAST
        ax.text(
            across, down, f"{value:.1e}", ha="center", va="center", fontsize=style.SIZE,
            color="white" if dark else "black",
        )  # fmt: skip
    ax.set_xticks(range(len(grid.columns)), [f"{bits}" for bits in grid.columns])
    ax.set_yticks(range(len(grid.index)), [f"{bits}" for bits in grid.index])
    ax.set_xlabel("value bits")
    ax.set_ylabel("key bits")
    ax.grid(False)
    ax.figure.colorbar(image, ax=ax, label="mean KL divergence, nats")


@style.styled
def context_figure(rows: pd.DataFrame) -> style.Picture | str | None:
    """Perplexity delta by context, with intervals and every document; one panel per setting."""
    shows = "Perplexity against the uncompressed cache, by context"
    return _scaling(over_contexts(rows), "context_tokens", "context, tokens", shows)


@style.styled
def agent_figure(rows: pd.DataFrame) -> style.Picture | str | None:
    """Perplexity delta by number of agents; one panel per setting."""
    shows = "Perplexity against the uncompressed cache of the last of N agents that read one pool"
    return _scaling(over_agents(rows), "n_agents", "agents that read the pool", shows)


def _scaling(found: Sequence[Line], axis: str, label: str, shows: str) -> style.Picture | None:
    """A panel for each setting: a line with intervals for each recipe over `axis`; documents by context as dots."""
    settings: dict[str, dict[str, pd.DataFrame]] = {}
    for setting, recipe, mine in found:
        settings.setdefault(setting, {})[recipe] = mine
    if not settings:
        return None
    canvas, panels = style.sheet([*map(_short, settings)], 1, 2.3, style.COLUMN)
    for (ax,), recipes in zip(panels, settings.values(), strict=True):
        looks = style.looks(recipes)
        for place, (recipe, mine) in enumerate(recipes.items()):
            shift, (tint, marker) = 1.07 ** (place - (len(recipes) - 1) / 2), looks[recipe]
            if axis == "context_tokens":
                deltas = deltas_of(mine)
                at = deltas.index.to_numpy(float) * shift
                ax.plot(at, deltas, ".", alpha=0.3, color=tint, markersize=3, markeredgewidth=0)
            parts = mine.groupby(axis)
            spots = [(at * shift, measured(part, "perplexity_delta")) for at, part in parts]
            style.series(ax, spots, fmt=f"{marker}-", color=tint, markersize=3.5, label=recipe)
        style.delta_axis(ax, "perplexity delta, %")
        ax.set_xscale("log", base=2)
        style.number_ticks(ax, [at for mine in recipes.values() for at in mine[axis]])
        ax.set_xlabel(label)
    used = pd.concat([mine for _, _, mine in found])
    marks = style.Marks(dots="single documents")
    return style.picture(style.legend(canvas), shows, about(used), marks)


def _short(heading: str) -> str:
    """A setting's heading, wrapped to the width of one column."""
    return textwrap.fill(heading, HEADING)


def claims(rows: pd.DataFrame) -> list[Claim]:
    """One claim per setting that can decide it, or the command that would measure it."""
    contexts = [(where, mine) for where, recipe, mine in over_contexts(rows) if recipe == RECIPE]
    crowds = [(where, mine) for where, recipe, mine in over_agents(rows) if recipe == RECIPE]
    found = scores(rows)
    bits = by_setting(found[composed(found)])
    judged = {
        ("the perplexity delta shrinks as the context grows", "context_scaling"): [
            (where, _shrinks(mine)) for where, mine in contexts
        ],
        ("quality does not depend on how many agents read the pool", "agent_scaling"): [
            (where, _same_for_all(mine)) for where, mine in crowds
        ],
        ("keys deserve more bits than values (8 and 3)", "kv_asymmetry"): [
            (where, verdict) for where, mine in bits if (verdict := _unequal(mine))
        ],
    }
    claims = []
    for (said, experiment), verdicts in judged.items():
        run = f"Not measured; run experiment={experiment}."
        none = [] if verdicts else [Claim(PAPER, TABLE, NOT_MEASURED, said, run)]
        claims += none or [
            Claim(PAPER, TABLE, got, f"{said} (on {on})", why) for on, (got, why) in verdicts
        ]
    return claims


def _shrinks(mine: pd.DataFrame) -> tuple[str, str]:
    deltas = deltas_of(mine)
    contexts = deltas.index.to_numpy(float)
    slope, mean = trend(contexts, deltas.to_numpy()), float(deltas.mean())
    if slope.low is None:
        return INCONCLUSIVE, f"{slope.note.capitalize()}; {TREND}."
    # a negative delta shrinks upwards
    ends = (slope.low, slope.high) if mean >= 0 else (-slope.high, -slope.low)
    verdict = REPRODUCED if ends[1] < 0 else NOT_REPRODUCED if ends[0] > 0 else INCONCLUSIVE
    return verdict, (
        f"Over {contexts.min():,.0f} to {contexts.max():,.0f} tokens, {len(deltas)} documents, its mean is {mean:+.3f} "
        f"% and it changes by {slope.text('+.3f')} points with each doubling{MORE * (verdict == INCONCLUSIVE)}."
    )  # fmt: skip


def _same_for_all(mine: pd.DataFrame) -> tuple[str, str]:
    crowds = {int(n): part for n, part in mine.groupby("n_agents")}
    deltas = [measured(part, "perplexity_delta").value for part in crowds.values()]
    spreads = [measured(part, "agent_spread").value for part in crowds.values()]
    if len(crowds) < 2 or None in (*deltas, *spreads):
        return INCONCLUSIVE, "One number of agents tells nothing; run n_agents=1,15."
    apart, spread = max(deltas) - min(deltas), max(spreads)
    return REPRODUCED if apart < PRINTED and spread < SAME_NATS else NOT_REPRODUCED, (
        f"With {min(crowds)} to {max(crowds)} agents in a batch the perplexity delta changes by {apart:.2g} points, "
        f"and no agent's log-probability differs from a single reader's by more than {spread:.2g} nats."
    )


def _unequal(mine: pd.DataFrame) -> tuple[str, str] | None:
    """Keys at 8 bits and values at 3 against the reverse; None where one of them was not run."""
    widths = {(key, value): part for (key, value), part in mine.groupby(["key_bits", "value_bits"])}
    if (8, 3) not in widths or (3, 8) not in widths:
        return None
    two = [widths[8, 3], widths[3, 8]]
    keys, values = (measured(part, "kl_mean") for part in two)
    pairs = pairs_of(samples_of(pd.concat(two), "kl", ["recipe"]).swaplevel())
    p = next(iter(pairs.p.values()), None)
    tied = p is None or p >= ALPHA
    better = REPRODUCED if pairs.names[0] == two[0]["recipe"].iloc[0] else NOT_REPRODUCED
    return INCONCLUSIVE if tied else better, (
        f"At equal bits: mean KL {keys.text('.3g')} with keys at 8 and values at 3, "
        f"{values.text('.3g')} the other way round{p_text(p)}{MORE * tied}."
    )


TABLES = {table.__name__: table for table in (kv_asymmetry, context_scaling, agent_scaling)}
FIGURES = {
    "kv_asymmetry": asymmetry_figure,
    "context_scaling": context_figure,
    "agent_scaling": agent_figure,
}
CLAIMS = claims
