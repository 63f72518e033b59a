"""Policies by budget on one text: the fp16 relay replayed under each, KL to it beside that of uniform bits.

Bits by token (QKVShare) and better codes for all tokens are compared at equal nominal budgets. The test is paired by
problem; it separates policies with far fewer problems than their answers do.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import pandas as pd

from analysis import style
from analysis.handoff_accuracy import ALPHA, FLIPS, KL, PLAYED
from analysis.points import (
    RUN,
    bits_text,
    cell_dtype,
    counted,
    groups,
    hops_text,
    ordered,
    over_seeds,
    run_text,
    settings_text,
)
from analysis.render import Column, Row, Table, describe, fixed, keys, settings_columns, significant
from analysis.statistics import Measure, Value, mean_of_samples, samples_of
from polykv.evaluation.statistics import PairedRatio, holm, paired_ratio

STUDY = "handoff_accuracy"
Key = TypeVar("Key", bound=Hashable)
UNIFORM = "uniform"
BITS = Measure("mean_bits", reduce=mean_of_samples)
MINUTES = Measure("replay_minutes")
SAME_CARDS = "the same cards"  # so far as KL, equal to the bit in every problem, tells
NOT_PAIRED = "uniform bits were not run on the same problems, or too few of them have a KL above 0"
EQUAL = PairedRatio(1.0, 1.0, 1.0, 1.0, 1.0, None)
LEAST = 2  # problems of a pair, and budgets or policies other than uniform, below which there is nothing to show


@dataclass(frozen=True)
class Against:
    """A policy's KL over that of uniform bits on the same problems, and its p after Holm."""

    ratio: PairedRatio
    p: float

    @property
    def over(self) -> Value:
        return Value(self.ratio.ratio, self.ratio.low, self.ratio.high)

    @property
    def verdict(self) -> str:
        if self.ratio is EQUAL:
            return SAME_CARDS
        if self.p >= ALPHA:
            return "no difference shown"
        return "better" if self.ratio.ratio < 1 else "worse"


def lines_of(rows: pd.DataFrame) -> list[Row]:
    """One line per policy and budget: bits, KL, and `against` uniform (None: itself, or not comparable).

    A run is corrected as a whole. Seeds, which may draw the same problems, are runs of their own.
    """
    found = ordered(cell_dtype(rows, PLAYED))
    found = found[(found["hop"] == found["n_hops"]) & found["budget_bits"].notna()]
    several = found["seed"].nunique() > 1
    lines = []
    for run, mine in groups(found, *RUN, "document", "n_hops", "seed"):
        run["of_seed"] = f", seed {run['seed']}" if several else ""
        of_run = [
            line | run | {"policy": policy, "rows": of}
            for line, at in groups(mine, "reseal", "budget_bits")
            for policy, of in at.groupby("policy", sort=False)
        ]
        against = _against(of_run)
        for number, line in enumerate(of_run):
            own = line.pop("rows")
            line |= {"kl": over_seeds(own, KL.of), "bits": over_seeds(own, BITS.of)}
            line |= {"minutes": over_seeds(own, MINUTES.of), "flips": over_seeds(own, FLIPS.of)}
            lines.append(line | {"against": against.get(number)})
    return lines


def _against(lines: list[Row]) -> dict[int, Against]:
    """By number of the line, its comparison with the uniform line of the same budget and problems."""
    pairs = {
        number: wide
        for number, line in enumerate(lines)
        for other in lines
        if line["policy"] != UNIFORM == other["policy"]
        and all(line[n] == other[n] for n in line if n not in ("policy", "rows"))
        and (wide := _paired(line["rows"], other["rows"])) is not None
    }
    return tested(pairs)


