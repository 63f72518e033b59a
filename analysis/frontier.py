"""Recipes at equal stored bits: ranks with their ties, the Pareto front, and tests between pairs of recipes.

All of it from compare's rows. Seeds, which draw rotations and the generator's documents, are taken together.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

from analysis import style
from analysis.load import ONLINE, swept, with_protocol
from analysis.load import SETTING as SET
from analysis.points import ANSWERS, parts
from analysis.render import Column, Table, describe, fixed, keys, significant
from analysis.statistics import (
    ALPHA,
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
    once_per_frame,
    pairs_of,
    samples_of,
)

STUDY = "compare"
SETTING = ("model", "weights", "document", "context_tokens")
APART = ("dtype", "device", "protocol", "reader")  # said where they differ
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
Looks = Mapping[str, tuple[str, str]]  # colour and marker of each recipe
ROOM = 1.2  # bits left of the first recipe, for its name
NAME, NEAR = 1.0, 1.5  # how wide and high (as a ratio of KL) a name may be
RECIPE = "polykv"
EQUAL_BITS = 0.05
PAIRS = {
    ("turboquant_4bit", "uniform_rotated"): "4-bit TurboQuant and plain absmax with a rotation",
    ("turboquant_3bit", "uniform_rotated_3bit"): "3-bit TurboQuant and plain absmax with a rotation",
    ("turboquant_3bit", "uniform_rotated"): "3-bit TurboQuant and plain 4-bit with a rotation",
    ("turboquant_4bit", "turboquant_prod_4bit"): "4-bit TurboQuant keys without and with QJL residual",
    ("q4_0", "q4_0_rotated"): "ggml's q4_0 without and with a rotation before it",
    ("uniform", "uniform_rotated"): "4-bit absmax without and with a rotation before it",
    ("trellis_3", "polykv"): "Keys before RoPE in trellis codes at 3 bits, and PolyKV",
    ("trellis_4", "waterfill_4"): "Trellis codes at 4 bits, and scalar ones",
    ("trellis_4", "q8_0"): "Trellis codes at 4 bits, and ggml's q8_0",
    ("waterfill_4", "polykv"): "4-bit keys before RoPE with water-filled widths, and PolyKV",
    ("waterfill_4", "q8_0"): "4-bit keys before RoPE with water-filled widths, and ggml's q8_0",
    ("polykv_sinks4_token", "polykv"): "PolyKV with four exact tokens and a key scale per token, and as published",
    ("polykv", "polykv_q8_0"): "PolyKV as published and with q8_0 keys and random signs",
}  # fmt: skip
QUALITY_COLUMNS = (
    Column("stored_bits", "stored bits", fixed(3)),
    Column("nominal_bits", "nominal bits", fixed(2)),
    Column("kl_mean", "KL mean [95 %]", significant, interval=True),
    Column("perplexity_delta", "Δppl % [95 %]", fixed(2, "+"), interval=True),
    Column("perplexity_ratio", "ppl ratio [95 %]", fixed(4), interval=True),
    Column("same_top1", "top-1", fixed(4)),
)


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
        n = self.pairs.documents
        return f"{self.setting}; {n} document{'s' * (n != 1)}"


def measured(rows: pd.DataFrame, name: str) -> Value:
    """A figure of one recipe over the documents of all its seeds."""
    if name == "perplexity_ratio":
        return perplexity_ratio(rows)
    return MEASURES[name].of(rows, ["seed"])


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
    """Rows of scores and bits of compressed caches, either of agents that scored `together` or of single readers."""
    crowds = rows.loc[rows["metric"] == "agent_spread", "cell"].unique()
    aside = rows["metric"].isin([*ANSWERS, "kv_memory"]) | (rows["recipe"] == BASELINE)
    return with_protocol(rows[~aside & (rows["cell"].isin(crowds) == together)])


def by_setting(
    rows: pd.DataFrame, setting: Sequence[str] = SETTING
) -> Iterator[tuple[str, pd.DataFrame]]:
    """(heading, rows) of each setting; within one, rows differ in recipe, seed and number of agents only."""
    apart = [name for name in (*APART, *swept(rows)) if name not in UNSCORED]
    apart = [n for n in apart if rows[n].nunique() > 1 or (rows[n] == ONLINE).any()]
    for said, part in parts(rows, [*setting, *apart], sort=True):
        named = [f"{said['model']} ({said['weights']} weights)", said["document"]]
        named += [f"{said['context_tokens']:,} tokens"] if "context_tokens" in said else []
        named += [f"{name.removeprefix(SET)}={said[name] or 'unset'}" for name in apart]
        yield ", ".join(named), part


def composed(rows: pd.DataFrame) -> pd.Series:
    """Which rows are of a recipe composed of key bits and value bits (experiment=kv_asymmetry)."""
    return rows["key_bits"].notna() if "key_bits" in rows else pd.Series(False, rows.index)


@once_per_frame
def compared(rows: pd.DataFrame) -> list[Comparison]:
    """The comparisons of all settings in which several recipes were measured."""
    found, comparisons = scores(rows), []
    for setting, part in by_setting(found[~composed(found)]):
        pairs = pairs_of(samples_of(part, "kl", ["recipe"]).swaplevel())
        each = [Standing(recipe, mine) for recipe, mine in part.groupby("recipe")]
        each = [s for s in each if None not in s.spot]
        each.sort(key=lambda s: (s.spot[1], s.recipe))
        if len(each) > 1:
            ranked = [_ranked(s, each, pairs) for s in each]
            comparisons.append(Comparison(setting, ranked, pairs))
    return comparisons


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


def about(rows: pd.DataFrame) -> str:
    """What the scores were measured on, for a caption; n: scored tokens per document."""
    return describe(rows[rows["metric"] == "kl"])


def table_of(
    name: str, caption: str, rows: pd.DataFrame, columns: Sequence[Column], lines: list
) -> Table | None:
    return Table(name, f"{caption} {about(rows)}", columns, lines) if lines else None


def recipe_frontier(rows: pd.DataFrame) -> Table | None:
    """All recipes by mean KL, with ranks; a range of ranks is a tie."""

    def some(names: tuple[str, ...]) -> str:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (", ".join(names[:3]) or "none") + more

    lines = [
        {"section": found.heading, "recipe": s.recipe, "rank": s.rank}
        | {"front": "yes" if s.on_front else "no", "dominated": some(s.dominated_by)}
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
        "tokens, as llama.cpp's perplexity tool, which takes them as independent: too narrow for other documents."
    )  # fmt: skip
    return table_of("recipe_frontier", caption, scores(rows), columns, lines)


def recipe_pairs(rows: pd.DataFrame) -> Table | None:
    """The ratio of KL for each pair of recipes, and the smallest ratio that would have been detected."""
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
        Column("needed", "documents for this ratio", fixed(0)),
    ]
    caption = (
        "Recipes pair by pair: the ratio of their KL divergences on the same documents (geometric means, paired t on "
        "logarithms, Holm over the pairs of a setting), the smallest ratio that these documents would have shown with "
        "80 % power, and how many would show this one."
    )
    return table_of("recipe_pairs", caption, scores(rows), columns, lines)


def recipe_divergence(rows: pd.DataFrame) -> Table | None:
    """The distribution per token: KL percentiles, and the true token's probability."""
    columns = [
        QUALITY_COLUMNS[0],
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
    return table_of("recipe_divergence", caption, scores(rows), [*keys("recipe"), *columns], lines)


@style.styled
def frontier_figure(rows: pd.DataFrame) -> style.Picture | str | None:
    """KL against stored bits, the Pareto front marked; one panel per setting."""
    found = compared(rows)
    if not found:
        return None
    canvas, panels = style.sheet([comparison.heading for comparison in found], 1, 2.8)
    every = [s for comparison in found for s in comparison.standings]
    look, bits = _looks(every), [s.spot[0] for s in every]
    for (ax,), comparison in zip(panels, found, strict=True):
        _frontier(ax, [s for s in comparison.standings if s.spot[1] > 0], look)
        ax.set_xlim(min(bits) - ROOM, max(bits) + ROOM / 2)
    shows = "Mean KL divergence to the uncompressed cache against stored bits per value"
    more = (
        "One colour a family of recipes; filled, and joined by the grey line: the Pareto front. Recipes whose markers "
        "coincide stand apart in figure recipe_ranking."
    )
    marks = style.Marks(lines="Markers", more=more)
    return style.picture(style.legend(canvas), shows, about(scores(rows)), marks)


def _frontier(ax: Axes, standings: Sequence[Standing], looks: Looks) -> None:
    """Recipes on the front are filled. They and PolyKV are named, since others lie over each other."""
    for s in sorted(standings, key=lambda s: list(looks).index(s.recipe)):
        tint, marker = looks[s.recipe]
        look = {"color": tint, "elinewidth": 0.9, "markersize": 6, "markeredgewidth": 1}
        look["markerfacecolor"] = tint if s.on_front else "none"
        style.series(ax, [(s.spot[0], s["kl_mean"])], fmt=marker, label=s.recipe, **look)
    named: list[tuple[float, float]] = []
    for s in reversed(standings):  # from the top down, so that a name makes way for those above it
        if s.on_front or s.recipe == RECIPE:
            near = (abs(s.spot[0] - x) < NAME and y < NEAR * s.spot[1] for x, y in named)
            below = ((-5, -5 - 1.3 * style.SIZE * any(near)), "right", "top")
            offset, ha, va = below if s.on_front else ((5, 3), "left", "bottom")
            ax.annotate(
                s.recipe, s.spot, offset, textcoords="offset points", ha=ha, va=va,
                fontsize=style.SIZE, color=style.ink(looks[s.recipe][0]),
            )  # fmt: skip
            named.append(s.spot)
    bits, kl = zip(*sorted(s.spot for s in standings if s.on_front), strict=True)
    ax.step(bits, kl, where="post", color="0.55", linewidth=1, zorder=0)
    ax.set_yscale("log")
    ax.margins(y=0.14)
    ax.set_xlabel("stored bits per value (every byte kept)")
    ax.set_ylabel("mean KL divergence, nats")


@style.styled
def ranking_figure(rows: pd.DataFrame) -> style.Picture | str | None:
    """Recipes from best to worst with intervals: KL and perplexity delta side by side."""
    found = compared(rows)
    if not found:
        return None
    heights = [0.17 * len(comparison.standings) + 0.5 for comparison in found]
    canvas, panels = style.sheet([c.heading for c in found], 2, heights)
    for (left, right), comparison in zip(panels, found, strict=True):
        standings = comparison.standings
        _ranking(left, standings, "kl_mean", "mean KL divergence, nats")
        left.set_xscale("log")
        left.set_yticklabels(
            [f"{s.recipe}   {s.spot[0]:.2f} bits   rank {s.rank}" for s in standings]
        )
        look = _looks(standings)
        for tick, s in zip(left.get_yticklabels(), standings, strict=True):
            tick.set_color(style.ink(look[s.recipe][0]))
            tick.set_fontweight("bold" if s.on_front else "normal")
        _ranking(right, standings, "perplexity_delta", "perplexity delta, %")
        right.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        if right.get_xlim()[1] > style.WIDE:
            right.set_xscale("symlog", linthresh=1)
        right.set_yticklabels([])
    shows = "Recipes by mean KL divergence, and their perplexity against the uncompressed cache"
    more = (
        "Bold: on the Pareto front of stored bits and KL. A range of ranks is a tie: paired t on log KL of the same "
        "documents, Holm over all pairs, 5 %."
    )
    return style.picture(canvas, shows, about(scores(rows)), style.Marks(more=more))


def _ranking(ax: Axes, standings: Sequence[Standing], metric: str, title: str) -> None:
    """One line per recipe, best on top, with its interval."""
    look = _looks(standings)
    for place, s in enumerate(standings):
        (tint, marker), value = look[s.recipe], s[metric]
        if value.value is not None:
            reach = style.reaches([value])
            ax.errorbar(value.value, place, xerr=reach, fmt=marker, color=tint, elinewidth=0.9)
    ax.set_yticks(range(len(standings)))
    ax.set_ylim(len(standings) - 0.4, -0.6)
    ax.grid(axis="x")
    ax.set_xlabel(title)


def _looks(standings: Sequence[Standing]) -> Looks:
    """Colour and marker of each recipe, by family and then stored bits."""
    ordered = sorted(standings, key=lambda s: (s.spot[0], s.recipe))
    return style.looks(dict.fromkeys(s.recipe for s in ordered))


def findings(rows: pd.DataFrame) -> dict[str, list[str]]:
    """Findings for each setting: the Pareto front and the outcome of chosen pairs."""
    return {f"Which recipe: {found.setting}": _recipes(found) for found in compared(rows)}


def _recipes(found: Comparison) -> list[str]:
    by_name = {s.recipe: s for s in found.standings}
    front = sorted((s for s in found.standings if s.on_front), key=lambda s: s.spot)
    steps = ", ".join(f"{s.recipe} ({s.spot[0]:.2f} bits, KL {s.spot[1]:.3g})" for s in front)
    lines = [f"The Pareto front of stored bits and mean KL: {steps}."]
    for pair, said in PAIRS.items():
        if {*pair} <= {*by_name}:
            lines.append(_pair(*(by_name[name] for name in pair), said, found.pairs))
    mine = by_name.get(RECIPE)
    if mine and mine.dominated_by:
        lines.append(
            f"{RECIPE}, at {mine.spot[0]:.2f} bits, is significantly worse than these that take no more: "
            f"{', '.join(mine.dominated_by)}."
        )
    return lines


def _pair(one: Standing, other: Standing, said: str, pairs: Pairs) -> str:
    both = (one.recipe, other.recipe)
    p = pairs.p.get(both, pairs.p.get(both[::-1]))
    at = "equal" if abs(one.spot[0] - other.spot[0]) <= EQUAL_BITS else "different"
    better = min(both, key=pairs.names.index) if p is not None else ""
    outcome = "not tested" if p is None else f"{better} is better" if p < ALPHA else "a tie"
    each = "; ".join(
        f"{s.recipe} {s.spot[0]:.2f} bits, KL {s['kl_mean'].text('.3g')}" for s in (one, other)
    )
    return f"{said}, at {at} bits: **{outcome}**{p_text(p, ' after Holm')} ({each})."


def p_text(p: float | None, how: str = "") -> str:
    return "" if p is None else f", p = {p:.2g}{how}"


TABLES = {table.__name__: table for table in (recipe_frontier, recipe_pairs, recipe_divergence)}
FIGURES = {"recipe_frontier": frontier_figure, "recipe_ranking": ranking_figure}
FINDINGS = findings
