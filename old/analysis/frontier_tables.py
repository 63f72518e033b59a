"""The tables of the frontier experiments. Every builder: rows -> Table, or None where nothing was run."""

from collections.abc import Callable

import pandas as pd
from analysis.frontier import FRONTIER, compared, layers, of_experiment, settings, trend, values
from analysis.frontier import by_document as of_documents
from analysis.reduce import Value, describe

from analysis.render import Column, Table, fixed, keys, significant


def recipe_frontier(rows: pd.DataFrame) -> Table | None:
    """Every recipe by mean KL, with the ranks that the tests leave open."""
    rows = of_experiment(rows, *FRONTIER)
    lines = []
    for found in compared(rows):
        for s in found.standings:
            line = {
                "section": f"{found.setting}; {found.n_documents} documents",
                "recipe": s.recipe,
            }
            line |= {"rank": s.rank, "front": "yes" if s.on_front else "no"}
            line["dominated"] = _some(s.dominated_by)
            line |= {c.name: s[c.name] for c in _QUALITY}
            lines.append(line)
    columns = [
        *keys("recipe"),
        Column("rank", "rank"),
        *_QUALITY,
        Column("front", "Pareto front"),
        Column("dominated", "significantly better at no more bits"),
    ]
    caption = (
        "Recipes by mean KL divergence to the uncompressed cache. Ranks that paired tests leave open "
        "(Wilcoxon signed-rank over documents, Holm over all pairs, 5 %): 3-6 is a tie of four. Bits per "
        "value count every byte kept. Intervals: skewness-corrected t over the documents of all seeds; a seed draws "
        "documents and rotations. Perplexity ratio: paired standard error over tokens, as llama.cpp's "
        f"perplexity tool; over seeds the hull of their intervals. {describe(rows)}"
    )
    return Table("recipe_frontier", caption, columns, lines) if lines else None


_QUALITY = (
    Column("stored_bits", "stored bits", fixed(3)),
    Column("nominal_bits", "nominal bits", fixed(2)),
    Column("kl_mean", "KL mean [95 %]", significant, interval=True),
    Column("perplexity_delta", "Δppl % [95 %]", fixed(2, "+"), interval=True),
    Column("perplexity_ratio", "ppl ratio [95 %]", fixed(4), interval=True),
    Column("same_top1", "top-1", fixed(4)),
)


def recipe_divergence(rows: pd.DataFrame) -> Table | None:
    """The distribution per token: KL percentiles, and the true token's probability."""
    rows = of_experiment(rows, *FRONTIER)
    kl = ("mean", "median", "p90", "p95", "p99", "p999", "max")
    delta = ("mean", "rms", "p01", "p05", "p25", "median", "p75", "p95", "p99")
    columns = [
        *keys("recipe"),
        Column("stored_bits", "stored bits", fixed(3)),
        *(Column(f"kl_{name}", f"KL {name}", significant) for name in kl),
        *(Column(f"delta_p_{name}", f"Δp {name}", significant) for name in delta),
    ]
    lines = [
        {"section": str(found.setting), "recipe": s.recipe}
        | {column.name: s[column.name] for column in columns[1:]}
        for found in compared(rows)
        for s in found.standings
    ]
    caption = (
        "Divergence per token, over all documents: KL in nats, and Δp, the change in the probability of "
        f"the true token (p01 is its 1 % percentile, p999 the 99.9 %). {describe(rows)}"
    )
    return Table("recipe_divergence", caption, columns, lines) if lines else None


def kv_asymmetry(rows: pd.DataFrame) -> Table | None:
    """Key bits x value bits."""
    rows = of_experiment(rows, "kv_asymmetry")
    columns = [Column("recipe", "key and value bits", key=True), *_QUALITY]
    lines = [
        {"section": str(setting), "recipe": recipe} | values(part)
        for setting, mine in settings(rows)
        for recipe, part in sorted(
            mine.groupby("recipe"), key=lambda pair: values(pair[1])["stored_bits"].value
        )
    ]
    caption = f"One recipe at key bits x value bits, by stored bits. {describe(rows)}"
    return Table("kv_asymmetry", caption, columns, lines) if lines else None


