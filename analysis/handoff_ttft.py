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
from analysis.catalog import (
    INCONCLUSIVE,
    NOT_MEASURED,
    Claim,
    decided,
    equivalent,
)
from analysis.load import swept
from analysis.points import IN_PLACE, RUN, bits_text, counted, named, ordered, over_seeds, run_text
from analysis.published import HOLDS, SAME_LENGTH, Figure, with_budget
from analysis.render import Column, Row, Table, compact, describe, fixed, keys, settings_columns
from analysis.statistics import QUALITY, Measure, Value, median
from polykv.evaluation.statistics import spread_warning

STAGES = ("create", "serialize", "transfer", "verify", "dequantize", "inject", "first_forward")
TEXT, MEMORY = "text", "memory"
TRANSPORTS = {MEMORY: "card in memory", "file": "card through a file"}
SUFFIX = f", {style.READERS[IN_PLACE][0]}"
WHISKER = "0.35"
ROUTE = ["policy", "budget_bits", "transport", "reader", "backend"]
TIMES = {name: Measure("time", {"stage": name}, median) for name in (*STAGES, "total")}
SPEEDUP = Measure("speedup", reduce=median)
LOSSES = {"mean_bits": Measure("mean_bits")} | {
    name: QUALITY[name] for name in ("kl_mean", "perplexity_delta")
}
EXACT = Value(None, note="the receiver reads the text itself: nothing is lost")
CARD = "topology"  # the policy of a QKVShare card
FACTOR = 1.25  # ratios of times within it are the same: our choice, none is published
MORE = "More repeats (repeats=) would tell"


def timed(rows: pd.DataFrame) -> pd.DataFrame:
    """The times in order, with `speedup` rows: re-prefill's time over the card's in each repeat.

    Re-prefill is that of the same cell and repeat, one after the other, so that a busy machine slows both.
    """
    times = rows[rows["metric"] == "time"]
    total = times[times["stage"] == "total"]
    text, cards = (total[(total["transport"] == TEXT) == is_text] for is_text in (True, False))
    text = text[["cell", "sample", "value"]].rename(columns={"value": "_text"})
    gains = cards.merge(text, on=["cell", "sample"])
    gains = gains.assign(metric="speedup", unit="x", value=gains.pop("_text") / gains["value"])
    found = ordered(pd.concat([times, gains]) if len(gains) else times)
    route = found["transport"] + np.where(found["reader"] == IN_PLACE, SUFFIX, "")
    if found.loc[found["transport"] != TEXT, "backend"].nunique() > 1:
        route += np.where(found["transport"] == TEXT, "", ", " + found["backend"])
    return found.assign(route=route)


def _routes(found: pd.DataFrame) -> Iterator[tuple[Row, pd.DataFrame]]:
    """(line that names it, rows) for each run, context and route that was timed."""
    about = [*RUN, "document", "context_tokens", *ROUTE, *swept(found)]
    for key, mine in found.groupby(about, dropna=False, sort=False):
        line = named(about, key)
        read = f", {line['document']}" if line["document"] else ""
        line |= {"section": f"measured on {run_text(line)}{read}", "route": mine["route"].iloc[0]}
        line["context"] = f"{line['context_tokens']:,}"
        yield line | {"budget": bits_text(line["budget_bits"])}, mine


def _warned(timing: Value) -> Value:
    """The timing, with a footnote where its quartiles are so far apart that the machine was busy."""
    notes = (timing.note, spread_warning(timing.low, timing.high))
    return replace(timing, note="; ".join(filter(None, notes)))


