"""Tables that put our value beside every figure that a paper publishes, or the reason why there is none.

Our value is preferably from the published setting, else from a similar one on the same model, else from another model.
What follows from arithmetic alone (GB in the paper's accounting, ratios of payload bits) is computed, and marked so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd

from analysis import published
from analysis.catalog import NOT_MEASURED, PAPERS
from analysis.points import (
    IN_PLACE,
    RUN,
    UNSHARED,
    Point,
    counted,
    having,
    hops_text,
    over_seeds,
    points,
)
from analysis.published import HOLDS, NOT_HERE, SAME_LENGTH, Figure, with_budget
from analysis.render import Column, Row, Table, describe, fixed, keys, memory
from analysis.statistics import BASELINE, Measure, Value, median, newest, percentage, rate

STUDY = ("polykv_memory", "compare", "handoff_accuracy", "handoff_ttft")
# How our value relates to the published figure (explained in MATCHES); NOT_MEASURED is the fifth.
EXACT, NEAR, OTHER, COMPUTED = "exact", "near", "other model", "computed"
# The experiment that gives a value for a figure, by the figure's metric or else its table.
EXPERIMENT_FOR = {
    "kv_memory": "polykv_memory",
    "memory_reduction": "polykv_memory",
    "compression_ratio": "polykv_ratio",
    "ttft": "handoff_ttft",
    "gsm8k_accuracy": "handoff_accuracy",
    "n_problems": "handoff_accuracy",
    "net_right": "handoff_accuracy",
    "quality": "polykv_quality",
    "stages": "handoff_stages",
}
# How our cards travel, for policies of QKVShare; we take the others to hand over in memory.
TRANSPORT = {"reprefill": "text", "q4_reload": "file"}
# The paper states no rule. Some chat models never write the #### that the strict one wants: 0 of 150 are right then.
EXTRACTION = "flexible"
ACCURACY = Measure("answer_right", {"extraction": EXTRACTION}, reduce=rate, form=percentage)
# Tables of times, which are compared by ratio; all other figures are compared by difference.
TIMES = ("ttft", "stages")
# How numbers are written, by metric; others have one decimal.
DIGITS = {
    "kv_memory": memory,
    "memory_reduction": fixed(1),
    "compression_ratio": fixed(3),
    "bertscore_f1": fixed(4),
    "perplexity": fixed(3),
    "perplexity_delta": fixed(2, "+"),
    "n_problems": fixed(0),
    "net_right": fixed(0, "+"),
    "gsm8k_accuracy": fixed(2),
}
# By paper, the metrics of our rows that its figures are compared with; the caption describes these rows.
ANSWERED_BY = {
    "polykv": ("kv_memory", "compression_ratio", "nll", "nll_delta", "bertscore_f1"),
    "qkvshare": ("answer_right", "time"),
}
MATCHES = (
    f"{EXACT}: the published setting; {NEAR}: the same model, in another setting; {OTHER}: another model, "
    f"for orientation only, not compared; {COMPUTED}: by the arithmetic of the published figure, "
    "nothing was measured"
)
CAPTIONS = {
    "polykv": "Every figure that PolyKV publishes beside what was measured or computed here, or the reason why "
    "nothing was. GB are in the paper's own accounting: fp32, the prefilled part of the document only",
    "qkvshare": "Every figure of QKVShare that we know of beside what was measured here, or the reason why nothing "
    "was. Its device, according to a secondary digest, is an RTX 5070 Ti laptop GPU with 12 GB, and the cards of its "
    "times have uniform 4 bits. We take its 1K, 4K and 8K to be the 476, 1,939 and 3,877 tokens that a "
    "secondary digest gives (the digest's stages at 8K add up to the abstract's time), its hops to be handoffs, and "
    "its Q4 and Q8 to be budgets of 4 and 8 payload bits per value, without metadata",
}


@dataclass(frozen=True)
class Counterpart:
    """Our value for a published figure.

    Attributes:
        value: its note says how the setting differs from the published one; None with the reason in the note.
        match: EXACT, NEAR, OTHER, COMPUTED or NOT_MEASURED.
        on: the model, weights, device and dtype (RUN) of our value.
        at: the rest of its setting, such as document, tokens and agents.
    """

    value: Value
    match: str = NOT_MEASURED
    on: tuple[str, ...] = ()
    at: str = ""


def table(paper: str, rows: pd.DataFrame) -> Table:
    """The table of a paper's figures and our values for them; `rows` are those of the studies in STUDY."""
    figures = published.load(paper)
    own = rows[rows["study"].isin(("polykv_memory", "compare"))]
    found = points(own) if paper == "polykv" else []
    answers = [counterpart(figure, found, rows) for figure in figures]

    def form(number: float, row: Row) -> str:
        return DIGITS.get(row["metric"], fixed(1))(number, row)

    def difference(number: float, row: Row) -> str:
        return f"× {number:.2f}" if row["unit"] == "ms" else fixed(4, "+")(number, row)

    columns = [
        *keys("setting", "policy", "metric", "unit"),
        Column("published", "published", form),
        Column("ours", "here [95 %]", form, interval=True),
        Column("against", "against published", difference),
        *keys("match", "on", "at"),
    ]
    lines = [_line(*pair) for pair in zip(figures, answers, strict=True)]
    return Table(f"published_{paper}", _caption(paper, figures, answers, rows), columns, lines)


