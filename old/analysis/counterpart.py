"""What was measured of a published figure: in its setting, near it, on another model, or not at all and why.

Figures that both sides only work out (GB by the paper's accounting, payload bits) are computed, never measured.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
from analysis.handoff_reduce import SETTING, average, hops_text, relays, value, with_budget
from analysis.published import NOT_HERE, SAME_LENGTH, Figure
from analysis.reduce import BASELINE, Point, Value, having

from analysis import published

EXACT, NEAR, OTHER, NONE = "exact", "near", "other model", "not measured"
COMPUTED = "computed"  # by the arithmetic of the published figure: nothing was measured
RUN = {  # by metric, or by table
    "kv_memory": "experiment=polykv_memory",
    "memory_reduction": "experiment=polykv_memory",
    "compression_ratio": "experiment=polykv_ratio",
    "ttft": "experiment=handoff_ttft",
    "gsm8k_accuracy": "experiment=handoff_accuracy",
    "n_problems": "experiment=handoff_accuracy",
    "quality": "experiment=polykv_quality",
    "stages": "experiment=handoff_stages",
}
# The published stages, and the ones of ours that they hold.
HOLDS = {
    "card_create": ("create",),
    "inject": ("dequantize", "inject"),
    "generate": ("first_forward",),
}
ROUTE = {"reprefill": "text", "q4_reload": "file"}  # the others are read as handed over in memory


@dataclass(frozen=True)
class Counterpart:
    """`value`: ours, or None with the reason. `match`: EXACT, NEAR, OTHER, COMPUTED or NONE.

    `on`: model (weights), device, dtype; `at`: the rest of the setting that it is from. What
    differs from the published setting stands in the value's note.
    """

    value: Value
    match: str = NONE
    on: str = ""
    at: str = ""


def counterpart(figure: Figure, points: Sequence[Point], rows: pd.DataFrame) -> Counterpart:
    """The measured side of one published figure; `points` are those of `rows`."""
    if figure.paper == "qkvshare":
        return _of_handoff(figure, rows)
    if figure.metric == "compression_ratio":
        return _ratio(figure, points)
    if figure.metric in ("kv_memory", "memory_reduction"):
        return _memory(figure, points)
    return _quality(figure, points)


def run_name(model: str, weights: str, device: str, dtype: str) -> str:
    """What a figure was measured on."""
    return f"{model} ({weights}), {device} {dtype}"


def _ratio(figure: Figure, points: Sequence[Point]) -> Counterpart:
    mine = [p for p in having(points, "nominal_ratio") if p.recipe == figure.recipe]
    if not mine:
        return _absent(figure, "no compression ratio was measured")
    note = "16 bits over the recipe's mean payload bits"
    return _beside(mine[0], replace(mine[0]["nominal_ratio"], note=note), COMPUTED)


def _memory(figure: Figure, points: Sequence[Point]) -> Counterpart:
    """By the paper's own accounting, worked back from its table: tokens x bytes of the geometry."""
    answer = published.memory_answer(figure, having(points, "paper"))
    if isinstance(answer, str):
        others = [p for p in having(points, "paper") if p.recipe == figure.recipe and p.n_agents]
        if not others or any(published.same_model(figure.model, p.model) for p in others):
            return _absent(figure, answer)
        answer = min(others, key=partial(_apart, figure))
        return _reduced(figure, answer, points, OTHER, "computed; other geometry, other bytes")
    return _reduced(figure, answer, points, COMPUTED, "paper accounting, from the geometry")


def _reduced(
    figure: Figure, pool: Point, points: Sequence[Point], match: str, note: str
) -> Counterpart:
    if figure.metric == "kv_memory":
        return _beside(pool, replace(pool["paper"], note=note), match)
    wanted = replace(figure, policy="no_sharing", document_tokens=pool.context_tokens)
    wanted = replace(wanted, model=pool.model, n_agents=pool.n_agents)
    full = published.memory_answer(wanted, having(points, "paper"))
    if isinstance(full, str):
        return _absent(figure, f"{NOT_HERE}no {BASELINE} row beside the pool")
    saved = 100 * (1 - pool["paper"].value / full["paper"].value)
    return _beside(pool, Value(saved, note=note), match)


def _apart(figure: Figure, point: Point) -> tuple:
    return abs(point.n_agents - figure.n_agents), published.distance(figure, point)


def _quality(figure: Figure, points: Sequence[Point]) -> Counterpart:
    answer = published.quality_answer(figure, points)
    match = EXACT
    if isinstance(answer, str):
        trained = [p for p in points if p.weights != "random"]
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
    found = answer[figure.metric]
    return _beside(answer, replace(found, note=_joined(found.note, *differs)), match)


def _differences(*settings: tuple[object, object, str]) -> list[str]:
    return [name for ours, theirs, name in settings if ours is not None and ours != theirs]


def _beside(p: Point, found: Value, match: str) -> Counterpart:
    tokens = f"{p.context_tokens:,} tokens" if p.context_tokens else "whole text"
    agents = f"{p.n_agents} agents" if p.n_agents else ""
    reader = p.reader if p.reader not in ("", "private") else ""
    at = ", ".join(filter(None, (p.document, tokens, agents, reader)))
    return Counterpart(found, match, run_name(p.model, p.weights, p.device, p.dtype), at)


