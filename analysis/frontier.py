"""Recipes at equal stored bits: the ranks that documents leave open, the Pareto front, trends over context and agents.

All of it from compare's rows. Seeds, which draw rotations and the generator's documents, are taken together.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from scipy import stats

from analysis.load import SETTING as SET
from analysis.load import swept
from analysis.points import ANSWERS
from analysis.render import Column, Table, describe, fixed, keys, significant
from analysis.statistics import (
    BASELINE,
    BYTES,
    QUALITY,
    Measure,
    Pairs,
    Value,
    bits_of_ratio,
    documents,
    exponential,
    largest,
    mean,
    pairs_of,
    percent,
    samples_of,
)

STUDY = "compare"
SETTING = ("model", "weights", "document", "context_tokens")
APART = ("dtype", "device", "reader")  # said where they differ
# Settings that change no score.
UNSCORED = tuple(SET + name for name in ("answers", "resident", "max_new_tokens"))
KL = ("median", "p90", "p95", "p99", "p999", "max")
DELTA_P = ("rms", "p01", "p05", "p25", "median", "p75", "p95", "p99")
MEASURES = {
    **BYTES,
    **QUALITY,
    "nominal_bits": replace(BYTES["nominal_ratio"], form=bits_of_ratio),
    "nll_delta": Measure("nll_delta", reduce=mean),
    "agent_spread": Measure("agent_spread", reduce=largest),
    **{f"kl_{name}": Measure("kl", {"statistic": name}) for name in KL},
    **{f"delta_p_{name}": Measure("delta_p", {"statistic": name}) for name in DELTA_P},
}
SPREAD = Measure("nll_delta", {"statistic": "sd"})  # of the tokens' differences
NORMAL = float(stats.norm.ppf(0.975))


@dataclass(frozen=True)
class Standing:
    """One recipe among the others of its setting.

    Attributes:
        rank: the ranks that the tests leave open: 3-6 is a tie of four.
        dominated_by: recipes of no more bits whose divergence is significantly lower.
        on_front: no recipe of at most its bits has a lower mean, significantly or not.
    """

    recipe: str
    rows: pd.DataFrame
    rank: str = "not tested"
    dominated_by: tuple[str, ...] = ()
    on_front: bool = False
    _values: dict[str, Value] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Value:
        """One of MEASURES, or `perplexity_ratio`."""
        if name not in self._values:
            self._values[name] = measured(self.rows, name)
        return self._values[name]

    @property
    def spot(self) -> tuple[float, float]:
        """(stored bits, mean KL)."""
        return self["stored_bits"].value, self["kl_mean"].value


@dataclass(frozen=True)
class Comparison:
    """All recipes of one setting, least mean KL first, and their pairs."""

    setting: str
    standings: Sequence[Standing]
    pairs: Pairs

    @property
    def heading(self) -> str:
        """The setting, and how many documents all its recipes have."""
        return f"{self.setting}; {self.pairs.documents} documents"


def measured(rows: pd.DataFrame, name: str) -> Value:
    """A figure of one recipe over the documents of all its seeds."""
    return (
        perplexity_ratio(rows) if name == "perplexity_ratio" else MEASURES[name].of(rows, ["seed"])
    )


def perplexity_ratio(rows: pd.DataFrame) -> Value:
    """The ratio of perplexities with the interval of llama.cpp's tool: tokens are paired and taken as independent.

    Seeds that read the same texts are averaged first, the variance of a token's difference too: theirs is at most that.
    """
    mine = rows[rows["metric"] == "nll_delta"]
    each = []
    for _, of_seed in mine.groupby("seed", dropna=False):
        at, spread = (measure.of(of_seed) for measure in (MEASURES["nll_delta"], SPREAD))
        if at.value is None or spread.value is None:
            return at if at.value is None else spread
        texts = frozenset(documents(of_seed[of_seed["sample"].notna()]))
        each.append((texts, at.value, spread.value**2, at.n))
    found = pd.DataFrame(each, columns=["texts", "mean", "variance", "n"]).groupby("texts").mean()
    m, variance, n = (found[name].to_numpy() for name in ("mean", "variance", "n"))
    at = float(np.average(m, weights=n))
    squares = ((n - 1) * variance + n * (m - at) ** 2).sum()
    reach = NORMAL * math.sqrt(squares / (n.sum() - 1) / n.sum())
    return Value(at, at - reach, at + reach, n=int(n.sum())).map(exponential)


def scores(rows: pd.DataFrame, together: bool = False) -> pd.DataFrame:
    """The rows of compressed caches' scores and bits: of agents that scored `together`, or of a reader alone."""
    crowds = rows.loc[rows["metric"] == "agent_spread", "cell"].unique()
    aside = rows["metric"].isin([*ANSWERS, "kv_memory"]) | (rows["recipe"] == BASELINE)
    return rows[~aside & (rows["cell"].isin(crowds) == together)]


