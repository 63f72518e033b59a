"""Ablation of the controller: which signals beat uniform bits after correction for multiple comparisons.

The question is ours: QKVShare names the ablation as future work and publishes no KL divergence.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis import style
from analysis.handoff_accuracy import ALPHA, CARD, KL
from analysis.points import (
    RUN,
    bits_text,
    counted,
    groups,
    hops_text,
    less,
    ordered,
    over_seeds,
    run_text,
    settings_text,
)
from analysis.render import Column, Row, Table, describe, fixed, keys, settings_columns
from analysis.statistics import Measure, Value, mean_of_samples
from polykv.config import load_group
from polykv.evaluation.statistics import holm

ABLATED = ["importance", "demand", "alpha", "inverse", "tiers"]
LINE = [*RUN, "document", "n_hops", "budget_bits", "policy", *ABLATED, "reseal"]
MINUS = {
    name: Measure(f"kl_minus_{name}", reduce=mean_of_samples) for name in ("uniform", "random")
}


def sides() -> dict[str, str]:
    """The signals of the published controller: importance and demand, as rows name them."""
    policy = load_group("policy", "topology")
    return {side: " + ".join(policy[side]) for side in ("importance", "demand")}


def lines_of(rows: pd.DataFrame) -> list[Row]:
    """One line per ablated policy: signals, setting, KL, and its difference to each baseline."""
    found = ordered(rows[rows["metric"] == "kl"])
    found = found.sort_values(["tiers", "reseal"], kind="stable")
    mine = found[found["baseline"] == ""]
    apart = [less(mine, found[found["baseline"] == name], m.metric) for name, m in MINUS.items()]
    lines = []
    for line, part in groups(pd.concat([mine, *apart]), *LINE):
        line |= {"signals": signals(line), "hops": int(line["n_hops"])}
        line |= {"budget": bits_text(line["budget_bits"]), "kl": over_seeds(part, KL.of)}
        line |= {f"minus_{name}": over_seeds(part, m.of) for name, m in MINUS.items()}
        lines.append(line)
    return lines


def signals(line: Row, short: bool = False) -> str:
    """The policy's signals as text, weighted by alpha where both sides count; `short` names the published sides."""
    names = {joined: side for side, joined in sides().items()} if short else {}
    weighed = [(line["alpha"], line["importance"]), (1 - line["alpha"], line["demand"])]
    said = [(weight, names.get(side, side)) for weight, side in weighed if weight and side]
    text = said[0][1] if said else "none"
    if len(said) > 1:
        text = " + ".join(
            f"{weight:g} {side}" if short else f"{weight:g} ({side})" for weight, side in said
        )
    return text + "; inverse" * bool(line["inverse"])


def table(rows: pd.DataFrame) -> Table:
    """Which signals beat uniform and random bits, and which do not."""
    lines = lines_of(rows)
    for line in lines:
        line["section"] = f"{run_text(line)}, {line['document']}"
        line |= {f"verdict_{name}": _verdict(line[f"minus_{name}"]) for name in MINUS}
    columns = [
        *keys("budget", "reseal", "hops", "signals", "tiers"),
        *settings_columns(rows),
        Column("kl", "KL to fp16", fixed(5)),
        Column("minus_uniform", "minus uniform [95 %]", fixed(5, "+"), interval=True),
        Column("verdict_uniform", "against uniform"),
        Column("minus_random", "minus random [95 %]", fixed(5, "+"), interval=True),
        Column("verdict_random", "against random"),
    ]
    explained = (
        "KL divergence to the fp16 relay on the last agent's answer, and its paired difference to uniform and to "
        "random bits on the same problems. `better` or `worse`: the 95 % interval of the difference leaves out 0, each "
        "line by itself (with so many lines a few do by chance). alpha weighs importance against demand, as `alpha "
        "(importance) + (1 - alpha) (demand)`; tiers are the bits that a token may get"
    )
    caption = f"The controller's signals at equal nominal bits. {describe(counted(rows))}"
    return Table("controller_ablation", caption, columns, lines, explained)