def _of_handoff(figure: Figure, rows: pd.DataFrame) -> Counterpart:
    if figure.table == "accuracy":
        return _accuracy(figure, rows)
    return _stage(figure, rows) if figure.table == "stages" else _ttft(figure, rows)


def _accuracy(figure: Figure, rows: pd.DataFrame) -> Counterpart:
    found = relays(rows, "accuracy")
    found = found[found["how"] == "strict"]
    if figure.policy:  # not the number of problems
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
    nearest = min(set(chosen["n_hops"]), key=lambda n: (abs(n - hops), n))
    chosen = chosen[chosen["n_hops"] == nearest]
    reseal = max(chosen["reseal"])  # "requantize", as published, where it was run
    chosen = chosen[chosen["reseal"] == reseal]
    one = chosen.iloc[0]
    differs = _differences(
        (one["document"], figure.document, f"{one['document']} instead of {figure.document}"),
        (nearest, hops, "another number of handoffs"),
    )
    if figure.policy:
        got = value(chosen[chosen["document"] == one["document"]])
        at = f"{one['document']}, {hops_text(nearest)}, {one['policy']}, {reseal}"
    else:
        got, at = Value(float(chosen["n"].max())), one["document"]
    return _of_rows(figure, one, replace(got, note=_joined(got.note, *differs)), at, differs)


def _ttft(figure: Figure, rows: pd.DataFrame) -> Counterpart:
    chosen, differs = _timed(figure, rows[rows["metric"] == "ttft"])
    if chosen.empty:
        return _absent(figure, differs[0])
    got = value(chosen)
    return _timing(figure, chosen, replace(got, note=_joined(got.note, *differs)), differs)


def _stage(figure: Figure, rows: pd.DataFrame) -> Counterpart:
    """The sum of our stages that the published one holds; sums of quartiles are none, so no interval."""
    names = [f"stage_{name}" for name in HOLDS[figure.metric]]
    chosen, differs = _timed(figure, rows[rows["metric"].isin(names)])
    if chosen.empty:
        return _absent(figure, differs[0])
    parts = [value(chosen[chosen["metric"] == name]) for name in names]
    if any(part.value is None for part in parts):
        return _absent(figure, f"{NOT_HERE}a stage is missing")
    held = " + ".join(HOLDS[figure.metric])
    got = parts[0] if len(parts) == 1 else Value(sum(part.value for part in parts))
    of = average(chosen)
    note = _joined(got.note, f"{held}, {of}" if figure.metric != held else of, *differs)
    return _timing(figure, chosen, replace(got, note=note), differs)


def _timed(figure: Figure, rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows of the figure's route nearest its context, and how they differ; or none, and why."""
    policy, bits = figure.controller
    route = ROUTE.get(figure.policy, "memory")
    found = rows[(rows["policy"] == policy) & (rows["protocol"] == route)]
    found = found[with_budget(found, bits)]
    chosen = _of_model(figure, found, lambda own: own)
    if chosen.empty:
        return chosen, [f"{NOT_HERE}route {policy}, {route} was not timed"]
    tokens = min(
        set(chosen["context_tokens"]), key=lambda n: (abs(math.log(n / figure.label_tokens)), n)
    )
    chosen = chosen[chosen["context_tokens"] == tokens]
    far = abs(tokens / figure.label_tokens - 1) > SAME_LENGTH
    return chosen, ["another length"] if far else []


def _of_model(
    figure: Figure, found: pd.DataFrame, keep: Callable[[pd.DataFrame], pd.DataFrame]
) -> pd.DataFrame:
    """What `keep` leaves of the figure's own model; where nothing, one other model's, on one device."""
    own = found["model"].map(lambda name: published.same_model(figure.model, name)).astype(bool)
    mine = keep(found[own])
    mine = mine if len(mine) else found[~own]
    # a GPU before a CPU, then by name: one place, never a mean over several
    order = mine.sort_values(SETTING, key=lambda c: c.eq("cpu") if c.name == "device" else c)
    return order.merge(order[SETTING].head(1), on=SETTING)


def _timing(
    figure: Figure, chosen: pd.DataFrame, got: Value, differs: Iterable[str]
) -> Counterpart:
    one = chosen.iloc[0]
    at = f"{one['context_tokens']:,.0f} tokens, {one['policy']}, {one['protocol']}"
    return _of_rows(figure, one, got, at, [*differs, "their device is not stated"])


def _of_rows(
    figure: Figure, one: pd.Series, got: Value, at: str, differs: Sequence[str]
) -> Counterpart:
    on = run_name(*(one[key] for key in SETTING))
    own = published.same_model(figure.model, one["model"])
    return Counterpart(got, (NEAR if differs else EXACT) if own else OTHER, on, at)


def _absent(figure: Figure, why: str, bits: float | None = None) -> Counterpart:
    run = RUN.get(figure.metric) or RUN[figure.table]
    model = "" if figure.model == "any" else f" model={figure.model.removesuffix('-instruct')}"
    budget = "" if bits is None else f" budget_bits={bits:g}"
    return Counterpart(Value(None, note=f"{why}; run {run}{model}{budget}"))


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))
