"""PolyKV's tables: memory, ratio and quality as published and as measured, and how the published GB come about."""

import textwrap
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from analysis import published
from analysis.points import TRAINED, Point, having, points
from analysis.polykv_claims import claims
from analysis.published import NOT_HERE, Figure
from analysis.render import Column, Row, Table, describe, fixed, keys, memory
from analysis.statistics import BASELINE, Value
from polykv.config import load_group

STUDY = ("polykv_memory", "compare")
NOT_PUBLISHED = Value(None, note="no published figure for this model, context and number of agents")
MEMORY = ("paper", "stored", "resident")
RATIOS = ("nominal_ratio", "stored_ratio")
QUALITY_METRICS = ("nll", "nll_delta", "bertscore_f1")
DECIMALS = {"perplexity": fixed(3), "perplexity_delta": fixed(2, "+"), "bertscore_f1": fixed(4)}
WIDTH = 100  # characters of a line of the text


def polykv_memory(rows: pd.DataFrame) -> Table | None:
    """Published GB beside the same accounting here, and beside what is stored and resident; None without any."""
    found = having(points(rows), *MEMORY)
    if not found:
        return None
    unshared = {_place(p): p for p in found if p.recipe == BASELINE}
    lines, answered = [], []
    for figure in published.load("polykv"):
        if figure.metric != "kv_memory":
            continue
        answer = published.memory_answer(figure, found)
        line = {"section": "published configurations", "model": figure.model}
        line |= {"context": figure.document_tokens, "agents": figure.n_agents}
        line |= {"recipe": figure.recipe, "published": figure.value}
        if isinstance(answer, str):
            line |= {n: Value(None, note=answer) for n in ("difference", "fp16", *MEMORY)}
            line["reader"] = "not stated"
        else:
            answered.append(answer)
            line |= _memory(answer, unshared.get(_place(answer)), figure.value)
        lines.append(line)
    for p in (p for p in found if p not in answered):
        line = {"section": "measured only", "model": p.model, "context": p.context_tokens}
        line |= {"agents": p.n_agents or "any", "recipe": p.name, "published": NOT_PUBLISHED}
        lines.append(line | _memory(p, unshared.get(_place(p)), NOT_PUBLISHED))
    columns = [
        *keys("model", "context", "agents", "recipe", "reader"),
        Column("published", "published", memory),
        Column("paper", "paper accounting", memory),
        Column("difference", "difference", fixed(5, "+")),
        Column("fp16", "fp16 unshared", memory),
        Column("stored", "stored", memory),
        Column("resident", "resident", memory),
    ]
    caption = (
        "KV memory in GB (10^9 bytes): published by PolyKV, worked out as it did, and measured. "
        f"Recipe {BASELINE}: every agent keeps its own cache; other recipes: one pool. Paper accounting "
        "counts fp32 and only the prefilled 70 %; the true figures are fp16 unshared (half of that "
        "fp32), stored (every byte kept) and resident (measured while all agents decode, with what "
        f"readers rebuild). {_describe(rows, 'kv_memory')}"
    )
    return Table("polykv_memory", caption, columns, lines)


def _memory(p: Point, unshared: Point | None, said: Value) -> Row:
    """The measured columns; fp16 unshared is half the fp32 that the paper counts."""
    fp32 = unshared["paper"] if unshared else Value(None, note=f"no {BASELINE} row beside it")
    fp16 = Value(fp32.value / 2) if fp32.value is not None else fp32
    own = {name: p[name] for name in MEMORY}
    return own | {"reader": p.reader, "fp16": fp16, "difference": _minus(p["paper"], said)}


def polykv_ratio(rows: pd.DataFrame) -> Table | None:
    """Nominal and stored ratio per recipe and head_dim beside the published 2.91; None without any."""
    found = having(points(rows), *RATIOS)
    if not found:
        return None
    said = next(f.value for f in published.load("polykv") if f.metric == "compression_ratio")
    lines = []
    for recipe, name, dim in dict.fromkeys((p.recipe, p.name, p.head_dim) for p in found):
        mine = [p for p in found if (p.name, p.head_dim) == (name, dim)]
        contexts = sorted({p.context_tokens or 0 for p in mine})
        line = {"recipe": name, "head_dim": dim}
        line["models"] = ", ".join(dict.fromkeys(p.model for p in mine))
        line["contexts"] = " and ".join(f"{context:,}" for context in contexts)
        line["published"] = said if recipe == "polykv" else Value(None, note="not published")
        for ratio in RATIOS:
            values = [p[ratio].value for p in mine if p[ratio].value is not None]
            line[f"{ratio}_low"] = Value(min(values)) if values else mine[0][ratio]
            line[f"{ratio}_high"] = Value(max(values)) if values else mine[0][ratio]
        line["difference"] = _minus(line["nominal_ratio_low"], line["published"])
        lines.append(line)
    columns = [
        *keys("recipe", "head_dim", "models", "contexts"),
        Column("published", "published", fixed(2)),
        *_ends("nominal"),
        Column("difference", "difference", fixed(3, "+")),
        *_ends("stored"),
    ]
    caption = (
        "Compression against fp16, least and most over the contexts run: nominal (payload bits "
        "only, which is what was published) and stored (all bytes kept). "
        f"{_describe(rows, 'compression_ratio')}"
    )
    return Table("polykv_ratio", caption, columns, lines)