def _verdict(apart: Value) -> str | Value:
    if apart.low is None or apart.high is None:
        return Value(None, note="no interval was given")
    return "better" if apart.high < 0 else "worse" if apart.low > 0 else "no difference"


@style.styled
def figure(rows: pd.DataFrame) -> style.Picture | str:
    """Paired KL difference to uniform bits, with interval: left of 0 a signal earns its bits."""
    found = [line for line in lines_of(rows) if line["minus_uniform"].value is not None]
    if not found:
        return "no difference to uniform bits was measured"
    short = [signals(line, short=True) for line in found]
    mean = [line["minus_uniform"].value for line in found]
    found = pd.DataFrame(found).assign(short=short, mean=mean)
    # one order of the signals for all panels, the best at the bottom
    names = list(found.groupby("short")["mean"].mean().sort_values().index)
    runs = list(groups(found, *RUN, "document", "n_hops"))
    settings = [list(mine.groupby(["budget_bits", "reseal"])) for _, mine in runs]
    headings = [
        f"{run_text(run)}, {run['document']}, {hops_text(run['n_hops'])}{settings_text(run)}"
        for run, _ in runs
    ]
    canvas, panels = style.sheet(headings, max(map(len, settings)), 0.55 + 0.2 * len(names))
    for axes, setting in zip(panels, settings, strict=True):
        for ax, ((bits, reseal), mine) in zip(axes, setting, strict=False):
            _ablated(ax, mine, names)
            ax.set_title(f"{bits:g} bits, {reseal}")
        style.keep(axes, len(setting))
    named_sides = "; ".join(f"{side}: {joined}" for side, joined in sides().items())
    return style.picture(
        style.legend(canvas),
        "What each signal of the controller earns: KL divergence to the fp16 relay, less that of uniform bits on the "
        "same problems, at equal nominal bits",
        describe(counted(rows)),
        style.Marks(
            lines="Markers",
            more="Left of 0: better than uniform, each line by itself; the findings say what is left after correction "
            f"for their number. {named_sides}; tiers: the bits that a token may get.",
        ),
    )


def _ablated(ax: Axes, mine: pd.DataFrame, names: list[str]) -> None:
    kinds = sorted(set(mine["tiers"]), key=len, reverse=True)
    for place, tiers in enumerate(kinds):
        of_tiers = mine[mine["tiers"] == tiers]
        shift = 0.34 * ((len(kinds) - 1) / 2 - place) / max(1, len(kinds) - 1)
        ax.errorbar(
            of_tiers["mean"], [names.index(name) + shift for name in of_tiers["short"]],
            xerr=style.reaches(list(of_tiers["minus_uniform"])), fmt="os^D"[place % 4],
            color=(style.BLUE, style.ORANGE)[place % 2], markersize=3, elinewidth=0.8, capsize=1.5,
            label=f"tiers: {tiers}",
        )  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.axvline(0, color="0.4", linewidth=0.8, zorder=0)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.set_xlabel("KL less uniform's, nats")


@dataclass(frozen=True)
class Comparison:
    """One policy less uniform bits, in nats of KL: below 0 it is nearer to fp16.

    Attributes:
        at: the setting.
        is_published: whether the policy is the controller as published.
    """

    signals: str
    reseal: str
    at: str
    apart: Value
    is_published: bool = False

    @property
    def p(self) -> float:
        """Two-sided, as a normal mean has it whose 95 % interval is as wide.

        The width and not the side of zero: a skewed interval leans, so that its nearer end would flatter.
        """
        width, reach = self.apart.high - self.apart.low, NormalDist().inv_cdf(0.975)
        if not width:
            return float(self.apart.value == 0)
        return 2 * NormalDist().cdf(-2 * reach * abs(self.apart.value) / width)

    @property
    def better(self) -> bool:
        """By its own interval, uncorrected."""
        return self.apart.high < 0

    @property
    def worse(self) -> bool:
        """By its own interval, uncorrected."""
        return self.apart.low > 0