def composed(rows: pd.DataFrame) -> pd.Series:
    """Whether a row's recipe is one of key bits by value bits."""
    return rows["key_bits"].notna() if "key_bits" in rows else pd.Series(False, rows.index)


def by_setting(
    rows: pd.DataFrame, setting: Sequence[str] = SETTING
) -> Iterator[tuple[str, pd.DataFrame]]:
    """What was measured alike but for recipe, seed and number of agents, under a heading each."""
    apart = [name for name in (*APART, *swept(rows)) if name not in UNSCORED]
    apart = [name for name in apart if rows[name].nunique() > 1]
    for key, part in rows.groupby([*setting, *apart], dropna=False):
        said = dict(zip((*setting, *apart), key, strict=True))
        parts = [f"{said['model']} ({said['weights']} weights)", said["document"]]
        parts += [f"{said['context_tokens']:,} tokens"] if "context_tokens" in said else []
        parts += [f"{name.removeprefix(SET)}={said[name] or 'unset'}" for name in apart]
        yield ", ".join(parts), part


def compared(rows: pd.DataFrame) -> list[Comparison]:
    """Each setting in which several recipes were measured."""
    found = scores(rows)
    each = [_compare(*setting) for setting in by_setting(found[~composed(found)])]
    return [comparison for comparison in each if len(comparison.standings) > 1]


def _compare(setting: str, rows: pd.DataFrame) -> Comparison:
    pairs = pairs_of(samples_of(rows, "kl", ["recipe"]).swaplevel())
    each = [Standing(recipe, part) for recipe, part in rows.groupby("recipe")]
    each = [s for s in each if None not in s.spot]
    each.sort(key=lambda s: (s.spot[1], s.recipe))
    return Comparison(setting, [_ranked(s, each, pairs) for s in each], pairs)


def _ranked(mine: Standing, among: Sequence[Standing], pairs: Pairs) -> Standing:
    bits, kl = mine.spot
    cheaper = [s for s in among if s is not mine and s.spot[0] <= bits]
    better = pairs.below(mine.recipe)
    rank = mine.rank
    if pairs.p and mine.recipe in pairs.names:
        low, high = 1 + len(better), len(pairs.names) - len(pairs.above(mine.recipe))
        rank = f"{low}" if low == high else f"{low}-{high}"
    return replace(
        mine,
        rank=rank,
        dominated_by=tuple(s.recipe for s in cheaper if s.recipe in better),
        on_front=all(s.spot[1] >= kl for s in cheaper),
    )


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


def deltas_of(rows: pd.DataFrame) -> pd.Series:
    """One recipe's perplexity delta of each document in percent, by context."""
    return samples_of(rows, "nll_delta", ["context_tokens"]).dropna().droplevel("text").map(percent)


