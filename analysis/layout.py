"""The size and arrangement of every figure: one or two columns of a paper, panels under headings."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import matplotlib

matplotlib.use("Agg")  # files only, no window

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure as Canvas  # noqa: E402
from matplotlib.ticker import (  # noqa: E402
    FixedLocator,
    FuncFormatter,
    LogLocator,
    NullLocator,
)

STYLE = Path(__file__).with_name("style.mplstyle")
COLUMN, PAGE = 3.35, 7.0  # inches: one column, and both
HEADING = 0.2  # inches that a heading takes


P, R = ParamSpec("P"), TypeVar("R")


def styled(build: Callable[P, R]) -> Callable[P, R]:
    """A builder of figures in the one style: colours and sizes are taken while it draws."""

    @functools.wraps(build)
    def inside(*arguments: P.args, **named: P.kwargs) -> R:
        with plt.style.context(STYLE):
            return build(*arguments, **named)

    return inside


def sheet(
    headings: Sequence[str], across: int, height: float, width: float = PAGE
) -> tuple[Canvas, list[list[Axes]]]:
    """One row of `across` panels, each `height` inches tall, under each heading ("": none)."""
    heights = [height + HEADING * (1 + heading.count("\n")) * bool(heading) for heading in headings]
    canvas = plt.figure(figsize=(width, sum(heights)))
    parts = canvas.subfigures(len(headings), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, heading in zip(parts, headings, strict=True):
        if heading:
            part.suptitle(heading, x=0.01, ha="left")
    return canvas, [list(part.subplots(1, across, squeeze=False)[0]) for part in parts]


def absent(ax: Axes, why: str) -> Axes:
    """A panel that says why it is empty."""
    ax.set_axis_off()
    ax.text(0, 0.5, why, transform=ax.transAxes, va="center", color="0.3", wrap=True)
    return ax


def number_ticks(ax: Axes, places: Sequence[float]) -> Axes:
    """Numbers with thousands separators at these places of x."""
    ax.xaxis.set_major_locator(FixedLocator(sorted(set(places))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.0f}"))
    return ax


def plain_log(ax: Axes) -> Axes:
    """A log y axis with plain numbers at 1, 2 and 5 of each decade."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,g}"))
    return ax