def findings(rows: pd.DataFrame) -> dict[str, list[str]]:
    """By run and kind of problems, sentences: counts before and after correction, and what leads."""
    by_run: dict[str, list[Comparison]] = {}
    policy = load_group("policy", CARD)
    tiers = "/".join(map(str, policy.tiers))
    theirs = sides() | {"alpha": policy.alpha, "inverse": policy.inverse, "tiers": tiers}
    for line in lines_of(rows):
        apart, at = line["minus_uniform"], (hops_text(line["hops"]), line["budget"], line["reseal"])
        if apart.low is not None and apart.high is not None:
            is_published = all(line[name] == value for name, value in theirs.items())
            about = (line["signals"], line["reseal"], ", ".join(at), apart, is_published)
            by_run.setdefault(f"{run_text(line)}, {line['document']}", []).append(
                Comparison(*about)
            )
    return {
        f"Which signals earn their bits (our question): {run}": [
            _counts(found),
            *_ahead(found),
            *_published([c for c in found if c.is_published]),
        ]
        for run, found in sorted(by_run.items())
    }


def _counts(found: Sequence[Comparison]) -> str:
    wins, losses = sum(c.better for c in found), sum(c.worse for c in found)
    better, worse = _corrected(found)
    adjusted = zip(found, holm([c.p for c in found]), strict=True)
    smallest = min((p for c, p in adjusted if c.apart.value < 0), default=None)
    outcome = "no signal beats equal bits" if not better else f"better in {len(better)}"
    nearest = "" if smallest is None else f" (smallest adjusted p = {smallest:.2g})"
    return (
        f"Signals against uniform bits, KL paired by problem: **{outcome}** after Holm over all {len(found)} "
        f"comparisons{nearest}; {len(worse)} are worse after it. Each by its own 95 % interval, {wins} are better and "
        f"{losses} worse, where chance alone gives about {0.025 * len(found):.1f} of either."
    )


def _corrected(found: Sequence[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
    """(better, worse) comparisons after Holm over all of `found`."""
    sure = [c for c, p in zip(found, holm([c.p for c in found]), strict=True) if p < ALPHA]
    return [c for c in sure if c.apart.value < 0], [c for c in sure if c.apart.value > 0]


def _ahead(found: Sequence[Comparison]) -> Iterator[str]:
    """The signals that are better most often, by resealing; selected after the fact, so not a finding."""
    wins = Counter(c.signals for c in found if c.better)
    for name in [name for name, count in wins.items() if count == max(wins.values())]:
        mine = [c for c in found if c.signals == name]
        n, n_better = Counter(c.reseal for c in mine), Counter(c.reseal for c in mine if c.better)
        each = " and ".join(f"{n_better[reseal]} of {n[reseal]} under {reseal}" for reseal in n)
        below = sum(c.apart.value < 0 for c in mine)
        yield (
            f"Most often better: {name}, by its own intervals in {each}; its mean is below uniform's in "
            f"{below} of {len(mine)}. Chosen after the fact it is no finding; named before, it would be better "
            f"in {len(_corrected(mine)[0])} of {len(mine)} after Holm over these. The settings share their problems, "
            "so they are no independent repeats."
        )


def _published(found: Sequence[Comparison]) -> Iterator[str]:
    """The controller as published, with Holm over its own settings: it was chosen before measuring."""
    if not found:
        return
    better, worse = _corrected(found)
    outcome = "a tie" if bool(better) == bool(worse) else "better" if better else "worse"
    each = "; ".join(f"{c.at} {c.apart.text('+.2g')}" for c in found)
    yield (
        f"Topology-aware cards, all signals and tiers, against uniform ones of equal bits: **{outcome}**, better in "
        f"{len(better)} and worse in {len(worse)} of {len(found)} settings after Holm over these. KL minus that of "
        f"uniform, nats: {each}."
    )


TABLES = {"controller_ablation": table}
FIGURES = {"controller_ablation": figure}
FINDINGS = findings
