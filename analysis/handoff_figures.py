"""QKVShare's figures: quality by hop, time to first token by context, its stages, and the ablation.

Each takes the tidy rows and returns a canvas, or None where there is nothing to draw.
"""

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from analysis import published
from analysis.colours import BLUE, ORANGE, policy_colour
from analysis.draw import OPEN, reaches
from analysis.handoff_reduce import SETTING, hops_text, relays, sides, value
from analysis.handoff_timing import STAGES
from analysis.labels import label_ends
from analysis.layout import COLUMN, PAGE, number_ticks, plain_log, sheet, styled
from analysis.reduce import Value

RUN = [*SETTING, "document", "budget_bits", "reseal"]
TRANSPORTS = {"memory": "card in memory", "file": "card through a file"}
DODGE = 0.09  # handoffs between policies at one place of x, so that bars do not hide each other


@styled
def handoff_hops(rows: pd.DataFrame) -> Canvas | None:
    """KL to the fp16 relay and strict accuracy against handoffs; one line of panels per budget."""
    found = relays(rows[rows["experiment"] != "controller_ablation"], "relay_kl", "accuracy")
    found = found[(found["how"] != "flexible") & found["budget_bits"].notna()]
    if found.empty:
        return None
    groups = list(found.groupby(RUN, sort=False))
    canvas, rows_of = sheet([_run(dict(zip(RUN, key, strict=True))) for key, _ in groups], 2, 1.75)
    for (left, right), (_, mine) in zip(rows_of, groups, strict=True):
        kl = _by_hop(left, mine[mine["metric"] == "relay_kl"])
        if kl > 0:
            left.set_yscale("log")
        left.set_ylabel("KL to fp16 relay, nats")
        _by_hop(right, mine[mine["metric"] == "accuracy"])
        right.set_ylabel("accuracy (strict), %")
        right.set_ylim(top=103)
        for ax, metric in ((left, "relay_kl"), (right, "accuracy")):
            label_ends(ax, _ends(mine[mine["metric"] == metric]))
    return canvas


def _by_hop(ax: Axes, mine: pd.DataFrame) -> float:
    """A line with intervals a policy; the least value."""
    least = np.inf
    policies = list(dict.fromkeys(mine["policy"]))
    for place, (policy, spots) in enumerate(_spots(mine, "n_hops").items()):
        shift = DODGE * (place - (len(policies) - 1) / 2)
        values = [v for _, v in spots]
        ax.errorbar(
            [n + shift for n, _ in spots], [v.value for v in values], yerr=reaches(values), fmt="o-",
            elinewidth=0.8, markersize=3, color=policy_colour(policy),
        )  # fmt: skip
        least = min(least, *(v.value for v in values))
    number_ticks(ax, set(mine["n_hops"]))
    ax.set_xlabel("handoffs")
    return least


def _spots(mine: pd.DataFrame, axis: str) -> dict[str, list[tuple[float, Value]]]:
    """The values of each policy along an axis, of those that have any."""
    found = {}
    for policy, line in mine.groupby("policy", sort=False):
        spots = [(n, value(of)) for n, of in line.groupby(axis)]
        if spots := [(n, v) for n, v in spots if v.value is not None]:
            found[policy] = spots
    return found


def _ends(mine: pd.DataFrame) -> list[tuple[float, str, str]]:
    lines = _spots(mine, "n_hops").items()
    return [(spots[-1][1].value, policy, policy_colour(policy)) for policy, spots in lines]


@styled
def handoff_ttft(rows: pd.DataFrame) -> Canvas | None:
    """Milliseconds against context, log-log, with quartiles; published ones open, on the same model only."""
    found = rows[(rows["metric"] == "ttft") & rows["context_tokens"].notna()]
    if found.empty:
        return None
    groups = list(found.groupby(SETTING, sort=False))
    headings = [_machine(dict(zip(SETTING, key, strict=True))) for key, _ in groups]
    canvas, panels = sheet(headings, len(TRANSPORTS), 2.1, PAGE)
    for axes, ((model, *_), mine) in zip(panels, groups, strict=True):
        said = [f for f in published.load("qkvshare") if f.metric == "ttft" and not f.digest]
        said = [f for f in said if published.same_model(f.model, model)]
        for ax, (transport, title) in zip(axes, TRANSPORTS.items(), strict=True):
            ax.set_title(title)
            for f in said:
                ax.plot(
                    f.label_tokens, f.value.value, "s", color=policy_colour(f.controller[0]), **OPEN
                )
            ax.set_xscale("log", base=2)
            plain_log(ax)
            number_ticks(ax, {*mine["context_tokens"], *(f.label_tokens for f in said)})
            ax.set_xlabel("context, tokens")
            shown = mine[mine["protocol"].str.match(f"(text|{transport})")]
            label_ends(ax, _draw_routes(ax, shown))
        axes[0].set_ylabel("time to first token, ms")
    return canvas


