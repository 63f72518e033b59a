"""Every published figure beside its measured counterpart, or beside the reason why there is none."""

from collections.abc import Callable, Sequence

import pandas as pd
from analysis.counterpart import (
    COMPUTED,
    EXACT,
    NEAR,
    NONE,
    OTHER,
    Counterpart,
    counterpart,
    run_name,
)
from analysis.handoff_reduce import SETTING
from analysis.published import Figure
from analysis.reduce import Value, describe, points

from analysis import published
from analysis.render import Column, Row, Table, fixed, keys, memory

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
# The metrics that answer each paper's figures.
ANSWERING = {
    "polykv": r"(kv_memory|compression_ratio|perplexity|perplexity_delta|bertscore_f1)$",
    "qkvshare": r"(accuracy|ttft)$|stage_",
}
TIMES = ("ttft", "stages")  # these are divided, all else is subtracted
MATCHES = (
    f"{EXACT}: the published setting; {NEAR}: the same model, in another setting; {OTHER}: another model, "
    f"for orientation only, not compared; {COMPUTED}: by the arithmetic of the published figure, "
    "nothing was measured"
)


def published_polykv(rows: pd.DataFrame) -> Table:
    """PolyKV's figures."""
    caption = (
        "Every figure that PolyKV publishes, beside what was measured or computed here, or the reason why nothing "
        "was. GB as in the paper's own accounting: fp32, the prefilled part of the document only"
    )
    return _table("polykv", caption, rows)


def published_qkvshare(rows: pd.DataFrame) -> Table:
    """QKVShare's figures."""
    caption = (
        "Every figure of QKVShare that we know, beside what was measured here, or the reason why nothing was. "
        "Its device is not stated; its 1K, 4K and 8K are read as the 476, 1,939 and 3,877 tokens that the digest "
        "gives them (whose stages at 8K add up to the abstract's time); its hops are read as handoffs, its Q4 "
        "and Q8 as budgets of 4 and 8 bits of every byte stored"
    )
    return _table("qkvshare", caption, rows)


PUBLISHED_TABLES: dict[str, Callable[[pd.DataFrame], Table]] = {
    table.__name__: table for table in (published_polykv, published_qkvshare)
}


def _table(paper: str, caption: str, rows: pd.DataFrame) -> Table:
    figures = published.load(paper)
    reduced = points(rows)
    columns = [
        *keys("setting", "policy", "metric", "unit"),
        Column("published", "published", _digits),
        Column("ours", "here [95 %]", _digits, interval=True),
        Column("against", "against published", _against),
        Column("match", "match", key=True),
        Column("on", "on", key=True),
        Column("at", "at", key=True),
    ]
    answers = [counterpart(figure, reduced, rows) for figure in figures]
    lines = [_line(*pair) for pair in zip(figures, answers, strict=True)]
    found = sum(line["match"] in (EXACT, NEAR) for line in lines)
    computed = sum(line["match"] == COMPUTED for line in lines)
    counted = f"{found} measured on the published model" + f", {computed} computed" * bool(computed)
    digest = sum(figure.digest for figure in figures)
    secondary = f", {digest} of them taken from a secondary digest of the paper" if digest else ""
    measured = [answer for answer in answers if answer.match != COMPUTED]
    origin = describe(_of(rows, paper, measured))
    if not any(answer.on for answer in measured):
        origin = describe(_of(rows, paper, answers), "Computed for")
    text = (
        f"{caption}. {len(lines)} figures{secondary}; {counted}. {MATCHES}. Intervals of "
        f"times are quartiles. {origin}"
    )
    return Table(f"published_{paper}", text, columns, lines)


def _of(rows: pd.DataFrame, paper: str, answers: Sequence[Counterpart]) -> pd.DataFrame:
    """The rows that answer: of these runs and metrics."""
    runs = {answer.on for answer in answers}
    rows = rows[rows["metric"].str.match(ANSWERING[paper])]
    return rows[[name in runs for name in map(run_name, *(rows[key] for key in SETTING))]]


def _line(figure: Figure, answer: Counterpart) -> Row:
    model = "any model" if figure.model == "any" else figure.model
    line = {"section": f"{figure.table}, published on {model}", "metric": figure.metric}
    line["unit"] = figure.unit
    line |= {"setting": _setting(figure), "policy": figure.policy or "any"}
    line |= {"published": figure.value, "ours": answer.value, "match": answer.match}
    absent = Value(None, note=answer.value.note)
    line |= {"on": answer.on or absent, "at": answer.at or absent}
    return line | {"against": _compared(figure, answer)}


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
