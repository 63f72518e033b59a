"""QKVShare's figures of quality: by hop, and the ablation. Those of time: handoff_timing_figures.py.

Each takes the tidy rows and returns a canvas, or None where there is nothing to draw.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from analysis.colours import BLUE, ORANGE, policy_colour
from analysis.draw import reaches
from analysis.handoff_reduce import (
    SETTING,
    hops_text,
    relays,
    run_text,
    sides,
    spots_of,
    value,
)
from analysis.handoff_timing_figures import handoff_stages, handoff_ttft
from analysis.layout import legend, number_ticks, sheet, styled
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

PLACE = [*SETTING, "document"]
RUN = [*PLACE, "budget_bits", "reseal"]
EXACT = "fp16"  # the policy that the others are compared with
DODGE = 0.09  # handoffs between policies at one place of x, so that bars do not hide each other


@styled
def handoff_hops(rows: pd.DataFrame) -> Canvas | None:
    """KL to the fp16 relay and strict accuracy against handoffs; one line of panels per budget.

    The fp16 relay's own accuracy stands in each panel: what the others lose is lost from there.
    """
    found = relays(rows[rows["experiment"] != "controller_ablation"], "relay_kl", "accuracy")
    found = found[found["how"] != "flexible"]
    exact = found[(found["policy"] == EXACT) & (found["metric"] == "accuracy")]
    found = found[found["budget_bits"].notna()]
    if found.empty:
        return None
    groups = list(found.groupby(RUN, sort=False))
    canvas, rows_of = sheet([_run(dict(zip(RUN, key, strict=True))) for key, _ in groups], 2, 1.75)
    for (left, right), (_, mine) in zip(rows_of, groups, strict=True):
        kl = _by_hop(left, mine[mine["metric"] == "relay_kl"])
        if kl > 0:
            left.set_yscale("log")
        left.set_ylabel("KL to fp16 relay, nats")
        same = (exact[PLACE] == mine[PLACE].iloc[0]).all(axis=1)
        _by_hop(right, pd.concat([exact[same], mine[mine["metric"] == "accuracy"]]))
        right.set_ylabel("accuracy (strict), %")
        right.set_ylim(top=103)
    return legend(canvas)


def _by_hop(ax: Axes, mine: pd.DataFrame) -> float:
    """A line with intervals a policy, dashed for the exact one; the least value."""
    least = np.inf
    policies = list(dict.fromkeys(mine["policy"]))
    for place, (policy, spots) in enumerate(spots_of(mine, "n_hops").items()):
        shift = DODGE * (place - (len(policies) - 1) / 2)
        values = [v for _, v in spots]
        ax.errorbar(
            [n + shift for n, _ in spots], [v.value for v in values], yerr=reaches(values), fmt="o",
            linestyle="--" if policy == EXACT else "-", elinewidth=0.8, markersize=3,
            color=policy_colour(policy), label=policy, zorder=3 if policy == EXACT else 2,
        )  # fmt: skip
        least = min(least, *(v.value for v in values))
    number_ticks(ax, set(mine["n_hops"]))
    ax.set_xlim(mine["n_hops"].min() - 0.5, mine["n_hops"].max() + 0.5)
    ax.set_xlabel("handoffs")
    return least


@styled
def controller_ablation(rows: pd.DataFrame) -> Canvas | None:
    """Paired KL difference to uniform bits, with interval: left of 0 a signal earns its bits."""
    found = relays(rows, "kl_minus_uniform")
    if found.empty:
        return None
    parts = found["policy"].str.partition("; tiers ")
    tiers = parts[2].where(parts[2] != "", "all")
    found = found.assign(tiers="tiers: " + tiers, signals=parts[0].map(_short))
    # one order of the signals for all panels, the best at the bottom
    names = list(found.groupby("signals")["value"].mean().sort_values().index)
    runs = list(found.groupby([*SETTING, "document", "n_hops"], sort=False))
    settings = [list(mine.groupby(["budget_bits", "reseal"], sort=True)) for _, mine in runs]
    headings = [
        f"{run_text(dict(zip(SETTING, key, strict=False)))}, {key[-2]}, {hops_text(key[-1])}"
        for key, _ in runs
    ]
    height = 0.55 + 0.2 * len(names)
    canvas, rows_of = sheet(headings, max(map(len, settings)), height)
    for panels, setting in zip(rows_of, settings, strict=True):
        for ax, ((bits, reseal), mine) in zip(panels, setting, strict=False):
            _ablated(ax, mine, names)
            ax.set_title(f"{bits:g} bits, {reseal}")
        for ax in panels[1 : len(setting)]:
            ax.set_yticklabels([])
        for ax in panels[len(setting) :]:
            ax.remove()
    return legend(canvas)


def _ablated(ax: Axes, mine: pd.DataFrame, names: list[str]) -> None:
    kinds = sorted(set(mine["tiers"]), reverse=True)
    for place, (tiers, of_tiers) in enumerate([(k, mine[mine["tiers"] == k]) for k in kinds]):
        found = {name: value(of) for name, of in of_tiers.groupby("signals", sort=False)}
        found = {name: v for name, v in found.items() if v.value is not None}
        shift = 0.34 * ((len(kinds) - 1) / 2 - place) / max(1, len(kinds) - 1)
        ax.errorbar(
            [v.value for v in found.values()], [names.index(name) + shift for name in found],
            xerr=reaches(list(found.values())), fmt="os^D"[place % 4], color=(BLUE, ORANGE)[place % 2],
            markersize=3, elinewidth=0.8, capsize=1.5, label=tiers,
        )  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.axvline(0, color="0.4", linewidth=0.8, zorder=0)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.set_xlabel("KL less uniform's, nats")


def _short(signals: str) -> str:
    """The signals, with the sides of the published controller by their names."""
    for side, joined in sides().items():
        signals = signals.replace(f"({joined})", side).replace(joined, side)
    return signals.replace("(", "").replace(")", "")


def _run(named: dict[str, object]) -> str:
    bits = f"{named['budget_bits']:g} bits, {named['reseal']}"
    return f"{named['model']} ({named['weights']} weights), {named['document']}; {bits}"


HANDOFF_FIGURES: dict[str, Callable[[pd.DataFrame], Canvas | None]] = {
    figure.__name__: figure
    for figure in (handoff_hops, handoff_ttft, handoff_stages, controller_ablation)
}
