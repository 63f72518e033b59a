"""QKVShare's claims: time to first token and where it goes here, answers over handoffs in relay_claims."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
from analysis.counterpart import HOLDS
from analysis.handoff_reduce import average, value, with_budget
from analysis.published import SAME_LENGTH, Figure
from analysis.reduce import Value
from analysis.relay_claims import CARD, DIGEST, each_run
from analysis.verdict import NO, OPEN, YES, Claim, equivalent, with_interval

from analysis import published, relay_claims

ROUTE = "memory"  # a card handed over in memory and decoded into a cache, as published; named before any is timed
FACTOR = 1.25  # ratios of times within it are the same: our choice, none is published


def claims(rows: pd.DataFrame) -> list[Claim]:
    """One for each claim and each run (weights, device) that can tell, else one that says what would."""
    figures = published.load("qkvshare")
    speed = rows[(rows["metric"] == "ttft_speedup") & (rows["policy"] == CARD)]
    stages = rows[rows["metric"].str.startswith("stage_") & (rows["policy"] == CARD)]
    run = "experiment=handoff_ttft"
    return [
        *_levels(speed, figures),
        *each_run("a card reaches its first token sooner than re-prefilling", run, speed, _sooner),
        *each_run("the longer the context, the more a card gains", run, speed, _grows),
        *each_run(
            f"a card's time to first token is mostly the receiver's forward pass{DIGEST}",
            "experiment=handoff_stages",
            stages,
            _mostly_forward,
        ),
        *relay_claims.claims(rows, figures),
    ]


def _levels(speed: pd.DataFrame, figures: Sequence[Figure]) -> list[Claim]:
    """The abstract's times, as the ratio of re-prefilling to a card, on the published model only."""
    said = {(f.at, f.policy): f for f in figures if f.metric == "ttft" and not f.digest}
    found = []
    for label in dict.fromkeys(at for at, _ in said):
        slow, fast = said[label, "reprefill"], said[label, "qkvshare"]
        ratio, tokens = slow.value.value / fast.value.value, fast.label_tokens
        place = f"{label} (which is {tokens:,} tokens by published.csv) on {fast.model}"
        times = f"{slow.value.value:g} to {fast.value.value:g} ms at {place}"
        claim = f"a card takes the time to first token from {times}, {ratio:.2f} times sooner"
        own = [published.same_model(fast.model, name) for name in speed["model"]]
        route = (speed["protocol"] == ROUTE) & with_budget(speed, fast.controller[1])
        mine = speed[pd.Series(own, speed.index, bool) & route]
        model = fast.model.removesuffix("-instruct")
        run = f"experiment=handoff_ttft model={model} context={tokens}, on a GPU"
        found += each_run(claim, run, mine, partial(_level, ratio, tokens, run))
    return found


def _level(ratio: float, tokens: int, run: str, mine: pd.DataFrame) -> tuple[str, str]:
    """Milliseconds belong to a device that is not stated: the ratio is judged, and on a GPU only."""
    at = min(set(mine["context_tokens"]), key=lambda n: (abs(math.log(n / tokens)), n))
    mine = mine[mine["context_tokens"] == at]
    got = _of_median(value(mine), mine["n"].min())
    if got.value is None:
        return OPEN, f"Not measured: {got.note}; run {run}."
    said = f"At {at:,.0f} tokens, handed over in memory: {with_interval(got, '.3g')} times"
    if abs(at / tokens - 1) > SAME_LENGTH:
        return OPEN, f"{said}. It decides nothing: another length; run {run}."
    if mine["device"].iloc[0] == "cpu":
        return OPEN, f"{said}. It decides nothing: their times are a GPU's; run {run}."
    # What is not sooner at all is not the same, however near.
    low, high = max(1.0, ratio / FACTOR), FACTOR * ratio
    verdict = equivalent(got, low, high)
    more = "; more repeats (repeats=) would tell" if verdict == OPEN else ""
    return verdict, (
        f"{said} (median [95 %]; their GPU is not stated); it is the same where the whole interval lies within "
        f"{low:.2f} to {high:.2f}, a factor of {FACTOR:g} (our margin){more}."
    )


