"""QKVShare's figures of time: to first token by context and route, and by stage.

Each takes the tidy rows and returns a canvas, or None where there is nothing to draw.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from analysis.colours import policy_colour
from analysis.draw import IN_PLACE, OPEN, READ_IN_PLACE, reaches
from analysis.handoff_reduce import SETTING, average, ordered, run_text, spots_of, value
from analysis.handoff_timing import STAGES
from analysis.layout import PAGE, SIZE, legend, number_ticks, plain_log, sheet, styled
from analysis.published import Figure
from analysis.reduce import Value
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from analysis import published

TRANSPORTS = {"memory": "card in memory", "file": "card through a file"}
WHISKER = "0.35"


@styled
def handoff_ttft(rows: pd.DataFrame) -> Canvas | None:
    """Milliseconds against context, log-log, with quartiles; published ones open, on the same model only.

    Bars of the routes where there is one context only.
    """
    found = rows[(rows["metric"] == "ttft") & rows["context_tokens"].notna()]
    if found.empty:
        return None
    groups = list(found.groupby(SETTING, sort=False))
    shown = [name for name in TRANSPORTS if found["protocol"].str.match(name).any()]
    shown = shown or [*TRANSPORTS][:1]  # nothing but re-prefill
    headings = [run_text(dict(zip(SETTING, key, strict=True))) for key, _ in groups]
    n_bars = found.groupby(["policy", "protocol"]).ngroups / len(shown)
    said = [f for f in published.load("qkvshare") if f.metric == "ttft" and not f.digest]
    beside = [[f for f in said if published.same_model(f.model, key[0])] for key, _ in groups]
    one_context = found["context_tokens"].nunique() == 1 and not any(beside)
    height = 0.6 + 0.2 * n_bars if one_context else 2.1
    canvas, panels = sheet(headings, len(shown), height, PAGE, share_y=True)
    for axes, (_, mine), of_model in zip(panels, groups, beside, strict=True):
        for ax, transport in zip(axes, shown, strict=True):
            routes = _routes(mine[mine["protocol"].str.match(f"(text|{transport})")])
            if one_context:
                _route_bars(ax, routes)
                tokens = mine["context_tokens"].iloc[0]
                ax.set_title(f"{TRANSPORTS[transport]}, {tokens:,.0f} tokens")
            else:
                _route_lines(ax, routes, of_model)
                ax.set_title(TRANSPORTS[transport])
        if not one_context:
            axes[0].set_ylabel("time to first token, ms")
    return canvas if one_context else legend(canvas)


Routes = dict[str, tuple[str, list[tuple[float, Value]]]]  # policy, values by context


def _routes(mine: pd.DataFrame) -> Routes:
    """What was timed, by its name: the policy, and whether the card is read in place."""
    found: Routes = {}
    for route, line in ordered(mine).groupby("protocol", sort=False):
        for policy, spots in spots_of(line, "context_tokens").items():
            found[policy + IN_PLACE * ("in place" in route)] = policy, spots
    return found


def _route_lines(ax: Axes, routes: Routes, said: Sequence[Figure]) -> None:
    for f in said:
        ax.plot(f.label_tokens, f.value.value, "s", color=policy_colour(f.controller[0]), **OPEN)
    for name, (policy, spots) in routes.items():
        values = [v for _, v in spots]
        look = READ_IN_PLACE if name.endswith(IN_PLACE) else {}
        ax.errorbar(
            [n for n, _ in spots], [v.value for v in values], yerr=reaches(values), marker="o",
            markersize=3.5, color=policy_colour(policy), label=name, **look,
        )  # fmt: skip
    ax.set_xscale("log", base=2)
    plain_log(ax)
    contexts = {n for _, spots in routes.values() for n, _ in spots}
    number_ticks(ax, {*contexts, *(f.label_tokens for f in said)})
    ax.set_xlabel("context, tokens")


def _route_bars(ax: Axes, routes: Routes) -> None:
    values = [spots[0][1] for _, spots in routes.values()]
    bars = ax.barh(
        range(len(routes)), [v.value for v in values], xerr=reaches(values), height=0.7,
        color=[policy_colour(policy) for policy, _ in routes.values()], ecolor=WHISKER,
    )  # fmt: skip
    ax.bar_label(bars, [_digits(v.value) for v in values], padding=3, fontsize=SIZE)
    _bar_names(ax, list(routes))
    ax.margins(x=0.12)
    ax.set_xlabel("time to first token, ms")


def _bar_names(ax: Axes, names: Sequence[str]) -> None:
    """A name beside each horizontal bar, the first on top, and a grid of values only."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_axisbelow(True)
    ax.grid(axis="x")
    ax.grid(axis="y", visible=False)


@styled
def handoff_stages(rows: pd.DataFrame) -> Canvas | None:
    """Milliseconds by stage, stacked, one bar a route, with the total's quartiles; a panel per context."""
    found = rows[rows["metric"].str.startswith("stage_") & rows["context_tokens"].notna()]
    found = found[found["policy"] != "reprefill"]
    if found.empty:
        return None
    settings = list(found.groupby(SETTING, sort=False))
    across = max(part["context_tokens"].nunique() for _, part in settings)
    headings = [run_text(dict(zip(SETTING, key, strict=True))) for key, _ in settings]
    n_bars = found.groupby(["policy", "protocol"]).ngroups
    canvas, rows_of = sheet(headings, across, 0.6 + 0.15 * n_bars, PAGE)
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
    return legend(canvas)


def _stacked(ax: Axes, mine: pd.DataFrame, tints: list[str]) -> None:
    bars = [name for name, _ in mine.groupby(["policy", "protocol"], sort=False)]
    left = np.zeros(len(bars))
    for stage, tint in zip(STAGES, tints, strict=True):
        widths = np.array([_stage(mine, stage, *bar).value or 0 for bar in bars])
        if widths.any():
            named = {"color": tint, "label": stage.replace("_", " ")}
            ax.barh(range(len(bars)), widths, left=left, **named)
        left += widths
    for height, bar in enumerate(bars):
        total = _stage(mine, "total", *bar)
        if total.low is not None:  # its own ends: a mean may lie outside the quartiles
            at = [total.low, total.high], [height, height]
            ax.plot(*at, "|-", color=WHISKER, linewidth=0.8, label="total, quartiles")
    _bar_names(ax, [f"{policy}, {route}" for policy, route in bars])
    ax.set_xlabel(f"ms, {average(mine)}")


def _stage(mine: pd.DataFrame, stage: str, policy: str, route: str) -> Value:
    of = mine[(mine["metric"] == f"stage_{stage}") & (mine["policy"] == policy)]
    return value(of[of["protocol"] == route])


def _digits(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
