"""Every published figure beside what was measured of it: in its setting, near it, on another model, or why not at all.

Figures that both sides only work out (GB by the paper's accounting, payload bits) are computed, never measured.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd

from analysis import published
from analysis.catalog import NOT_MEASURED, PAPERS
from analysis.points import IN_PLACE, UNSHARED, Point, having, over_seeds, points
from analysis.published import HOLDS, NOT_HERE, SAME_LENGTH, Figure, with_budget
from analysis.render import Column, Row, Table, describe, fixed, keys, memory
from analysis.statistics import BASELINE, Measure, Value, median, percentage, rate

STUDY = ("polykv_memory", "compare", "handoff_accuracy", "handoff_ttft")
EXACT, NEAR, OTHER, NONE = "exact", "near", "other model", NOT_MEASURED
COMPUTED = "computed"  # by the arithmetic of the published figure: nothing was measured
RUN = {  # by metric, or by table
    "kv_memory": "polykv_memory",
    "memory_reduction": "polykv_memory",
    "compression_ratio": "polykv_ratio",
    "ttft": "handoff_ttft",
    "gsm8k_accuracy": "handoff_accuracy",
    "n_problems": "handoff_accuracy",
    "quality": "polykv_quality",
    "stages": "handoff_stages",
}
TRANSPORT = {
    "reprefill": "text",
    "q4_reload": "file",
}  # the others are read as handed over in memory
ACCURACY = Measure("answer_right", {"extraction": "strict"}, reduce=rate, form=percentage)
RUN_OF = ["model", "weights", "device", "dtype"]
TIMES = ("ttft", "stages")  # these are divided, all else is subtracted
DIGITS = {
    "kv_memory": memory,
    "memory_reduction": fixed(1),
    "compression_ratio": fixed(3),
    "bertscore_f1": fixed(4),
    "perplexity": fixed(3),
    "perplexity_delta": fixed(2, "+"),
    "n_problems": fixed(0),
    "gsm8k_accuracy": fixed(2),
}
# The studies and metrics whose rows answer each paper's figures.
ANSWERING = {
    "polykv": ("kv_memory", "compression_ratio", "nll", "nll_delta", "bertscore_f1"),
    "qkvshare": ("answer_right", "time"),
}
MATCHES = (
    f"{EXACT}: the published setting; {NEAR}: the same model, in another setting; {OTHER}: another model, "
    f"for orientation only, not compared; {COMPUTED}: by the arithmetic of the published figure, "
    "nothing was measured"
)
CAPTIONS = {
    "polykv": "Every figure that PolyKV publishes, beside what was measured or computed here, or the reason why "
    "nothing was. GB as in the paper's own accounting: fp32, the prefilled part of the document only",
    "qkvshare": "Every figure of QKVShare that we know, beside what was measured here, or the reason why nothing was. "
    "Its device is not stated; its 1K, 4K and 8K are read as the 476, 1,939 and 3,877 tokens that the digest "
    "gives them (whose stages at 8K add up to the abstract's time); its hops are read as handoffs, its Q4 "
    "and Q8 as budgets of 4 and 8 bits of every byte stored",
}


@dataclass(frozen=True)
class Counterpart:
    """What was measured of a published figure.

    Attributes:
        value: ours, or None with the reason; what differs from the published setting is its note.
        match: EXACT, NEAR, OTHER, COMPUTED or NONE.
        on: model, weights, device and dtype.
        at: the rest of the setting that it is from.
    """

    value: Value
    match: str = NONE
    on: tuple[str, ...] = ()
    at: str = ""


def table(paper: str, rows: pd.DataFrame) -> Table:
    """Every figure of a paper, and its counterpart or the reason why there is none."""
    figures = published.load(paper)
    found = points(_of(rows, ("polykv_memory", "compare"))) if paper == "polykv" else []
    answers = [counterpart(figure, found, rows) for figure in figures]
    columns = [
        *keys("setting", "policy", "metric", "unit"),
        Column("published", "published", _digits),
        Column("ours", "here [95 %]", _digits, interval=True),
        Column("against", "against published", _against),
        Column("match", "match", key=True),
        Column("on", "on", key=True),
        Column("at", "at", key=True),
    ]
    lines = [_line(*pair) for pair in zip(figures, answers, strict=True)]
    return Table(f"published_{paper}", _caption(paper, figures, answers, rows), columns, lines)


def _caption(
    paper: str, figures: Sequence[Figure], answers: Sequence[Counterpart], rows: pd.DataFrame
) -> str:
    n_found = sum(answer.match in (EXACT, NEAR) for answer in answers)
    n_computed = sum(answer.match == COMPUTED for answer in answers)
    counted = f"{n_found} measured on the published model"
    counted += f", {n_computed} computed" * bool(n_computed)
    digest = sum(figure.digest for figure in figures)
    secondary = f", {digest} of them taken from a secondary digest of the paper" if digest else ""
    measured = {answer.on for answer in answers if answer.on and answer.match != COMPUTED}
    runs, how = measured, "Measured on"
    if not measured:
        runs, how = {answer.on for answer in answers}, "Computed for"
    mine = rows[rows["metric"].isin(ANSWERING[paper])]
    mine = mine[[run in runs for run in mine[RUN_OF].itertuples(index=False, name=None)]]
    return (
        f"{CAPTIONS[paper]}. {len(figures)} figures{secondary}; {counted}. {MATCHES}. Intervals of "
        f"times are quartiles. {describe(mine, how)}"
    )


def _line(figure: Figure, answer: Counterpart) -> Row:
    model = "any model" if figure.model == "any" else figure.model
    absent = Value(None, note=answer.value.note)
    return {
        "section": f"{figure.table}, published on {model}",
        "setting": _setting(figure),
        "policy": figure.policy or "any",
        "metric": figure.metric,
        "unit": figure.unit,
        "published": figure.value,
        "ours": answer.value,
        "against": _compared(figure, answer),
        "match": answer.match,
        "on": "{} ({}), {} {}".format(*answer.on) if answer.on else absent,
        "at": answer.at or absent,
    }


def _compared(figure: Figure, answer: Counterpart) -> Value:
    """The difference or, of times, the ratio; neither where the models differ."""
    if answer.match == NONE:
        return Value(None, note=answer.value.note)
    if answer.match == OTHER:
        return Value(None, note="another model: not compared")
    ours, theirs = answer.value.value, figure.value.value
    return Value(ours / theirs if figure.table in TIMES else ours - theirs)


def _against(number: float, row: Row) -> str:
    return f"× {number:.2f}" if row["unit"] == "ms" else fixed(4, "+")(number, row)


def _setting(figure: Figure) -> str:
    tokens = f"{figure.document_tokens:,} tokens" if figure.document_tokens else ""
    agents = f"{figure.n_agents} agents" if figure.n_agents else ""
    at = figure.at and f"{figure.at} hops" if figure.table == "accuracy" else figure.at
    document = figure.document if figure.document != "any" else ""
    return ", ".join(filter(None, (document, at, tokens, agents))) or "any"


def _digits(number: float, row: Row) -> str:
    return DIGITS.get(row["metric"], fixed(1))(number, row)


def counterpart(figure: Figure, found: Sequence[Point], rows: pd.DataFrame) -> Counterpart:
    """What was measured of one published figure; `found` are the points of `rows`, which answer PolyKV's."""
    if figure.paper == "qkvshare":
        return _accuracy(figure, rows) if figure.table == "accuracy" else _time(figure, rows)
    if figure.metric == "compression_ratio":
        return _ratio(figure, found)
    if figure.metric in ("kv_memory", "memory_reduction"):
        return _memory(figure, found)
    return _quality(figure, found)