def layer_sensitivity(rows: pd.DataFrame) -> Table | None:
    """Errors by layer beside the theory, and each layer's own damage."""
    rows = of_experiment(rows, "layer_sensitivity")
    whole = layers(rows)
    whole = whole[whole["head"].isna()]
    lines = []
    for setting, mine in settings(whole):
        for (recipe, layer), part in mine.groupby(["recipe", "layer"]):
            line = {"section": str(setting), "recipe": recipe, "layer": int(layer)}
            lines.append(line | values(part))
    columns = [
        *keys("recipe", "layer"),
        Column("layer_kl_mean", "KL, this layer alone [95 %]", significant, interval=True),
        *(
            Column(f"error_{kind}", f"{kind} error", significant)
            for kind in ("key", "value", "logits", "output")
        ),
        Column("gaussian_error_key", "key, Gaussian", significant),
        Column("gaussian_error_value", "value, Gaussian", significant),
        Column("dc_share_key", "key DC share", fixed(3)),
        Column("dc_share_value", "value DC share", fixed(3)),
        Column("peak_to_rms_key", "key peak channel", fixed(2)),
        Column("peak_to_rms_value", "value peak channel", fixed(2)),
    ]
    caption = (
        "Relative squared errors of each layer (mean of its heads), beside the same codec's error on "
        "Gaussian data. DC share: energy in each vector's mean, which an unsigned Hadamard transform "
        "gathers in one coordinate (1 / head_dim for white noise). Peak channel: its root mean square "
        f"over the head's (1 for white noise). {describe(rows)}"
    )
    return Table("layer_sensitivity", caption, columns, lines) if lines else None


def context_scaling(rows: pd.DataFrame) -> Table | None:
    """Perplexity delta by context, and its slope."""
    rows = of_experiment(rows, "context_scaling")
    lines = []
    for (model, weights, document), mine in rows.groupby(["model", "weights", "document"]):
        for recipe, part in mine.groupby("recipe"):
            section = f"{model} ({weights} weights), {document}"
            for context, at in part.groupby("context_tokens"):
                line = {"section": section, "recipe": recipe, "context": f"{int(context):,}"}
                lines.append(line | values(at))
            documents = of_documents(mine, recipe)
            slope = trend(list(documents["context_tokens"]), list(documents["value"]))
            line = {"section": section, "recipe": recipe, "context": "per doubling"}
            lines.append({**line, "perplexity_delta": slope, **_no_slope()})
    columns = [
        *keys("recipe", "context"),
        Column("perplexity_delta", "Δppl % [95 %]", fixed(3, "+"), interval=True),
        Column("kl_mean", "KL mean [95 %]", significant, interval=True),
        Column("stored_bits", "stored bits", fixed(3)),
    ]
    caption = (
        "Perplexity delta by context. Per doubling: least-squares slope of the documents' deltas over "
        "log2 of the context, every context with a variance of its own (Welch); the delta shrinks where it "
        f"points to 0 with its whole interval. {describe(rows)}"
    )
    return Table("context_scaling", caption, columns, lines) if lines else None


def _no_slope() -> dict[str, Value]:
    return dict.fromkeys(("kl_mean", "stored_bits"), Value(None, note="no slope is fitted"))


def agent_scaling(rows: pd.DataFrame) -> Table | None:
    """Perplexity delta by number of agents, and how far any agent is from a single reader."""
    rows = of_experiment(rows, "agent_scaling")
    lines = [
        {"section": str(setting), "recipe": recipe, "agents": int(n)} | values(part)
        for setting, mine in settings(rows)
        for (recipe, n), part in mine.groupby(["recipe", "n_agents"])
    ]
    columns = [
        *keys("recipe", "agents"),
        Column("perplexity_delta", "Δppl % [95 %]", fixed(3, "+"), interval=True),
        Column("kl_mean", "KL mean [95 %]", significant, interval=True),
        Column("agent_spread", "largest difference to a single reader, nats", significant),
    ]
    caption = f"Quality of the last of N agents that read one pool. {describe(rows)}"
    return Table("agent_scaling", caption, columns, lines) if lines else None


def recipe_search(rows: pd.DataFrame) -> Table | None:
    """What the search found, on documents that it did not see."""
    rows = of_experiment(rows, "recipe_search")
    lines = []
    for setting, mine in settings(rows):
        for (budget, recipe), part in mine.groupby(["budget_bits", "recipe"]):
            line = {"section": str(setting), "recipe": recipe, "budget": budget}
            lines.append(line | {"table": part["note"].iloc[0]} | values(part))
    columns = [
        *keys("recipe"),
        Column("budget", "budget_bits", fixed(2), key=True),
        *_QUALITY[:1],
        *_QUALITY[2:4],
        Column("table", "[key, value] bits by layer"),
    ]
    caption = (
        "The best bits per layer that the search found under a budget of stored bits, beside the best "
        f"table with the same bits in every layer, on fresh documents. {describe(rows)}"
    )
    return Table("recipe_search", caption, columns, lines) if lines else None


def _some(names: tuple[str, ...]) -> str:
    """The first names, and how many more."""
    if not names:
        return "none"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


FRONTIER_TABLES: dict[str, Callable[[pd.DataFrame], Table | None]] = {
    table.__name__: table
    for table in (recipe_frontier, recipe_divergence, kv_asymmetry, layer_sensitivity,
                  context_scaling, agent_scaling, recipe_search)
}  # fmt: skip
