"""From samples to numbers: means with intervals, medians, rates, and tests between pairs of recipes.

Every interval and test of the project is computed here from rows; polykv/evaluation/statistics.py has the formulas.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from polykv.evaluation.statistics import (
    MIN_DOCUMENTS,
    PairedRatio,
    document_interval,
    holm,
    paired_ratio,
    skewed_interval,
    wilson,
)

BASELINE = "full"
LARGEST_EXPONENT = 700  # e**700 is 1e304, a hundredfold of which still is a float
DOCUMENTS, BLOCKS = "documents", "blocks of tokens"
ALPHA = 0.05
FEW = 3  # documents below which no pair is tested


@dataclass(frozen=True)
class Value:
    """A number with its interval, or None with the reason in `note` (else `note` is a remark).

    Attributes:
        n: observations behind it: tokens, answers, problems or repeats.
        over: what the interval's sample is: documents, blocks of tokens, problems, quartiles of repeats.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""
    n: int | None = None
    over: str = ""

    def map(self, form: Callable[[float], float]) -> "Value":
        """The value and its ends under a monotone function; an interval stays in order."""
        if self.value is None:
            return self
        ends = sorted(form(end) for end in (self.low, self.high) if end is not None)
        low, high = ends if len(ends) == 2 else (None, None)
        return replace(self, value=form(self.value), low=low, high=high)

    def text(self, form: str) -> str:
        """`0.5 [0.4, 0.6]`, or the value alone where it has no interval."""
        if self.low is None or self.high is None:
            return f"{self.value:{form}}"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


UNMEASURED = Value(None, note="not measured")
Reduce = Callable[[pd.DataFrame], Value]
# The columns that a Reduce may read: to select all forty of them in each of thousands of figures takes seconds.
READ = (
    "cell", "created_at", "seed", "sample", "text", "block", "agent", "scorer", "statistic", "n", "value", "note",
)  # fmt: skip


def of_present(reduce: Callable[..., Value]) -> Callable[..., Value]:
    """Wrap `reduce`: no rows give "not measured", and a missing value gives its reason."""

    @functools.wraps(reduce)
    def checked(rows: pd.DataFrame, *arguments: Any) -> Value:
        if rows.empty:
            return UNMEASURED
        missing = rows["value"].isna()
        if missing.any():
            return Value(None, note=rows.loc[missing, "note"].iloc[0])
        return reduce(rows, *arguments)

    return checked


def once_per_frame(function: Callable[[pd.DataFrame], Any]) -> Callable[[pd.DataFrame], Any]:
    """Wrap `function`, which answers from memory if it is asked about the same frame again.

    The tables and figures of one folder share their comparisons, which take seconds. Rows are never changed in place.
    """
    # The frame itself, so that no other can take its place in memory; and what the function returned.
    last: list[Any] = [None, None]

    @functools.wraps(function)
    def remembered(rows: pd.DataFrame) -> Any:
        if last[0] is not rows:
            last[:] = rows, function(rows)
        return last[1]

    return remembered