def _ends(ratio: str) -> list[Column]:
    ends = {"low": "least", "high": "most"}
    return [
        Column(f"{ratio}_ratio_{end}", f"{ratio}, {name}", fixed(3)) for end, name in ends.items()
    ]


def polykv_quality(rows: pd.DataFrame) -> Table | None:
    """Published perplexity, delta and BERTScore beside the measured, other models apart; None without any."""
    found = having(points(rows), *TRAINED)
    if not found:
        return None
    figures = [f for f in published.load("polykv") if f.table == "quality"]
    theirs = list(dict.fromkeys(f.model for f in figures))
    others = [p for p in found if not any(published.same_model(m, p.model) for m in theirs)]
    lines = []
    for model in theirs:
        mine = [f for f in figures if f.model == model]
        answers = [published.quality_answer(f, found) for f in mine]
        weights = {a.weights for a in answers if isinstance(a, Point)}
        if weights or not others:
            on = f"; measured on it ({' and '.join(sorted(weights))} weights)" if weights else ""
            head = f"published on {model}{on}"
            lines += [_quality(f, a, head, True) for f, a in zip(mine, answers, strict=True)]
            continue
        for measured, kind in dict.fromkeys((p.model, p.weights) for p in others):
            own = [p for p in others if (p.model, p.weights) == (measured, kind)]
            head = f"published on {model}; measured on {measured} ({kind} weights)"
            lines += [_quality(f, published.nearest(f, own), head, False) for f in mine]
    columns = [
        *keys("document", "context", "agents", "recipe", "metric"),
        Column("published", "published", _by_metric),
        Column("measured", "measured [95 %]", _by_metric, interval=True),
        Column("on", "measured on"),
        Column("at", "at context"),
        Column("difference", "difference", fixed(4, "+")),
    ]
    caption = (
        "Quality as PolyKV published it and as measured. A difference is given for the same model "
        "only; another model stands beside it for orientation, at its nearest context. "
        f"{_describe(rows, *QUALITY_METRICS)}"
    )
    return Table("polykv_quality", caption, columns, lines)


def _quality(figure: Figure, answer: Point | str, section: str, same: bool) -> Row:
    line = {"section": section, "metric": figure.metric, "published": figure.value}
    line |= {"document": figure.document, "context": figure.document_tokens}
    line |= {"agents": figure.n_agents, "recipe": figure.recipe}
    if not isinstance(answer, str) and answer[figure.metric].value is None:
        answer = NOT_HERE + answer[figure.metric].note
    if isinstance(answer, str):
        blank = ("measured", "on", "at", "difference")
        return {**line, **dict.fromkeys(blank, Value(None, note=answer))}
    value, remarks = answer[figure.metric], []
    # A perplexity delta without its interval is not a result.
    if figure.metric == "perplexity_delta" and (value.low is None or value.high is None):
        remarks.append("no interval could be had")
    if figure.metric.startswith("bertscore"):
        remarks.append(f"scored by {answer.scorer}")
    if same and answer.document != figure.document.replace("-", ""):
        remarks.append(f"on {answer.document}, another text of the kind of {figure.document}")
    value = replace(value, note="; ".join(filter(None, [value.note, *remarks])))
    apart = Value(None, note="not subtracted: another model")
    line |= {"measured": value, "on": answer.document, "at": answer.context_tokens}
    return line | {"difference": _minus(value, figure.value) if same else apart}


def _by_metric(number: float, row: Row) -> str:
    return DECIMALS[row["metric"]](number, row)


def _place(p: Point) -> tuple:
    return p.model, p.weights, p.document, p.context_tokens, p.n_agents


def _minus(measured: Value, said: Value) -> Value:
    if measured.value is None or said.value is None:
        return Value(None, note=measured.note if measured.value is None else said.note)
    return Value(measured.value - said.value)


