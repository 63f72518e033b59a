"""How every figure looks: the colours, markers and names of recipes, policies and readers, panels and legends."""

import functools
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from zlib import crc32

import matplotlib

matplotlib.use("Agg")  # files only, no window

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import to_hex, to_rgb  # noqa: E402
from matplotlib.container import BarContainer, ErrorbarContainer  # noqa: E402
from matplotlib.figure import Figure as Canvas  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import (  # noqa: E402
    FixedLocator,
    FuncFormatter,
    Locator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from analysis.statistics import BASELINE, Value  # noqa: E402
from polykv.config import available  # noqa: E402

STYLE = Path(__file__).with_name("style.mplstyle")
COLUMN, PAGE = 3.35, 7.0  # inches: one column, and both
HEADING = 0.2  # inches that a heading takes
ENTRY = 0.15  # inches that a line of a legend takes
LETTERS = 13  # of a legend to an inch, its handle counted
BOLD = 15  # letters of a heading to an inch
SIZE = 7.0  # points, the smallest text of any figure
# Where a decade of a log axis may have its numbers, coarsest first, and the fewest numbers that show it is log.
DIGITS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))
FEWEST = 4
# No date, no version: the same rows give the same files.
UNDATED = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}
BLACK, ORANGE, BLUE, VERMILION = "#000000", "#E69F00", "#0072B2", "#D55E00"
GREEN, PINK, SKY, GREY = "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F"
WINE, PURPLE, OLIVE, TEAL, INDIGO = "#882255", "#7B4FB5", "#999933", "#44AA99", "#332288"
# (name, colour, first marker) of a family of recipes: the first prefix that fits.
FAMILIES = {
    BASELINE: ("uncompressed", BLACK, "o"),
    "polykv": ("PolyKV", VERMILION, "D"),
    "turboquant": ("TurboQuant", BLUE, "o"),
    "waterfill": ("this project", WINE, "h"),
    "trellis": ("this project", WINE, "h"),
    "mean_": ("this project", WINE, "h"),
    "vllm": ("vLLM presets", PINK, "P"),
    "kivi": ("KIVI", GREEN, "^"),
    "kvarn": ("KVarN", OLIVE, ">"),
    "fibquant": ("FibQuant", TEAL, "<"),
    "nvfp4": ("NVFP4", INDIGO, "p"),
    "uniform": ("absmax", ORANGE, "s"),
    "per_layer": ("absmax", ORANGE, "s"),
    "streaming": ("StreamingLLM", SKY, "h"),
    "snapkv": ("SnapKV", GREY, "s"),
    "transformers": ("transformers' own", SKY, "*"),
    "q": ("ggml", PURPLE, "v"),
    "": ("8-bit formats", GREY, "X"),
}
POLICIES = {
    "full": GREY,
    "reprefill": BLACK,
    "fp16": GREY,
    "uniform": ORANGE,
    "trellis": INDIGO,
    "waterfill": WINE,
    "local": GREEN,
    "topology": VERMILION,
    "dont_waste_bits": OLIVE,
    "qkvshare": PURPLE,
    "random": SKY,
    "sinks_recent": BLUE,
    "inverse": PINK,
    "other_card": WINE,
    "random_card": TEAL,
    "no_card": INDIGO,
}
# What a figure calls a reader, and its colour.
READERS = {
    "unshared": ("unshared caches", BLACK),
    "dequantize": ("dequantize, as published", ORANGE),
    "in_place": ("in place", BLUE),
}
MARKERS = "osD^vPX*<>hpd"
# Of what was published; of what is read in place.
OPEN = {"fillstyle": "none", "linestyle": "none", "markersize": 8, "markeredgewidth": 0.9}
READ_IN_PLACE = {"linestyle": "--", "markerfacecolor": "white"}
WIDE = 50  # percent; perplexity deltas beyond it need an axis that shows small ones too
CONTRAST = 4.5  # to white, WCAG's least for text
SHADES = (0, -0.3, 0.25)  # of a family's colour, by a recipe's place in it
LOOKS = len(MARKERS) * len(SHADES)  # different ones in a family, as the two have no common factor

P, R = ParamSpec("P"), TypeVar("R")


def styled(build: Callable[P, R]) -> Callable[P, R]:
    """Decorator: draw the figure under style.mplstyle."""

    @functools.wraps(build)
    def inside(*arguments: P.args, **named: P.kwargs) -> R:
        with plt.style.context(STYLE):
            return build(*arguments, **named)

    return inside


