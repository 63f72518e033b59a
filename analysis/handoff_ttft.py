"""QKVShare's times: to first token by route, with what each costs in quality; by stage; and its claims on them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis import published, style
from analysis.catalog import INCONCLUSIVE, NOT_MEASURED, Claim, decided, equivalent
from analysis.points import (
    IN_PLACE,
    RUN,
    bits_text,
    counted,
    groups,
    ordered,
    over_seeds,
    run_text,
    settings_text,
)
from analysis.published import HOLDS, SAME_LENGTH, judged_runs, with_budget
from analysis.render import Column, Row, Table, compact, describe, fixed, keys, settings_columns
from analysis.statistics import QUALITY, Measure, Value, median
from polykv.evaluation.statistics import spread_warning

STAGES = ("create", "serialize", "transfer", "verify", "dequantize", "inject", "first_forward")
TEXT, MEMORY = "text", "memory"
TRANSPORTS = {MEMORY: "card in memory", "file": "card through a file"}
SUFFIX = f", {style.READERS[IN_PLACE][0]}"
WHISKER = "0.35"
ROUTE = ("policy", "budget_bits", "transport", "reader", "backend")
TOTAL = Measure("time", {"stage": "total"}, median).of
SPEEDUP = Measure("speedup", reduce=median).of
LOSSES = {"mean_bits": Measure("mean_bits")} | {
    name: QUALITY[name] for name in ("kl_mean", "perplexity_delta")
}
# Policy and budget of the cards in QKVShare's tables of times.
CARD, CARD_BITS = published.CONTROLLER_OF["qkvshare"]
# What a row of panels is of. `cell_budget`, the bits of a cell's cards, is also on its routes that have no budget.
PANELS = (*RUN, "document", "cell_budget")
FACTOR = 1.25  # ratios of times within it are the same: our choice, none is published
MORE = "More repeats (repeats=) would tell."


def timed(rows: pd.DataFrame) -> pd.DataFrame:
    """The times in order with columns `route` and `cell_budget`, and rows `speedup`: re-prefill's time over the card's.

    Each is of one repeat of a cell, in which the two were timed one after the other, so that a busy machine slows both.
    """
    times = rows[rows["metric"] == "time"]
    total = times[times["stage"] == "total"]
    is_text = total["transport"] == TEXT
    text = total.loc[is_text, ["cell", "sample", "value"]].rename(columns={"value": "_text"})
    gains = total[~is_text].merge(text, on=["cell", "sample"])
    gains = gains.assign(metric="speedup", unit="x", value=gains.pop("_text") / gains["value"])
    found = ordered(pd.concat([times, gains]) if len(gains) else times)
    of_card = found["transport"] != TEXT
    route = found["transport"] + np.where(found["reader"] == IN_PLACE, SUFFIX, "")
    if found.loc[of_card, "backend"].nunique() > 1:
        route += np.where(of_card, ", " + found["backend"], "")
    budget = found.groupby("cell")["budget_bits"].transform("max")
    return found.assign(route=route, cell_budget=budget)


def _routes(found: pd.DataFrame) -> Iterator[tuple[Row, pd.DataFrame]]:
    """(a table's line that names it, rows) for each run, context and route that was timed."""
    for line, mine in groups(found, *RUN, "document", "context_tokens", *ROUTE):
        on = ", ".join(filter(None, [run_text(line), line["document"]]))
        named = {"section": f"measured on {on}", "context": f"{line['context_tokens']:,}"}
        named |= {"budget": bits_text(line["budget_bits"]), "route": mine["route"].iloc[0]}
        yield line | named, mine


def _warned(timing: Value) -> Value:
    """The timing, with a footnote where its quartiles are so far apart that the machine was busy."""
    notes = (timing.note, spread_warning(timing.low, timing.high))
    return replace(timing, note="; ".join(filter(None, notes)))


def _table(
    name: str, caption: str, legend: str, found: pd.DataFrame, columns: list[Column], lines: list
) -> Table:
    """A table of routes, with the columns that name them."""
    about = [*keys("context", "policy", "budget", "route"), *settings_columns(found)]
    return Table(name, f"{caption}. {_describe(found)}", [*about, *columns], lines, legend)


def _describe(found: pd.DataFrame) -> str:
    return describe(counted(found[found["metric"] == "time"]))


def table(rows: pd.DataFrame) -> Table:
    """Time to first token by route, published and measured, and what each route costs in quality."""
    found, lines = timed(rows), []
    blank = Value(None, note="measured rows stand below, by their own routes and contexts")
    for said in _published_times():
        tokens = f" ({said.document_tokens} tokens)" if said.document_tokens else ""
        line = {"section": f"published on {said.model}", "policy": said.policy}
        line |= {"context": f"{said.at}{tokens}", "route": "not stated", "published": said.value}
        lines.append(line | dict.fromkeys(("ttft", "speedup", *LOSSES), blank))
    for line, mine in _routes(found):
        line["published"] = Value(None, note="the published routes stand above")
        line["ttft"] = _warned(over_seeds(mine, TOTAL))
        if line["transport"] == TEXT:
            line["speedup"] = Value(None, note="re-prefill is what cards are held to")
            exact = Value(None, note="the receiver reads the text itself: nothing is lost")
            line |= dict.fromkeys(LOSSES, exact)
        else:
            line["speedup"] = _warned(over_seeds(mine, SPEEDUP))
            # They do not depend on the transport.
            same = rows["cell"].isin(mine["cell"]) & (rows["policy"] == line["policy"])
            same &= rows["reader"] == line["reader"]
            line |= {name: over_seeds(rows[same], loss.of) for name, loss in LOSSES.items()}
        lines.append(line)
    columns = [
        Column("published", "published ms", fixed(1)),
        Column("ttft", "ms [quartiles]", fixed(0), interval=True),
        Column("kl_mean", "KL [95 %]", compact, interval=True),
        Column("mean_bits", "bits stored", fixed(2)),
        Column("speedup", "times faster [quartiles]", fixed(2), interval=True),
        Column("perplexity_delta", "Δppl % [95 %]", fixed(2, "+"), interval=True),
    ]
    caption = "Time to first token, one model, dtype and runtime for all routes"
    explained = (
        "A card's time starts with the sender's cache in memory and holds its creation, as the published total does. "
        "Median and quartiles of repeats in which the routes take turns; times faster: of re-prefill and card in the "
        "same repeat. KL divergence (nats) and perplexity are of the text after the context, read after the card, "
        "against the uncompressed cache read alike, in float32 whatever the times' dtype; bits: stored per cached "
        "value, all metadata counted"
    )
    return _table("handoff_ttft", caption, explained, found, columns, lines)


def _published_times() -> list[published.Figure]:
    return [f for f in published.load("qkvshare") if f.metric == "ttft"]


def stages_table(rows: pd.DataFrame) -> Table:
    """Milliseconds by stage, and their sum relative to the total."""
    found = timed(rows)
    lines: list[Row] = []
    said = [f for f in published.load("qkvshare") if f.table == "stages"]
    for label in dict.fromkeys(f.at for f in said):
        mine = [f for f in said if f.at == label]
        line = {"section": f"published on {mine[0].model}", "policy": "qkvshare"}
        line |= {"context": f"{label} ({mine[0].document_tokens} tokens)", "route": "not stated"}
        line |= dict.fromkeys(STAGES, Value(None, note="not a published stage"))
        line |= {HOLDS[f.metric][0]: f.value for f in mine}
        total = Value(sum(f.value.value for f in mine), note="sum of the published stages")
        lines.append(line | {"total": total, "adds_up": Value(None, note="no total was published")})
    absent = Value(None, note="this route has no such stage")
    for line, mine in _routes(found):
        took, total = _by_stage(mine), _warned(over_seeds(mine, TOTAL))
        summed = sum(value.value for value in took.values())
        line |= dict.fromkeys(STAGES, absent) | took
        lines.append(line | {"total": total, "adds_up": Value(100 * summed / total.value)})
    columns = [
        *(Column(name, name.replace("_", " "), fixed(2)) for name in (*STAGES, "total")),
        Column("adds_up", "sum / total %", fixed(1)),
    ]
    explained = (
        "The total is timed on its own. The published create, inject and generate stand under create, dequantize "
        "(which theirs holds) and first forward"
    )
    caption = "Milliseconds by stage, medians over repeats"
    return _table("handoff_stages", caption, explained, found, columns, lines)


def _by_stage(mine: pd.DataFrame) -> dict[str, Value]:
    """Median milliseconds of the stages that this route has."""
    took = {name: over_seeds(mine, Measure("time", {"stage": name}, median).of) for name in STAGES}
    return {name: value for name, value in took.items() if value.value is not None}


@style.styled
def figure(rows: pd.DataFrame) -> style.Picture:
    """Milliseconds against context with quartiles, published ones of the same model open; bars of a single context."""
    found = timed(rows)
    runs = list(groups(found, *PANELS))
    shown = [name for name in TRANSPORTS if (found["transport"] == name).any()]
    shown = shown or [MEMORY]  # nothing but re-prefill
    said = [f for f in _published_times() if not f.digest]
    beside = [[f for f in said if published.same_model(f.model, run["model"])] for run, _ in runs]
    bars = found["context_tokens"].nunique() == 1 and not any(beside)
    n_bars = found.groupby(["policy", "route"]).ngroups / len(shown)
    height = 0.6 + 0.2 * n_bars if bars else 2.1
    canvas, panels = style.sheet(_headings(runs), len(shown), height, style.PAGE, share_y=True)
    for axes, (_, mine), theirs in zip(panels, runs, beside, strict=True):
        for ax, transport in zip(axes, shown, strict=True):
            part = mine[mine["transport"].isin((TEXT, transport))]
            ends = part["route"].str.removeprefix(TEXT).str.removeprefix(transport)
            routes = part.assign(name=part["policy"] + ends).groupby(["policy", "name"], sort=False)
            if bars:
                _bars(ax, {key: over_seeds(of, TOTAL) for key, of in routes})
                ax.set_title(f"{TRANSPORTS[transport]}, {mine['context_tokens'].iloc[0]:,} tokens")
                continue
            for f in theirs:
                tint = style.policy_colour(f.controller[0])
                ax.plot(f.label_tokens, f.value.value, "s", color=tint, **style.OPEN)
            for (policy, name), of in routes:
                spots = [(n, over_seeds(at, TOTAL)) for n, at in of.groupby("context_tokens")]
                look = style.READ_IN_PLACE if (of["reader"] == IN_PLACE).any() else {}
                look = {"color": style.policy_colour(policy), "label": name} | look
                style.series(ax, spots, marker="o", markersize=3.5, **look)
            ax.set_xscale("log", base=2)
            style.plain_log(ax)
            style.number_ticks(ax, {*part["context_tokens"], *(f.label_tokens for f in theirs)})
            ax.set_xlabel("context, tokens")
            ax.set_title(TRANSPORTS[transport])
        if not bars:
            axes[0].set_ylabel("time to first token, ms")
    models = dict.fromkeys(f.model for theirs in beside for f in theirs)
    more = "Published figures are of other models: not drawn, but in table published_qkvshare"
    marks = style.Marks(
        panels=True,
        bars="quartiles",
        dashed="the card is read in place, not decoded into a cache first",
        more=f"Open markers: published, on {' and '.join(models)}" if models else more,
    )
    drawn = canvas if bars else style.legend(canvas)
    return style.picture(drawn, "Median time to first token by route", _describe(found), marks)


def _headings(runs: Sequence[tuple[Row, object]]) -> list[str]:
    """The run of each row of panels, its document and its cards' budget where there are several, and its settings."""
    documents, budgets = ({run[name] for run, _ in runs} for name in ("document", "cell_budget"))
    return [
        run_text(run)
        + f", {run['document']}" * (len(documents) > 1)
        + f", cards of {bits_text(run['cell_budget'])}" * (len(budgets) > 1)
        + settings_text(run)
        for run, _ in runs
    ]


def _bars(ax: Axes, times: dict[tuple[str, str], Value]) -> None:
    """A bar with quartiles for each (policy, name)."""
    values = list(times.values())
    tints = [style.policy_colour(policy) for policy, _ in times]
    bars = ax.barh(
        range(len(times)), [v.value for v in values], xerr=style.reaches(values), height=0.7, color=tints,
        ecolor=WHISKER,
    )  # fmt: skip
    texts = [f"{v.value:,.0f}" if v.value >= 100 else f"{v.value:.3g}" for v in values]
    ax.bar_label(bars, texts, padding=3, fontsize=style.SIZE)
    style.name_bars(ax, [name for _, name in times])
    ax.margins(x=0.12)
    ax.set_xlabel("time to first token, ms")


@style.styled
def stages_figure(rows: pd.DataFrame) -> style.Picture | str:
    """Milliseconds by stage, stacked, one bar a route, with the total's quartiles; a panel per context."""
    found = timed(rows)
    found = found[found["transport"] != TEXT]
    if found.empty:
        return "no card was timed"
    runs = [(run, list(mine.groupby("context_tokens"))) for run, mine in groups(found, *PANELS)]
    height = 0.6 + 0.15 * found.groupby(["policy", "route"]).ngroups
    across = max(len(contexts) for _, contexts in runs)
    canvas, panels = style.sheet(_headings(runs), across, height)
    for axes, (_, contexts) in zip(panels, runs, strict=True):
        for ax, (tokens, part) in zip(axes, contexts, strict=False):
            _stacked(ax, part)
            ax.set_title(f"{tokens:,} tokens")
        style.keep(axes, len(contexts))
    shows = "Where a card's time to first token goes: medians of the stages"
    more = "The published stages, in table published_qkvshare, hold: create; dequantize and inject; first forward."
    marks = style.Marks(lines="Shown", more=more)
    return style.picture(style.legend(canvas), shows, _describe(found), marks)


def _stacked(ax: Axes, mine: pd.DataFrame) -> None:
    bars = dict(list(mine.groupby(["policy", "route"], sort=False)))
    took = pd.DataFrame([_by_stage(of) for of in bars.values()], columns=STAGES)
    took = took.map(lambda value: value.value if isinstance(value, Value) else 0.0)
    left = took.cumsum(axis=1) - took
    for stage, tint in zip(STAGES, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=True):
        if took[stage].any():
            look = {"color": tint, "label": stage.replace("_", " ")}
            ax.barh(range(len(bars)), took[stage], left=left[stage], **look)
    for place, of in enumerate(bars.values()):
        total = over_seeds(of, TOTAL)
        ends, look = (total.low, total.high), {"color": WHISKER, "linewidth": 0.8}
        ax.plot(ends, (place, place), "|-", label="total, quartiles", **look)
    style.name_bars(ax, [f"{policy}, {route}" for policy, route in bars])
    ax.set_xlabel("ms, medians")


def claims(rows: pd.DataFrame) -> list[Claim]:
    """Claims on cards of the published policy and budget, one per run (weights, device) that timed them.

    Without such a run, the command that would time them.
    """
    found = rows
    if len(rows):
        found = timed(rows)
        found = found[(found["policy"] == CARD) & with_budget(found, CARD_BITS)]
    run = "experiment=handoff_ttft"
    mostly = "a card's time to first token is mostly the receiver's forward pass"
    mostly += ", as a secondary digest of the paper has it"
    return [
        *_levels(found),
        *judged_runs("ttft", "a card reaches its first token sooner than re-prefilling", run, found, _sooner),
        *judged_runs("ttft", "the longer the context, the more a card gains", run, found, _grows),
        *judged_runs("stages", mostly, "experiment=handoff_stages", found, _mostly_forward),
    ]  # fmt: skip


def _levels(found: pd.DataFrame) -> list[Claim]:
    """The abstract's times, as the ratio of re-prefilling to a card, on the published model and route only."""
    figures = [f for f in _published_times() if not f.digest]
    said, judged = {(f.at, f.policy): f for f in figures}, []
    for label in dict.fromkeys(f.at for f in figures):
        slow, fast = said[label, "reprefill"], said[label, "qkvshare"]
        ratio, tokens = slow.value.value / fast.value.value, fast.label_tokens
        claim = (
            f"a card takes the time to first token from {slow.value.value:g} to {fast.value.value:g} ms at {label} "
            f"(which is {tokens:,} tokens by published.csv) on {fast.model}, {ratio:.2f} times faster"
        )
        mine = found
        if len(found):
            mine = _as_published(found[published.of_model(found, fast.model)])
        model = fast.model.removesuffix("-instruct")
        run = f"experiment=handoff_ttft model={model} context={tokens}, on a GPU"
        judge = partial(_level, ratio, tokens, run)
        judged += judged_runs("ttft", claim, run, mine, judge)
    return judged


def _as_published(found: pd.DataFrame) -> pd.DataFrame:
    """The rows of the published route: cards handed over in memory and decoded into a cache."""
    return found[(found["transport"] == MEMORY) & (found["reader"] != IN_PLACE)]


def _level(ratio: float, tokens: int, run: str, mine: pd.DataFrame) -> tuple[str, str]:
    """Judge the ratio of times, measured on a GPU as the published ones are, at the context nearest to `tokens`."""
    at = min(set(mine["context_tokens"]), key=lambda n: (abs(math.log(n / tokens)), n))
    got = _of_median(over_seeds(mine[mine["context_tokens"] == at], SPEEDUP))
    said = f"At {at:,} tokens, handed over in memory: {got.text('.3g')} times"
    if abs(at / tokens - 1) > SAME_LENGTH:
        return INCONCLUSIVE, f"{said}. It decides nothing: another length; run {run}."
    if mine["device"].iloc[0] == "cpu":
        return INCONCLUSIVE, f"{said}. It decides nothing: their times are a GPU's; run {run}."
    # A card that is no faster than re-prefilling is not the same, even within the factor.
    low, high = max(1.0, ratio / FACTOR), FACTOR * ratio
    verdict = equivalent(got, low, high)
    said += (
        " (median [95 %]; theirs is an RTX 5070 Ti laptop GPU, as a secondary digest has it); it is the same where the "
        f"whole interval lies within {low:.2f} to {high:.2f}, a factor of {FACTOR:g} (our margin)."
    )
    return verdict, said + f" {MORE}" * (verdict == INCONCLUSIVE)


def _of_median(got: Value) -> Value:
    """The value with the 95 % interval of a median of n repeats, estimated from its quartiles.

    A normal median has 1.2533 standard deviations / sqrt(n) of error, and 1.349 of them between quartiles.
    """
    reach = 1.96 * 1.2533 / 1.349 * (got.high - got.low) / math.sqrt(got.n)
    return replace(got, low=got.value - reach, high=got.value + reach)


def _sooner(mine: pd.DataFrame) -> tuple[str, str]:
    """Judge by quartiles, at the longest context, whether cards are faster by every route."""
    at = mine["context_tokens"].max()
    got = _speedups(mine, at)
    verdict = decided(all(v.low > 1 for v in got.values()), all(v.high < 1 for v in got.values()))
    said = f"At {at:,} tokens, by route: {_said(got)} times faster (median [quartiles])."
    return verdict, said + f" {MORE}" * (verdict == INCONCLUSIVE)


def _grows(mine: pd.DataFrame) -> tuple[str, str]:
    """Judge by quartiles whether every route gains more at the longest context than at the shortest."""
    least, most = mine["context_tokens"].min(), mine["context_tokens"].max()
    if least == most:
        run = "run experiment=handoff_ttft with several (context=)"
        return NOT_MEASURED, f"One context was run; {run}."
    first, last = _speedups(mine, least), _speedups(mine, most)
    pairs = [(first[name], last[name]) for name in first if name in last]
    gains = bool(pairs) and all(b.low > a.high for a, b in pairs)
    loses = bool(pairs) and all(b.high < a.low for a, b in pairs)
    return _by_quartiles(
        gains,
        loses,
        f"By route, from {least:,} tokens: {_said(first)} times faster; to {most:,}: {_said(last)} "
        "(median [quartiles]).",
    )


def _by_quartiles(holds: bool, fails: bool, said: str) -> tuple[str, str]:
    verdict = decided(holds, fails)
    return verdict, said + f" The quartiles overlap. {MORE}" * (verdict == INCONCLUSIVE)


def _speedups(mine: pd.DataFrame, tokens: int) -> dict[str, Value]:
    """Speedup over re-prefill by route."""
    at = mine[mine["context_tokens"] == tokens]
    return {route: over_seeds(of, SPEEDUP) for route, of in at.groupby("route", sort=False)}


def _said(got: dict[str, Value]) -> str:
    return ", ".join(f"{name} {v.text('.3g')}" for name, v in got.items())


def _mostly_forward(mine: pd.DataFrame) -> tuple[str, str]:
    """Judge by quartiles whether the first forward pass takes longer than every other published stage."""
    at = mine["context_tokens"].max()
    mine = _as_published(mine[mine["context_tokens"] == at])
    took = {name: _sum_of(mine, ours) for name, ours in HOLDS.items() if name != "ttft"}
    if any(v.value is None for v in took.values()):
        return NOT_MEASURED, "No card was handed over in memory; run experiment=handoff_stages."
    each = ", ".join(f"{name} {v.value:.3g} ms" for name, v in took.items())
    forward = took.pop("generate")
    return _by_quartiles(
        all(forward.low > other.high for other in took.values()),
        any(forward.high < other.low for other in took.values()),
        f"Medians at {at:,} tokens, in memory: {each}.",
    )


def _sum_of(mine: pd.DataFrame, stages: Sequence[str]) -> Value:
    """The median of a published stage, which holds these stages of ours, summed in each repeat."""
    repeats = ["seed", "cell", "created_at", "metric", "sample"]
    held = mine[mine["stage"].isin(stages)]
    summed = held.groupby(repeats, as_index=False, dropna=False)["value"].sum()
    return over_seeds(summed, Measure("time", reduce=median).of)


TABLES = {"handoff_ttft": table, "handoff_stages": stages_table}
FIGURES = {"handoff_ttft": figure, "handoff_stages": stages_figure}
CLAIMS = claims
