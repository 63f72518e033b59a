"""QKVShare's claims on answers: accuracy holds over handoffs, and its controller beats equal bits."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import NormalDist

import pandas as pd
from analysis.frontier import ALPHA
from analysis.handoff_reduce import (
    SETTING,
    bits_text,
    hops_text,
    verdicts,
    with_budget,
)
from analysis.published import Figure
from analysis.verdict import NO, OPEN, YES, Claim

from polykv.evaluation.statistics import holm, mcnemar

CARD = "topology"  # the policy of a QKVShare card
LOSS = (
    5.0  # points of accuracy: to hold is to rule out a greater loss. Our choice, none is published.
)
DIGEST = ", as a secondary digest of the paper has it"
SAYS = "; more problems (n_problems=) would tell"

of_paper = partial(Claim, "qkvshare")
Judge = Callable[[pd.DataFrame], tuple[str, str]]  # the rows of one run -> verdict and sentence


def claims(rows: pd.DataFrame, figures: Sequence[Figure]) -> list[Claim]:
    """One for each claim and each run (weights, problems, device) that can tell, else what would."""
    answers = verdicts(rows)
    answers = answers[answers["how"] == "strict"]
    said = [f for f in figures if f.metric == "gsm8k_accuracy" and f.controller[0] == CARD]
    hops, model = sorted({int(f.at) for f in said}), said[0].model.removesuffix("-instruct")
    run = f"experiment=handoff_accuracy model={model} relay=gsm8k"
    within = answers[answers["n_hops"].between(hops[0], hops[-1])]
    return [
        *each_run(f"accuracy holds over {hops[0]} to {hops[-1]} hops{DIGEST}", run, within, _holds),
        *each_run(
            f"topology-aware cards answer better than uniform ones{DIGEST}", run, within, _better
        ),
    ]


def each_run(claim: str, run: str, rows: pd.DataFrame, judge: Judge) -> list[Claim]:
    """The verdict of every run (and kind of problems), or what would tell."""
    found = []
    for (*place, document), mine in rows.groupby([*SETTING, "document"], sort=True):
        model, weights, device, dtype = place
        where = [f"{weights} weights of {model}", document, device, dtype]
        verdict, said = judge(mine)
        found.append(of_paper(verdict, f"{claim} (on {', '.join(filter(None, where))})", said))
    return found or [of_paper(OPEN, claim, f"Not measured; run {run}.", measured=False)]


def _holds(mine: pd.DataFrame) -> tuple[str, str]:
    """Against handing over fp16, on the same problems: depth costs both, the difference is the card's."""
    pairs = _pairs(mine, "fp16")
    if not pairs:
        return OPEN, "No card was run beside fp16; run experiment=handoff_accuracy."
    apart = {what: difference(card, other) for what, card, other in pairs}
    worst = min(apart, key=lambda what: apart[what][1])
    got, low, high = apart[worst]
    lost = [
        p for p, (_, *two) in zip(_tests(pairs), pairs, strict=True) if p < ALPHA and _loses(*two)
    ]
    said = (
        f"Against fp16 on {_span(pairs)}: at worst {got:+.1f} points "
        f"[{low:+.1f}, {high:+.1f}] ({worst}); {len(lost)} of {len(pairs)} comparisons are a significant "
        f"loss (McNemar, Holm)"
    )
    if lost:
        return NO, f"{said}."
    if low > -LOSS:
        return YES, f"{said}, and a loss of more than {LOSS:g} points is ruled out in each (95 %)."
    return OPEN, f"{said}, but a loss of {LOSS:g} points is not ruled out{SAYS}."


def _better(mine: pd.DataFrame) -> tuple[str, str]:
    pairs = _pairs(mine, "uniform")
    if not pairs:
        return OPEN, "No topology-aware card was run beside a uniform one of equal bits."
    found = [_loses(*two) for p, (_, *two) in zip(_tests(pairs), pairs, strict=True) if p < ALPHA]
    wins, losses = found.count(False), found.count(True)
    said = (
        f"On {_span(pairs)}: significantly better in {wins} and worse in {losses} of "
        f"{len(pairs)} comparisons (McNemar, Holm)"
    )
    if bool(wins) == bool(losses):
        return OPEN, f"{said}{SAYS}."
    return (YES if wins else NO), f"{said}."


def _pairs(mine: pd.DataFrame, other: str) -> list[tuple[str, list[bool], list[bool]]]:
    """(setting, right answers of the card, of the other policy), on the same problems and handoffs."""
    theirs = mine[mine["policy"] == other]
    found = []
    for card in mine[mine["policy"] == CARD].to_dict("records"):
        same = theirs[(theirs["n_hops"] == card["n_hops"]) & (theirs["seed"] == card["seed"])]
        if same["budget_bits"].notna().any():  # fp16 has neither a budget nor a kind of resealing
            same = same[with_budget(same, card["budget_bits"]) & (same["reseal"] == card["reseal"])]
        same = same[same["n"] == card["n"]]
        if len(same):
            what = (
                f"{hops_text(card['n_hops'])}, {bits_text(card['budget_bits'])}, {card['reseal']}"
            )
            found.append((what, card["verdicts"], same["verdicts"].iloc[-1]))
    return found


def _tests(pairs: Sequence[tuple]) -> list[float]:
    return holm([mcnemar(card, other)[2] for _, card, other in pairs])


def _loses(card: Sequence[bool], other: Sequence[bool]) -> bool:
    return sum(card) < sum(other)


def difference(one: Sequence[bool], other: Sequence[bool]) -> tuple[float, float, float]:
    """Points of accuracy that `one` has more, with Agresti and Min's 95 % interval (2005) for pairs.

    Half a problem is added to each cell, so that no difference at all among n still has a width.
    """
    only_one, only_other, _ = mcnemar(one, other)
    n = len(one) + 2
    centre = (only_one - only_other) / n
    spread = math.sqrt((only_one + only_other + 1) - n * centre**2) / n
    reach = NormalDist().inv_cdf(0.975) * spread
    exact = 100 * (only_one - only_other) / len(one)
    return exact, 100 * (centre - reach), 100 * (centre + reach)


def _span(pairs: Sequence[tuple]) -> str:
    return f"the same {len(pairs[0][1])} problems, in {len(pairs)} settings"