def table(rows: pd.DataFrame) -> Table:
    """Time to first token by route, published and measured, and what each route costs in quality."""
    found, lines = timed(rows), []
    blank = Value(None, note="measured rows stand below, by their own routes and contexts")
    for said in (said for said in published.load("qkvshare") if said.metric == "ttft"):
        tokens = f" ({said.document_tokens} tokens)" if said.document_tokens else ""
        line = {"section": f"published on {said.model}", "policy": said.policy}
        line |= {"context": f"{said.at}{tokens}", "route": "not stated", "published": said.value}
        lines.append(line | dict.fromkeys(("ttft", "speedup", *LOSSES), blank))
    for line, mine in _routes(found):
        line["published"] = Value(None, note="the published routes stand above")
        line["ttft"] = _warned(over_seeds(mine, TIMES["total"].of))
        if line["transport"] == TEXT:
            line["speedup"] = Value(None, note="re-prefill is what cards are held to")
            line |= dict.fromkeys(LOSSES, EXACT)
        else:
            line["speedup"] = _warned(over_seeds(mine, SPEEDUP.of))
            line |= _losses(rows, mine)
        lines.append(line)
    columns = [
        *keys("context", "policy", "budget", "route"),
        *settings_columns(found),
        Column("published", "published ms", fixed(1)),
        Column("ttft", "ms [quartiles]", fixed(0), interval=True),
        Column("kl_mean", "KL [95 %]", compact, interval=True),
        Column("mean_bits", "bits stored", fixed(2)),
        Column("speedup", "times faster [quartiles]", fixed(2), interval=True),
        Column("perplexity_delta", "\u0394ppl % [95 %]", fixed(2, "+"), interval=True),
    ]
    explained = (
        "A card's time starts with the sender's cache in memory and holds its creation, as the published total does. "
        "Median and quartiles of repeats in which the routes take turns; times faster: of re-prefill and card in the "
        "same repeat. KL divergence (nats) and perplexity are of the text after the context, read after the card, "
        "against the uncompressed cache read alike, in float32 whatever the times' dtype; bits: stored per cached "
        "value, all metadata counted"
    )
    caption = (
        f"Time to first token, one model, dtype and runtime for all routes. {_describe(found)}"
    )
    return Table("handoff_ttft", caption, columns, lines, explained)


def _losses(rows: pd.DataFrame, mine: pd.DataFrame) -> dict[str, Value]:
    """Bits, KL divergence and perplexity of a route's card and reader; they do not depend on the transport."""
    same = rows["cell"].isin(mine["cell"])
    for name in ("policy", "reader"):
        same &= rows[name] == mine[name].iloc[0]
    return {name: over_seeds(rows[same], measure.of) for name, measure in LOSSES.items()}


def _describe(found: pd.DataFrame) -> str:
    return describe(counted(found[found["metric"] == "time"]))


def stages_table(rows: pd.DataFrame) -> Table:
    """Milliseconds by stage, and their sum relative to the total."""
    found = timed(rows)
    lines: list[Row] = []
    said = [f for f in published.load("qkvshare") if f.table == "stages"]
    for label in dict.fromkeys(f.at for f in said):
        mine = [f for f in said if f.at == label]
        line = {"section": f"published on {mine[0].model}", "policy": "qkvshare"}
        line |= {"context": f"{label} ({mine[0].document_tokens} tokens)", "route": "not stated"}
        line |= {name: Value(None, note="not a published stage") for name in STAGES}
        line |= {HOLDS[f.metric][0]: f.value for f in mine}
        total = Value(sum(f.value.value for f in mine), note="sum of the published stages")
        lines.append(line | {"total": total, "adds_up": Value(None, note="no total was published")})
    for line, mine in _routes(found):
        took = {name: over_seeds(mine, measure.of) for name, measure in TIMES.items()}
        total = _warned(took.pop("total"))
        summed = sum(v.value for v in took.values() if v.value is not None)
        absent = Value(None, note="this route has no such stage")
        line |= {name: absent if v.value is None else v for name, v in took.items()}
        lines.append(line | {"total": total, "adds_up": Value(100 * summed / total.value)})
    columns = [
        *keys("context", "policy", "budget", "route"),
        *settings_columns(found),
        *(Column(name, name.replace("_", " "), fixed(2)) for name in STAGES),
        Column("total", "total", fixed(2)),
        Column("adds_up", "sum / total %", fixed(1)),
    ]
    explained = (
        "The total is timed on its own. The published create, inject and generate stand under create, dequantize "
        "(which theirs holds) and first forward"
    )
    caption = f"Milliseconds by stage, medians over repeats. {_describe(found)}"
    return Table("handoff_stages", caption, columns, lines, explained)


Routes = dict[str, tuple[str, bool, list[tuple[int, Value]]]]  # policy, in place, times by context


