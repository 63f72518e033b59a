"""Figure of `capacity`: tokens per second against agents, for each device, up to all that fit."""

from collections.abc import Iterator

import pandas as pd
from analysis.capacity_reduce import ANY, Kind, devices, newest, rank
from analysis.colours import BLACK, BLUE, READERS, SKY, colours
from analysis.layout import absent, legend, sheet, styled
from analysis.reduce import BASELINE
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

SETTING = ["model", "dtype", "context_tokens"]
ACROSS = 5
HEIGHT = 1.35  # inches of a panel
THICK, THIN = 2.6, 1.1  # what coincides shows both


@styled
def draw_capacity(rows: pd.DataFrame) -> Canvas | None:
    """Panels of devices under each model; lines by reader and recipe, dotted for more own tokens."""
    rows = newest(rows)
    speed = rows[(rows["metric"] == "throughput") & rows["own"].notna()]
    if speed["value"].notna().sum() == 0:
        return None
    lines = list(_lines_of_panels(rows, speed))
    kinds = sorted({kind for kind, _, _ in _lines(speed)}, key=rank)
    across = max(len(places) for _, places, _ in lines)
    canvas, panels = sheet([heading for heading, _, _ in lines], across, HEIGHT)
    for axes, (_, places, mine) in zip(panels, lines, strict=True):
        for ax, device in zip(axes, places, strict=False):
            ax.set_title(device)
            _panel(ax, mine[mine["device"] == device], kinds)
        for ax in axes[len(places) :]:
            ax.set_axis_off()
        _share(axes[: len(places)], mine[mine["value"].notna()])
    return legend(canvas)


def _lines_of_panels(
    rows: pd.DataFrame, speed: pd.DataFrame
) -> Iterator[tuple[str, list[str], pd.DataFrame]]:
    """Heading, devices and rows of each line of panels; the heading stands over the first of its lines."""
    for (model, dtype, context), mine in speed.groupby(SETTING):
        places = [name for name in devices(rows) if name in set(mine["device"])]
        own = sorted(set(mine["own"]))
        said = " or ".join(f"{number:,.0f}" for number in dict.fromkeys([own[0], own[-1]]))
        heading = f"{model}, {dtype}, {context:,.0f} tokens, {said} of them an agent's own"
        for start in range(0, len(places), ACROSS):
            yield heading if not start else "", places[start : start + ACROSS], mine


def _panel(ax: Axes, rows: pd.DataFrame, kinds: list[Kind]) -> None:
    if rows["value"].isna().all():
        absent(ax, "not one agent fits")
    for kind, own, spots in _lines(rows):
        look, fewest = _look(kind, kinds), own == rows["own"].min()
        named = {"ls": "-", "label": _name(kind)} if fewest else {"ls": ":"}
        ax.plot(spots["n_agents"], spots["value"], **named, **look)
        ax.plot(*spots[["n_agents", "value"]].iloc[-1], "x", color=look["color"])


def _share(panels: list[Axes], rows: pd.DataFrame) -> None:
    """One range of agents and of tokens per second for panels that stand side by side."""
    for place, ax in enumerate(panels):
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlim(0.6, rows["n_agents"].max() * 2)
        ax.set_ylim(rows["value"].min() / 2, rows["value"].max() * 2)
        for axis in (ax.xaxis, ax.yaxis):
            low, high = axis.get_view_interval()
            axis.set_major_locator(
                LogLocator(subs=(1,) if high > 100 * low else (1, 3), numticks=5)
            )
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(_short))
        ax.tick_params(labelleft=place == 0)
        ax.set_xlabel("agents")
    panels[0].set_ylabel("tokens per second")


def _short(number: float, _: int) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def _lines(rows: pd.DataFrame) -> Iterator[tuple[Kind, float, pd.DataFrame]]:
    """Kind, own tokens and spots of each line, for the fewest own tokens, and for the most under cascade.

    Without sharing it is the same however many are an agent's own. Not drawn: a pool of full precision that
    everybody copies again.
    """
    own = rows["own"]
    found = rows[rows["value"].notna() & own.isin((own.min(), own.max()))]
    groups = found.groupby(["own", "reader", "recipe"])
    for key in sorted(groups.groups, key=lambda key: (key[0], rank(key[1:]))):
        of, reader, recipe = key
        alike = reader != "cascade" and of != own.min()
        if not alike and (reader, recipe) != ("inject", BASELINE):
            yield (reader, recipe), of, groups.get_group(key).sort_values("n_agents")


def _look(kind: Kind, kinds: list[Kind]) -> dict[str, object]:
    """Inject lies on private, and often a recipe's cascade on that of the full cache: thin on thick."""
    reader, recipe = kind
    if reader == "cascade":
        shared = colours(recipe for reader, recipe in kinds if reader == "cascade")
        tint = SKY if recipe == BASELINE else {BLACK: BLUE}.get(shared[recipe], shared[recipe])
    else:
        tint = READERS[reader][1]
    thick = reader == "private" or kind == ("cascade", BASELINE)
    return {"color": tint, "linewidth": THICK if thick else THIN}


def _name(kind: Kind) -> str:
    reader, recipe = kind
    name = READERS[reader][0]
    return name if recipe == ANY else f"{recipe}, {name}"