def over_contexts(rows: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """(setting, recipe, rows) of what was measured at several contexts."""
    found = by_setting(scores(rows), [name for name in SETTING if name != "context_tokens"])
    each = [(setting, *own) for setting, part in found for own in part.groupby("recipe")]
    return [line for line in each if line[2]["context_tokens"].nunique() > 1]


def over_agents(rows: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """(setting, recipe, rows) of agents that scored together."""
    found = by_setting(scores(rows, together=True))
    return [(setting, *own) for setting, part in found for own in part.groupby("recipe")]


QUALITY_COLUMNS = (
    Column("stored_bits", "stored bits", fixed(3)),
    Column("nominal_bits", "nominal bits", fixed(2)),
    Column("kl_mean", "KL mean [95 %]", significant, interval=True),
    Column("perplexity_delta", "Δppl % [95 %]", fixed(2, "+"), interval=True),
    Column("perplexity_ratio", "ppl ratio [95 %]", fixed(4), interval=True),
    Column("same_top1", "top-1", fixed(4)),
)
_BITS, _KL = QUALITY_COLUMNS[0], QUALITY_COLUMNS[2]
_DELTA = Column("perplexity_delta", "Δppl % [95 %]", fixed(3, "+"), interval=True)


def about(rows: pd.DataFrame) -> str:
    """What scores were measured on, for a caption; n: scored tokens of a document."""
    each = rows[(rows["metric"] == "kl") & rows["sample"].notna() & rows["block"].isna()]
    return describe(each)


def _table(
    name: str, caption: str, rows: pd.DataFrame, columns: Sequence[Column], lines: list
) -> Table | None:
    return Table(name, f"{caption} {about(rows)}", columns, lines) if lines else None


def _values(rows: pd.DataFrame, columns: Sequence[Column]) -> dict[str, Value]:
    return {column.name: measured(rows, column.name) for column in columns}


def recipe_frontier(rows: pd.DataFrame) -> Table | None:
    """Every recipe by mean KL, with the ranks that the tests leave open."""
    lines = [
        {"section": found.heading, "recipe": s.recipe, "rank": s.rank}
        | {"front": "yes" if s.on_front else "no", "dominated": _some(s.dominated_by)}
        | {column.name: s[column.name] for column in QUALITY_COLUMNS}
        for found in compared(rows)
        for s in found.standings
    ]
    columns = [
        *keys("recipe"),
        Column("rank", "rank"),
        *QUALITY_COLUMNS,
        Column("front", "Pareto front"),
        Column("dominated", "significantly better at no more bits"),
    ]
    caption = (
        "Recipes by mean KL divergence to the uncompressed cache. Ranks that paired tests leave open (t on log KL "
        "of the same documents, Holm over all pairs, 5 %): 3-6 is a tie of four; table recipe_pairs has each pair. "
        "Bits per value count every byte kept. Intervals: skewness-corrected t over the documents; a text that several "
        "seeds read is one document, at the mean over its rotations. Perplexity ratio: paired standard error over "
        "tokens, as llama.cpp's perplexity tool."
    )  # fmt: skip
    return _table("recipe_frontier", caption, scores(rows), columns, lines)


def recipe_pairs(rows: pd.DataFrame) -> Table | None:
    """By what factor one recipe's KL exceeds another's, and what the documents could have shown."""
    lines = [
        {"section": found.heading, "more": more, "less": less, "p": found.pairs.p[less, more],
         "ratio": Value(ratio.ratio, ratio.low, ratio.high), "detectable": ratio.detectable,
         "needed": Value(ratio.documents_needed, note="" if ratio.documents_needed else "no number is near enough")}
        for found in compared(rows)
        for (less, more), ratio in found.pairs.ratios.items()
    ]  # fmt: skip
    columns = [
        Column("more", "recipe", key=True),
        Column("less", "over", key=True),
        Column("ratio", "KL ratio [95 %]", fixed(2), interval=True),
        Column("p", "p (Holm)", significant),
        Column("detectable", "detectable ratio", fixed(2)),
        Column("needed", "documents for this ratio", lambda number, row: f"{number:,.0f}"),
    ]
    caption = (
        "Recipes pair by pair: the ratio of their KL divergences on the same documents (geometric means, paired t on "
        "logarithms, Holm over the pairs of a setting), the smallest ratio that these documents would have shown with "
        "80 % power, and how many would show this one."
    )
    return _table("recipe_pairs", caption, scores(rows), columns, lines)


def recipe_divergence(rows: pd.DataFrame) -> Table | None:
    """The distribution per token: KL percentiles, and the true token's probability."""
    columns = [
        _BITS,
        *(Column(f"kl_{name}", f"KL {name}", significant) for name in ("mean", *KL)),
        *(Column(f"delta_p_{name}", f"Δp {name}", significant) for name in ("mean", *DELTA_P)),
    ]
    lines = [
        {"section": found.setting, "recipe": s.recipe} | {c.name: s[c.name] for c in columns}
        for found in compared(rows)
        for s in found.standings
    ]
    caption = (
        "Divergence per token, over all documents: KL in nats, and Δp, the change in the probability of the true "
        "token (p01 is its 1 % percentile, p999 the 99.9 %)."
    )
    return _table("recipe_divergence", caption, scores(rows), [*keys("recipe"), *columns], lines)


def kv_asymmetry(rows: pd.DataFrame) -> Table | None:
    """Key bits x value bits."""
    found = scores(rows)
    found = found[composed(found)]
    lines = [
        {"section": setting, "recipe": recipe} | _values(part, QUALITY_COLUMNS)
        for setting, mine in by_setting(found)
        for recipe, part in mine.groupby("recipe")
    ]
    lines.sort(key=lambda line: (line["section"], line["stored_bits"].value or 0))
    columns = [Column("recipe", "key and value bits", key=True), *QUALITY_COLUMNS]
    return _table(
        "kv_asymmetry",
        "One recipe at key bits x value bits, by stored bits.",
        found,
        columns,
        lines,
    )


def context_scaling(rows: pd.DataFrame) -> Table | None:
    """Perplexity delta by context, and its slope."""
    columns, lines = [_DELTA, _KL, _BITS], []
    none = dict.fromkeys(("kl_mean", "stored_bits"), Value(None, note="no slope is fitted"))
    for section, recipe, mine in over_contexts(rows):
        line = {"section": section, "recipe": recipe}
        for context, part in mine.groupby("context_tokens"):
            lines.append(line | {"context": f"{context:,}"} | _values(part, columns))
        deltas = deltas_of(mine)
        slope = trend(deltas.index.to_numpy(float), deltas.to_numpy())
        lines.append(line | none | {"context": "per doubling", "perplexity_delta": slope})
    caption = (
        "Perplexity delta by context. Per doubling: least-squares slope of the documents' deltas over log2 of the "
        "context, every context with a variance of its own (Welch); the delta shrinks where it points to 0 with its "
        "whole interval."
    )
    return _table(
        "context_scaling", caption, scores(rows), [*keys("recipe", "context"), *columns], lines
    )


def agent_scaling(rows: pd.DataFrame) -> Table | None:
    """Perplexity delta by number of agents, and how far any agent is from a single reader."""
    spread = Column("agent_spread", "largest difference to a single reader, nats", significant)
    columns = [_DELTA, _KL, spread]
    lines = [
        {"section": section, "recipe": recipe, "agents": int(n)} | _values(part, columns)
        for section, recipe, mine in over_agents(rows)
        for n, part in mine.groupby("n_agents")
    ]
    caption = "Quality of the last of N agents that read one pool."
    return _table(
        "agent_scaling",
        caption,
        scores(rows, together=True),
        [*keys("recipe", "agents"), *columns],
        lines,
    )


def _some(names: tuple[str, ...]) -> str:
    """The first names, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "none") + more


TABLES = {
    table.__name__: table
    for table in (recipe_frontier, recipe_pairs, recipe_divergence, kv_asymmetry, context_scaling, agent_scaling)
}  # fmt: skip
