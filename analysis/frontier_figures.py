"""The figures of the frontier experiments: rows -> Canvas, or None where nothing was run."""

from collections.abc import Callable, Sequence

import matplotlib

matplotlib.use("Agg")  # files only, no window

import matplotlib.pyplot as plt  # noqa: E402
import pandas as pd  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure as Canvas  # noqa: E402

from analysis import frontier_draw as draw  # noqa: E402
from analysis.figures import STYLE  # noqa: E402
from analysis.frontier import (  # noqa: E402
    FRONTIER,
    by_document,
    compared,
    layers,
    of_experiment,
    settings,
    values,
)


def recipe_frontier(rows: pd.DataFrame) -> Canvas | None:
    """KL against stored bits, the Pareto front marked; one panel per setting."""
    found = compared(of_experiment(rows, *FRONTIER))
    if not found:
        return None
    with plt.style.context(STYLE):
        canvas, panels = _stacked(len(found), 9.5, 7)
        for ax, comparison in zip(panels, found, strict=True):
            ax.set_title(
                f"{comparison.setting}; {comparison.n_documents} documents, 95 % intervals"
            )
            draw.frontier(ax, comparison.standings)
    return canvas


def recipe_ranking(rows: pd.DataFrame) -> Canvas | None:
    """Recipes from best to worst with intervals: KL and perplexity delta side by side."""
    found = compared(of_experiment(rows, *FRONTIER))
    if not found:
        return None
    n = max(len(comparison.standings) for comparison in found)
    with plt.style.context(STYLE):
        canvas = plt.figure(figsize=(9.5, (0.19 * n + 0.9) * len(found)))
        for line, comparison in enumerate(found):
            left = canvas.add_subplot(len(found), 2, 2 * line + 1)
            right = canvas.add_subplot(len(found), 2, 2 * line + 2)
            draw.ranking(left, comparison.standings, "kl_mean", "mean KL divergence, nats")
            draw.ranking_names(left, comparison.standings)
            draw.ranking(right, comparison.standings, "perplexity_delta", "perplexity delta, %")
            right.set_yticklabels([])
            left.set_title(f"{comparison.setting}\nbold: Pareto front; a range of ranks is a tie")
            right.set_title(
                f"95 % intervals over {comparison.n_documents} documents\nties: Wilcoxon, Holm, 5 %"
            )
    return canvas


def kv_asymmetry(rows: pd.DataFrame) -> Canvas | None:
    """Heat map of KL, key bits x value bits; one panel per setting."""
    rows = of_experiment(rows, "kv_asymmetry")
    bits = rows["recipe"].str.extract(r"^k(?P<key_bits>\d+)v(?P<value_bits>\d+)$").astype(float)
    rows = rows.assign(**bits)[rows["metric"] == "kl_mean"].dropna(subset=["key_bits", "value"])
    found = settings(rows)
    if not found:
        return None
    with plt.style.context(STYLE):
        canvas, panels = _stacked(len(found), 5.2, 4.2)
        for ax, (setting, mine) in zip(panels, found, strict=True):
            grid = mine.pivot_table(index="key_bits", columns="value_bits", values="value")
            grid = grid.sort_index(ascending=False).sort_index(axis=1, ascending=False)
            draw.heat_map(ax, grid, lambda number: f"{number:.1e}")
            ax.set_title(str(setting))
    return canvas


def layer_sensitivity(rows: pd.DataFrame) -> Canvas | None:
    """Which layers a recipe hurts, and how far its errors are from those on Gaussian data."""
    rows = layers(of_experiment(rows, "layer_sensitivity"))
    found = settings(rows)
    if not found:
        return None
    with plt.style.context(STYLE):
        canvas = plt.figure(figsize=(9, 5.4 * len(found)))
        panels = canvas.subplots(2 * len(found), 2, squeeze=False)
        for line, (setting, mine) in enumerate(found):
            (damage, output), (keys, vals) = panels[2 * line : 2 * line + 2]
            lines = _lines(mine, "layer_kl_mean")
            draw.by_layer(damage, lines, "KL, this layer alone compressed")
            heads = _lines(mine, "error_output", of_heads=True)
            draw.by_layer(output, _lines(mine, "error_output"), "attention output error", heads)
            for ax, kind in ((keys, "key"), (vals, "value")):
                ratio = _over_theory(mine, kind)
                draw.by_layer(ax, ratio, f"{kind} error over that on Gaussian data", log=False)
                ax.axhline(1, color="0.6", linewidth=0.8, zorder=0)
            damage.set_title(f"{setting}\n95 % intervals over documents")
            output.set_title("relative squared error; dots: single heads")
            keys.set_title("1: as theory promises; above: this cache is harder")
            damage.legend(fontsize=6.5)
    return canvas


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


def context_scaling(rows: pd.DataFrame) -> Canvas | None:
    """Perplexity delta by context, with intervals and every document; one panel per model."""
    rows = of_experiment(rows, "context_scaling")
    found = list(rows.groupby(["model", "weights", "document"]))
    if not found:
        return None
    with plt.style.context(STYLE):
        canvas, panels = _stacked(len(found), 5.6, 3.8)
        for ax, ((model, weights, document), mine) in zip(panels, found, strict=True):
            dots = {recipe: by_document(mine, recipe) for recipe in sorted(set(mine["recipe"]))}
            draw.over(ax, "context, tokens", _spots(mine, "context_tokens"), dots)
            ax.set_title(
                f"{model} ({weights} weights), {document}\n95 % intervals; dots: documents"
            )
    return canvas


def agent_scaling(rows: pd.DataFrame) -> Canvas | None:
    """Perplexity delta by number of agents; one panel per setting."""
    rows = of_experiment(rows, "agent_scaling")
    found = settings(rows)
    if not found:
        return None
    with plt.style.context(STYLE):
        canvas, panels = _stacked(len(found), 4.6, 3.2)
        for ax, (setting, mine) in zip(panels, found, strict=True):
            draw.over(ax, "agents that read the pool", _spots(mine, "n_agents"), {})
            ax.set_title(f"{setting}\n95 % intervals")
    return canvas


def _stacked(n: int, width: float, height: float) -> tuple[Canvas, Sequence[Axes]]:
    """`n` panels, one above the other, each of this size in inches."""
    canvas = plt.figure(figsize=(width, height * n))
    return canvas, canvas.subplots(n, 1, squeeze=False)[:, 0]


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