def whole_samples(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of whole documents, answers or repeats: no blocks of tokens, no statistics over several documents."""
    whole = np.ones(len(rows), bool)
    for column in ("block", "statistic"):
        if column in rows:
            whole &= (rows[column].isna() | (rows[column] == "")).to_numpy(bool)
    return rows if whole.all() else rows[whole]


def documents(rows: pd.DataFrame) -> pd.Series:
    """The document of each row: its text; where that is unknown, its place among those of its seed."""
    if "text" in rows and (rows["text"] != "").all():
        return rows["text"]
    place = rows["seed"].astype(str) + "/" + rows["sample"].astype(str)
    return rows["text"].where(rows["text"] != "", place) if "text" in rows else place


def by_document(rows: pd.DataFrame, *within: str) -> pd.DataFrame:
    """Mean value and tokens `n` of each document (and block or agent `within` it).

    A text that several seeds read is one document: seeds that draw only rotations add no observation, so the values
    under them are averaged (they weigh the same, as the text has the same tokens under each).
    """
    groups = rows.assign(text=documents(rows)).groupby(["text", *within], sort=False)
    return pd.DataFrame({"value": groups["value"].mean(), "n": groups["n"].max()})


def mean(rows: pd.DataFrame, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Value:
    """The mean over all tokens, from each document's mean of `n` tokens, with its interval.

    The interval's sample is the documents, or blocks of tokens where there are fewer than MIN_DOCUMENTS. A mean of
    which a document is missing is missing.
    """
    blocks = rows[rows["block"].notna()] if "block" in rows else rows[:0]
    return _mean(whole_samples(rows), blocks, bounds)


@of_present
def _mean(whole: pd.DataFrame, blocks: pd.DataFrame, bounds: tuple[float, float]) -> Value:
    found = by_document(whole)
    few = len(found) < MIN_DOCUMENTS
    units = by_document(blocks, "block") if few and "block" in blocks else found
    interval = skewed_interval(units["value"].to_numpy(float), bounds) or (None, None)
    over = (BLOCKS if few else DOCUMENTS) if interval[0] is not None else ""
    value = float(np.average(found["value"], weights=found["n"].fillna(1).to_numpy(float)))
    n = found["n"].sum() if found["n"].notna().all() else len(found)
    return Value(value, *interval, n=int(n), over=over)


@of_present
def mean_of_answers(rows: pd.DataFrame, bounds: tuple[float, float]) -> Value:
    """The mean over answers (of each document and `agent`), with an interval from MIN_DOCUMENTS answers up."""
    answers = by_document(rows, "agent")["value"]
    samples = [of.to_numpy(float) for _, of in answers.groupby(level="text", sort=False)]
    n, value = len(answers), float(answers.mean())
    if n < MIN_DOCUMENTS:
        return Value(value, note=f"no interval: {n} answers, and it takes {MIN_DOCUMENTS}", n=n)
    if len(samples) >= MIN_DOCUMENTS:
        interval = document_interval(samples, bounds) or (None, None)
        return Value(value, *interval, n=n, over=DOCUMENTS)
    interval = skewed_interval(np.concatenate(samples), bounds) or (None, None)
    about = f"{len(samples)} document{'s' * (len(samples) > 1)}"
    note = f"interval over {n} answers about {about}, taken as independent"
    return Value(value, *interval, note, n, "answers")


@of_present
def mean_of_samples(
    rows: pd.DataFrame, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Value:
    """The mean over samples (problems), each of which counts the same, with its interval."""
    values = rows["value"].to_numpy(float)
    interval = skewed_interval(values, bounds) or (None, None)
    return Value(float(values.mean()), *interval, n=len(values), over="problems")


@of_present
def plain_mean(rows: pd.DataFrame) -> Value:
    """The mean of all rows, without an interval."""
    return Value(float(rows["value"].mean()), n=len(rows))


@of_present
def rate(rows: pd.DataFrame) -> Value:
    """The share of samples that are 1, with Wilson's interval."""
    right, n = int(rows["value"].sum()), len(rows)
    return Value(right / n, *(wilson(right, n) or (None, None)), n=n, over="problems")


@of_present
def median(rows: pd.DataFrame) -> Value:
    """The median of repeats (`sample`), with quartiles as its ends."""
    low, mid, high = (float(x) for x in np.percentile(rows["value"], (25, 50, 75)))
    return Value(mid, low, high, n=len(rows), over="quartiles")


@of_present
def largest(rows: pd.DataFrame) -> Value:
    """The largest of the samples."""
    return Value(float(rows["value"].max()), n=len(rows))


def single(rows: pd.DataFrame) -> Value:
    """The last value of each cell, averaged over cells: for metrics without samples (arithmetic, bytes, statistics)."""
    last = rows.drop_duplicates("cell", keep="last")
    found = plain_mean(last)
    return found if found.value is None else Value(found.value, note=last["note"].iloc[-1])


@dataclass(frozen=True)
class Measure:
    """How a figure of a table comes from a cell's rows.

    Attributes:
        where: the columns that the rows of `metric` must have; where it names no statistic, rows have none.
        reduce: `mean`, `mean_of_answers`, `rate`, `median`, `largest` or `single`, from those rows.
        form: what is shown of it, such as `percent`.
    """

    metric: str
    where: Mapping[str, str] = field(default_factory=dict)
    reduce: Reduce = single
    form: Callable[[float], float] | None = None

    def of(self, rows: pd.DataFrame, over: Sequence[str] = ()) -> Value:
        """The figure, from the rows of one cell or of cells of one line, of which the newest counts.

        Cells that differ in the columns `over` are taken together: `["seed"]` gives a mean over the distinct
        documents of all seeds.
        """
        read = [name for name in rows if name in READ or name in self.where or name in over]
        mine = rows["metric"] == self.metric
        for column, wanted in ({"statistic": ""} | dict(self.where)).items():
            if column in rows:
                mine &= rows[column] == wanted
        found = self.reduce(newest(rows.loc[mine, read], over))
        if self.form is None or found.value is None:
            return found
        shown = found.map(self.form)
        if not math.isfinite(shown.value):
            return Value(
                None, note="the exponential of a mean log-probability leaves the range of a float"
            )
        return shown


def within(low: float, high: float, reduce: Callable[..., Value] = mean) -> Reduce:
    """`mean` or `mean_of_samples` with its interval cut to these bounds."""
    return lambda rows: reduce(rows, (low, high))


def percentage(share: float) -> float:
    """A share in percent."""
    return 100 * share


def percent(difference: float) -> float:
    """Perplexity change in percent from the difference of mean negative log-probabilities."""
    return 100 * math.expm1(difference) if abs(difference) < LARGEST_EXPONENT else math.nan


def exponential(nats: float) -> float:
    """e**x, NaN where that leaves the range of a float."""
    return math.exp(nats) if abs(nats) < LARGEST_EXPONENT else math.nan


def bits_of_ratio(ratio: float) -> float:
    """Bits per cached value from the compression ratio to fp16."""
    return 16 / ratio


# What compare's rows give; further measures stand with the study that shows them.
QUALITY: Mapping[str, Measure] = {
    "perplexity": Measure("nll", reduce=mean, form=exponential),
    "perplexity_full": Measure("nll_full", reduce=mean, form=exponential),
    "perplexity_delta": Measure("nll_delta", reduce=mean, form=percent),
    "kl_mean": Measure("kl", reduce=within(0, math.inf)),
    "kl_median": Measure("kl", {"statistic": "median"}),
    "kl_p99": Measure("kl", {"statistic": "p99"}),
    "same_top1": Measure("same_top1", reduce=within(0, 1)),
    "delta_p_mean": Measure("delta_p", reduce=within(-1, 1)),
    "delta_p_rms": Measure("delta_p", {"statistic": "rms"}),
    "reader_floor_kl": Measure("reader_floor_kl", reduce=within(0, math.inf)),
    "reader_floor_delta": Measure("reader_floor_nll_delta", reduce=mean, form=percent),
    "exact_match": Measure("exact_match", reduce=rate),
    "contains": Measure("contains", reduce=rate),
    "empty_answers": Measure("empty_answer", reduce=rate),
    "bertscore_f1": Measure(
        "bertscore_f1", reduce=lambda rows: mean_of_answers(_scored(rows), (-1, 1))
    ),
    "bertscore_floor": Measure("bertscore_floor", reduce=lambda rows: plain_mean(_scored(rows))),
}
BYTES: Mapping[str, Measure] = {
    "nominal_ratio": Measure("compression_ratio", {"accounting": "nominal"}),
    "stored_ratio": Measure("compression_ratio", {"accounting": "stored"}),
    "stored_bits": Measure("compression_ratio", {"accounting": "stored"}, form=bits_of_ratio),
    "full_layers_nominal": Measure("full_layers_ratio", {"accounting": "nominal"}),
    "full_layers_stored": Measure("full_layers_ratio", {"accounting": "stored"}),
    "paper": Measure("kv_memory", {"accounting": "paper"}),
    "stored": Measure("kv_memory", {"accounting": "stored"}),
    "resident": Measure("kv_memory", {"accounting": "resident"}),
}


def rescaled(f1: Value, floor: Value) -> Value:
    """BERTScore F1 above its floor: (F1 - floor) / (1 - floor)."""
    if f1.value is None or floor.value is None:
        return f1 if f1.value is None else floor
    if floor.value > 1 - 1e-4:  # only rounding is above it
        return Value(
            None, note="mismatched answers score 1 too, so nothing can stand above the floor"
        )
    return f1.map(lambda score: (score - floor.value) / (1 - floor.value))


def _scored(rows: pd.DataFrame) -> pd.DataFrame:
    """The pairs with a score; pairs of two empty answers have none and are dropped, unless there are no others."""
    scored = rows[rows["value"].notna()]
    return rows if scored.empty else scored


def newest(rows: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of the cell measured last, for each value of the columns `by`."""
    if rows["cell"].nunique() < 2:
        return rows
    ordered = rows.sort_values("created_at", kind="stable")
    groups = [ordered[name] for name in by] or [pd.Series(0, ordered.index)]
    last = ordered["cell"].groupby(groups, dropna=False).transform("last")
    return rows[rows["cell"] == last.reindex(rows.index)]


@dataclass(frozen=True)
class Pairs:
    """A positive quantity of the same documents under several recipes, compared pair by pair: (less, more).

    Attributes:
        documents: how many all recipes have; below FEW no pair is tested.
        names: the recipes, least mean first.
        ratios: by what factor, with the smallest that would have shown at Holm's first step.
        p: of the paired t test on logarithms, Holm's correction over all pairs.
    """

    documents: int
    names: Sequence[str]
    ratios: Mapping[tuple[str, str], PairedRatio] = field(default_factory=dict)
    p: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def ties(self) -> list[tuple[str, str]]:
        """The pairs that the documents do not tell apart."""
        return [pair for pair, p in self.p.items() if p >= ALPHA]

    def below(self, name: str) -> list[str]:
        """The recipes that are significantly below this one."""
        return [less for (less, more), p in self.p.items() if more == name and p < ALPHA]

    def above(self, name: str) -> list[str]:
        """The recipes that are significantly above this one."""
        return [more for (less, more), p in self.p.items() if less == name and p < ALPHA]


def pairs_of(values: pd.Series) -> Pairs:
    """Recipes compared pair by pair.

    Args:
        values: by document and, in the last level, recipe. Documents that a recipe lacks are left out, and those
            whose value has no logarithm.
    """
    wide = values[values > 0].unstack().dropna()
    names = sorted(wide.columns, key=lambda name: wide[name].mean())
    pairs = list(combinations(names, 2))
    if len(wide) < FEW or not pairs:
        return Pairs(len(wide), names)
    ratios = {
        (less, more): paired_ratio(wide[more], wide[less], ALPHA / len(pairs))
        for less, more in pairs
    }
    p = holm([found.p for found in ratios.values()])
    return Pairs(len(wide), names, ratios, dict(zip(ratios, p, strict=True)))


def samples_of(rows: pd.DataFrame, metric: str, by: Sequence[str]) -> pd.Series:
    """Values of `metric` by `by` and document (`by_document`), the newest cell's; no blocks, no statistics."""
    mine = whole_samples(rows[(rows["metric"] == metric) & rows["sample"].notna()])
    place = list(dict.fromkeys([*by, "seed", "sample"]))
    mine = mine.sort_values("created_at", kind="stable").drop_duplicates(place, keep="last")
    mine = mine.assign(text=documents(mine))
    return mine.groupby([*by, "text"], dropna=False, sort=False)["value"].mean()
