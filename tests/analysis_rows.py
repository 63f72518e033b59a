"""Synthetic cells for the tests of the analysis: every number below is made up, none is a measurement."""

import math
from itertools import product

from analysis.__main__ import main
from polykv.evaluation.statistics import MIN_DOCUMENTS
from polykv.results import Rows, Store

RATIO = {"full": (1.0, 1.0), "polykv": (32 / 11, 2.876), "polykv_q8_0": (32 / 11.5, 2.753)}
BYTES = {"llama-3-8b": 262144, "reference": 8192}  # fp32 keys and values per token
# What studies declare of the rows below.
COLUMNS = {
    "accounting": str, "head_dim": int, "n_tokens": int, "synthetic": bool, "statistic": str, "block": int,
    "quantization": str, "agent": int, "scorer": str, "n_hops": int, "hop": int, "reseal": str, "extraction": str,
    "stage": str, "transport": str,
}  # fmt: skip
SHARED = {"device": "cpu", "dtype": "float32", "seed": 0, "backend": "torch"}
TOKENS = 1000 // MIN_DOCUMENTS  # scored of a document


def declared(study):
    columns = {name: kind.__name__ for name, kind in COLUMNS.items()}
    about = {"name": study, "title": study, "question": f"{study}?", "answers": [], "settings": []}
    return about | {"columns": columns}


def cell(study, name, config=None, **shared):
    """A cell without rows yet: (study, name, config, rows)."""
    return study, name, config or {}, Rows(COLUMNS, **(SHARED | shared))


def write(root, cells):
    """Cells on disk as sweeps lay them out."""
    for study, name, config, rows in cells:
        Store(root).write(declared(study), name, config, rows)
    return root


def add_bytes(rows, model, context, n_agents, recipe, reader="dequantize", resident=None):
    """Ratios and memory in every accounting; `resident` in GB, None: as many bytes as fp16 caches of all agents."""
    nominal, stored = RATIO.get(recipe, RATIO["polykv"])
    copies = n_agents if recipe == "full" else 1
    head_dim = 128 if model == "llama-3-8b" else 64
    for accounting, ratio in (("nominal", nominal), ("stored", stored)):
        rows.add("compression_ratio", ratio, "x", accounting=accounting, head_dim=head_dim)
    fp32 = int(context * 0.7) * BYTES[model] / 1e9
    about = {"reader": "unshared" if recipe == "full" else reader}
    rows.add("kv_memory", fp32 / nominal * copies, "GB", accounting="paper", **about)
    rows.add("kv_memory", fp32 / 2 / stored * copies, "GB", accounting="stored", **about)
    value, why = fp32 / 2 * n_agents if resident is None else resident, ""
    if model == "llama-3-8b":
        value, why = None, f"needs about {n_agents + 20} GB and 9 GB are free"
    rows.add("kv_memory", value, "GB", why=why, accounting="resident", **about)


def add_quality(
    rows,
    delta,
    n_agents,
    f1=None,
    floor=0.55,
    scorer="minilm",
    n_documents=MIN_DOCUMENTS,
    spread=0.5,
):
    """Scores of documents whose perplexity delta is `delta` percent on average, with a spread, and answers."""
    nats, n = math.log1p(delta / 100), n_documents
    for sample in range(n):
        about = {"sample": sample, "n": TOKENS}
        part = nats * (1 + spread * (sample - (n - 1) / 2) / n)
        rows.add("nll", math.log(9) + part, "nats", **about)
        rows.add("nll_full", math.log(9), "nats", **about)
        rows.add("nll_delta", part, "nats", **about)
        rows.add("kl", abs(part), "nats", **about)
        rows.add("same_top1", 1 - abs(part), "rate", **about)
    f1 = 1 - abs(delta) / 100 - n_agents / 1000 if f1 is None else f1
    for sample, agent in product(range(n), range(n_agents)):
        about = {"sample": sample, "agent": agent, "n": 1}
        score = f1 + (0.001 * ((sample + agent) % 3 - 1) if f1 < 0.999 else 0)
        rows.add("bertscore_f1", score, "f1", scorer=scorer, **about)
        rows.add("bertscore_floor", floor, "f1", scorer=scorer, **about)
        rows.add("exact_match", float((sample + agent) % 3 > 0), "rate", **about)