def _ratio(figure: Figure, found: Sequence[Point]) -> Counterpart:
    mine = [p for p in having(found, "nominal_ratio") if p.recipe == figure.recipe]
    if not mine:
        return _absent(figure, "no compression ratio was measured")
    note = "16 bits over the recipe's mean payload bits"
    return _beside(mine[0], replace(mine[0]["nominal_ratio"], note=note), COMPUTED)


def _memory(figure: Figure, found: Sequence[Point]) -> Counterpart:
    """By the paper's own accounting, worked back from its table: tokens x bytes of the geometry."""
    counted = having(found, "paper")
    answer = published.memory_answer(figure, counted)
    if isinstance(answer, Point):
        note = "paper accounting, from the geometry"
        return _reduced(figure, answer, counted, COMPUTED, note)
    others = [p for p in counted if p.recipe == figure.recipe and p.n_agents]
    if not others or any(published.same_model(figure.model, p.model) for p in others):
        return _absent(figure, answer)
    nearest = min(others, key=partial(_apart, figure))
    return _reduced(figure, nearest, counted, OTHER, "computed; other geometry, other bytes")


def _reduced(
    figure: Figure, pool: Point, found: Sequence[Point], match: str, note: str
) -> Counterpart:
    if figure.metric == "kv_memory":
        return _beside(pool, replace(pool["paper"], note=note), match)
    wanted = replace(figure, policy="no_sharing", document_tokens=pool.context_tokens)
    wanted = replace(wanted, model=pool.model, n_agents=pool.n_agents)
    full = published.memory_answer(wanted, found)
    if isinstance(full, str):
        return _absent(figure, f"{NOT_HERE}no {BASELINE} row beside the pool")
    saved = 100 * (1 - pool["paper"].value / full["paper"].value)
    return _beside(pool, Value(saved, note=note), match)