def sheet(
    headings: Sequence[str],
    across: int,
    height: float | Sequence[float],
    width: float = PAGE,
    share_y: bool = False,
) -> tuple[Canvas, list[list[Axes]]]:
    """One row of `across` panels under each heading ("": none), `height` inches tall: all rows, or row by row.

    `share_y`: the panels of a row have one y axis, with its numbers at the first.
    """
    headings = [fitted(heading, width) for heading in headings]
    panel = [height] * len(headings) if isinstance(height, float | int) else height
    above = [HEADING * (1 + heading.count("\n")) * bool(heading) for heading in headings]
    heights = [sum(pair) for pair in zip(panel, above, strict=True)]
    canvas = plt.figure(figsize=(width, sum(heights)))
    parts = canvas.subfigures(len(headings), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, heading in zip(parts, headings, strict=True):
        if heading:
            part.suptitle(heading, x=0.01, ha="left")
    rows = [part.subplots(1, across, squeeze=False, sharey=share_y)[0] for part in parts]
    return canvas, [list(row) for row in rows]


def fitted(heading: str, width: float) -> str:
    """A heading with its lines broken to fit so many inches."""
    return "\n".join(textwrap.fill(line, int(BOLD * width)) for line in heading.splitlines())


def grid(n: int, across: int, height: float) -> tuple[Canvas, list[Axes]]:
    """`n` panels, at most `across` beside each other, each `height` inches tall; one alone fits a column."""
    across = min(across, n)
    canvas, rows = sheet(
        [""] * math.ceil(n / across), across, height, PAGE if across > 1 else COLUMN
    )
    panels = [ax for row in rows for ax in row]
    for ax in panels[n:]:
        ax.remove()
    return canvas, panels[:n]


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
    """Turn the panel into a text that says why it is empty."""
    ax.set_axis_off()
    ax.text(0, 0.5, why, transform=ax.transAxes, va="center", color="0.3", wrap=True)
    return ax


def number_ticks(ax: Axes, places: Sequence[float]) -> Axes:
    """Ticks at these x, with thousands separators."""
    ax.xaxis.set_major_locator(FixedLocator(sorted(set(places))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.0f}"))
    return ax


def reaches(values: Sequence[Value]) -> list[list[float]]:
    """Intervals as matplotlib takes them: distances below and above; 0 where there is none."""
    lows = [v.value if v.low is None else v.low for v in values]
    highs = [v.value if v.high is None else v.high for v in values]
    pairs = list(zip(values, lows, highs, strict=True))
    return [
        [max(0.0, v.value - x) for v, x, _ in pairs],
        [max(0.0, x - v.value) for v, _, x in pairs],
    ]


def series(ax: Axes, spots: Iterable[tuple[float, Value]], **look: Any) -> list[Value]:
    """Draw a line through those (x, value) that have a value, with intervals; return these values."""
    found = [(x, value) for x, value in spots if value.value is not None]
    values = [value for _, value in found]
    if found:
        spread = reaches(values) if any(value.low is not None for value in values) else None
        ax.errorbar([x for x, _ in found], [value.value for value in values], yerr=spread, **look)
    return values


def delta_axis(ax: Axes, label: str) -> None:
    """A y axis of differences: signed numbers, and a line at 0."""
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:+g}" if number else "0"))
    ax.set_ylabel(label)


def name_bars(ax: Axes, names: Sequence[str]) -> None:
    """A name beside each horizontal bar, the first on top, and a grid of values only."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_axisbelow(True)
    ax.grid(axis="x")
    ax.grid(axis="y", visible=False)


def keep(axes: Sequence[Axes], n: int) -> None:
    """The first `n` panels of a row stay, with the names of their common y axis at the first."""
    for ax in axes[1:n]:
        ax.set_yticklabels([])
    for ax in axes[n:]:
        ax.remove()


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


def save(canvas: Canvas, stem: Path, formats: Sequence[str]) -> list[Path]:
    """Write `stem`.png and/or .pdf: the same rows give the same bytes."""
    files = []
    with plt.style.context(STYLE):
        canvas.draw_without_rendering()
        canvas.set_layout_engine("none")  # laid out above, once for all formats
        for kind in formats:
            files.append(stem.with_suffix(f".{kind}"))
            # Into memory first: where a disk is full, matplotlib's PDF writer hides the error behind its own.
            drawn = BytesIO()
            canvas.savefig(drawn, format=kind, metadata=UNDATED[kind])
            files[-1].write_bytes(drawn.getvalue())
    plt.close(canvas)
    return files


def family(recipe: str) -> tuple[str, str, str]:
    """(name, colour, first marker) of a recipe's family."""
    return next(f for prefix, f in FAMILIES.items() if recipe.startswith(prefix))


def colours(recipes: Iterable[str]) -> dict[str, str]:
    """The colour of each recipe, as in `looks`."""
    return {recipe: tint for recipe, (tint, _) in looks(recipes).items()}


def looks(recipes: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) of each recipe, by family: those of a recipe in conf/recipe are the same in every figure.

    A family has shades of one colour. Other recipes, such as those with overrides, get what is free in their family.
    """
    names = list(dict.fromkeys(recipes))
    places: dict[str, int] = {}
    for recipe in sorted(names, key=lambda name: (name not in _places(), name)):
        first = _places().get(recipe, crc32(recipe.encode()))
        taken = {_look(name, other) for name, other in places.items()}
        tries = range(first, first + LOOKS)
        places[recipe] = next((at for at in tries if _look(recipe, at) not in taken), first)
    families = [family(name) for name in names]
    ordered = sorted(names, key=lambda name: families.index(family(name)))
    return {name: _look(name, places[name]) for name in ordered}


def _look(recipe: str, place: int) -> tuple[str, str]:
    _, tint, marker = family(recipe)
    at = MARKERS.index(marker) + place
    return shaded(tint, SHADES[place % len(SHADES)]), MARKERS[at % len(MARKERS)]


@functools.cache
def _places() -> dict[str, int]:
    """The place of each recipe of conf/recipe in its family."""
    seen: Counter[str] = Counter()
    places = {}
    for recipe in available("recipe"):
        name = family(recipe)[0]
        places[recipe] = seen[name]
        seen[name] += 1
    return places


def shaded(tint: str, by: float) -> str:
    """The colour mixed with white (`by` above 0) or with black (below 0)."""
    end = 1.0 if by > 0 else 0.0
    return to_hex([part + abs(by) * (end - part) for part in to_rgb(tint)])


def policy_colour(policy: str) -> str:
    return POLICIES.get(policy, BLACK)


def ink(tint: str) -> str:
    """The colour darkened until text in it has enough contrast on white (CONTRAST)."""
    shade = to_rgb(tint)
    while contrast(shade) < CONTRAST:
        shade = tuple(0.95 * part for part in shade)
    return to_hex(shade)


def contrast(shade: Sequence[float]) -> float:
    """Contrast to white, from 1 to 21 (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shade[:3]]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 1.05 / (luminance + 0.05)


MOST = 12  # names; a caption counts more than these


@dataclass(frozen=True)
class Picture:
    """A drawn figure and its caption."""

    canvas: Canvas
    caption: str


@dataclass(frozen=True)
class Marks:
    """The meaning of a figure's marks; the caption explains those that were drawn.

    Attributes:
        panels: whether the titles of the panels are said.
        lines: what the names in the legend are.
        bars, dashed, dotted, dots: what marks of this kind are.
        more: what holds whatever is drawn.
    """

    panels: bool = False
    lines: str = "Lines"
    bars: str = "95 % intervals"
    dashed: str = ""
    dotted: str = ""
    dots: str = ""
    more: str = ""


NO_MARKS = Marks()


def picture(canvas: Canvas, shows: str, about: str, marks: Marks = NO_MARKS) -> Picture:
    """The figure with its caption: what it `shows`, its panels, lines and marks, and what was measured.

    `about` is render.describe of the rows.
    """
    axes = [ax for ax in canvas.axes if ax.axison and ax.has_data()]
    axes = [ax for ax in axes if ax.get_label() != "<colorbar>"]
    titles = dict.fromkeys(ax.get_title(loc="left") for ax in axes)
    names = [text.get_text().replace("\n", " ") for text in _legend(canvas)]
    kinds = {mark for ax in axes for line in ax.lines if (mark := _mark(line))}
    log = {axis for ax in axes for axis in "xy" if getattr(ax, f"get_{axis}scale")() != "linear"}
    parts = [
        f"{shows}: {'; '.join(titles)}" if marks.panels else shows,
        f"{marks.lines}: {'; '.join(names)}" if 0 < len(names) <= MOST else "",
        f"Error bars: {marks.bars}" if _has_bars(canvas) else "",
        *(f"{kind}: {getattr(marks, kind.lower())}" for kind in sorted(kinds)),
        f"Log {' and '.join(sorted(log))} {'axes' if len(log) > 1 else 'axis'}" if log else "",
        marks.more,
    ]
    return Picture(
        canvas, " ".join([*(f"{part.removesuffix('.')}." for part in parts if part), about])
    )


def _legend(canvas: Canvas) -> list:
    own = [legend for ax in canvas.axes if (legend := ax.get_legend())]
    return [text for legend in (*canvas.legends, *own) for text in legend.get_texts()]


def _mark(line: Line2D) -> str:
    """The kind of a line that a caption explains, or ""."""
    if line.get_marker() == "." and line.get_linestyle() == "None":
        return "Dots"
    return {"--": "Dashed", ":": "Dotted"}.get(line.get_linestyle(), "")


def _has_bars(canvas: Canvas) -> bool:
    """Whether the figure has an error bar of non-zero length."""
    held = [container for ax in canvas.axes for container in ax.containers]
    held += [c.errorbar for c in held if isinstance(c, BarContainer) and c.errorbar]
    bars = [part for c in held if isinstance(c, ErrorbarContainer) for part in c[2]]
    return any((ends[0] != ends[-1]).any() for bar in bars for ends in bar.get_segments())