def _draw_routes(ax: Axes, mine: pd.DataFrame) -> list[tuple[float, str, str]]:
    """A line for each policy and way of reading; where it ends, its name and colour."""
    ends = []
    for route, line in mine.groupby("protocol", sort=False):
        in_place = route.endswith("in place")
        for policy, spots in _spots(line, "context_tokens").items():
            values, tint = [v for _, v in spots], policy_colour(policy)
            ax.errorbar(
                [n for n, _ in spots], [v.value for v in values], yerr=reaches(values), fmt="o",
                linestyle="--" if in_place else "-", markersize=3.5, color=tint,
            )  # fmt: skip
            ends.append((values[-1].value, policy + ", in place" * in_place, tint))
    return ends


@styled
def handoff_stages(rows: pd.DataFrame) -> Canvas | None:
    """Stacked milliseconds by stage with the total's quartiles, one bar a route; a panel per context."""
    found = rows[rows["metric"].str.startswith("stage_") & rows["context_tokens"].notna()]
    found = found[found["policy"] != "reprefill"]
    if found.empty:
        return None
    settings = list(found.groupby(SETTING, sort=False))
    across = max(part["context_tokens"].nunique() for _, part in settings)
    headings = [_machine(dict(zip(SETTING, key, strict=True))) for key, _ in settings]
    n_bars = found.groupby(["policy", "protocol"]).ngroups
    canvas, rows_of = sheet(headings, across, 0.6 + 0.15 * n_bars, PAGE if across > 1 else COLUMN)
    tints = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for panels, (_, mine) in zip(rows_of, settings, strict=True):
        contexts = sorted(set(mine["context_tokens"]))
        for ax, tokens in zip(panels, contexts, strict=False):
            _stacked(ax, mine[mine["context_tokens"] == tokens], tints)
            ax.set_title(f"{tokens:,.0f} tokens")
        for ax in panels[1 : len(contexts)]:
            ax.set_yticklabels([])
        for ax in panels[len(contexts) :]:
            ax.remove()
    handles, names = rows_of[0][0].get_legend_handles_labels()
    canvas.legend(handles, names, loc="outside lower center", ncols=len(names), columnspacing=1)
    return canvas


def _stacked(ax: Axes, mine: pd.DataFrame, tints: list[str]) -> None:
    bars = [name for name, _ in mine.groupby(["policy", "protocol"], sort=False)]
    left = np.zeros(len(bars))
    for stage, tint in zip(STAGES, tints, strict=True):
        widths = [_stage(mine, stage, *bar).value or 0 for bar in bars]
        ax.barh(range(len(bars)), widths, left=left, color=tint, label=stage.replace("_", " "))
        left += widths
    for height, bar in enumerate(bars):
        total = _stage(mine, "total", *bar)
        if total.low is not None:
            ax.plot([total.low, total.high], [height, height], "|-", color="0.35", linewidth=0.8)
    ax.set_yticks(range(len(bars)), [f"{policy}, {route}" for policy, route in bars])
    ax.invert_yaxis()
    ax.set_axisbelow(True)
    ax.grid(axis="x")
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("ms, means")


def _stage(mine: pd.DataFrame, stage: str, policy: str, route: str) -> Value:
    of = mine[(mine["metric"] == f"stage_{stage}") & (mine["policy"] == policy)]
    return value(of[of["protocol"] == route])


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
        f"{_machine(dict(zip(SETTING, key, strict=False)))}, {key[-2]}, {hops_text(key[-1])}"
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
    handles, texts = panels[0].get_legend_handles_labels()
    canvas.legend(handles, texts, loc="outside lower center", ncols=len(texts))
    return canvas


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


def _machine(named: dict[str, object]) -> str:
    return f"{named['model']} ({named['weights']} weights), {named['device']}, {named['dtype']}"


HANDOFF_FIGURES: dict[str, Callable[[pd.DataFrame], Canvas | None]] = {
    figure.__name__: figure
    for figure in (handoff_hops, handoff_ttft, handoff_stages, controller_ablation)
}
