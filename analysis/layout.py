"""The size and arrangement of every figure: one or two columns of a paper, panels under headings."""

import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import matplotlib

matplotlib.use("Agg")  # files only, no window

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.container import ErrorbarContainer  # noqa: E402
from matplotlib.figure import Figure as Canvas  # noqa: E402
from matplotlib.ticker import (  # noqa: E402
    FixedLocator,
    FuncFormatter,
    Locator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

STYLE = Path(__file__).with_name("style.mplstyle")
COLUMN, PAGE = 3.35, 7.0  # inches: one column, and both
HEADING = 0.2  # inches that a heading takes
ENTRY = 0.15  # inches that a line of a legend takes
LETTERS = 13  # of a legend to an inch, its handle counted
SIZE = 7.0  # points, the smallest text of any figure
# Where a decade of a log axis may have its numbers, coarsest first, and the fewest numbers that show it is log.
DIGITS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))
FEWEST = 4


P, R = ParamSpec("P"), TypeVar("R")


def styled(build: Callable[P, R]) -> Callable[P, R]:
    """A builder of figures in the one style: colours and sizes are taken while it draws."""

    @functools.wraps(build)
    def inside(*arguments: P.args, **named: P.kwargs) -> R:
        with plt.style.context(STYLE):
            return build(*arguments, **named)

    return inside


def sheet(
    headings: Sequence[str],
    across: int,
    height: float,
    width: float = PAGE,
    share_y: bool = False,
) -> tuple[Canvas, list[list[Axes]]]:
    """One row of `across` panels, each `height` inches tall, under each heading ("": none).

    `share_y`: the panels of a row have one y axis, with its numbers at the first.
    """
    heights = [height + HEADING * (1 + heading.count("\n")) * bool(heading) for heading in headings]
    canvas = plt.figure(figsize=(width, sum(heights)))
    parts = canvas.subfigures(len(headings), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, heading in zip(parts, headings, strict=True):
        if heading:
            part.suptitle(heading, x=0.01, ha="left")
    rows = [part.subplots(1, across, squeeze=False, sharey=share_y)[0] for part in parts]
    return canvas, [list(row) for row in rows]


def legend(canvas: Canvas) -> Canvas:
    """Every labelled line of the panels once, below them, in as many columns as fit the width.

    Names too long for the width (a recipe's with many settings) are broken.
    """
    named = {}
    for ax in canvas.axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle[0] if isinstance(handle, ErrorbarContainer) else handle)
    width, height = canvas.get_size_inches()
    texts = [textwrap.fill(name, int(LETTERS * width)) for name in named]
    for columns in range(len(named), 0, -1):
        shown = canvas.legend(
            list(named.values()), texts, loc="outside lower center", ncols=columns
        )
        if shown.get_window_extent().width <= canvas.bbox.width or columns == 1:
            lines = sum(1 + text.count("\n") for text in texts)
            canvas.set_size_inches(width, height + ENTRY * math.ceil(lines / columns))
            break
        shown.remove()
    return canvas


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


class Numbers(Locator):
    """Ticks of a log axis at the coarsest of DIGITS that gives FEWEST in view; in a narrow view, even steps."""

    def __call__(self) -> list[float]:
        return self.tick_values(*sorted(self.axis.get_view_interval()))

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        """The ticks from `vmin` to `vmax`, both above 0."""
        decades = range(math.floor(math.log10(vmin)), math.ceil(math.log10(vmax)) + 1)
        for digits in DIGITS:
            ticks = [digit * 10.0**decade for decade in decades for digit in digits]
            ticks = [tick for tick in ticks if vmin <= tick <= vmax]
            if len(ticks) >= FEWEST:
                return ticks
        for intervals in range(FEWEST + 2, 3 * FEWEST):
            even = MaxNLocator(intervals, steps=(1, 2, 5, 10)).tick_values(vmin, vmax)
            ticks = [tick for tick in even if vmin <= tick <= vmax]
            if len(ticks) >= FEWEST:
                break
        return ticks


def plain_log(ax: Axes) -> Axes:
    """A log y axis with enough plain numbers to be read as one, and small ticks between them."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(Numbers())
    ax.yaxis.set_minor_locator(LogLocator(subs=range(1, 10), numticks=99))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,g}"))
    return ax
