"""QKVShare's claims: time to first token and where it goes here, answers over handoffs in relay_claims."""

from collections.abc import Sequence
from functools import partial

import pandas as pd

from analysis import published, relay_claims
from analysis.counterpart import HOLDS
from analysis.handoff_reduce import value
from analysis.published import SAME_LENGTH, Figure
from analysis.reduce import Value
from analysis.relay_claims import CARD, DIGEST, each_run
from analysis.verdict import NO, OPEN, YES, Claim, with_interval


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
        times = f"{slow.value.value:g} to {fast.value.value:g} ms at {label} on {fast.model}"
        claim = f"a card takes the time to first token from {times}, {ratio:.2f} times sooner"
        own = [published.same_model(fast.model, name) for name in speed["model"]]
        near = (speed["context_tokens"] / tokens - 1).abs() <= SAME_LENGTH
        model = fast.model.removesuffix("-instruct")
        run = f"experiment=handoff_ttft model={model} context={tokens}"
        mine = speed[pd.Series(own, speed.index, bool) & near]
        found += each_run(
            claim, f"{run}, on a GPU for times like theirs", mine, partial(_level, ratio)
        )
    return found


def _level(ratio: float, mine: pd.DataFrame) -> tuple[str, str]:
    """Milliseconds belong to a device that is not stated: the ratio is judged."""
    got = _routes(mine)
    inside = any(v.low is not None and v.low <= ratio <= v.high for v in got.values())
    return YES if inside else NO, f"Measured, by route: {_said(got)} times (median [quartiles])."


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
    said = f"Means at {at:,.0f} tokens, in memory: {', '.join(parts)}."
    (low, high), others = ends["generate"], [e for name, e in ends.items() if name != "generate"]
    if all(low > other[1] for other in others):
        return YES, said
    if any(high < other[0] for other in others):
        return NO, said
    return OPEN, said + " The quartiles overlap; more repeats (repeats=) would tell."
