"""What the controller's ablation says once its many comparisons are corrected for. Pure.

The question is ours: QKVShare names the ablation as future work and publishes no KL divergence.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import pandas as pd
from analysis.frontier import ALPHA
from analysis.handoff_reduce import SETTING, bits_text, hops_text, relays, run_text, sides, value
from analysis.reduce import Value
from analysis.relay_claims import CARD
from analysis.verdict import p_said, with_interval

from polykv.config import load_group
from polykv.evaluation.statistics import holm

EXPERIMENT = "controller_ablation"
TIERS = "; tiers "  # ends the signals where a token may not get every tier


@dataclass(frozen=True)
class Comparison:
    """One policy less uniform bits, in nats of KL: below 0 it is nearer to fp16. `at`: the setting."""

    signals: str
    reseal: str
    at: str
    apart: Value

    @property
    def p(self) -> float:
        """Two-sided, as a normal mean has it whose 95 % interval is as wide.

        The width and not the side of zero: with skew, a percentile interval, as older rows have it, leans to the
        wrong side (Hesterberg 2015), so that its nearer end would flatter.
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


def compared(rows: pd.DataFrame) -> Iterator[tuple[str, list[Comparison]]]:
    """Each run and kind of problems, with all its comparisons that have an interval."""
    found = relays(rows[rows["experiment"] == EXPERIMENT], "kl_minus_uniform")
    for (*place, document), mine in found.groupby([*SETTING, "document"], sort=True):
        line = []
        keys = ["policy", "reseal", "n_hops", "budget_bits"]
        for (policy, reseal, hops, bits), part in mine.groupby(keys, sort=True):
            apart = value(part)
            if apart.low is not None and apart.high is not None:
                at = f"{hops_text(hops)}, {bits_text(bits)}, {reseal}"
                line.append(Comparison(policy, reseal, at, apart))
        if line:
            run = run_text(dict(zip(SETTING, place, strict=True)))
            yield f"{run}, {document}", line


def sentences(found: Sequence[Comparison]) -> list[str]:
    """Counts before and after correction, the signals that are ahead, and the published controller."""
    return [
        _counts(found),
        *_ahead(found),
        *_published([c for c in found if c.signals == published_signals()]),
    ]


def published_signals() -> str:
    """What experiments/controller_ablation calls the published controller: both sides, all tiers."""
    alpha, named = load_group("policy", CARD).alpha, sides()
    return f"{alpha:g} ({named['importance']}) + {1 - alpha:g} ({named['demand']})"


def _counts(found: Sequence[Comparison]) -> str:
    wins, losses = sum(c.better for c in found), sum(c.worse for c in found)
    better, worse = _corrected(found)
    smallest = min(
        (p for c, p in zip(found, holm([c.p for c in found]), strict=True) if c.apart.value < 0),
        default=None,
    )
    outcome = "no signal beats equal bits" if not better else f"better in {len(better)}"
    nearest = "" if smallest is None else f" (smallest adjusted{p_said(smallest).replace(',', '')})"
    return (
        f"Signals against uniform bits, KL paired by problem: **{outcome}** after Holm over all "
        f"{len(found)} comparisons{nearest}; {len(worse)} are worse after it. Each by its own 95 % interval, "
        f"{wins} are better and {losses} worse, where chance alone gives about {0.025 * len(found):.1f} of "
        "either."
    )


def _corrected(found: Sequence[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
    """Those that are better and those that are worse after Holm over all of `found`."""
    sure = [c for c, p in zip(found, holm([c.p for c in found]), strict=True) if p < ALPHA]
    return [c for c in sure if c.apart.value < 0], [c for c in sure if c.apart.value > 0]


def _ahead(found: Sequence[Comparison]) -> Iterator[str]:
    """The signals that are better most often, by resealing: a lead, which the correction above judges."""
    wins = Counter(_bare(c) for c in found if c.better)
    for signals in [name for name, count in wins.items() if count == max(wins.values())]:
        mine = [c for c in found if _bare(c) == signals]
        parts = []
        for reseal in dict.fromkeys(c.reseal for c in mine):
            own = [c for c in mine if c.reseal == reseal]
            parts.append(f"{sum(c.better for c in own)} of {len(own)} under {reseal}")
        better, _ = _corrected(mine)
        below = sum(c.apart.value < 0 for c in mine)
        yield (
            f"Most often better: {signals}, by its own intervals in {' and '.join(parts)}; its mean is below "
            f"uniform's in {below} of {len(mine)}. Chosen after the fact it is a lead and no finding; named "
            f"before, it would be better in {len(better)} of {len(mine)} after Holm over these. The settings "
            "share their problems, so they are no independent repeats."
        )


def _bare(c: Comparison) -> str:
    return c.signals.partition(TIERS)[0]


def _published(found: Sequence[Comparison]) -> Iterator[str]:
    """The controller as published, its own settings the family: it was named before any was measured."""
    if not found:
        return
    better, worse = _corrected(found)
    outcome = "a tie" if bool(better) == bool(worse) else "better" if better else "worse"
    parts = "; ".join(f"{c.at} {with_interval(c.apart, '+.2g')}" for c in found)
    yield (
        f"Topology-aware cards, all signals and tiers, against uniform ones of equal bits: **{outcome}**, "
        f"better in {len(better)} and worse in {len(worse)} of {len(found)} settings after Holm over these. "
        f"KL minus that of uniform, nats: {parts}."
    )