def _caption(
    paper: str, figures: Sequence[Figure], answers: Sequence[Counterpart], rows: pd.DataFrame
) -> str:
    n_digest = sum(figure.digest for figure in figures)
    n_measured = sum(answer.match in (EXACT, NEAR) for answer in answers)
    n_computed = sum(answer.match == COMPUTED for answer in answers)
    counts = f"{len(figures)} figures"
    counts += f", {n_digest} of them taken from a secondary digest of the paper" * bool(n_digest)
    counts += f"; {n_measured} measured on the published model"
    counts += f", {n_computed} computed" * bool(n_computed)
    # The caption names the runs that were measured; if there are none, those that were computed.
    measured = {answer.on for answer in answers if answer.on and answer.match != COMPUTED}
    runs = measured or {answer.on for answer in answers}
    used = rows[rows["metric"].isin(ANSWERED_BY[paper])]
    used = used[[run in runs for run in used[RUN].itertuples(index=False, name=None)]]
    if paper == "qkvshare" and len(used):  # its rows are of one problem or repeat each
        used = counted(used)
    return (
        f"{CAPTIONS[paper]}. {counts}. {MATCHES}. Intervals of times are quartiles. "
        f"{describe(used, 'Measured on' if measured else 'Computed for')}"
    )


def _line(figure: Figure, answer: Counterpart) -> Row:
    """A line of the table."""
    model = "any model" if figure.model == "any" else figure.model
    absent = Value(None, note=answer.value.note)
    against = absent  # our value less the published one or, for times, over it
    if answer.match == OTHER:
        against = Value(None, note="another model: not compared")
    elif answer.match != NOT_MEASURED:
        ours, theirs = answer.value.value, figure.value.value
        against = Value(ours / theirs if figure.table in TIMES else ours - theirs)
    return {
        "section": f"{figure.table}, published on {model}",
        "setting": _setting(figure),
        "policy": figure.policy or "any",
        "metric": figure.metric,
        "unit": figure.unit,
        "published": figure.value,
        "ours": answer.value,
        "against": against,
        "match": answer.match,
        "on": "{} ({}), {} {}".format(*answer.on) if answer.on else absent,
        "at": answer.at or absent,
    }


def _setting(figure: Figure) -> str:
    """The published setting in words: "gsm8k, 3 hops"; "any" if the figure depends on none."""
    hops = " hops" * (figure.table == "accuracy")
    parts = [
        figure.document if figure.document != "any" else "",
        f"{figure.at}{hops}" if figure.at else "",
        f"{figure.document_tokens:,} tokens" if figure.document_tokens else "",
        f"{figure.n_agents} agents" if figure.n_agents else "",
    ]
    return ", ".join(filter(None, parts)) or "any"


def counterpart(figure: Figure, found: Sequence[Point], rows: pd.DataFrame) -> Counterpart:
    """Our value for one published figure: from the points `found` for PolyKV, from `rows` for QKVShare."""
    if figure.metric == "net_right":
        return _net(figure, rows)
    if figure.paper == "qkvshare":
        return _time(figure, rows) if figure.table in TIMES else _accuracy(figure, rows)
    if figure.metric == "compression_ratio":
        return _ratio(figure, found)
    if figure.metric in ("kv_memory", "memory_reduction"):
        return _memory(figure, found)
    return _quality(figure, found)


