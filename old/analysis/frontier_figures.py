"""The figures of the frontier experiments: rows -> Canvas, or None where nothing was run."""

from collections.abc import Callable

import pandas as pd
from analysis.frontier import (
    FRONTIER,
    Setting,
    by_document,
    compared,
    layers,
    of_experiment,
    settings,
    values,
)
from analysis.layout import COLUMN, legend, sheet, styled
from matplotlib.figure import Figure as Canvas

from analysis import frontier_draw as draw


@styled
def recipe_frontier(rows: pd.DataFrame) -> Canvas | None:
    """KL against stored bits, the Pareto front marked; one panel per setting."""
    found = compared(of_experiment(rows, *FRONTIER))
    if not found:
        return None
    headings = [f"{c.setting}; {c.n_documents} documents" for c in found]
    canvas, panels = sheet(headings, 1, 5.2)
    for (ax,), comparison in zip(panels, found, strict=True):
        draw.frontier(ax, comparison.standings)
    return canvas


@styled
def recipe_ranking(rows: pd.DataFrame) -> Canvas | None:
    """Recipes from best to worst with intervals: KL and perplexity delta side by side."""
    found = compared(of_experiment(rows, *FRONTIER))
    if not found:
        return None
    n = max(len(comparison.standings) for comparison in found)
    headings = [f"{c.setting}; {c.n_documents} documents" for c in found]
    canvas, panels = sheet(headings, 2, 0.17 * n + 0.5)
    for (left, right), comparison in zip(panels, found, strict=True):
        draw.ranking(left, comparison.standings, "kl_mean", "mean KL divergence, nats")
        draw.ranking_names(left, comparison.standings)
        draw.ranking(right, comparison.standings, "perplexity_delta", "perplexity delta, %")
        right.set_yticklabels([])
    return canvas


@styled
def kv_asymmetry(rows: pd.DataFrame) -> Canvas | None:
    """Heat map of KL, key bits x value bits; one panel per setting."""
    rows = of_experiment(rows, "kv_asymmetry")
    bits = rows["recipe"].str.extract(r"^k(?P<key_bits>\d+)v(?P<value_bits>\d+)$").astype(float)
    rows = rows.assign(**bits)[rows["metric"] == "kl_mean"].dropna(subset=["key_bits", "value"])
    found = settings(rows)
    if not found:
        return None
    canvas, panels = sheet([_short(setting) for setting, _ in found], 1, 2.7, COLUMN)
    for (ax,), (_, mine) in zip(panels, found, strict=True):
        grid = mine.pivot_table(index="key_bits", columns="value_bits", values="value")
        grid = grid.sort_index(ascending=False).sort_index(axis=1, ascending=False)
        draw.heat_map(ax, grid, lambda number: f"{number:.1e}")
    return canvas


@styled
def layer_sensitivity(rows: pd.DataFrame) -> Canvas | None:
    """Which layers a recipe hurts, and how far its errors are from those on Gaussian data."""
    rows = layers(of_experiment(rows, "layer_sensitivity"))
    found = settings(rows)
    if not found:
        return None
    headings = [text for setting, _ in found for text in (str(setting), "")]
    canvas, panels = sheet(headings, 2, 1.9)
    for place, (_, mine) in enumerate(found):
        (damage, output), (keys, vals) = panels[2 * place : 2 * place + 2]
        draw.by_layer(damage, _lines(mine, "layer_kl_mean"), "KL, nats")
        heads = _lines(mine, "error_output", of_heads=True)
        draw.by_layer(output, _lines(mine, "error_output"), "relative squared error", heads)
        for ax, kind in ((keys, "key"), (vals, "value")):
            draw.by_layer(ax, _over_theory(mine, kind), "times the Gaussian error", log=False)
            ax.axhline(1, color="0.6", linewidth=0.8, zorder=0)
            ax.set_title(f"{kind} error over that on Gaussian data")
        damage.set_title("this layer alone compressed")
        output.set_title("attention output; dots: single heads")
    return legend(canvas)


def _lines(rows: pd.DataFrame, metric: str, of_heads: bool = False) -> dict[str, pd.DataFrame]:
    mine = rows[(rows["metric"] == metric) & (rows["head"].notna() == of_heads)]
    return dict(iter(mine.groupby("recipe")))


def _over_theory(rows: pd.DataFrame, kind: str) -> dict[str, pd.DataFrame]:
    theory = _lines(rows, f"gaussian_error_{kind}")
    found = {}
    for recipe, mine in _lines(rows, f"error_{kind}").items():
        expected = theory[recipe].set_index("layer")["value"]
        found[recipe] = mine.assign(value=mine["value"] / mine["layer"].map(expected))
    return found


@styled
def context_scaling(rows: pd.DataFrame) -> Canvas | None:
    """Perplexity delta by context, with intervals and every document; one panel per model."""
    rows = of_experiment(rows, "context_scaling")
    found = list(rows.groupby(["model", "weights", "document"]))
    if not found:
        return None
    headings = [
        f"{model} ({weights} weights), {document}" for (model, weights, document), _ in found
    ]
    canvas, panels = sheet(headings, 1, 2.3, COLUMN)
    for (ax,), (_, mine) in zip(panels, found, strict=True):
        dots = {recipe: by_document(mine, recipe) for recipe in sorted(set(mine["recipe"]))}
        draw.over(ax, "context, tokens", _spots(mine, "context_tokens"), dots)
    return legend(canvas)


@styled
def agent_scaling(rows: pd.DataFrame) -> Canvas | None:
    """Perplexity delta by number of agents; one panel per setting."""
    found = settings(of_experiment(rows, "agent_scaling"))
    if not found:
        return None
    canvas, panels = sheet([_short(setting) for setting, _ in found], 1, 1.8, COLUMN)
    for (ax,), (_, mine) in zip(panels, found, strict=True):
        draw.over(ax, "agents that read the pool", _spots(mine, "n_agents"), {})
    return legend(canvas)


def _short(setting: Setting) -> str:
    """The setting as the heading of one column."""
    where = f"{setting.document}, {setting.context:,} tokens"
    return f"{setting.model} ({setting.weights} weights)\n{where}"


def _spots(rows: pd.DataFrame, axis: str) -> dict[str, list]:
    return {
        recipe: [(at, values(part)["perplexity_delta"]) for at, part in mine.groupby(axis)]
        for recipe, mine in rows.groupby("recipe")
    }


FRONTIER_FIGURES: dict[str, Callable[[pd.DataFrame], Canvas | None]] = {
    figure.__name__: figure
    for figure in (recipe_frontier, recipe_ranking, kv_asymmetry, layer_sensitivity,
                   context_scaling, agent_scaling)
}  # fmt: skip
