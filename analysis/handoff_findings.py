"""Findings of the relays: do cards hold, do handoffs hurt, does a policy beat uniform bits, does the content help."""

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from analysis.handoff_accuracy import ALPHA, EXACT, KL, difference, verdicts
from analysis.handoff_controls import CONTROLS, GIVEN
from analysis.points import RUN, bits_text, groups, hops_text, run_text, settings_text
from analysis.render import Row
from analysis.statistics import Value
from polykv.evaluation.statistics import detectable, holm, mcnemar, skewed_interval

STUDY = "handoff_accuracy"
UNIFORM = "uniform"
# Of verdicts that may be paired: the same problems, after the same number of handoffs.
SAME = ("document", "n_hops", "seed", "n")
# The questions.
HOLDS = "Does a card answer like an fp16 card?"
DEPTH = "Do handoffs hurt?"
BITS = "Does a policy beat uniform bits at an equal budget?"
CONTENT = "Does the card's content help?"


@dataclass(frozen=True)
class Pair:
    """Two sides that answered the same problems, and the question that they answer.

    Attributes:
        own, other: rows of `verdicts`.
        more: what else is known of the pair.
    """

    question: str
    what: str
    own: Row
    other: Row
    more: str = ""

    @property
    def p(self) -> float:
        """McNemar's exact test, not corrected."""
        return mcnemar(self.own["right"], self.other["right"])[2]

    def told(self, p: float, level: float) -> str:
        """The sentence. `p` is corrected; `level` is that of the test which so many comparisons leave to each."""
        own, other = self.own["right"], self.other["right"]
        apart = Value(*difference(own, other))
        outcome, tail = "no difference shown", ""
        if p < ALPHA:
            outcome = "better" if apart.value > 0 else "worse"
        elif least := detectable(len(own), sum(mcnemar(own, other)[:2]), level):
            tail = f" ({100 * least:.1f} points would have shown)"
        rates = [100 * sum(side) / len(side) for side in (own, other)]
        return (
            f"{self.question} {self.what}: {rates[0]:.1f} against {rates[1]:.1f} % right, {apart.text('+.1f')} points, "
            f"**{outcome}**{tail}{self.more}."
        )


def findings(rows: pd.DataFrame) -> dict[str, list[str]]:
    """By run, problems and handoffs: a sentence for each comparison, with Holm's correction over all of them."""
    found = verdicts(rows)
    found = found[found["extraction"] == "flexible"]
    said = {}
    for about, mine in groups(found, *RUN, *SAME):
        pairs = [*_cards(mine), *_depths(mine), *_policies(mine, rows), *_contents(mine)]
        if not pairs:
            continue
        corrected = holm([pair.p for pair in pairs])
        what = f"{about['document']}, {hops_text(about['n_hops'])}, {about['n']} problems"
        what += settings_text(about)
        if found["seed"].nunique() > 1:
            what += f", seed {about['seed']}"
        said[f"Answers after handoffs: {run_text(about)}, {what}"] = [
            pair.told(p, ALPHA / len(pairs)) for pair, p in zip(pairs, corrected, strict=True)
        ]
    return said


def _last(mine: pd.DataFrame) -> list[Row]:
    """The verdicts after all handoffs."""
    return mine[mine["hop"] == mine["n_hops"]].to_dict("records")


def _exact(mine: pd.DataFrame) -> Row | None:
    return next((line for line in _last(mine) if line["policy"] == EXACT), None)


def _name(line: Row) -> str:
    if pd.isna(line["budget_bits"]):
        return line["policy"]
    return f"{line['policy']} at {bits_text(line['budget_bits'])}, {line['reseal']}"


def _budgeted(mine: pd.DataFrame) -> list[Row]:
    return [line for line in _last(mine) if pd.notna(line["budget_bits"])]


def _cards(mine: pd.DataFrame) -> Iterator[Pair]:
    if exact := _exact(mine):
        for line in _budgeted(mine):
            yield Pair(HOLDS, _name(line), line, exact)


def _depths(mine: pd.DataFrame) -> Iterator[Pair]:
    """The last answer against the first agent's, which has seen no card."""
    first = mine[mine["hop"] == 0].set_index("cell")
    for line in _last(mine):
        if line["cell"] in first.index and line["policy"] not in CONTROLS:
            alone = first.loc[line["cell"]].to_dict()
            yield Pair(DEPTH, f"{_name(line)}, after {hops_text(line['hop'])}", line, alone)


def _policies(mine: pd.DataFrame, rows: pd.DataFrame) -> Iterator[Pair]:
    budgeted = _budgeted(mine)
    for line in budgeted:
        for other in budgeted:
            alike = all(line[name] == other[name] for name in ("budget_bits", "reseal"))
            if alike and line["policy"] != UNIFORM == other["policy"]:
                yield Pair(BITS, _name(line), line, other, _divergence(rows, line, other))


def _contents(mine: pd.DataFrame) -> Iterator[Pair]:
    if exact := _exact(mine):
        for line in _last(mine):
            if line["policy"] in CONTROLS:
                yield Pair(CONTENT, f"{GIVEN[line['policy']]} in its place", line, exact)


def _divergence(rows: pd.DataFrame, line: Row, other: Row) -> str:
    """KL to the fp16 relay less the other's on the same problems, "" where they are not both measured."""
    kl = rows[(rows["metric"] == KL.metric) & (rows["hop"] == line["hop"])]
    own, theirs = (
        kl[kl["cell"] == side["cell"]].set_index("sample")["value"] for side in (line, other)
    )
    apart = (own - theirs).dropna()
    if apart.empty:
        return ""
    if not apart.any():
        return f"; KL to the fp16 relay is equal in all of {len(apart)} problems: the cards are the same"
    ends = skewed_interval(apart.to_numpy(float)) or (None, None)
    return (
        f"; KL to the fp16 relay {own[apart.index].mean():.2g} against {theirs[apart.index].mean():.2g} nats, "
        f"{Value(float(apart.mean()), *ends).text('+.2g')} over {len(apart)} problems"
    )


FINDINGS = findings
