"""QKVShare's figures: quality by hop, time to first token by context, its stages, and the ablation.

Each takes the tidy rows and returns a canvas, or None where there is nothing to draw.
"""

import textwrap
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")  # files only, no window

import matplotlib.pyplot as plt  # noqa: E402
import pandas as pd  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure as Canvas  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator  # noqa: E402

from analysis.draw import label_ends  # noqa: E402
from analysis.figures import STYLE  # noqa: E402
from analysis.handoff_reduce import POLICIES, SETTING, qkvshare, relays, value  # noqa: E402
from analysis.handoff_timing import HOLDS, STAGES  # noqa: E402
from analysis.reduce import Value  # noqa: E402

PANEL = (3.8, 2.7)  # inches
RUN = [*SETTING, "document", "budget_bits", "reseal"]


def handoff_hops(rows: pd.DataFrame) -> Canvas | None:
    """KL to the fp16 relay (above) and strict accuracy (below) against handoffs; one column per budget."""
    found = relays(rows[rows["experiment"] != "controller_ablation"], "relay_kl", "accuracy")
    found = found[(found["how"] != "flexible") & found["budget_bits"].notna()]
    if found.empty:
        return None
    groups = list(found.groupby(RUN, sort=False))

    def panel(ax: Axes, down: int, right: int) -> None:
        key, mine = groups[right]
        metric = ("relay_kl", "accuracy")[down]
        ends = []
        for policy, line in mine[mine["metric"] == metric].groupby("policy", sort=False):
            spots = {n: value(of) for n, of in line.groupby("n_hops")}
            spots = {n: v for n, v in spots.items() if v.value is not None}
            _line(ax, spots, policy)
            ends.append((list(spots.values())[-1].value, policy, _colour(policy)))
        if metric == "relay_kl" and all(y > 0 for y, *_ in ends):
            ax.set_yscale("log")
        named = dict(zip(RUN, key, strict=True))
        _ticks(ax, sorted(set(mine["n_hops"])))
        ax.set_xlabel("handoffs")
        ax.set_ylabel(("KL to fp16 relay, nats", "accuracy (strict), %")[down])
        if metric == "accuracy":
            ax.set_ylim(0, 100)
        title = f"{named['model']} ({named['weights']} weights), {named['document']}"
        ax.set_title(f"{title}\n{named['budget_bits']:g} bits, {named['reseal']}")
        label_ends(ax, ends)

    return _grid(
        2, len(groups), panel, "Bars: 95 % intervals. Tests of pairs: table handoff_pairs."
    )


def handoff_ttft(rows: pd.DataFrame) -> Canvas | None:
    """Milliseconds against context, log-log; published ones as open markers where the model is the same."""
    found = rows[(rows["metric"] == "ttft") & rows["context_tokens"].notna()]
    if found.empty:
        return None
    groups = list(found.groupby(SETTING, sort=False))
    said = qkvshare().query("metric == 'ttft' and not digest")

    def panel(ax: Axes, down: int, right: int) -> None:
        key, mine = groups[right]
        ends = []
        for (policy, route), line in mine.groupby(["policy", "protocol"], sort=False):
            spots = {n: value(of) for n, of in line.groupby("context_tokens")}
            style = "--" if route == "file" else "-"
            ys = [v.value for v in spots.values()]
            ax.plot(list(spots), ys, marker="o", linestyle=style, color=_colour(policy))
            ends.append(
                (ys[-1], policy if route == "text" else f"{policy}, {route}", _colour(policy))
            )
        named = dict(zip(SETTING, key, strict=True))
        if named["model"] == said["model"].iloc[0].removesuffix("-instruct"):
            for policy, line in said.groupby("policy", sort=False):
                tokens = [1024 * int(text.removesuffix("K")) for text in line["hop_or_context"]]
                tint = _colour("reprefill" if policy == "reprefill" else "topology")
                ax.plot(tokens, line["value"], "s", fillstyle="none", markersize=9, color=tint)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        _ticks(ax, sorted(set(mine["context_tokens"])))
        ax.set_xlabel("context, tokens")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.0f}"))
        ax.set_ylabel("time to first token, ms")
        ax.set_title(
            f"{named['model']} ({named['weights']} weights)\n{named['device']}, {named['dtype']}"
        )
        label_ends(ax, ends)

    note = "Medians. Dashed: the card goes through a file. Open squares: published, on the same model only."
    return _grid(1, len(groups), panel, note)


