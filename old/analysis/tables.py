"""What each table holds. Every builder: (rows, points, published figures) -> Table."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pandas as pd
from analysis.published import NOT_HERE, Figure
from analysis.reduce import BASELINE, QUALITY, Point, Value, describe, having, points

from analysis import published
from analysis.render import Column, Row, Table, fixed, keys, memory

NOT_PUBLISHED = "no published figure for this model, context and number of agents"
MEMORY = ("paper", "stored", "resident")
RATIOS = ("nominal_ratio", "stored_ratio")
DECIMALS = {"perplexity": fixed(3), "perplexity_delta": fixed(2, "+"), "bertscore_f1": fixed(4)}


def polykv_memory(rows: pd.DataFrame, figures: Sequence[Figure]) -> Table:
    """Published GB beside the same accounting measured here, and beside the true figures."""
    found = having(points(rows), *MEMORY)
    unshared = {_place(p): p for p in found if p.recipe == BASELINE}
    lines, answered = [], []
    for figure in figures:
        if figure.metric != "kv_memory":
            continue
        answer = published.memory_answer(figure, found)
        line = {"model": figure.model, "context": figure.document_tokens}
        line |= {"agents": figure.n_agents, "recipe": figure.recipe, "published": figure.value}
        if isinstance(answer, str):
            line |= {n: Value(None, note=answer) for n in ("difference", "fp16", *MEMORY)}
            line["reader"] = "not stated"
        else:
            answered.append(answer)
            line["reader"] = answer.reader
            line |= _memory(answer, unshared.get(_place(answer)), figure.value)
        lines.append({"section": "published configurations", **line})
    for p in found:
        if p not in answered:
            line = {"model": p.model, "context": p.context_tokens, "agents": agents(p)}
            line |= {"recipe": p.recipe, "reader": p.reader}
            line["published"] = Value(None, note=NOT_PUBLISHED)
            line |= _memory(p, unshared.get(_place(p)), Value(None, note=NOT_PUBLISHED))
            lines.append({"section": "measured only", **line})
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
        "readers rebuild). "
        f"{describe(_of(rows, 'kv_memory'))}"
    )
    return Table("polykv_memory", caption, columns, lines)


def _memory(p: Point, unshared: Point | None, said: Value) -> Row:
    """The measured columns; fp16 unshared is half the fp32 that the paper counts."""
    fp32 = unshared["paper"] if unshared else Value(None, note=f"no {BASELINE} row beside it")
    fp16 = Value(fp32.value / 2) if fp32.value is not None else fp32
    return {**{n: p[n] for n in MEMORY}, "fp16": fp16, "difference": _minus(p["paper"], said)}


def polykv_quality(rows: pd.DataFrame, figures: Sequence[Figure]) -> Table:
    """Published perplexity, delta and BERTScore beside the measured; other models apart."""
    found = having(points(rows), *QUALITY)
    figures = [f for f in figures if f.table == "quality"]
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
        f"{describe(rows[rows['metric'].isin(QUALITY)])}"
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
    value = answer[figure.metric]
    if figure.metric == "perplexity_delta":
        value = with_interval(value)
    if figure.metric.startswith("bertscore"):
        value = remarked(value, f"scored by {answer.scorer}")
    if same and answer.document != figure.document.replace("-", ""):
        value = remarked(
            value, f"on {answer.document}, another text of the kind of {figure.document}"
        )
    line["measured"] = value
    apart = Value(None, note="not subtracted: another model")
    line["difference"] = _minus(value, figure.value) if same else apart
    return {**line, "on": answer.document, "at": answer.context_tokens}


def polykv_ratio(rows: pd.DataFrame, figures: Sequence[Figure]) -> Table:
    """Nominal and stored ratio per recipe and head_dim beside the published 2.91."""
    found = having(points(rows), *RATIOS)
    said = next(f.value for f in figures if f.metric == "compression_ratio")
    lines = []
    for recipe, dim in dict.fromkeys((p.recipe, p.head_dim) for p in found):
        mine = [p for p in found if (p.recipe, p.head_dim) == (recipe, dim)]
        line = {"recipe": recipe, "head_dim": dim or Value(None, note="the rows do not name it")}
        line["models"] = ", ".join(dict.fromkeys(p.model for p in mine))
        line["contexts"] = " and ".join(
            f"{c:,}" for c in sorted({p.context_tokens or 0 for p in mine})
        )
        line["published"] = said if recipe == "polykv" else Value(None, note="not published")
        for name in RATIOS:
            values = [p[name].value for p in mine if p[name].value is not None]
            line[f"{name}_low"] = Value(min(values)) if values else mine[0][name]
            line[f"{name}_high"] = Value(max(values)) if values else mine[0][name]
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
        f"{describe(_of(rows, 'compression_ratio'))}"
    )
    return Table("polykv_ratio", caption, columns, lines)


def _ends(ratio: str) -> list[Column]:
    ends = {"low": "least", "high": "most"}
    return [
        Column(f"{ratio}_ratio_{end}", f"{ratio}, {name}", fixed(3)) for end, name in ends.items()
    ]


def _by_metric(number: float, row: Row) -> str:
    return DECIMALS[row["metric"]](number, row)


def _place(p: Point) -> tuple:
    return p.model, p.weights, p.document, p.context_tokens, p.n_agents


def _of(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    return rows[rows["metric"] == metric]


def _minus(measured: Value, said: Value) -> Value:
    if measured.value is None or said.value is None:
        return Value(None, note=measured.note if measured.value is None else said.note)
    return Value(measured.value - said.value)


def agents(p: Point) -> int | str:
    return p.n_agents or "any"


def with_interval(delta: Value) -> Value:
    """A perplexity delta without its interval is not a result: say so."""
    bare = delta.value is not None and (delta.low is None or delta.high is None)
    return remarked(delta, "no interval was given") if bare else delta


def remarked(value: Value, remark: str) -> Value:
    return replace(value, note="; ".join(filter(None, [value.note, remark])))


TABLES: dict[str, Callable[[pd.DataFrame, Sequence[Figure]], Table]] = {
    table.__name__: table for table in (polykv_memory, polykv_quality, polykv_ratio)
}