def _apart(figure: Figure, point: Point) -> tuple:
    return abs(point.n_agents - figure.n_agents), published.distance(figure, point)


def _quality(figure: Figure, found: Sequence[Point]) -> Counterpart:
    answer, match = published.quality_answer(figure, found), EXACT
    if isinstance(answer, str):
        trained = [p for p in found if p.weights != "random"]
        others = [p for p in trained if not published.same_model(figure.model, p.model)]
        beside = published.nearest(figure, others) if len(others) == len(trained) else answer
        # Of a model that was not run at all another stands beside it, never one in its place.
        if isinstance(beside, str):
            return _absent(figure, answer)
        answer, match = beside, OTHER
    differs = _differences(
        (answer.document, figure.document.replace("-", ""), "another text"),
        (answer.context_tokens, figure.document_tokens, "another length"),
        (answer.n_agents, figure.n_agents, "another number of agents"),
    )
    if not published.scored_alike(figure, answer):
        differs.append(f"scored by {answer.scorer}")
    if match == EXACT and (weights := published.other_weights(figure, answer)):
        differs.append(weights)
    match = NEAR if match == EXACT and differs else match
    got = answer[figure.metric]
    return _beside(answer, replace(got, note=_joined(got.note, *differs)), match)


def _differences(*settings: tuple[object, object, str]) -> list[str]:
    return [name for ours, theirs, name in settings if ours is not None and ours != theirs]


def _beside(p: Point, got: Value, match: str) -> Counterpart:
    tokens = f"{p.context_tokens:,} tokens" if p.context_tokens else "whole text"
    agents = f"{p.n_agents} agents" if p.n_agents else ""
    reader = p.reader if p.reader != UNSHARED else ""
    at = ", ".join(filter(None, (p.document, tokens, agents, reader, p.settings)))
    return Counterpart(got, match, (p.model, p.weights, p.device, p.dtype), at)


def _accuracy(figure: Figure, rows: pd.DataFrame) -> Counterpart:
    found = _of(rows, ("handoff_accuracy",), "answer_right")
    if len(found) and figure.policy:  # the number of problems has none
        policy, bits = figure.controller
        found = found[found["policy"] == policy]
        if found.empty:
            return _absent(figure, f"{NOT_HERE}policy {policy} was not run")
        found = found[with_budget(found, bits)]
        if found.empty:
            return _absent(figure, f"{NOT_HERE}policy {policy} was not run at {bits:g} bits", bits)
    chosen = _of_model(figure, found, lambda own: own[own["document"] == figure.document])
    if chosen.empty:
        return _absent(figure, f"{NOT_HERE}no relay was run")
    hops = int(figure.at) if figure.at else int(chosen["n_hops"].min())
    nearest = int(min(set(chosen["n_hops"]), key=lambda n: (abs(n - hops), n)))
    chosen = chosen[chosen["n_hops"] == nearest]
    reseal = max(chosen["reseal"])  # "requantize", as published, where it was run
    chosen = chosen[chosen["reseal"] == reseal]
    document = chosen["document"].iloc[0]
    chosen = chosen[chosen["document"] == document]
    differs = _differences(
        (document, figure.document, f"{document} instead of {figure.document}"),
        (nearest, hops, "another number of handoffs"),
    )
    got, at = over_seeds(chosen, ACCURACY.of), document
    if figure.policy:
        handoffs = f"{nearest} handoff" + "s" * (nearest != 1)
        at = ", ".join(
            filter(None, (document, handoffs, str(chosen["policy"].iloc[0]), str(reseal)))
        )
    else:
        got = Value(None if got.n is None else float(got.n))
    if got.value is None:
        return _absent(figure, NOT_HERE + got.note)
    return _of_rows(figure, chosen, replace(got, note=_joined(got.note, *differs)), at, differs)


