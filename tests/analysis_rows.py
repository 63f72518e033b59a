"""Synthetic rows for the tests of the analysis: every number below is made up, none is a measurement."""

import json
from itertools import product

from analysis.__main__ import main
from polykv.results import COLUMNS

RATIO = {"full": (1.0, 1.0), "polykv": (32 / 11, 2.876), "polykv_q8_0": (32 / 11.5, 2.753)}
BYTES = {"llama-3-8b": 262144, "reference": 8192}  # fp32 keys and values per token


def cell_rows(model, weights, context, n_agents, recipe, quality, document="generated", **more):
    """Rows as experiments/quickstart.py writes them: ratios without reader, memory and quality with."""
    shared = {
        "experiment": "synthetic", "model": model, "weights": weights, "document": document,
        "context_tokens": context, "n_agents": n_agents, "recipe": recipe, "seed": 0,
        "device": "cpu", "dtype": "float32", "commit": "0123456789ab",
        "created_at": "2026-01-02T03:04:05+00:00", "cell": f"{model}-{context}-{n_agents}-{recipe}",
    }  # fmt: skip
    shared |= more
    nominal, stored = RATIO[recipe]
    copies = n_agents if recipe == "full" else 1
    fp32 = int(context * 0.7) * BYTES[model] / 1e9
    note = f"head_dim {128 if model == 'llama-3-8b' else 64}; synthetic cache"
    private = {"metric": "kv_memory", "reader": "private" if recipe == "full" else "inject"}
    resident = {"value": fp32 / 2 * n_agents}
    if model == "llama-3-8b":
        resident = {"value": None, "note": f"needs about {n_agents + 20} GB and 9 GB are free"}
    rows = [
        {"metric": "compression_ratio", "protocol": "nominal", "value": nominal, "note": note},
        {"metric": "compression_ratio", "protocol": "stored", "value": stored, "note": note},
        {**private, "protocol": "paper", "value": fp32 / nominal * copies},
        {**private, "protocol": "stored", "value": fp32 / 2 / stored * copies},
        {**private, "protocol": "resident", **resident},
    ]
    if quality:
        delta = 0 if recipe == "full" else 400 / context * RATIO[recipe][0]
        inject = {"reader": "inject", "n": 1000}
        paper = {**inject, "protocol": "paper; interval: skewness-corrected t over documents"}
        scored = {**inject, "protocol": "bertscore minilm"}
        rows += [
            {**paper, "metric": "perplexity", "value": 9 + delta / 10},
            {**paper, "metric": "perplexity_delta", "value": delta, "ci_low": delta * 0.7,
             "ci_high": delta * 1.4},
            {**paper, "metric": "kl_mean", "value": delta / 90},
            {**paper, "metric": "same_top1", "value": 1 - delta / 60},
            {**scored, "metric": "bertscore_f1", "value": 1 - delta / 100 - n_agents / 1000},
            {**scored, "metric": "bertscore_floor", "value": 0.55 + delta / 1000},
            {**scored, "metric": "bertscore_rescaled", "value": 1 - delta / 50},
            {**inject, "metric": "exact_match", "value": 0.7 - delta / 60, "protocol": "greedy"},
        ]  # fmt: skip
    return [{**dict.fromkeys(COLUMNS), **shared, **row} for row in rows]


def write(root, rows):
    """Cells on disk, one file per cell, as polykv.results.Store lays them out."""
    by_cell = {}
    for row in rows:
        by_cell.setdefault((row["experiment"], row["cell"]), []).append(row)
    for (experiment, cell), mine in by_cell.items():
        file = root / "cells" / experiment / f"{cell}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"config": {}, "provenance": {}, "rows": mine}))
    return root


def quickstart(contexts=(256, 512), agents=(3, 15), recipes=tuple(RATIO)):
    grid = product(contexts, agents, recipes)
    return [r for c, n, p in grid for r in cell_rows("reference", "reference", c, n, p, True)]


def paper_memory(recipes=tuple(RATIO)):
    grid = product((1837, 7194), (3, 5, 10, 15), recipes)
    return [r for c, n, p in grid for r in cell_rows("llama-3-8b", "random", c, n, p, False)]


def run(root, *arguments):
    return main(["--results", str(root), *arguments])


def handoff_rows(
    model="reference", weights="reference", document="word_problems", hops=(2, 3, 5), loss=0
):
    """A relay of 80 problems, times and stages, and the ablation; `loss`: problems that topology gets wrong."""
    shared = {"model": model, "weights": weights, "device": "cpu", "dtype": "float32", "seed": 0,
              "commit": "0123456789ab", "created_at": "2026-01-02T03:04:05+00:00"}  # fmt: skip
    rows = []

    def add(experiment, policy, metric, value, **more):
        cell = {"experiment": experiment, "cell": f"{experiment}-{len(rows)}", "policy": policy}
        rows.append(
            {**dict.fromkeys(COLUMNS), **shared, **cell, "metric": metric, "value": value, **more}
        )

    for n, (policy, bits) in product(hops, (("fp16", None), ("uniform", 4.0), ("topology", 4.0))):
        wrong = 8 + (loss if policy == "topology" else 0)
        place = {"document": document, "n_hops": n, "budget_bits": bits, "n": 80}
        share = 100 * (80 - wrong) / 80
        spread = {"ci_low": share - 6, "ci_high": share + 4}
        add("handoff_accuracy", policy, "accuracy", share, protocol="strict; requantize", **place, **spread,
            note="verdicts " + "1" * (80 - wrong) + "0" * wrong)  # fmt: skip
        if bits:
            add("handoff_accuracy", policy, "relay_kl", 1e-3 * n, ci_low=5e-4 * n, ci_high=2e-3 * n,
                protocol="teacher-forced; requantize", **place)  # fmt: skip
    routes = (
        ("reprefill", None, "text", 9.0),
        ("fp16", None, "memory", 1.0),
        ("topology", 4.0, "memory", 3.0),
    )
    for tokens, (policy, bits, route, ms) in product((1024, 8192), routes):
        place = {"context_tokens": tokens, "budget_bits": bits, "protocol": route, "n": 10}
        ms *= tokens / 100
        add(
            "handoff_ttft",
            policy,
            "ttft",
            ms,
            ci_low=0.9 * ms,
            ci_high=1.1 * ms,
            unit="ms",
            **place,
        )
        if policy == "topology":
            gain = 2.0 if tokens == 1024 else 2.6
            add(
                "handoff_ttft",
                policy,
                "ttft_speedup",
                gain,
                ci_low=gain - 0.1,
                ci_high=gain + 0.1,
                **place,
            )
        if policy != "reprefill":
            parts = {
                "create": 0.1,
                "dequantize": 0.1,
                "inject": 0.1,
                "first_forward": 0.7,
                "total": 1.0,
            }
            for stage, part in parts.items():
                add("handoff_stages", policy, f"stage_{stage}", part * ms, ci_low=0.9 * part * ms,
                    ci_high=1.1 * part * ms, **place)  # fmt: skip
    both = "0.5 (attention_window + value_norm + sinks_recent) + 0.5 (shared + anchors)"
    for signals, apart in ((both, 2e-3), ("sinks_recent", -1e-3), (f"{both}; tiers 2/8", 1e-3)):
        add("controller_ablation", signals, "kl_minus_uniform", apart, ci_low=apart - 5e-4, ci_high=apart + 5e-4,
            document=document, n_hops=3, budget_bits=4.0, protocol="teacher-forced; append", n=64)  # fmt: skip
    return rows
