"""The rows of `capacity` that are shown, and the figure: tokens per second against agents, by device."""

from collections.abc import Iterator

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis.handoff import named
from analysis.load import SETTING as SET
from analysis.load import swept
from analysis.points import RECIPES
from analysis.render import describe
from analysis.statistics import BASELINE
from analysis.style import (
    BLACK,
    BLUE,
    SKY,
    Marks,
    Picture,
    absent,
    colours,
    legend,
    picture,
    sheet,
    styled,
)
from analysis.style import READERS as NAMES

READERS = ("unshared", "dequantize", "in_place")
ANY = "any"  # unshared caches have no recipe, and our assumptions no device
HELD = ("nodes", "devices", "memory_gb", "usable")  # their product is what devices are ordered by
SETTING = ["model", "dtype", "context_tokens"]
# What a row is about, apart from its part or sample: of cells that agree in it the newest counts.
IDENTITY = [
    "model", "weights", "dtype", "device", "context_tokens", "recipe", "reader", "backend", "n_agents", "seed",
    "metric", "source", "accounting", "suffix_tokens", "n_tokens", "n_threads", "synthetic",
]  # fmt: skip
ACROSS = 5
HEIGHT = 1.35  # inches of a panel
THICK, THIN = 2.6, 1.1  # what coincides shows both

Kind = tuple[str, str]  # reader and recipe


def newest(rows: pd.DataFrame) -> pd.DataFrame:
    """The newest rows of each line; what unshared caches do is the same under every recipe."""
    unshared = (rows["reader"] == "unshared") & rows["suffix_tokens"].notna()
    rows = rows.assign(recipe=rows["recipe"].mask(unshared, ANY))
    rows = rows.sort_values(["created_at", "cell"], kind="stable")
    line = [name for name in (*IDENTITY, *swept(rows)) if name in rows]
    last = rows.groupby(line, dropna=False)["cell"].transform("last")
    return rows[rows["cell"] == last]


def devices(rows: pd.DataFrame) -> list[str]:
    """The devices, largest memory first."""
    found = rows[rows["metric"].isin(HELD)].groupby(["device", "metric"])["value"].last()
    memory = found.unstack().prod(axis=1) if len(found) else pd.Series(dtype=float)
    return sorted(memory.index, key=lambda name: (-memory[name], name))


def rank(kind: Kind) -> tuple[int, int, str]:
    """Readers and recipes in the order in which they are shown."""
    reader, recipe = kind
    place = RECIPES.index(recipe) if recipe in RECIPES else len(RECIPES)
    return READERS.index(reader), place, recipe