def _ratio(figure: Figure, found: Sequence[Point]) -> Counterpart:
    """The nominal compression ratio of the figure's recipe, which depends on neither model nor text."""
    same_recipe = [p for p in having(found, "nominal_ratio") if p.recipe == figure.recipe]
    if not same_recipe:
        return _not_measured(figure, "no compression ratio was measured")
    point = same_recipe[0]
    note = "16 bits over the recipe's mean payload bits"
    return _from_point(point, replace(point["nominal_ratio"], note=note), COMPUTED)


def _memory(figure: Figure, found: Sequence[Point]) -> Counterpart:
    """GB, or the percentage saved, in the paper's own accounting: tokens x bytes per token of the model's geometry."""
    accounted = having(found, "paper")
    answer = published.memory_answer(figure, accounted)
    if isinstance(answer, Point):
        note = "paper accounting, from the geometry"
        return _memory_of(answer, figure, accounted, COMPUTED, note)
    others = [p for p in accounted if p.recipe == figure.recipe and p.n_agents]
    # Another model stands in only if the published one was not run at all.
    if not others or any(published.same_model(figure.model, p.model) for p in others):
        return _not_measured(figure, answer)
    nearest = min(
        others, key=lambda p: (abs(p.n_agents - figure.n_agents), published.distance(figure, p))
    )
    return _memory_of(nearest, figure, accounted, OTHER, "computed; other geometry, other bytes")


def _memory_of(
    point: Point, figure: Figure, accounted: Sequence[Point], match: str, note: str
) -> Counterpart:
    """The memory of `point` or, for a reduction, the percentage saved against unshared caches in the same setting."""
    if figure.metric == "kv_memory":
        return _from_point(point, replace(point["paper"], note=note), match)
    setting = {"document_tokens": point.context_tokens, "n_agents": point.n_agents}
    unshared = replace(figure, policy="no_sharing", model=point.model, **setting)
    baseline = published.memory_answer(unshared, accounted)
    if isinstance(baseline, str):
        return _not_measured(figure, f"{NOT_HERE}no {BASELINE} row beside the pool")
    saved = 100 * (1 - point["paper"].value / baseline["paper"].value)
    return _from_point(point, Value(saved, note=note), match)


def _quality(figure: Figure, found: Sequence[Point]) -> Counterpart:
    """Perplexity or BERTScore; of another model only if the published one was not run at all with trained weights."""
    point, match = published.quality_answer(figure, found), EXACT
    if isinstance(point, str):
        reason = point
        trained = [p for p in found if p.weights != "random"]
        if any(published.same_model(figure.model, p.model) for p in trained):
            return _not_measured(figure, reason)
        point, match = published.nearest(figure, trained), OTHER
        if isinstance(point, str):
            return _not_measured(figure, reason)
    differences = _differences(
        # "wikitext-2" is our document wikitext2.
        (point.document, figure.document.replace("-", ""), "another text"),
        (point.context_tokens, figure.document_tokens, "another length"),
        (point.n_agents, figure.n_agents, "another number of agents"),
    )
    if not published.scored_alike(figure, point):
        differences.append(f"scored by {point.scorer}")
    if match == EXACT and (weights := published.other_weights(figure, point)):
        differences.append(weights)
    if match == EXACT and differences:
        match = NEAR
    value = point[figure.metric]
    value = replace(value, note=_join_notes(value.note, *differences))
    return _from_point(point, value, match)


def _differences(*settings: tuple[object, object, str]) -> list[str]:
    """The descriptions of those (ours, published, description) whose values differ; ours may be None: it never does."""
    return [what for ours, theirs, what in settings if ours is not None and ours != theirs]


def _from_point(point: Point, value: Value, match: str) -> Counterpart:
    """The counterpart with this value of a point."""
    parts = [
        point.document,
        f"{point.context_tokens:,} tokens" if point.context_tokens else "whole text",
        f"{point.n_agents} agents" if point.n_agents else "",
        point.reader if point.reader != UNSHARED else "",
        point.settings,
    ]
    on = (point.model, point.weights, point.device, point.dtype)
    return Counterpart(value, match, on, ", ".join(filter(None, parts)))