def tested(pairs: Mapping[Key, pd.DataFrame]) -> dict[Key, Against]:
    """KL by problem (first column) over another's (second), with Holm over all pairs; not those of too few problems."""
    same = [key for key, wide in pairs.items() if (wide.iloc[:, 0] == wide.iloc[:, 1]).all()]
    # Those that are not above 0 have no logarithm.
    positive = {key: wide[(wide > 0).all(axis=1)] for key, wide in pairs.items() if key not in same}
    positive = {key: wide for key, wide in positive.items() if len(wide) >= LEAST}
    ratios = [
        paired_ratio(*(wide[side].tolist() for side in wide), ALPHA / len(positive))
        for wide in positive.values()
    ]
    p = holm([ratio.p for ratio in ratios]) if ratios else []
    found = {
        key: Against(*one) for key, one in zip(positive, zip(ratios, p, strict=True), strict=True)
    }
    return found | {key: Against(EQUAL, 1.0) for key in same}


def _paired(own: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame | None:
    """KL of both by problem; None if these are not the same problems."""
    one, theirs = (samples_of(rows, "kl", ["seed", "sample"]) for rows in (own, other))
    if set(one.index) != set(theirs.index):
        return None
    return pd.concat({"own": one, "other": theirs}, axis=1).dropna()


def _by_run(rows: pd.DataFrame) -> dict[str, list[Row]]:
    """The lines of each run that has something to compare: several budgets or policies."""
    by_run = defaultdict(list)
    for line in lines_of(rows):
        by_run[_run(line)].append(line)
    return {run: lines for run, lines in by_run.items() if _worth_showing(lines)}


def _worth_showing(lines: list[Row]) -> bool:
    n_budgets, n_policies = (
        len({line[name] for line in lines}) for name in ("budget_bits", "policy")
    )
    return n_policies > 1 and (n_budgets >= LEAST or n_policies > LEAST)


def _run(line: Row) -> str:
    about = f"{run_text(line)}, {line['document']}, {hops_text(line['n_hops'])}{line['of_seed']}"
    return about + settings_text(line)


def table(rows: pd.DataFrame) -> Table | None:
    """KL by policy and budget, with its ratio to uniform bits and the smallest ratio that would have shown."""
    lines = [line | {"section": run} for run, of in _by_run(rows).items() for line in of]
    if not lines:
        return None
    for line in lines:
        against = line["against"]
        line |= {"budget": bits_text(line["budget_bits"])}
        nothing = "it is uniform" if line["policy"] == UNIFORM else NOT_PAIRED
        none = Value(None, note=nothing)
        if against is None:
            line |= dict.fromkeys(("ratio", "p", "detectable", "verdict"), none)
        else:
            line |= {"ratio": against.over, "p": Value(against.p), "verdict": against.verdict}
            line["detectable"] = Value(against.ratio.detectable)
    columns = [
        *keys("budget", "reseal", "policy"),
        *settings_columns(rows),
        Column("bits", "bits stored", fixed(3)),
        Column("kl", "KL to fp16 [95 %]", fixed(5), interval=True),
        Column("ratio", "over uniform [95 %]", fixed(2), interval=True),
        Column("p", "p, Holm", significant),
        Column("detectable", "detectable", fixed(2)),
        Column("verdict", "against uniform"),
        Column("flips", "digit flipped % [95 %]", fixed(1), interval=True),
        Column("minutes", "min", fixed(1)),
    ]
    explained = (
        "KL divergence to the fp16 relay on the last agent's answer, teacher-forced on its text. over uniform: ratio "
        "of geometric means to uniform bits of the same budget, paired by problem (t on logarithms, Holm over a run's "
        "comparisons). detectable: the smallest ratio that so many problems show in 4 of 5 samples after that "
        "correction. the same cards: KL is equal in every problem, as where a budget gives all tokens the same tier "
        "whatever their scores. digit flipped: answers in which any digit would be another. A budget is of "
        "payload bits; bits stored count scales, maps and token ids. min: "
        "minutes for the replays of all problems, beside whatever else the machine did"
    )
    caption = f"Policies by budget. {describe(counted(rows))}"
    return Table("handoff_budgets", caption, columns, lines, explained)


@style.styled
def figure(rows: pd.DataFrame) -> style.Picture | str:
    """KL to the fp16 relay over stored bits, a line per policy, a panel per way of resealing."""
    by_run = _by_run(rows)
    if not by_run:
        return "no two policies were replayed at several budgets"
    reseals = [list(dict.fromkeys(line["reseal"] for line in of)) for of in by_run.values()]
    canvas, panels = style.sheet(list(by_run), max(map(len, reseals)), 2.2)
    for axes, lines, of_run in zip(panels, by_run.values(), reseals, strict=True):
        for ax, reseal in zip(axes, of_run, strict=False):
            _drawn(style.plain_log(ax), [line for line in lines if line["reseal"] == reseal])
            ax.set_title(reseal)
            ax.set_xlabel("bits stored per value")
            ax.set_ylabel("KL to fp16 relay, nats")
        for ax in axes[len(of_run) :]:
            ax.remove()
    return style.picture(
        style.legend(canvas),
        "KL divergence to the fp16 relay by policy and stored bits: lower and further left is better",
        describe(counted(rows)),
        style.Marks(
            dashed="uniform bits, over lines of the same cards",
            more="Tests against uniform bits: table handoff_budgets.",
        ),
    )


def _drawn(ax: style.Axes, mine: list[Row]) -> None:
    for policy in dict.fromkeys(line["policy"] for line in mine):
        spots = [
            (line["bits"].value, line["kl"])
            for line in mine
            if line["policy"] == policy and line["bits"].value is not None
        ]
        plain = policy == UNIFORM  # over what may be the same cards
        look = {"fmt": "o--" if plain else "o-", "zorder": 3 if plain else 2}
        look |= {"markersize": 3, "elinewidth": 0.8, "label": policy}
        style.series(ax, spots, color=style.policy_colour(policy), **look)


def findings(rows: pd.DataFrame) -> dict[str, list[str]]:
    """By run: for each policy, in how many settings it beats uniform bits."""
    said = {run: list(_sentences(lines)) for run, lines in _by_run(rows).items()}
    return {
        f"Which policy makes the best use of bits: {run}": sentences
        for run, sentences in said.items()
        if sentences
    }


def _sentences(lines: list[Row]) -> Iterator[str]:
    tested = [line for line in lines if line["against"] is not None]
    n_tested = sum(line["against"].verdict != SAME_CARDS for line in tested)
    for policy in dict.fromkeys(line["policy"] for line in tested):
        mine = [line for line in tested if line["policy"] == policy]
        verdicts = [line["against"].verdict for line in mine]
        n_better, n_worse = verdicts.count("better"), verdicts.count("worse")
        each = "; ".join(
            f"{bits_text(line['budget_bits'])}, {line['reseal']} "
            f"{line['against'].over.text('.2f')}{_unseen(line['against'])}"
            for line in mine
        )
        yield (
            f"{policy} against uniform bits of equal budget: **{_outcome(verdicts)}**, better in {n_better} and worse "
            f"in {n_worse} of {len(mine)} settings after Holm over all {n_tested} comparisons. KL over that of "
            f"uniform: {each}."
        )


def _outcome(verdicts: list[str]) -> str:
    """What the verdicts of all settings amount to."""
    if set(verdicts) == {SAME_CARDS}:
        return SAME_CARDS
    found = {verdict for verdict in verdicts if verdict in ("better", "worse")}
    if not found:
        return "no difference shown"
    if len(found) == 2:
        return "mixed"
    (one,) = found
    return one if set(verdicts) == found else f"{one} at some budgets"


def _unseen(against: Against) -> str:
    if against.verdict == SAME_CARDS:
        return f" ({SAME_CARDS})"
    if against.p < ALPHA:
        return ""
    return f" ({against.ratio.detectable:.2f} would have shown)"


TABLES = {"handoff_budgets": table}
FIGURES = {"handoff_budgets": figure}
FINDINGS = findings