@style.styled
def figure(rows: pd.DataFrame) -> style.Picture:
    """Milliseconds against context, log-log, with quartiles; published ones open, on the same model only.

    Bars of the routes where there is one context only.
    """
    found = timed(rows)
    about = [*RUN, "document", *swept(found)]
    groups = [
        (named(about, key), mine) for key, mine in found.groupby(about, dropna=False, sort=False)
    ]
    shown = [name for name in TRANSPORTS if (found["transport"] == name).any()]
    shown = shown or [MEMORY]  # nothing but re-prefill
    said = [f for f in published.load("qkvshare") if f.metric == "ttft" and not f.digest]
    beside = [[f for f in said if published.same_model(f.model, run["model"])] for run, _ in groups]
    one_context = found["context_tokens"].nunique() == 1 and not any(beside)
    n_bars = found.groupby(["policy", "route"]).ngroups / len(shown)
    height = 0.6 + 0.2 * n_bars if one_context else 2.1
    headings = [run_text(run) for run, _ in groups]
    canvas, panels = style.sheet(headings, len(shown), height, style.PAGE, share_y=True)
    for axes, (_, mine), of_model in zip(panels, groups, beside, strict=True):
        for ax, transport in zip(axes, shown, strict=True):
            routes = _by_name(mine[mine["transport"].isin((TEXT, transport))], transport)
            if one_context:
                _route_bars(ax, routes)
                ax.set_title(f"{TRANSPORTS[transport]}, {mine['context_tokens'].iloc[0]:,} tokens")
            else:
                _route_lines(ax, routes, of_model)
                ax.set_title(TRANSPORTS[transport])
        if not one_context:
            axes[0].set_ylabel("time to first token, ms")
    models = dict.fromkeys(f.model for of_model in beside for f in of_model)
    more = "Published figures are of other models: not drawn, but in table published_qkvshare"
    return style.picture(
        canvas if one_context else style.legend(canvas),
        "Median time to first token by route",
        _describe(found),
        style.Marks(
            panels=True,
            bars="quartiles",
            dashed="the card is read in place, not decoded into a cache first",
            more=f"Open markers: published, on {' and '.join(models)}" if models else more,
        ),
    )


def _by_name(mine: pd.DataFrame, transport: str) -> Routes:
    """Times by route name: the policy, the reader where it is in place, and the backend if there are several."""
    found: Routes = {}
    for (policy, route), part in mine.groupby(["policy", "route"], sort=False):
        spots = [
            (int(n), over_seeds(of, TIMES["total"].of)) for n, of in part.groupby("context_tokens")
        ]
        how = (part["reader"] == IN_PLACE).any()
        found[policy + route.removeprefix(TEXT).removeprefix(transport)] = policy, how, spots
    return found


def _route_lines(ax: Axes, routes: Routes, said: Sequence[Figure]) -> None:
    for f in said:
        ax.plot(
            f.label_tokens,
            f.value.value,
            "s",
            color=style.policy_colour(f.controller[0]),
            **style.OPEN,
        )
    for name, (policy, in_place, spots) in routes.items():
        values = [v for _, v in spots]
        ax.errorbar(
            [n for n, _ in spots], [v.value for v in values], yerr=style.reaches(values), marker="o",
            markersize=3.5, color=style.policy_colour(policy), label=name, **(style.READ_IN_PLACE if in_place else {}),
        )  # fmt: skip
    ax.set_xscale("log", base=2)
    style.plain_log(ax)
    contexts = {n for _, _, spots in routes.values() for n, _ in spots}
    style.number_ticks(ax, {*contexts, *(f.label_tokens for f in said)})
    ax.set_xlabel("context, tokens")


def _route_bars(ax: Axes, routes: Routes) -> None:
    values = [spots[0][1] for _, _, spots in routes.values()]
    bars = ax.barh(
        range(len(routes)), [v.value for v in values], xerr=style.reaches(values), height=0.7,
        color=[style.policy_colour(policy) for policy, _, _ in routes.values()], ecolor=WHISKER,
    )  # fmt: skip
    texts = [f"{v.value:,.0f}" if v.value >= 100 else f"{v.value:.3g}" for v in values]
    ax.bar_label(bars, texts, padding=3, fontsize=style.SIZE)
    _bar_names(ax, list(routes))
    ax.margins(x=0.12)
    ax.set_xlabel("time to first token, ms")


def _bar_names(ax: Axes, names: Sequence[str]) -> None:
    """A name beside each horizontal bar, the first on top, and a grid of values only."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_axisbelow(True)
    ax.grid(axis="x")
    ax.grid(axis="y", visible=False)


@style.styled
def stages_figure(rows: pd.DataFrame) -> style.Picture | str:
    """Milliseconds by stage, stacked, one bar a route, with the total's quartiles; a panel per context."""
    found = timed(rows)
    found = found[found["transport"] != TEXT]
    if found.empty:
        return "no card was timed"
    about = [*RUN, "document", *swept(found)]
    groups = list(found.groupby(about, dropna=False, sort=False))
    across = max(part["context_tokens"].nunique() for _, part in groups)
    height = 0.6 + 0.15 * found.groupby(["policy", "route"]).ngroups
    canvas, panels = style.sheet([run_text(named(about, key)) for key, _ in groups], across, height)
    tints = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for axes, (_, mine) in zip(panels, groups, strict=True):
        contexts = list(mine.groupby("context_tokens"))
        for ax, (tokens, part) in zip(axes, contexts, strict=False):
            _stacked(ax, part, tints)
            ax.set_title(f"{tokens:,} tokens")
        for ax in axes[1 : len(contexts)]:
            ax.set_yticklabels([])
        for ax in axes[len(contexts) :]:
            ax.remove()
    return style.picture(
        style.legend(canvas),
        "Where a card's time to first token goes: medians of the stages",
        _describe(found),
        style.Marks(
            lines="Shown",
            more="The published stages, in table published_qkvshare, hold: create; dequantize and inject; first "
            "forward.",
        ),
    )