def _accuracy(figure: Figure, rows: pd.DataFrame) -> Counterpart:
    """The share of right answers after the published number of handoffs, or the nearest that was run.

    The figure `n_problems` has no policy and no number of handoffs: for it, the relays with the nearest number.
    """
    found = _rows_of(rows, "handoff_accuracy", "answer_right")
    if len(found) and figure.policy:
        policy, bits = figure.controller
        found = found[found["policy"] == policy]
        if found.empty:
            return _not_measured(figure, f"{NOT_HERE}policy {policy} was not run", bits)
        found = found[with_budget(found, bits)]
        if found.empty:
            reason = f"{NOT_HERE}policy {policy} was not run at {bits:g} bits"
            return _not_measured(figure, reason, bits)
    chosen = _rows_of_one_run(figure, found, figure.document)
    if chosen.empty:
        return _not_measured(figure, f"{NOT_HERE}no relay was run")
    if not figure.policy:
        n_problems = chosen.groupby("cell")["sample"].transform("nunique")
        apart = (n_problems - figure.value.value).abs()
        chosen = chosen[apart == apart.min()]
    wanted_hops = int(figure.at) if figure.at else int(chosen["hop"].min())
    n_hops = int(min(set(chosen["hop"]), key=lambda n: (abs(n - wanted_hops), n)))
    chosen = chosen[chosen["hop"] == n_hops]
    chosen = chosen[chosen["n_hops"] == chosen["n_hops"].max()]
    reseal = max(chosen["reseal"])  # by name: "requantize", as published, comes before "append"
    chosen = chosen[chosen["reseal"] == reseal]
    document = chosen["document"].iloc[0]
    chosen = chosen[chosen["document"] == document]
    differences = _differences(
        (document, figure.document, f"{document} instead of {figure.document}"),
        (n_hops, wanted_hops, "another number of handoffs"),
    )
    value, at = over_seeds(chosen, ACCURACY.of), document
    if figure.policy:
        parts = (document, hops_text(n_hops), str(chosen["policy"].iloc[0]), str(reseal))
        at = ", ".join(filter(None, parts))
    else:
        value = Value(None if value.n is None else float(value.n))
    if value.value is None:
        return _not_measured(figure, NOT_HERE + value.note)
    value = replace(value, note=_join_notes(value.note, *differences))
    return _from_rows(figure, chosen, value, at, NEAR if differences else EXACT)


def _net(figure: Figure, rows: pd.DataFrame) -> Counterpart:
    """Problems that one policy answers right and the other does not, less the reverse, at 4 bits on the same problems.

    The paper's handoffs and bits are not known to us: the most handoffs, as published resealed, are taken. Of
    several seeds only the last one run counts: the seed does not change which problems of the test split are taken.
    """
    one, other = _policies(figure)
    found = _rows_of(rows, "handoff_accuracy", "answer_right")
    if found.empty:  # there may be no such columns either
        return _not_measured(figure, f"{NOT_HERE}no relay was run")
    found = found[(found["extraction"] == EXTRACTION) & found["policy"].isin((one, other))]
    found = found[with_budget(found, 4)]
    chosen = _rows_of_one_run(figure, found, figure.document)
    setting = ["hop", "n_hops", "reseal", "document"]
    chosen = chosen[chosen.groupby([*setting, "seed"])["policy"].transform("nunique") == 2]
    if chosen.empty:
        return _not_measured(
            figure, f"{NOT_HERE}{one} and {other} were not run on the same problems", 4
        )
    for column in setting:
        chosen = chosen[chosen[column] == chosen[column].max()]
    chosen = chosen.sort_values(["created_at", "cell"], kind="stable")
    seed = chosen["seed"].iloc[-1]
    of_seed = f" of seed {seed} alone" * (chosen["seed"].nunique() > 1)
    chosen = chosen[chosen["seed"] == seed]
    both = chosen.pivot_table(
        index="sample", columns="policy", values="value", aggfunc="last"
    ).dropna()
    net, at = float((both[one] - both[other]).sum()), chosen["document"].iloc[0]
    note = f"of {len(both)} problems{of_seed}; the published bits are not known"
    value = Value(net, n=len(both), note=note)
    at = ", ".join((at, hops_text(int(chosen["hop"].iloc[0])), "4 bits", chosen["reseal"].iloc[0]))
    return _from_rows(figure, chosen, value, at, NEAR)


