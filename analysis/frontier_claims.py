"""What recipes' rows say to PolyKV's claims on context, agents and keys against values, and to our own questions."""

from collections.abc import Mapping

import pandas as pd

from analysis.frontier import (
    Comparison,
    Standing,
    by_setting,
    compared,
    composed,
    deltas_of,
    measured,
    over_agents,
    over_contexts,
    scores,
    trend,
)
from analysis.published import INCONCLUSIVE, NOT_MEASURED, NOT_REPRODUCED, REPRODUCED, Claim
from analysis.statistics import ALPHA, Pairs, Value, pairs_of, samples_of

STUDY = "compare"
PAPER, TABLE, RECIPE = "polykv", "quality", "polykv"
TREND = "run experiment=context_scaling with three contexts (context=) of n_documents=8"
MORE = "; more documents (n_documents=) would tell"
PRINTED = 0.01  # a perplexity delta's last printed digit, in percent
SAME_NATS = 0.01  # of one token's log-probability; rounding is a hundred times less
EQUAL_BITS = 0.05
PAIRS = {
    ("turboquant_4bit", "uniform_rotated"): "4-bit TurboQuant and plain absmax with a rotation",
    ("turboquant_3bit", "uniform_rotated_3bit"): "3-bit TurboQuant and plain absmax with a rotation",
    ("turboquant_3bit", "uniform_rotated"): "3-bit TurboQuant and plain 4-bit with a rotation",
    ("turboquant_4bit", "turboquant_prod_4bit"): "4-bit TurboQuant keys without and with QJL residual",
    ("q4_0", "q4_0_rotated"): "ggml's q4_0 without and with a rotation before it",
    ("uniform", "uniform_rotated"): "4-bit absmax without and with a rotation before it",
    ("polykv", "polykv_q8_0"): "PolyKV as published and with q8_0 keys and random signs",
}  # fmt: skip


def claims(rows: pd.DataFrame) -> list[Claim]:
    """One for each claim and each setting that can tell, else one with the command that would."""
    contexts = [(where, mine) for where, recipe, mine in over_contexts(rows) if recipe == RECIPE]
    crowds = [(where, mine) for where, recipe, mine in over_agents(rows) if recipe == RECIPE]
    found = scores(rows)
    bits = by_setting(found[composed(found)])
    judged = {
        ("the perplexity delta shrinks as the context grows", "context_scaling"): [
            (where, _shrinks(mine)) for where, mine in contexts
        ],
        ("quality does not depend on how many agents read the pool", "agent_scaling"): [
            (where, _same_for_all(mine)) for where, mine in crowds
        ],
        ("keys deserve more bits than values (8 and 3)", "kv_asymmetry"): [
            (where, verdict) for where, mine in bits if (verdict := _unequal(mine))
        ],
    }
    return [
        claim
        for (said, experiment), verdicts in judged.items()
        for claim in _each(said, experiment, verdicts)
    ]


def _each(said: str, experiment: str, verdicts: list[tuple[str, tuple[str, str]]]) -> list[Claim]:
    if not verdicts:
        run = f"Not measured; run experiment={experiment}."
        return [Claim(PAPER, TABLE, NOT_MEASURED, said, run)]
    return [Claim(PAPER, TABLE, got[0], f"{said} (on {on})", got[1]) for on, got in verdicts]


def _shrinks(mine: pd.DataFrame) -> tuple[str, str]:
    deltas = deltas_of(mine)
    contexts = deltas.index.to_numpy(float)
    slope, mean = trend(contexts, deltas.to_numpy()), float(deltas.mean())
    if slope.low is None:
        return INCONCLUSIVE, f"{slope.note.capitalize()}; {TREND}."
    # a negative delta shrinks upwards
    ends = (slope.low, slope.high) if mean >= 0 else (-slope.high, -slope.low)
    verdict = REPRODUCED if ends[1] < 0 else NOT_REPRODUCED if ends[0] > 0 else INCONCLUSIVE
    return verdict, (
        f"Over {contexts.min():,.0f} to {contexts.max():,.0f} tokens, {len(deltas)} documents, its mean is {mean:+.3f} "
        f"% and it changes by {_said(slope, '+.3f')} points with each doubling{MORE * (verdict == INCONCLUSIVE)}."
    )  # fmt: skip


def _same_for_all(mine: pd.DataFrame) -> tuple[str, str]:
    crowds = {int(n): part for n, part in mine.groupby("n_agents")}
    deltas = [measured(part, "perplexity_delta").value for part in crowds.values()]
    spreads = [measured(part, "agent_spread").value for part in crowds.values()]
    if len(crowds) < 2 or None in (*deltas, *spreads):
        return INCONCLUSIVE, "One number of agents tells nothing; run n_agents=1,15."
    apart, spread = max(deltas) - min(deltas), max(spreads)
    return REPRODUCED if apart < PRINTED and spread < SAME_NATS else NOT_REPRODUCED, (
        f"With {min(crowds)} to {max(crowds)} agents in a batch the perplexity delta changes by {apart:.2g} points, "
        f"and no agent's log-probability differs from a single reader's by more than {spread:.2g} nats."
    )


def _unequal(mine: pd.DataFrame) -> tuple[str, str] | None:
    """None where one of the two was not run."""
    widths = {(key, value): part for (key, value), part in mine.groupby(["key_bits", "value_bits"])}
    if (8, 3) not in widths or (3, 8) not in widths:
        return None
    two = [widths[8, 3], widths[3, 8]]
    keys, values = (measured(part, "kl_mean") for part in two)
    pairs = pairs_of(samples_of(pd.concat(two), "kl", ["recipe"]).swaplevel())
    p = next(iter(pairs.p.values()), None)
    tied = p is None or p >= ALPHA
    better = REPRODUCED if pairs.names[0] == two[0]["recipe"].iloc[0] else NOT_REPRODUCED
    return INCONCLUSIVE if tied else better, (
        f"At equal bits: mean KL {_said(keys, '.3g')} with keys at 8 and values at 3, {_said(values, '.3g')} the other "
        f"way round{_p(p)}{MORE * tied}."
    )


def findings(rows: pd.DataFrame) -> Mapping[str, list[str]]:
    """Which recipe, by setting."""
    return {f"Which recipe: {found.setting}": _recipes(found) for found in compared(rows)}


def _recipes(found: Comparison) -> list[str]:
    front = sorted((s for s in found.standings if s.on_front), key=lambda s: s.spot)
    steps = ", ".join(f"{s.recipe} ({s.spot[0]:.2f} bits, KL {s.spot[1]:.3g})" for s in front)
    by_name = {s.recipe: s for s in found.standings}
    lines = [f"The Pareto front of stored bits and mean KL: {steps}."]
    lines += [
        _pair(by_name[first], by_name[second], said, found.pairs)
        for (first, second), said in PAIRS.items()
        if first in by_name and second in by_name
    ]
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
        f"{s.recipe} {s.spot[0]:.2f} bits, KL {_said(s['kl_mean'], '.3g')}" for s in (one, other)
    )
    return f"{said}, at {at} bits: **{outcome}**{_p(p, ' after Holm')} ({each})."


def _said(value: Value, form: str) -> str:
    if value.low is None:
        return f"{value.value:{form}}"
    return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"


def _p(p: float | None, how: str = "") -> str:
    return "" if p is None else f", p = {p:.2g}{how}"


CLAIMS = claims
FINDINGS = findings