def _stacked(ax: Axes, mine: pd.DataFrame, tints: Sequence[str]) -> None:
    bars = dict(list(mine.groupby(["policy", "route"], sort=False)))
    left = np.zeros(len(bars))
    for stage, tint in zip(STAGES, tints, strict=True):
        widths = [over_seeds(of, TIMES[stage].of).value or 0 for of in bars.values()]
        if any(widths):
            look = {"color": tint, "label": stage.replace("_", " ")}
            ax.barh(range(len(bars)), widths, left=left, **look)
        left += widths
    for height, of in enumerate(bars.values()):
        total = over_seeds(of, TIMES["total"].of)
        at = [total.low, total.high], [height, height]
        ax.plot(*at, "|-", color=WHISKER, linewidth=0.8, label="total, quartiles")
    _bar_names(ax, [f"{policy}, {route}" for policy, route in bars])
    ax.set_xlabel("ms, medians")


def claims(rows: pd.DataFrame) -> list[Claim]:
    """One claim per run (weights, device) that was timed, or the command that would measure it."""
    found = timed(rows) if len(rows) else rows
    if len(found):
        found = found[found["policy"] == CARD]
    run = "experiment=handoff_ttft"
    mostly = "a card's time to first token is mostly the receiver's forward pass"
    mostly += ", as a secondary digest of the paper has it"
    return [
        *_levels(found),
        *published.judged_runs("ttft", "a card reaches its first token sooner than re-prefilling", run, found, _sooner),
        *published.judged_runs("ttft", "the longer the context, the more a card gains", run, found, _grows),
        *published.judged_runs("stages", mostly, "experiment=handoff_stages", found, _mostly_forward),
    ]  # fmt: skip


def _levels(found: pd.DataFrame) -> list[Claim]:
    """The abstract's times, as the ratio of re-prefilling to a card, on the published model only.

    The card is handed over in memory and decoded into a cache, as published: a route named before any is timed.
    """
    said = [f for f in published.load("qkvshare") if f.metric == "ttft" and not f.digest]
    by_label = {(f.at, f.policy): f for f in said}
    judged = []
    for label in dict.fromkeys(f.at for f in said):
        slow, fast = by_label[label, "reprefill"], by_label[label, "qkvshare"]
        ratio, tokens = slow.value.value / fast.value.value, fast.label_tokens
        place = f"{label} (which is {tokens:,} tokens by published.csv) on {fast.model}"
        times = f"{slow.value.value:g} to {fast.value.value:g} ms at {place}"
        claim = f"a card takes the time to first token from {times}, {ratio:.2f} times faster"
        mine = found
        if len(found):
            own = found["model"].map(partial(published.same_model, fast.model)).astype(bool)
            mine = _as_published(found[own & with_budget(found, fast.controller[1])])
        model = fast.model.removesuffix("-instruct")
        run = f"experiment=handoff_ttft model={model} context={tokens}, on a GPU"
        judged += published.judged_runs(
            "ttft", claim, run, mine, partial(_level, ratio, tokens, run)
        )
    return judged


def _as_published(found: pd.DataFrame) -> pd.DataFrame:
    return found[(found["transport"] == MEMORY) & (found["reader"] != IN_PLACE)]