def handoff_stages(rows: pd.DataFrame) -> Canvas | None:
    """Stacked milliseconds by stage, one bar per route; one panel per model and context."""
    found = rows[rows["metric"].str.startswith("stage_") & rows["context_tokens"].notna()]
    found = found[(found["metric"] != "stage_total") & (found["policy"] != "reprefill")]
    if found.empty:
        return None
    groups = list(found.groupby([*SETTING, "context_tokens"], sort=True))
    palette = plt.get_cmap("viridis")(range(0, 256, 256 // len(STAGES)))

    def panel(ax: Axes, down: int, right: int) -> None:
        key, mine = groups[right]
        bars = [name for name, _ in mine.groupby(["policy", "protocol"], sort=False)]
        left = [0.0] * len(bars)
        for stage, tint in zip(STAGES, palette, strict=False):
            of = mine[mine["metric"] == f"stage_{stage}"]
            widths = [
                value(of[(of["policy"] == p) & (of["protocol"] == r)]).value or 0 for p, r in bars
            ]
            ax.barh(range(len(bars)), widths, left=left, color=tint, label=stage.replace("_", " "))
            left = [a + b for a, b in zip(left, widths, strict=True)]
        ax.set_yticks(range(len(bars)), [f"{policy}, {route}" for policy, route in bars])
        ax.invert_yaxis()
        ax.set_axisbelow(True)
        ax.set_xlabel("ms, means")
        ax.set_title(f"{key[0]} ({key[1]} weights), {key[2]}\n{key[-1]:,.0f} tokens")
        if right == len(groups) - 1:
            ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))

    published = "; ".join(f"{name}: {', '.join(ours)}" for name, ours in HOLDS.items())
    return _grid(1, len(groups), panel, f"What the published stages hold: {published}.")


def controller_ablation(rows: pd.DataFrame) -> Canvas | None:
    """Paired KL difference to uniform bits, with interval: left of 0 a signal earns its bits."""
    found = relays(rows, "kl_minus_uniform")
    if found.empty:
        return None
    groups = list(found.groupby([*RUN, "n_hops"], sort=False))

    def panel(ax: Axes, down: int, right: int) -> None:
        if (place := 2 * down + right) == len(groups):
            ax.set_axis_off()
            return
        key, mine = groups[place]
        lines = [(name, value(of)) for name, of in mine.groupby("policy", sort=False)]
        lines = sorted(
            (item for item in lines if item[1].value is not None), key=lambda i: i[1].value
        )
        for height, (_, v) in enumerate(lines):
            ends = [[v.value - (v.low or v.value)], [(v.high or v.value) - v.value]]
            ax.errorbar(v.value, height, xerr=ends, fmt="o", capsize=2.5, color="C0")
        ax.set_yticks(range(len(lines)), [name for name, _ in lines], fontsize=6.5)
        ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.set_xlabel("KL minus uniform, nats")
        named = dict(zip([*RUN, "n_hops"], key, strict=True))
        title = f"{named['model']}, {named['budget_bits']:g} bits, {named['reseal']}"
        ax.set_title(f"{title}\n{named['n_hops']:g} handoffs")

    note = "Bars: 95 % interval, paired by problem. Left of 0: better than uniform at equal stored bits."
    tall = max(len(set(mine["policy"])) for _, mine in groups)
    down, across = -(-len(groups) // 2), min(2, len(groups))
    return _grid(down, across, panel, note, height=max(PANEL[1], 0.22 * tall), width=6.0)


def _grid(
    down: int,
    across: int,
    panel: Callable[[Axes, int, int], None],
    note: str,
    height: float = PANEL[1],
    width: float = PANEL[0],
) -> Canvas:
    with plt.style.context(STYLE):
        canvas = plt.figure(figsize=(width * across, height * down))
        for row in range(down):
            for column in range(across):
                panel(canvas.add_subplot(down, across, row * across + column + 1), row, column)
        text = textwrap.fill(note, int(canvas.get_figwidth() * 15))
        canvas.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color="0.3")
    return canvas


def _line(ax: Axes, spots: dict[float, Value], policy: str) -> None:
    """Values with their intervals; policies stand a little apart so that bars do not hide each other."""
    shift = 0.03 * (POLICIES.index(policy) if policy in POLICIES else len(POLICIES))
    ends = [[v.value - (v.low or v.value), (v.high or v.value) - v.value] for v in spots.values()]
    ax.errorbar(
        [n + shift for n in spots],
        [v.value for v in spots.values()],
        yerr=list(zip(*ends, strict=True)),
        fmt="o-",
        capsize=2,
        elinewidth=0.8,
        color=_colour(policy),
    )


def _ticks(ax: Axes, places: list[float]) -> None:
    ax.xaxis.set_major_locator(FixedLocator(places))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.0f}"))


def _colour(policy: str) -> str:
    """The same policy has the same colour in every figure."""
    return f"C{POLICIES.index(policy) if policy in POLICIES else len(POLICIES)}"


HANDOFF_FIGURES: dict[str, Callable[[pd.DataFrame], Canvas | None]] = {
    "handoff_hops": handoff_hops,
    "handoff_ttft": handoff_ttft,
    "handoff_stages": handoff_stages,
    "controller_ablation": controller_ablation,
}