def _time(figure: Figure, rows: pd.DataFrame) -> Counterpart:
    """Our stages that the published time contains, summed in each repeat."""
    stages = HOLDS[figure.metric]
    policy, bits = figure.controller
    transport = TRANSPORT.get(figure.policy, "memory")
    found = _rows_of(rows, "handoff_ttft", "time")
    if len(found):
        found = found[(found["policy"] == policy) & (found["transport"] == transport)]
        found = found[found["stage"].isin(stages) & (found["reader"] != IN_PLACE)]
        found = found[with_budget(found, bits)]
    chosen = _rows_of_one_run(figure, found)
    if chosen.empty:
        return _not_measured(figure, f"{NOT_HERE}route {policy}, {transport} was not timed")
    tokens = min(
        set(chosen["context_tokens"]), key=lambda n: (abs(math.log(n / figure.label_tokens)), n)
    )
    chosen = chosen[chosen["context_tokens"] == tokens]
    chosen = chosen[chosen["backend"] == chosen["backend"].iloc[0]]
    if chosen["value"].isna().any() or set(chosen["stage"]) != set(stages):
        return _not_measured(figure, f"{NOT_HERE}a stage is missing")
    summed = f"{' + '.join(stages)}, medians" if figure.table == "stages" else ""
    length = "another length" if abs(tokens / figure.label_tokens - 1) > SAME_LENGTH else ""
    repeats = ["seed", "cell", "created_at", "sample"]
    summed_ms = chosen.groupby(repeats, as_index=False, dropna=False)["value"].sum()
    value = over_seeds(summed_ms, lambda of_seed: median(newest(of_seed)))
    value = replace(value, note=_join_notes(value.note, summed, length))
    at = f"{tokens:,.0f} tokens, {policy}, {transport}"
    # Never EXACT: ours is another device than the laptop GPU of the paper.
    return _from_rows(figure, chosen, value, at, NEAR)


def _rows_of(rows: pd.DataFrame, study: str, metric: str) -> pd.DataFrame:
    return rows[(rows["study"] == study) & (rows["metric"] == metric)]


def _rows_of_one_run(figure: Figure, found: pd.DataFrame, document: str = "") -> pd.DataFrame:
    """The rows of one model, weights, device and dtype (RUN), so that values are not averaged over several.

    The figure's own model comes first, on `document` if it is given; if that was not run, any other model on any
    document. Among several runs: a GPU before a CPU, then by name.
    """
    is_own = published.of_model(found, figure.model)
    chosen = found[is_own]
    if document:
        chosen = chosen[chosen["document"] == document]
    if chosen.empty:
        chosen = found[~is_own]
    ordered = chosen.sort_values(
        RUN, key=lambda c: c.eq("cpu") if c.name == "device" else c, kind="stable"
    )
    return ordered.merge(ordered[RUN].head(1), on=RUN)


def _from_rows(
    figure: Figure, chosen: pd.DataFrame, value: Value, at: str, match: str
) -> Counterpart:
    """The counterpart with this value of the rows of one run; `match` is overridden if the model is another."""
    on = tuple(chosen[RUN].iloc[0])
    return Counterpart(value, match if published.same_model(figure.model, on[0]) else OTHER, on, at)


def _not_measured(figure: Figure, reason: str, bits: float | None = None) -> Counterpart:
    """The counterpart without a value: the reason, and the command that would measure one (`bits`: its budget)."""
    experiment = EXPERIMENT_FOR.get(figure.metric) or EXPERIMENT_FOR[figure.table]
    model = "" if figure.model == "any" else f" model={figure.model.removesuffix('-instruct')}"
    relay = policy = several = ""
    if experiment == "handoff_accuracy":
        # Its default relay is of the reference model alone, its default policy is uniform.
        relay = " relay=gsm8k"
        policies = _policies(figure)
        policy = f" policy={','.join(policies)}" * bool(policies)
        several = " --multirun" * (len(policies) > 1)
    budget = "" if bits is None else f" budget_bits={bits:g}"
    command = f"experiment={experiment}{model}{relay}{policy}{budget}{several}"
    return Counterpart(Value(None, note=f"{reason}; run {command}"))


def _policies(figure: Figure) -> list[str]:
    """Our policies that a figure of QKVShare's accuracy is of: two of a pair, none of a number of problems."""
    if figure.metric == "net_right":
        return figure.policy.removesuffix("_q4").split("_vs_")
    return [figure.controller[0]] if figure.policy else []


def _join_notes(*notes: str) -> str:
    return "; ".join(filter(None, notes))


TABLES = {f"published_{paper}": partial(table, paper) for paper in PAPERS}