def _of_median(got: Value, n: float) -> Value:
    """The 95 % interval of a median of n repeats, from its quartiles: those are spread, whatever n is.

    A normal median has 1.2533 standard deviations / sqrt(n) of error, and 1.349 of them between quartiles.
    """
    if got.value is None or got.low is None or not n > 0:
        return replace(got, low=None, high=None)
    reach = 1.96 * 1.2533 / 1.349 * (got.high - got.low) / math.sqrt(n)
    return replace(got, low=got.value - reach, high=got.value + reach)


def _sooner(mine: pd.DataFrame) -> tuple[str, str]:
    at = mine["context_tokens"].max()
    got = _routes(mine[mine["context_tokens"] == at])
    said = f"At {at:,.0f} tokens, by route: {_said(got)} times sooner (median [quartiles])."
    if not got or any(v.low is None for v in got.values()):
        return OPEN, said + " Repeats would tell (repeats=10)."
    if all(v.low > 1 for v in got.values()):
        return YES, said
    if all(v.high < 1 for v in got.values()):
        return NO, said
    return OPEN, said + " More repeats (repeats=) would tell."


def _grows(mine: pd.DataFrame) -> tuple[str, str]:
    contexts = sorted(set(mine["context_tokens"]))
    if len(contexts) < 2:
        return OPEN, "One context was run; run experiment=handoff_ttft with several (context=)."
    ends = [_routes(mine[mine["context_tokens"] == n]) for n in (contexts[0], contexts[-1])]
    routes = [name for name in ends[0] if name in ends[1]]
    pairs = [(ends[0][name], ends[1][name]) for name in routes]
    said = (
        f"By route, from {contexts[0]:,.0f} tokens: {_said(ends[0])} times sooner; "
        f"to {contexts[-1]:,.0f}: {_said(ends[1])} (median [quartiles])."
    )
    if pairs and all(b.low is not None and a.high is not None and b.low > a.high for a, b in pairs):
        return YES, said
    if pairs and all(b.high is not None and a.low is not None and b.high < a.low for a, b in pairs):
        return NO, said
    return OPEN, said + " The quartiles overlap; more repeats (repeats=) would tell."


def _routes(mine: pd.DataFrame) -> dict[str, Value]:
    found = {name: value(part) for name, part in mine.groupby("protocol", sort=False)}
    return {name: v for name, v in found.items() if v.value is not None}


def _said(got: dict[str, Value]) -> str:
    return ", ".join(f"{name} {with_interval(v, '.3g')}" for name, v in got.items()) or "nothing"


def _mostly_forward(mine: pd.DataFrame) -> tuple[str, str]:
    """By the quartiles of the published stages; of one that joins two of ours they add up to a bound."""
    at = mine["context_tokens"].max()
    mine = mine[(mine["context_tokens"] == at) & (mine["protocol"] == "memory")]
    ends, parts = {}, []
    for name, ours in HOLDS.items():
        found = [value(mine[mine["metric"] == f"stage_{stage}"]) for stage in ours]
        if any(v.value is None or v.low is None for v in found):
            return OPEN, "A stage has no quartiles; run experiment=handoff_stages."
        ends[name] = sum(v.low for v in found), sum(v.high for v in found)
        parts.append(f"{name} {sum(v.value for v in found):.3g} ms")
    said = f"{average(mine).capitalize()} at {at:,.0f} tokens, in memory: {', '.join(parts)}."
    (low, high), others = ends["generate"], [e for name, e in ends.items() if name != "generate"]
    if all(low > other[1] for other in others):
        return YES, said
    if any(high < other[0] for other in others):
        return NO, said
    return OPEN, said + " The quartiles overlap; more repeats (repeats=) would tell."
