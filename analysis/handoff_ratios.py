"""KL of cards in pairs, problem by problem: does depth hurt, does requantizing, and does topology-awareness help.

Depth: after all handoffs of a relay against the last of them alone, on the same tokens. Topology-awareness: a policy
against the one that it adds downstream demand to (QKVShare's question), at equal budgets.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pandas as pd

from analysis.handoff_accuracy import ALPHA, KL, PLAYED
from analysis.handoff_budgets import EQUAL, LEAST, SAME_CARDS, Against, tested
from analysis.points import (
    RUN,
    bits_text,
    cell_dtype,
    counted,
    groups,
    hops_text,
    ordered,
    run_text,
    settings_text,
)
from analysis.render import Column, Row, Table, describe, fixed, keys, significant
from analysis.statistics import Value, samples_of

STUDY = "handoff_accuracy"
DEPTH = "Do the handoffs before the last one add divergence?"
RESEAL = "Does requantizing everything at each handoff add divergence, against appending?"
DEMAND = "Does topology-awareness reduce divergence?"
# The policy of the same signals without downstream demand.
WITHOUT_DEMAND = {"topology": "local", "qkvshare": "dont_waste_bits"}
PLACE = ("hop", "policy", "budget_bits", "reseal")


@dataclass(frozen=True, eq=False)
class Pair:
    """KL of two sides on the same problems, and the question that their ratio answers.

    Attributes:
        at: the setting of the first side, of which `differs` says how the other differs.
        kl: by problem, of both sides (columns `own` and `other`).
        against: the first side's KL over the other's, tested together with the other pairs of its run.
    """

    question: str
    at: Row
    differs: str
    kl: pd.DataFrame
    against: Against = Against(EQUAL, 1.0)

    @property
    def is_tested(self) -> bool:
        return self.against.verdict != SAME_CARDS

    @property
    def sentence(self) -> str:
        at, means = self.at, self.kl.mean()
        unseen = ""
        if self.is_tested and self.against.p >= ALPHA:
            unseen = f" ({self.against.ratio.detectable:.2f} would have shown)"
        return (
            f"{self.question} {at['policy']} at {bits_text(at['budget_bits'])}, {at['reseal']}, after "
            f"{hops_text(at['hop'])}: KL {means['own']:.2g} against {means['other']:.2g} nats ({self.differs}), "
            f"ratio {self.against.over.text('.2f')}, **{self.against.verdict}**{unseen}."
        )


def by_run(rows: pd.DataFrame) -> dict[str, list[Pair]]:
    """The pairs of each run, tested together. Seeds, which may draw the same problems, are runs of their own."""
    found = ordered(cell_dtype(rows, PLAYED))
    found = found[found["budget_bits"].notna() & (found["hop"] > 0)]
    several = found["seed"].nunique() > 1
    said = {}
    for run, mine in groups(found, *RUN, "document", "n_hops", "seed"):
        pairs = _tested([*_depths(mine), *_reseals(mine), *_demands(mine)])
        seed = f", seed {run['seed']}" if several else ""
        name = f"{run_text(run)}, {run['document']}, {hops_text(run['n_hops'])}{seed}"
        if pairs:
            said[name + settings_text(run)] = pairs
    return said


def _depths(mine: pd.DataFrame) -> Iterator[Pair]:
    last = mine[mine["hop"] == mine["n_hops"]]
    for at, of in groups(last, *PLACE):
        if at["hop"] > 1:
            yield _pair(DEPTH, at, "the last handoff alone", (of, KL.metric), (of, "kl_once"))


def _reseals(mine: pd.DataFrame) -> Iterator[Pair]:
    later = mine[mine["hop"] > 1]  # the first card is the same
    for at, of in groups(later, "hop", "policy", "budget_bits"):
        sides = [(of[of["reseal"] == how], KL.metric) for how in ("requantize", "append")]
        yield _pair(RESEAL, at | {"reseal": "requantize"}, "append", *sides)


def _demands(mine: pd.DataFrame) -> Iterator[Pair]:
    for at, of in groups(mine[mine["hop"] == mine["n_hops"]], "hop", "budget_bits", "reseal"):
        for policy, without in WITHOUT_DEMAND.items():
            sides = [(of[of["policy"] == name], KL.metric) for name in (policy, without)]
            yield _pair(DEMAND, at | {"policy": policy}, without, *sides)


def _pair(question: str, at: Row, differs: str, *sides: tuple[pd.DataFrame, str]) -> Pair:
    own, other = (samples_of(rows, metric, ["sample"]) for rows, metric in sides)
    both = pd.concat({"own": own, "other": other}, axis=1).dropna()
    return Pair(question, at, differs, both)


def _tested(pairs: list[Pair]) -> list[Pair]:
    """The pairs that have problems in common, tested together."""
    found = tested({pair: pair.kl for pair in pairs if len(pair.kl) >= LEAST})
    return [replace(pair, against=found[pair]) for pair in pairs if pair in found]


def table(rows: pd.DataFrame) -> Table | None:
    """Every pair of every run: KL of both sides, their ratio, and the smallest ratio that would have shown."""
    lines = [
        _line(pair) | {"section": f"{pair.question} {run}"}
        for run, pairs in by_run(rows).items()
        for pair in pairs
    ]
    if not lines:
        return None
    columns = [
        *keys("hop", "policy", "budget", "reseal", "against"),
        Column("n", "problems"),
        Column("kl", "KL to fp16", significant),
        Column("other", "KL of the other", significant),
        Column("ratio", "ratio [95 %]", fixed(2), interval=True),
        Column("p", "p, Holm", significant),
        Column("detectable", "detectable", fixed(2)),
        Column("verdict", "verdict"),
    ]
    legend = (
        "KL divergence to the fp16 relay on the answer after these handoffs, teacher-forced on its text: means. ratio: "
        "of geometric means, paired by problem (t on logarithms, Holm over a run's pairs). detectable: the smallest "
        "ratio that so many problems show in 4 of 5 samples after that correction. against the last handoff alone: as "
        "if one agent had taken all turns before it. the same cards: KL is equal in every problem"
    )
    caption = f"Depth, requantizing and topology-awareness. {describe(counted(rows))}"
    return Table("handoff_ratios", caption, columns, lines, legend)


def _line(pair: Pair) -> Row:
    against, means = pair.against, pair.kl.mean()
    test = {"p": Value(against.p), "detectable": Value(against.ratio.detectable)}
    if not pair.is_tested:
        test = dict.fromkeys(test, Value(None, note="the values are equal"))
    about = {"hop": int(pair.at["hop"]), "policy": pair.at["policy"], "reseal": pair.at["reseal"]}
    about |= {"budget": bits_text(pair.at["budget_bits"]), "against": pair.differs}
    kl = {"kl": Value(means["own"]), "other": Value(means["other"]), "n": len(pair.kl)}
    return about | kl | test | {"ratio": against.over, "verdict": against.verdict}


def findings(rows: pd.DataFrame) -> dict[str, list[str]]:
    """By run: a sentence for each pair."""
    return {
        f"Divergence of handed-on cards in pairs: {run}": [pair.sentence for pair in pairs]
        for run, pairs in by_run(rows).items()
    }


TABLES = {"handoff_ratios": table}
FINDINGS = findings