def steps(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a computed decode step: ms, tokens per second of all agents, the weights' share in percent.

    One that does not fit has no numbers, and in `note` why.
    """
    mine = rows[(rows["metric"] == "step_time") & rows["suffix_tokens"].notna()]
    about = [*SETTING, "device", "reader", "recipe", "suffix_tokens", "n_agents", *swept(rows)]
    linear = mine["value"].where(mine["part"] == "linear")
    groups = mine.assign(linear=linear).groupby(about, dropna=False)
    found = groups[["value", "linear"]].sum(min_count=1).assign(note=groups["note"].last())
    found = found.rename(columns={"value": "step_time"}).reset_index()
    return found.assign(
        throughput=1e3 * found["n_agents"].astype(float) / found["step_time"],
        weights_share=100 * found.pop("linear") / found["step_time"],
    )


@styled
def figure(rows: pd.DataFrame) -> Picture | str:
    """Panels of devices under each model; lines by reader and recipe, dotted for more own tokens."""
    used = newest(rows)
    speed = steps(used)
    if not speed["throughput"].notna().any():
        return "not one agent fits on any device"
    lines = list(_lines_of_panels(devices(used), speed))
    kinds = sorted({kind for kind, _, _ in _lines(speed)}, key=rank)
    across = max(len(places) for _, places, _ in lines)
    canvas, panels = sheet([heading for heading, _, _ in lines], across, HEIGHT)
    for axes, (_, places, mine) in zip(panels, lines, strict=True):
        for ax, device in zip(axes, places, strict=False):
            ax.set_title(device)
            _panel(ax, mine[mine["device"] == device], kinds)
        for ax in axes[len(places) :]:
            ax.set_axis_off()
        _share(axes[: len(places)], mine[mine["throughput"].notna()])
    return picture(
        legend(canvas),
        "Tokens per second of all agents against their number, up to all that fit: computed, not measured",
        describe(used[used["source"] == "computed"], "Computed for"),
        Marks(dotted="more tokens of an agent's own", more="Cross: all agents that fit."),
    )


def _lines_of_panels(
    order: list[str], speed: pd.DataFrame
) -> Iterator[tuple[str, list[str], pd.DataFrame]]:
    """Heading, devices and rows of each line of panels; the heading stands over the first of its lines."""
    about = [*SETTING, *swept(speed)]
    for key, mine in speed.groupby(about, dropna=False):
        run = named(about, key)
        places = [name for name in order if name in set(mine["device"])]
        own = sorted(set(mine["suffix_tokens"]))
        said = " or ".join(f"{number:,}" for number in dict.fromkeys([own[0], own[-1]]))
        heading = f"{run['model']}, {run['dtype']}, {run['context_tokens']:,} tokens, {said} of them an agent's own"
        for name in about[len(SETTING) :]:
            heading += f", {name.removeprefix(SET)}={run[name]}"
        for start in range(0, len(places), ACROSS):
            yield heading if not start else "", places[start : start + ACROSS], mine


def _panel(ax: Axes, rows: pd.DataFrame, kinds: list[Kind]) -> None:
    if rows["throughput"].isna().all():
        absent(ax, "not one agent fits")
    for kind, own, spots in _lines(rows):
        look, fewest = _look(kind, kinds), own == rows["suffix_tokens"].min()
        shown = {"ls": "-", "label": _name(kind)} if fewest else {"ls": ":"}
        at, speed = spots["n_agents"].to_numpy(float), spots["throughput"].to_numpy(float)
        ax.plot(at, speed, **shown, **look)
        ax.plot(at[-1], speed[-1], "x", color=look["color"])


def _share(panels: list[Axes], rows: pd.DataFrame) -> None:
    """One range of agents and of tokens per second for panels that stand side by side."""
    for place, ax in enumerate(panels):
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlim(0.6, float(rows["n_agents"].max()) * 2)
        ax.set_ylim(rows["throughput"].min() / 2, rows["throughput"].max() * 2)
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


def _lines(rows: pd.DataFrame) -> Iterator[tuple[Kind, int, pd.DataFrame]]:
    """Kind, own tokens and spots of each line, for the fewest own tokens, and for the most under in_place.

    Without sharing it is the same however many are an agent's own. Not drawn: a pool of full precision that
    everybody copies again.
    """
    own = rows["suffix_tokens"]
    found = rows[rows["throughput"].notna() & own.isin((own.min(), own.max()))]
    groups = found.groupby(["suffix_tokens", "reader", "recipe"])
    for key in sorted(groups.groups, key=lambda key: (key[0], rank(key[1:]))):
        of, reader, recipe = key
        alike = reader != "in_place" and of != own.min()
        if not alike and (reader, recipe) != ("dequantize", BASELINE):
            yield (reader, recipe), of, groups.get_group(key).sort_values("n_agents")


def _look(kind: Kind, kinds: list[Kind]) -> dict[str, object]:
    """Inject lies on unshared, and often a recipe's in_place on that of the full cache: thin on thick."""
    reader, recipe = kind
    if reader == "in_place":
        shared = colours(recipe for reader, recipe in kinds if reader == "in_place")
        tint = SKY if recipe == BASELINE else {BLACK: BLUE}.get(shared[recipe], shared[recipe])
    else:
        tint = NAMES[reader][1]
    thick = reader == "unshared" or kind == ("in_place", BASELINE)
    return {"color": tint, "linewidth": THICK if thick else THIN}


def _name(kind: Kind) -> str:
    reader, recipe = kind
    name = NAMES[reader][0]
    return name if recipe == ANY else f"{recipe}, {name}"
