"""Reduce the rows of the frontier experiments: recipes compared pair by pair, fronts, layers, trends. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from analysis.apart import told_by
from analysis.reduce import BASELINE, Value
from scipy import stats

from polykv.evaluation.statistics import MIN_DOCUMENTS, document_interval, holm, paired_p

EXPERIMENTS = ("recipe_frontier", "outside_references", "kv_asymmetry", "layer_sensitivity", "context_scaling",
               "agent_scaling", "recipe_search")  # fmt: skip
ALPHA = 0.05
LINE = ["model", "weights", "document", "context_tokens", "recipe", "budget_bits", "seed", "metric",
        "protocol"]  # fmt: skip
HIDDEN = ["device", "dtype", "reader", "backend"]  # in no table here
IDENTITY = [*LINE, *HIDDEN, "n_agents"]


FRONTIER = ("recipe_frontier", "outside_references")  # whose recipes are compared with each other


class Setting(NamedTuple):
    """Where recipes are compared with each other: one model, kind of documents and context."""

    model: str
    weights: str
    document: str
    context: int

    def __str__(self) -> str:
        return f"{self.model} ({self.weights} weights), {self.document}, {self.context:,} tokens"


@dataclass(frozen=True)
class Standing:
    """One recipe among the others of its setting.

    `better` and `worse`: recipes whose mean divergence is significantly lower or higher on the same
    documents (Wilcoxon, Holm over all pairs). `dominated_by`: those of `better` that take no more bits.
    `on_front`: no recipe of at most its bits has a lower mean, significantly or not.
    """

    recipe: str
    values: dict[str, Value]
    better: tuple[str, ...] = ()
    worse: tuple[str, ...] = ()
    dominated_by: tuple[str, ...] = ()
    on_front: bool = False
    n_recipes: int = 1
    tested: bool = False

    def __getitem__(self, metric: str) -> Value:
        return self.values.get(metric) or Value(None, note="no such row in these results")

    @property
    def rank(self) -> str:
        """The ranks that the tests leave open: 3-6 is a tie of four."""
        if not self.tested:
            return "not tested"
        low, high = 1 + len(self.better), self.n_recipes - len(self.worse)
        return f"{low}" if low == high else f"{low}-{high}"


@dataclass(frozen=True)
class Comparison:
    """All recipes of one setting, best first, and the adjusted p of every pair."""

    setting: Setting
    standings: list[Standing]
    p_values: dict[frozenset[str], float] = field(default_factory=dict)
    n_documents: int = 0


def of_experiment(rows: pd.DataFrame, *experiments: str) -> pd.DataFrame:
    """Their rows; re-measured ones: the newest counts. Lines that differ in what no table shows are told apart."""
    rows = rows[rows["experiment"].isin(experiments)]
    rows = rows.sort_values(["created_at", "cell"], kind="stable")
    rows = rows.drop_duplicates(IDENTITY, keep="last")
    if "agent_scaling" in experiments:  # the one whose lines are numbers of agents
        return told_by(rows, [*LINE, "n_agents"], HIDDEN)
    return told_by(rows, LINE, [*HIDDEN, "n_agents"])


def settings(rows: pd.DataFrame) -> list[tuple[Setting, pd.DataFrame]]:
    """The rows of each setting."""
    keys = ["model", "weights", "document", "context_tokens"]
    return [
        (Setting(model, weights, document, int(context)), part)
        for (model, weights, document, context), part in rows.groupby(keys, sort=True)
    ]


def values(rows: pd.DataFrame) -> dict[str, Value]:
    """Metric -> value, over seeds: their mean, and the hull of their intervals. `bits` by protocol."""
    name = rows["metric"].where(rows["metric"] != "bits", rows["protocol"] + "_bits")
    found = {}
    for metric, part in rows.groupby(name):
        present = part[part["value"].notna()]
        if present.empty:
            found[metric] = Value(None, note=part["note"].iloc[0])
            continue
        low, high = present["ci_low"].min(), present["ci_high"].max()
        ends = (None, None) if np.isnan(low) else (float(low), float(high))
        found[metric] = Value(float(present["value"].mean()), *ends)
    return found


def compared(rows: pd.DataFrame) -> list[Comparison]:
    """Each setting's recipes, ranked by mean divergence."""
    return [_compare(setting, part) for setting, part in settings(rows)]


