"""The generated caption of every figure: what it shows, what the marks in it mean, and what its rows are.

Panels, lines and marks are read off the drawn figure, so that a caption never names one which is not there.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
from analysis.colours import READERS
from analysis.frontier import FRONTIER
from analysis.handoff_reduce import average, sides
from analysis.reduce import describe, points
from analysis.registry import measured, of_papers
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from analysis import capacity, concurrency, published, registry, separation
from polykv.evaluation.statistics import MIN_DOCUMENTS

MOST = 12  # names; a caption counts more than these
INTERVALS = "95 % intervals"
IN_PLACE = f"the pool is read {READERS['cascade'][0]} (white markers), not copied by each agent"


@dataclass(frozen=True)
class Says:
    """What a figure shows, and which rows: metrics (prefixes) of experiments.

    Attributes:
        shows: the subject; of `panels`, their titles follow.
        experiments: none: all that have no figures of their own.
        bars, dashed, dotted, dots: what marks of this kind are, said where the figure has any.
        lines: what the names in the legend are.
        more: what holds whatever is drawn.
        measure: as which published figures would be drawn, by published.is_beside.
    """

    shows: str
    metrics: tuple[str, ...]
    experiments: tuple[str, ...] = ()
    panels: bool = False
    bars: str = INTERVALS
    dashed: str = ""
    dotted: str = ""
    dots: str = ""
    lines: str = "Lines"
    more: str = ""
    measure: str = ""


FIGURES: Mapping[str, Says] = {
    "compare": Says(
        "Mean KL divergence to the uncompressed cache against stored bits per value, for each recipe",
        ("kl_mean",),
        panels=True,
        lines="Markers",
    ),
    "memory_agents": Says(
        "KV memory by number of agents and recipe",
        ("kv_memory",),
        panels=True,
        dashed=IN_PLACE,
        measure="paper",
    ),
    "perplexity_context": Says(
        "Perplexity against the uncompressed cache, by context and recipe",
        ("perplexity_delta",),
        dashed=IN_PLACE,
        measure="perplexity_delta",
    ),
    "bertscore_agents": Says(
        "BERTScore F1 of answers from the pool against those from the uncompressed cache, by agents",
        ("bertscore_f1", "bertscore_floor"),
        dashed=IN_PLACE,
        more="Floor: mean F1 of mismatched pairs. Left out: settings in which every score is 1.0000, and "
        f"intervals over fewer than {MIN_DOCUMENTS} answers.",
        measure="bertscore_f1",
    ),
    "recipe_frontier": Says(
        "Mean KL divergence to the uncompressed cache against stored bits per value",
        ("kl_mean",),
        FRONTIER,
        lines="Markers",
        more="One colour a family of recipes; filled, and joined by the grey line: the Pareto front. "
        "Recipes whose markers coincide stand apart in figure recipe_ranking.",
    ),
    "recipe_ranking": Says(
        "Recipes by mean KL divergence, and their perplexity against the uncompressed cache",
        ("kl_mean", "perplexity_delta"),
        FRONTIER,
        more="Bold: on the Pareto front of stored bits and KL. A range of ranks is a tie: Wilcoxon's "
        "signed-rank test over documents, Holm over all pairs, 5 %.",
    ),
    "kv_asymmetry": Says(
        "Mean KL divergence of one recipe at key bits by value bits",
        ("kl_mean",),
        ("kv_asymmetry",),
        more="Log colour scale.",
    ),
    "layer_sensitivity": Says(
        "Where compression hurts: KL divergence when one layer alone is compressed, the error of its "
        "attention output, and its keys' and values' errors over the same codec's on Gaussian data",
        ("layer_kl_mean", "error_", "gaussian_error_"),
        ("layer_sensitivity",),
        dots="single heads",
        more="1: as theory promises; above it this cache is harder.",
    ),
    "context_scaling": Says(
        "Perplexity against the uncompressed cache, by context",
        ("perplexity_delta",),
        ("context_scaling",),
        dots="single documents",
    ),
    "agent_scaling": Says(
        "Perplexity against the uncompressed cache of the last of N agents that read one pool",
        ("perplexity_delta",),
        ("agent_scaling",),
    ),
    "handoff_hops": Says(
        "KL divergence to the fp16 relay, and accuracy (strict), by handoffs and policy",
        ("relay_kl", "accuracy"),
        ("handoff_accuracy",),
        dashed="the fp16 relay itself",
        more="The accuracy axis does not start at 0. Tests of pairs: table handoff_pairs; published "
        "accuracies: table published_qkvshare.",
    ),
    "handoff_ttft": Says(
        "Median time to first token by route",
        ("ttft",),
        ("handoff_ttft",),
        panels=True,
        bars="quartiles",
        dashed="the card is read in place, not decoded into a cache first",
        measure="ttft",
    ),
    "handoff_stages": Says(
        "Where a card's time to first token goes: {average} of the stages",
        ("stage_",),
        ("handoff_stages",),
        lines="Shown",
        more="The published stages, in table published_qkvshare, hold: create; dequantize and inject; "
        "first forward.",
    ),
    "controller_ablation": Says(
        "What each signal of the controller earns: KL divergence to the fp16 relay, less that of uniform "
        "bits on the same problems, at equal nominal bits",
        ("kl_minus_uniform",),
        ("controller_ablation",),
        lines="Markers",
        more="Left of 0: better than uniform, each line by itself; the findings say what is left after "
        "correction for their number. "
        + "; ".join(f"{side}: {signals}" for side, signals in sides().items())
        + "; tiers: the bits that a token may get.",
    ),
    "concurrency": Says(
        "Memory and throughput of N agents that decode together after one prefix, by reader; resident is "
        "the measured peak above the loaded model",
        ("kv_memory", "throughput"),
        (concurrency.EXPERIMENT,),
        bars="quartiles of decode steps",
        dashed="bytes stored of the prefix",
    ),
    "recipe_separation": Says(
        "What each recipe costs on the evaluation set: KL divergence, and problems answered right",
        ("kl_mean", "exact_match_change"),
        (separation.EXPERIMENT,),
        lines="Lines and markers",
        more="A line joins absmax at 8, 4, 3 and 2 bits.",
    ),
    "capacity": Says(
        "Tokens per second of all agents against their number, up to all that fit: computed, not measured",
        ("throughput",),
        (capacity.EXPERIMENT,),
        dotted="more tokens of an agent's own",
        more="Cross: all agents that fit.",
    ),
}


def caption(name: str, rows: pd.DataFrame, canvas: Canvas | None = None) -> str:
    """The caption of figure `name` as drawn from `rows`: its subject, panels, lines and marks, model,
    weights, n, device, dtype, commit and dates.

    `canvas` is the drawn figure; without it the figure is drawn here.

    Raises:
        KeyError: there is no figure of this name.
    """
    says = FIGURES[name]
    drawn = canvas or registry.FIGURES[name](rows)
    mine = rows[rows["experiment"].isin(says.experiments)]
    if not says.experiments:
        mine = of_papers(rows)
    mine = mine[mine["metric"].str.startswith(says.metrics) & mine["value"].notna()]
    how = "Computed for" if measured(mine).empty else "Measured on"
    parts = [says.shows.format(average=average(mine))]
    if isinstance(drawn, Canvas):
        parts = _seen(says, parts[0], drawn)
        if canvas is None:
            plt.close(drawn)
        parts += [_open(says, mine, drawn)] if says.measure else []
    return " ".join(
        [*(f"{part.removesuffix('.')}." for part in parts if part), describe(mine, how)]
    )


def _seen(says: Says, shows: str, canvas: Canvas) -> list[str]:
    """Sentences on the panels, lines and marks that the figure has."""
    axes = [ax for ax in canvas.axes if ax.axison and ax.has_data()]
    axes = [ax for ax in axes if ax.get_label() != "<colorbar>"]
    titles = dict.fromkeys(ax.get_title(loc="left") for ax in axes)
    names = [text.get_text().replace("\n", " ") for text in _legend(canvas)]
    marks = {mark for ax in axes for line in ax.lines if (mark := _mark(line))}
    log = {axis for ax in axes for axis in "xy" if getattr(ax, f"get_{axis}scale")() != "linear"}
    return [
        f"{shows}: {'; '.join(titles)}" if says.panels else shows,
        f"{says.lines}: {'; '.join(names)}" if 0 < len(names) <= MOST else "",
        f"Error bars: {says.bars}" if _has_bars(canvas) else "",
        *(f"{kind}: {getattr(says, kind.lower())}" for kind in sorted(marks)),
        f"Log {' and '.join(sorted(log))} {'axes' if len(log) > 1 else 'axis'}" if log else "",
        says.more,
    ]


def _legend(canvas: Canvas) -> list:
    own = [legend for ax in canvas.axes if (legend := ax.get_legend())]
    return [text for legend in (*canvas.legends, *own) for text in legend.get_texts()]


def _mark(line: Line2D) -> str:
    """What kind of line it is, of those that a caption explains."""
    if line.get_marker() == "." and line.get_linestyle() == "None":
        return "Dots"
    return {"--": "Dashed", ":": "Dotted"}.get(line.get_linestyle(), "")


def _has_bars(canvas: Canvas) -> bool:
    """Whether an interval is drawn that has a length."""
    held = [container for ax in canvas.axes for container in ax.containers]
    held += [c.errorbar for c in held if isinstance(c, BarContainer) and c.errorbar]
    bars = [part for c in held if isinstance(c, ErrorbarContainer) for part in c[2]]
    return any((ends[0] != ends[-1]).any() for bar in bars for ends in bar.get_segments())


def _open(says: Says, rows: pd.DataFrame, canvas: Canvas) -> str:
    """What open markers are, or why none are drawn."""
    drawn = any(line.get_fillstyle() == "none" for ax in canvas.axes for line in ax.lines)
    if says.measure == "ttft":
        said = [f for f in published.load("qkvshare") if f.metric == "ttft" and not f.digest]
        models = [
            f.model for f in said if any(published.same_model(f.model, m) for m in rows["model"])
        ]
    else:
        found = points(rows)
        said = published.load("polykv")
        models = [
            f.model for f in said if any(published.is_beside(f, says.measure, p) for p in found)
        ]
    if drawn:
        return f"Open markers: published, on {' and '.join(dict.fromkeys(models))}"
    table = f"published_{said[0].paper}"
    return f"Published figures are of other models or settings: not drawn, but in table {table}"
