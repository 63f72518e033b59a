"""The summary table: every recipe, context and number of agents with all its measures."""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from analysis.published import Figure
from analysis.reduce import QUALITY, Point, Value, describe, having, points
from analysis.render import Column, Table, fixed, keys, memory

MEMORY = ("paper", "stored", "resident")
RATIOS = ("nominal_ratio", "stored_ratio")


def summary(rows: pd.DataFrame, figures: Sequence[Figure]) -> Table:
    """All measures of every recipe, context and number of agents; one section per model and machine."""
    found = having(points(rows), *RATIOS, *MEMORY, *QUALITY)
    runs = dict.fromkeys(_run(p) for p in found)
    unit = _unit(found)
    varied = [
        key for key in ("document", "scorer") if len({getattr(p, key) for p in found} - {""}) > 1
    ]
    if len({(p.recipe, p.reader) for p in found}) > len({p.recipe for p in found}):
        varied.append("reader")
    columns = [
        *keys(*varied, "recipe", "context", "agents"),
        Column("nominal_ratio", "nominal x", fixed(3)),
        Column("stored_ratio", "stored x", fixed(3)),
        *(Column(name, f"{name} {unit}", memory) for name in MEMORY),
        Column("perplexity_delta", "Δppl %", fixed(2, "+"), interval=True),
        Column("kl_mean", "KL", fixed(4)),
        Column("same_top1", "top-1", fixed(3)),
        Column("bertscore_f1", "BERT F1", fixed(4)),
        Column("bertscore_floor", "floor", fixed(4)),
        Column("bertscore_rescaled", "rescaled", fixed(3)),
        *[Column("exact_match", "exact", fixed(3))][: len(having(found, "exact_match"))],
    ]
    lines = []
    for p in found:
        line = {"section": _run(p) if len(runs) > 1 else ""}
        line |= {name: getattr(p, name) for name in (*varied, "recipe")}
        line |= {"context": p.context_tokens, "agents": agents(p)}
        line |= {c.name: p[c.name] for c in columns if c.name not in line}
        line |= {name: _scaled(p[name], unit) for name in MEMORY}
        line["perplexity_delta"] = with_interval(p["perplexity_delta"])
        lines.append(line)
    scorers = " and ".join(sorted({p.scorer for p in having(found, "bertscore_f1")})) or "no model"
    caption = (
        "Recipes by context (tokens of the document) and agents. Compression: nominal counts payload "
        "bits, stored all bytes kept. KV memory: paper is computed (fp32), stored sums the bytes kept, "
        "resident is measured while all agents decode. Against the uncompressed cache: perplexity "
        "change with 95 % interval, mean KL divergence (nats), same-top-1 rate. BERTScore F1 by "
        f"{scorers}; floor: mismatched pairs; rescaled: above the floor. {describe(rows)}"
    )
    return Table("summary", caption, columns, lines)


def agents(p: Point) -> int | str:
    return p.n_agents or "any"


def with_interval(delta: Value) -> Value:
    """A perplexity delta without its interval is not a result: say so."""
    bare = delta.value is not None and (delta.low is None or delta.high is None)
    return remarked(delta, "no interval was given") if bare else delta


def remarked(value: Value, remark: str) -> Value:
    return replace(value, note="; ".join(filter(None, [value.note, remark])))


def _unit(found: Sequence[Point]) -> str:
    """MB if the largest figure of any run is small."""
    largest: dict[str, float] = {}
    for p in having(found, *MEMORY):
        largest[_run(p)] = max(largest.get(_run(p), 0), *(p[m].value or 0 for m in MEMORY))
    return "MB" if min(largest.values(), default=1) < 0.1 else "GB"


def _scaled(value: Value, unit: str) -> Value:
    factor = 1e3 if unit == "MB" else 1
    return replace(value, value=None if value.value is None else value.value * factor)


def _run(p: Point) -> str:
    return f"{p.model} ({p.weights} weights), {p.device}, {p.dtype}"