def compare_cell(
    context, n_agents, recipe, model="reference", weights="reference", document="generated", name="", delta=None,
    f1=None, scorer="minilm", n_documents=MIN_DOCUMENTS, reader="dequantize", resident=None, spread=0.5, **more
):  # fmt: skip
    """A cell of study compare: bytes, scores and answers."""
    name = name or f"{model}-{document}-{context}-{n_agents}-{recipe}-{reader}"
    about = {"context_tokens": context, "n_agents": n_agents, "recipe": recipe, "reader": reader}
    made = cell("compare", name, model=model, weights=weights, document=document, **about | more)
    add_bytes(made[3], model, context, n_agents, recipe, reader, resident)
    if delta is None:
        delta = 0 if recipe == "full" else 400 / context * RATIO.get(recipe, RATIO["polykv"])[0]
    add_quality(made[3], delta, n_agents, f1, scorer=scorer, n_documents=n_documents, spread=spread)
    return made


def quickstart(contexts=(256, 512), agents=(3, 15), recipes=tuple(RATIO), **more):
    grid = product(contexts, agents, recipes)
    return [compare_cell(c, n, recipe, **more) for c, n, recipe in grid]


def paper_memory(recipes=tuple(RATIO)):
    """Cells of study polykv_memory on the published model's geometry."""
    made = []
    for context, n_agents, recipe in product((1837, 7194), (3, 5, 10, 15), recipes):
        about = {"context_tokens": context, "n_agents": n_agents, "recipe": recipe}
        about |= {"model": "llama-3-8b", "weights": "random"}
        one = cell("polykv_memory", f"{context}-{n_agents}-{recipe}", **about)
        add_bytes(one[3], "llama-3-8b", context, n_agents, recipe)
        made.append(one)
    return made


def relay_cells(
    model="reference", weights="reference", document="word_problems", hops=(2, 3, 5), loss=0, n_problems=80
):  # fmt: skip
    """Cells of study handoff_accuracy, judged after `hops`; `loss`: problems that topology alone gets wrong."""
    made = []
    routes = (("fp16", None, ""), ("uniform", 4.0, "requantize"), ("topology", 4.0, "requantize"))
    for policy, bits, reseal in routes:
        about = {"document": document, "policy": policy, "budget_bits": bits}
        one = cell(
            "handoff_accuracy", f"{max(hops)}-{policy}", model=model, weights=weights, **about
        )
        n_wrong = 8 + (loss if policy == "topology" else 0)
        for hop, problem in product(hops, range(n_problems)):
            where = {"n_hops": max(hops), "hop": hop, "reseal": reseal}
            right = float(problem < n_problems - n_wrong)
            for how in ("strict", "flexible"):
                one[3].add("answer_right", right, "rate", sample=problem, extraction=how, **where)
            if bits:
                kl = 1e-3 * hop * (1 + 0.5 * (problem % 3 - 1))
                one[3].add("kl", kl, "nats", sample=problem, n=20, **where)
        made.append(one)
    return made


def timing_cells(model="reference", weights="reference", contexts=(1024, 8192), repeats=10):
    """Cells of study handoff_ttft: each repeat's stages and total, by route."""
    parts = {"create": 0.1, "dequantize": 0.1, "inject": 0.1, "first_forward": 0.7, "total": 1.0}
    routes = (
        ("reprefill", None, "text", 9.0),
        ("fp16", None, "memory", 1.0),
        ("uniform", 4.0, "memory", 3.0),
    )
    made = []
    for tokens in contexts:
        one = cell("handoff_ttft", f"{tokens}", model=model, weights=weights, context_tokens=tokens)
        for (policy, bits, transport, ms), repeat in product(routes, range(repeats)):
            about = {"policy": policy, "budget_bits": bits, "transport": transport}
            about["reader"] = "" if transport == "text" else "dequantize"
            scale = ms * tokens / 100 * (1 + 0.1 * (repeat / (repeats - 1) - 0.5))
            for stage, part in parts.items():
                if transport != "text" or stage == "total":
                    one[3].add("time", part * scale, "ms", stage=stage, sample=repeat, **about)
        made.append(one)
    return made


def handoff_cells(**more):
    return relay_cells(**more) + timing_cells(
        more.get("model", "reference"), more.get("weights", "reference")
    )


def run(root, *arguments):
    return main(["--results", str(root), *arguments])
