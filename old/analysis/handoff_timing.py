"""QKVShare's tables on time: time to first token with what it costs in quality, and its stages.

Each takes the tidy rows and returns a table, or None where nothing of it was measured.
"""

from collections.abc import Iterator

import pandas as pd
from analysis.counterpart import HOLDS
from analysis.handoff_reduce import (
    SETTING,
    average,
    bits_text,
    ordered,
    run_text,
    value,
    warned,
    with_budget,
)
from analysis.reduce import Value, describe

from analysis import published
from analysis.render import Column, Row, Table, compact, fixed, keys

STAGES = ("create", "serialize", "transfer", "verify", "dequantize", "inject", "first_forward")
QUALITY = ("mean_bits", "kl_mean", "perplexity_delta")


def handoff_ttft(rows: pd.DataFrame) -> Table | None:
    """Time to first token by route, published and measured, and what each route costs in quality."""
    rows = rows[rows["experiment"] == "handoff_ttft"]
    found = rows[rows["metric"].isin(("ttft", "ttft_speedup"))]
    if found.empty:
        return None
    lines = []
    for said in published.load("qkvshare"):
        if said.metric != "ttft":
            continue
        tokens = f" ({said.document_tokens} tokens)" if said.document_tokens else ""
        line = {"section": f"published on {said.model}", "policy": said.policy}
        line |= {"context": f"{said.at}{tokens}", "route": "not stated", "published": said.value}
        blank = Value(None, note="measured rows stand below, by their own routes and contexts")
        lines.append(line | dict.fromkeys(("ttft", "speedup", *QUALITY), blank))
    for line, mine in _routes(found):
        line["published"] = Value(None, note="the published routes stand above")
        line["ttft"] = warned(value(mine[mine["metric"] == "ttft"]))
        speedup = value(
            mine[mine["metric"] == "ttft_speedup"], "re-prefill is what cards are held to"
        )
        lines.append(line | {"speedup": warned(speedup)} | _quality(rows, mine.iloc[0]))
    columns = [
        *keys("context", "policy", "budget", "route"),
        Column("published", "published ms", fixed(1)),
        Column("ttft", "ms [quartiles]", fixed(0), interval=True),
        Column("kl_mean", "KL [95 %]", compact, interval=True),
        Column("mean_bits", "bits stored", fixed(2)),
        Column("speedup", "times faster [quartiles]", fixed(2), interval=True),
        Column("perplexity_delta", "\u0394ppl % [95 %]", fixed(2, "+"), interval=True),
    ]
    caption = (
        "Time to first token, one model, dtype and runtime for all routes; a card's time starts with the "
        "sender's cache in memory and holds its creation, as the published total does. Median and "
        "quartiles of repeats in which the routes take turns. Beside it what the receiver loses: stored bits per "
        "cached value, all metadata counted, KL divergence (nats) and perplexity of the text after the "
        "context, read after the card, against the uncompressed cache; in float32, whatever the times' dtype. "
        f"{describe(found)}"
    )
    return Table("handoff_ttft", caption, columns, lines)


def _quality(rows: pd.DataFrame, route: pd.Series) -> dict[str, Value]:
    """Bits, KL divergence and perplexity of a route's card and reader, in which transport plays no part."""
    if route["protocol"] == "text":
        exact = Value(None, note="the receiver reads the text itself: nothing is lost")
        return dict.fromkeys(QUALITY, exact)
    same = [
        *(name for name in SETTING if name != "dtype"),
        "document",
        "context_tokens",
        "policy",
        "reader",
    ]
    mine = rows[(rows[same] == route[same]).all(axis=1)]
    bits = None if pd.isna(route["budget_bits"]) else route["budget_bits"]
    mine = mine[with_budget(mine, bits)]
    return {name: value(mine[mine["metric"] == name]) for name in QUALITY}


def handoff_stages(rows: pd.DataFrame) -> Table | None:
    """Where the time goes: the stages, and how nearly they add up to the total."""
    found = rows[rows["metric"].str.match(r"(stage|share)_")]
    if found.empty:
        return None
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
        absent = "this route has no such stage"
        took = {n: value(mine[mine["metric"] == f"stage_{n}"], absent) for n in STAGES}
        line |= took | {"total": warned(value(mine[mine["metric"] == "stage_total"]))}
        summed = sum(v.value for v in took.values() if v.value is not None)
        line["adds_up"] = Value(100 * summed / line["total"].value)
        lines.append(line)
    columns = [
        *keys("context", "policy", "budget", "route"),
        *(Column(name, name.replace("_", " "), fixed(2)) for name in STAGES),
        Column("total", "total", fixed(2)),
        Column("adds_up", "sum / total %", fixed(1)),
    ]
    caption = (
        f"Milliseconds by stage, {average(found)} over repeats. The total is timed on its own; the published "
        "create, inject and generate stand under create, dequantize (which theirs holds) and first forward. "
        f"{describe(found)}"
    )
    return Table("handoff_stages", caption, columns, lines)


def _routes(found: pd.DataFrame) -> Iterator[tuple[Row, pd.DataFrame]]:
    """What was measured, by run, context and route: the line that names it, and its rows."""
    route = [*SETTING, "document", "context_tokens", "policy", "budget_bits", "protocol"]
    for key, mine in ordered(found).groupby(route, dropna=False, sort=False):
        named = dict(zip(route, key, strict=True))
        read = f", {named['document']}" if named["document"] else ""
        line = {"section": f"measured on {run_text(named)}{read}", "policy": named["policy"]}
        line |= {"context": f"{named['context_tokens']:,.0f}", "route": named["protocol"]}
        yield line | {"budget": bits_text(named["budget_bits"])}, mine
