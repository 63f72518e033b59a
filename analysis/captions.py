"""The generated caption of every figure: what it shows, what its markers mean, and what its rows are."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from analysis import capacity, concurrency, published, separation
from analysis.frontier import FRONTIER
from analysis.handoff_reduce import sides
from analysis.reduce import describe, points
from analysis.registry import measured, of_papers

BARS = "Bars: 95 % intervals."


@dataclass(frozen=True)
class Drawn:
    """What a figure shows, what its marks mean, and which rows: metrics (prefixes) of experiments.

    No `experiments`: all that have no figures of their own. `measure`: as which published figures would
    be drawn, by published.is_beside.
    """

    shows: str
    marks: str
    metrics: tuple[str, ...]
    experiments: tuple[str, ...] = ()
    measure: str = ""


FIGURES: Mapping[str, Drawn] = {
    "memory_agents": Drawn(
        "KV memory by number of agents and recipe, as the paper counts it, as stored, and resident",
        "Dashed: agents attend to the pool in place (cascade). Log axes.",
        ("kv_memory",),
        measure="paper",
    ),
    "perplexity_context": Drawn(
        "Perplexity against the uncompressed cache, by context and recipe",
        f"{BARS} Recipes stand a little apart along the axis.",
        ("perplexity_delta",),
        measure="perplexity_delta",
    ),
    "bertscore_agents": Drawn(
        "BERTScore F1 of answers from the pool against those from the uncompressed cache, by agents",
        f"{BARS} Dashed: the floor, the mean F1 of mismatched pairs.",
        ("bertscore_f1", "bertscore_floor"),
        measure="bertscore_f1",
    ),
    "recipe_frontier": Drawn(
        "Mean KL divergence to the uncompressed cache against stored bits per value",
        f"{BARS} One colour and marker a family of recipes; outlined, and joined by the grey line: the "
        "Pareto front.",
        ("kl_mean",),
        FRONTIER,
    ),
    "recipe_ranking": Drawn(
        "Recipes by mean KL divergence, and their perplexity against the uncompressed cache",
        f"{BARS} Bold: on the Pareto front of stored bits and KL. A range of ranks is a tie: Wilcoxon's "
        "signed-rank test over documents, Holm over all pairs, 5 %.",
        ("kl_mean", "perplexity_delta"),
        FRONTIER,
    ),
    "kv_asymmetry": Drawn(
        "Mean KL divergence of one recipe at key bits by value bits",
        "Log colour scale.",
        ("kl_mean",),
        ("kv_asymmetry",),
    ),
    "layer_sensitivity": Drawn(
        "Where compression hurts: KL divergence when one layer alone is compressed, the error of its "
        "attention output, and its keys' and values' errors over the same codec's on Gaussian data",
        f"{BARS} Dots: single heads. 1: as theory promises; above it this cache is harder.",
        ("layer_kl_mean", "error_", "gaussian_error_"),
        ("layer_sensitivity",),
    ),
    "context_scaling": Drawn(
        "Perplexity against the uncompressed cache, by context",
        f"{BARS} Dots: single documents.",
        ("perplexity_delta",),
        ("context_scaling",),
    ),
    "agent_scaling": Drawn(
        "Perplexity against the uncompressed cache of the last of N agents that read one pool",
        BARS,
        ("perplexity_delta",),
        ("agent_scaling",),
    ),
    "handoff_hops": Drawn(
        "KL divergence to the fp16 relay, and accuracy (strict), by handoffs and policy",
        f"{BARS} Policies stand a little apart along the axis. The accuracy axis does not start at 0. "
        "Tests of pairs: table handoff_pairs; published accuracies: table published_qkvshare.",
        ("relay_kl", "accuracy"),
        ("handoff_accuracy",),
    ),
    "handoff_ttft": Drawn(
        "Time to first token by context and route, medians",
        "Bars: quartiles. Dashed: the card is read in place, not decoded into a cache first. Log axes.",
        ("ttft",),
        ("handoff_ttft",),
        measure="ttft",
    ),
    "handoff_stages": Drawn(
        "Where a card's time to first token goes, means of the stages",
        "Bars: quartiles of the total. The published stages, in table published_qkvshare, hold: create; "
        "dequantize and inject; first forward.",
        ("stage_",),
        ("handoff_stages",),
    ),
    "controller_ablation": Drawn(
        "What each signal of the controller earns: KL divergence to the fp16 relay, less that of uniform "
        "bits on the same problems, at equal nominal bits",
        f"{BARS} Left of 0: better than uniform, each line by itself; the findings say what is left after "
        "correction for their number. "
        + "; ".join(f"{side}: {signals}" for side, signals in sides().items())
        + "; tiers: the bits that a token may get.",
        ("kl_minus_uniform",),
        ("controller_ablation",),
    ),
    "concurrency": Drawn(
        "Memory and throughput of N agents that decode together after one prefix, by reader",
        "Solid: resident, the measured peak above the loaded model. Dashed: bytes stored of the prefix. "
        "Bars: quartiles of decode steps. Log axes.",
        ("kv_memory", "throughput"),
        (concurrency.EXPERIMENT,),
    ),
    "recipe_separation": Drawn(
        "What each recipe costs on the evaluation set: KL divergence, and problems answered right",
        f"{BARS} Lines: absmax at 8, 4, 3 and 2 bits; crosses: other recipes.",
        ("kl_mean", "exact_match_change"),
        (separation.EXPERIMENT,),
    ),
    "capacity": Drawn(
        "Tokens per second of all agents against their number, up to all that fit: computed, not measured",
        "Cross: all agents that fit. Dotted: more tokens of an agent's own. Log axes.",
        ("throughput",),
        (capacity.EXPERIMENT,),
    ),
}


def caption(name: str, rows: pd.DataFrame) -> str:
    """The caption of figure `name` as drawn from `rows`: its subject, marks, model, weights, n, device,
    dtype, commit and dates.

    Raises:
        KeyError: there is no figure of this name.
    """
    drawn = FIGURES[name]
    mine = rows[rows["experiment"].isin(drawn.experiments)]
    if not drawn.experiments:
        mine = of_papers(rows)
    mine = mine[mine["metric"].str.startswith(drawn.metrics) & mine["value"].notna()]
    how = "Computed for" if measured(mine).empty else "Measured on"
    origin = describe(mine, how)
    return " ".join(filter(None, (f"{drawn.shows}.", drawn.marks, _open(drawn, mine), origin)))


def _open(drawn: Drawn, rows: pd.DataFrame) -> str:
    """What open markers are, or why none are drawn."""
    if not drawn.measure:
        return ""
    if drawn.measure == "ttft":
        said = [f for f in published.load("qkvshare") if f.metric == "ttft" and not f.digest]
        models = [
            f.model for f in said if any(published.same_model(f.model, m) for m in rows["model"])
        ]
    else:
        found = points(rows)
        said = published.load("polykv")
        models = [
            f.model for f in said if any(published.is_beside(f, drawn.measure, p) for p in found)
        ]
    if models:
        return f"Open markers: published, on {' and '.join(dict.fromkeys(models))}."
    table = f"published_{said[0].paper}"
    return f"Published figures are of other models or settings: not drawn, but in table {table}."