def _describe(rows: pd.DataFrame, *metrics: str) -> str:
    return describe(rows[rows["metric"].isin(metrics)])


def decomposition(rows: pd.DataFrame) -> str | None:
    """Every published kv_memory as tokens x bytes per token x agents, or over the ratio.

    None where the models whose gigabytes are published were not run.
    """
    figures = [f for f in published.load("polykv") if f.table == "memory"]
    found = points(rows)
    models = dict.fromkeys(f.model for f in figures)
    if not any(published.same_model(model, p.model) for model in models for p in found):
        return None
    lines = ["# How the published GB decompose", ""]
    for model in models:
        mine = [f for f in figures if f.model == model]
        lines += _of_model(model, mine, found)
    return "\n".join(lines)


def _of_model(model: str, figures: Sequence[Figure], found: Sequence[Point]) -> list[str]:
    gigabytes = [f for f in figures if f.metric == "kv_memory"]
    per_token, (ratio, of) = _bytes_per_token(model), _ratio(gigabytes, found)
    shares = sorted({f.prefilled_tokens / f.document_tokens for f in gigabytes})
    span = " to ".join(dict.fromkeys(f"{share:.1%}" for share in (shares[0], shares[-1])))
    said = (
        f"{model}: {per_token:,} bytes per token (keys and values of all layers and heads, in fp32); the pool is one "
        f"such cache over {ratio:.3f} ({of}). Only {span} of each document is prefilled and counted."
    )
    lines = [textwrap.fill(said, WIDTH), ""]
    lines += [
        "| agents | cache | computed | GB | published GB |",
        "| --: | :-- | :-- | --: | --: |",
    ]
    for f in gigabytes:
        size = f"{f.prefilled_tokens:,} tokens x {per_token:,} B"
        gb = f.prefilled_tokens * per_token / 1e9
        if f.recipe == BASELINE:
            kind, rule, gb = "unshared", f"{f.n_agents} agents x {size}", gb * f.n_agents
        else:
            kind, rule, gb = "one pool", f"{size} / {ratio:.3f}", gb / ratio
        lines.append(f"| {f.n_agents} | {kind} | {rule} | {gb:.3f} | {f.value.value:.3f} |")
    lines.append("")
    for f in (f for f in figures if f.metric == "memory_reduction"):
        lines += [_reduction(f, per_token, ratio, having(found, "stored")), ""]
    return lines


def _bytes_per_token(model: str) -> int:
    """Keys and values of all layers and heads in fp32, 4 bytes each, from the geometry in conf/model."""
    g = load_group("model", model.removesuffix("-instruct")).geometry
    head_dim = g.hidden_size // g.num_attention_heads
    return 2 * g.num_hidden_layers * g.num_key_value_heads * head_dim * 4


def _ratio(gigabytes: Sequence[Figure], found: Sequence[Point]) -> tuple[float, str]:
    for p in having(found, "nominal_ratio"):
        if p.recipe == "polykv":
            return p["nominal_ratio"].value, "nominal: 16 bits over the recipe's mean payload bits"
    large = max((f for f in gigabytes if f.recipe == BASELINE), key=lambda f: f.value.value)
    pool = next(
        f
        for f in gigabytes
        if f.recipe != BASELINE
        and (f.n_agents, f.prefilled_tokens) == (large.n_agents, large.prefilled_tokens)
    )
    return large.value.value / large.n_agents / pool.value.value, "as the published GB imply"


def _reduction(f: Figure, per_token: int, ratio: float, found: Sequence[Point]) -> str:
    """The published reduction: what sharing alone gives, and the same row at fp16 and as stored."""
    n, alone = f.n_agents, f.prefilled_tokens * per_token / 1e9
    said = (
        f"The published reduction of {f.value.value:g} % at {n} agents is 1 - 1 / ({n} x "
        f"{ratio:.3f}) = {1 - 1 / n / ratio:.1%}; sharing one uncompressed cache, without any "
        f"compression, gives {1 - 1 / n:.1%}. In fp16 the same row is {n * alone / 2:.3f} GB "
        f"unshared and {alone / 2 / ratio:.3f} GB pooled (nominal)."
    )
    answer = published.memory_answer(f, found)
    if isinstance(answer, Point):
        said += f" The pool really keeps (stored, measured) {answer['stored'].value:.3f} GB."
    return textwrap.fill(said, WIDTH)


TABLES = {
    "polykv_memory": polykv_memory,
    "polykv_ratio": polykv_ratio,
    "polykv_quality": polykv_quality,
}
TEXTS = {"polykv_memory_decomposition": decomposition}
CLAIMS = claims