def _level(ratio: float, tokens: int, run: str, mine: pd.DataFrame) -> tuple[str, str]:
    """Judge the ratio of times, on a GPU only: the paper does not state its device, so milliseconds do not compare."""
    at = min(set(mine["context_tokens"]), key=lambda n: (abs(math.log(n / tokens)), n))
    got = _of_median(over_seeds(mine[mine["context_tokens"] == at], SPEEDUP.of))
    said = f"At {at:,} tokens, handed over in memory: {got.text('.3g')} times"
    if abs(at / tokens - 1) > SAME_LENGTH:
        return INCONCLUSIVE, f"{said}. It decides nothing: another length; run {run}."
    if mine["device"].iloc[0] == "cpu":
        return INCONCLUSIVE, f"{said}. It decides nothing: their times are a GPU's; run {run}."
    # What is not sooner at all is not the same, however near.
    low, high = max(1.0, ratio / FACTOR), FACTOR * ratio
    verdict = equivalent(got, low, high)
    more = f" {MORE}." * (verdict == INCONCLUSIVE)
    return verdict, (
        f"{said} (median [95 %]; their GPU is not stated); it is the same where the whole interval lies within "
        f"{low:.2f} to {high:.2f}, a factor of {FACTOR:g} (our margin).{more}"
    )


def _of_median(got: Value) -> Value:
    """The value with the 95 % interval of a median of n repeats, estimated from its quartiles.

    A normal median has 1.2533 standard deviations / sqrt(n) of error, and 1.349 of them between quartiles.
    """
    reach = 1.96 * 1.2533 / 1.349 * (got.high - got.low) / math.sqrt(got.n)
    return replace(got, low=got.value - reach, high=got.value + reach)


def _sooner(mine: pd.DataFrame) -> tuple[str, str]:
    at = mine["context_tokens"].max()
    got = _speedups(mine, at)
    said = f"At {at:,} tokens, by route: {_said(got)} times faster (median [quartiles])."
    sooner, later = (all(v.low > 1 for v in got.values()), all(v.high < 1 for v in got.values()))
    verdict = decided(sooner, later)
    return verdict, said + f" {MORE}." * (verdict == INCONCLUSIVE)


def _grows(mine: pd.DataFrame) -> tuple[str, str]:
    contexts = sorted(set(mine["context_tokens"]))
    if len(contexts) < 2:
        return (
            NOT_MEASURED,
            "One context was run; run experiment=handoff_ttft with several (context=).",
        )
    first, last = (_speedups(mine, n) for n in (contexts[0], contexts[-1]))
    pairs = [(first[name], last[name]) for name in first if name in last]
    said = (
        f"By route, from {contexts[0]:,} tokens: {_said(first)} times faster; to {contexts[-1]:,}: {_said(last)} "
        "(median [quartiles])."
    )
    gains = bool(pairs) and all(b.low > a.high for a, b in pairs)
    loses = bool(pairs) and all(b.high < a.low for a, b in pairs)
    return _by_quartiles(gains, loses, said)


def _by_quartiles(holds: bool, fails: bool, said: str) -> tuple[str, str]:
    verdict = decided(holds, fails)
    return verdict, said + f" The quartiles overlap. {MORE}." * (verdict == INCONCLUSIVE)


def _speedups(mine: pd.DataFrame, tokens: int) -> dict[str, Value]:
    """Speedup over re-prefill by route."""
    at = mine[mine["context_tokens"] == tokens]
    return {route: over_seeds(of, SPEEDUP.of) for route, of in at.groupby("route", sort=False)}


def _said(got: dict[str, Value]) -> str:
    return ", ".join(f"{name} {v.text('.3g')}" for name, v in got.items())


def _mostly_forward(mine: pd.DataFrame) -> tuple[str, str]:
    """Compare quartiles of the published stages; where one joins two of ours, they are summed in each repeat."""
    at = mine["context_tokens"].max()
    mine = _as_published(mine[mine["context_tokens"] == at])
    took = {name: _sum_of(mine, ours) for name, ours in HOLDS.items() if name != "ttft"}
    if any(v.value is None for v in took.values()):
        return NOT_MEASURED, "No card was handed over in memory; run experiment=handoff_stages."
    each = ", ".join(f"{name} {v.value:.3g} ms" for name, v in took.items())
    said = f"Medians at {at:,} tokens, in memory: {each}."
    forward = took.pop("generate")
    most = all(forward.low > other.high for other in took.values())
    return _by_quartiles(most, any(forward.high < other.low for other in took.values()), said)


def _sum_of(mine: pd.DataFrame, stages: Sequence[str]) -> Value:
    held = mine[mine["stage"].isin(stages)]
    repeats = ["seed", "cell", "created_at", "metric", "sample"]
    summed = held.groupby(repeats, as_index=False, dropna=False)["value"].sum()
    return over_seeds(summed, Measure("time", reduce=median).of)


TABLES = {"handoff_ttft": table, "handoff_stages": stages_table}
FIGURES = {"handoff_ttft": figure, "handoff_stages": stages_figure}
CLAIMS = claims