def _compare(setting: Setting, rows: pd.DataFrame) -> Comparison:
    rows = rows[rows["recipe"] != BASELINE]
    measured = {recipe: values(part) for recipe, part in rows.groupby("recipe")}
    complete = _by_document(rows, "document_kl_mean")
    deltas = _by_document(rows, "document_perplexity_delta")
    tested = len(complete) >= MIN_DOCUMENTS
    p_values = _pairs(complete) if tested else {}
    means = complete.mean()
    if tested:
        for recipe in complete.columns:
            measured[recipe]["kl_mean"] = _pooled(complete[recipe], least=0)
        for recipe in deltas.columns:
            logs = _pooled(np.log1p(deltas[recipe] / 100))
            percent = [100 * math.expm1(x) for x in (logs.value, logs.low, logs.high)]
            measured[recipe]["perplexity_delta"] = Value(*percent)

    def beats(a: str, b: str) -> bool:
        return p_values.get(frozenset((a, b)), 1) < ALPHA and means[a] < means[b]

    standings = []
    for recipe, mine in measured.items():
        others = [other for other in measured if other != recipe]
        better = tuple(other for other in others if beats(other, recipe))
        cheaper = [
            o for o in others if measured[o]["stored_bits"].value <= mine["stored_bits"].value
        ]
        standings.append(
            Standing(
                recipe,
                mine,
                better=better,
                worse=tuple(other for other in others if beats(recipe, other)),
                dominated_by=tuple(other for other in cheaper if other in better),
                on_front=all(
                    measured[o]["kl_mean"].value >= mine["kl_mean"].value for o in cheaper
                ),
                n_recipes=len(measured),
                tested=tested,
            )
        )
    standings.sort(key=lambda s: s["kl_mean"].value)
    return Comparison(setting, standings, p_values, len(complete))


def _by_document(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One line per document of any seed that every recipe was measured on, one column per recipe."""
    return (
        rows[rows["metric"] == metric]
        .pivot_table(index=["seed", "protocol"], columns="recipe", values="value")
        .dropna()
    )


def _pooled(of_documents: pd.Series, least: float = -math.inf) -> Value:
    """Mean over the documents of all seeds, with its interval; `least` is what it can be."""
    documents = [np.array([value]) for value in of_documents]
    low, high = document_interval(documents, (least, math.inf))
    return Value(float(of_documents.mean()), low, high)


def _pairs(documents: pd.DataFrame) -> dict[frozenset[str], float]:
    pairs = list(combinations(documents.columns, 2))
    raw = [paired_p(documents[a], documents[b]) for a, b in pairs]
    return {frozenset(pair): p for pair, p in zip(pairs, holm(raw), strict=True)}


def layers(rows: pd.DataFrame) -> pd.DataFrame:
    """The layer rows with `layer` and `head` (NaN: the whole layer) taken from their protocol."""
    place = rows["protocol"].str.extract(r"^layer (?P<layer>\d+)(?: head (?P<head>\d+))?$")
    return rows.assign(**place.astype(float)).dropna(subset=["layer"])


def trend(contexts: Sequence[float], deltas: Sequence[float]) -> Value:
    """Least-squares slope of the delta per doubling of the context, with its 95 % interval.

    Long contexts spread far less than short ones, so each has its own variance, as in Welch's test: the
    slope is a weighted sum of the contexts' means, its degrees of freedom are Satterthwaite's (1946).
    """
    if len(set(contexts)) < 3:
        return Value(None, note="fewer than three contexts were run")
    x, y = np.log2(contexts), np.asarray(deltas, dtype=float)
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slope = float(weights @ y)
    groups = [x == at for at in np.unique(x)]
    if min(group.sum() for group in groups) < 2:
        return Value(slope, note="a context has one document only, which shows no spread")
    parts = np.array([(weights[g] ** 2).sum() * y[g].var(ddof=1) for g in groups])
    freedom = np.array([g.sum() - 1 for g in groups])
    if not (variance := parts.sum()):
        return Value(slope, slope, slope)
    reach = stats.t.ppf(0.975, variance**2 / (parts**2 / freedom).sum()) * math.sqrt(variance)
    return Value(slope, float(slope - reach), float(slope + reach))


def by_document(rows: pd.DataFrame, recipe: str) -> pd.DataFrame:
    """One recipe's perplexity delta of each document, with its context."""
    mine = (rows["recipe"] == recipe) & (rows["metric"] == "document_perplexity_delta")
    return rows[mine]