def _time(figure: Figure, rows: pd.DataFrame) -> Counterpart:
    """Our stages that the published time contains, summed in each repeat."""
    stages = HOLDS[figure.metric]
    policy, bits = figure.controller
    transport = TRANSPORT.get(figure.policy, "memory")
    found = _of(rows, ("handoff_ttft",), "time")
    if len(found):
        found = found[(found["policy"] == policy) & (found["transport"] == transport)]
        found = found[found["stage"].isin(stages) & (found["reader"] != IN_PLACE)]
        found = found[with_budget(found, bits)]
    chosen = _of_model(figure, found, lambda own: own)
    if chosen.empty:
        return _absent(figure, f"{NOT_HERE}route {policy}, {transport} was not timed")
    tokens = min(
        set(chosen["context_tokens"]), key=lambda n: (abs(math.log(n / figure.label_tokens)), n)
    )
    chosen = chosen[chosen["context_tokens"] == tokens]
    chosen = chosen[chosen["backend"] == chosen["backend"].iloc[0]]
    if chosen["value"].isna().any() or set(chosen["stage"]) != set(stages):
        return _absent(figure, f"{NOT_HERE}a stage is missing")
    differs = ["another length"] if abs(tokens / figure.label_tokens - 1) > SAME_LENGTH else []
    held = f"{' + '.join(stages)}, medians" if figure.table == "stages" else ""
    got = over_seeds(chosen, _median_of_sums)
    got = replace(got, note=_joined(got.note, held, *differs))
    at = f"{tokens:,.0f} tokens, {policy}, {transport}"
    return _of_rows(figure, chosen, got, at, [*differs, "their device is not stated"])


def _median_of_sums(rows: pd.DataFrame) -> Value:
    newest = rows.sort_values("created_at", kind="stable")["cell"].iloc[-1]
    mine = rows[rows["cell"] == newest]
    return median(mine.groupby("sample", as_index=False)["value"].sum())


def _of(rows: pd.DataFrame, studies: Sequence[str], metric: str = "") -> pd.DataFrame:
    mine = rows[rows["study"].isin(studies)]
    return mine[mine["metric"] == metric] if metric else mine


def _of_model(
    figure: Figure, found: pd.DataFrame, keep: Callable[[pd.DataFrame], pd.DataFrame]
) -> pd.DataFrame:
    """The rows of the figure's own model that `keep` selects; if none, those of one other model on one device."""
    own = found["model"].map(partial(published.same_model, figure.model)).astype(bool)
    mine = keep(found[own])
    mine = mine if len(mine) else found[~own]
    # a GPU before a CPU, then by name: one place, never a mean over several
    order = mine.sort_values(
        RUN_OF, key=lambda c: c.eq("cpu") if c.name == "device" else c, kind="stable"
    )
    return order.merge(order[RUN_OF].head(1), on=RUN_OF)


def _of_rows(
    figure: Figure, chosen: pd.DataFrame, got: Value, at: str, differs: Iterable[str]
) -> Counterpart:
    on = tuple(chosen[RUN_OF].iloc[0])
    own = published.same_model(figure.model, on[0])
    return Counterpart(got, (NEAR if differs else EXACT) if own else OTHER, on, at)


def _absent(figure: Figure, why: str, bits: float | None = None) -> Counterpart:
    run = RUN.get(figure.metric) or RUN[figure.table]
    model = "" if figure.model == "any" else f" model={figure.model.removesuffix('-instruct')}"
    budget = "" if bits is None else f" budget_bits={bits:g}"
    return Counterpart(Value(None, note=f"{why}; run experiment={run}{model}{budget}"))


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


TABLES = {f"published_{paper}": partial(table, paper) for paper in PAPERS}
