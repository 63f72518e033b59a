"""Names beside what they name, in place of legends: at the ends of lines, and beside points."""

import math
from collections.abc import Iterable, Sequence
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

SIZE = 7.0  # points, the smallest text of any figure
LABEL_GAP = 0.085  # of the panel's height: about one line of text
HIGHEST = 0.95  # a label above it would touch the title
CONTRAST = 4.5  # to white, WCAG's least for text
REACHES = (7, 14, 22, 32, 44, 58, 76, 100)  # points from the marker to its label, nearest first
ANGLES = (0, 35, -35, 180, 145, -145, 20, -20, 160, -160, 60, -60, 120, -120, 90, -90)
HALO = [withStroke(linewidth=2.5, foreground="white")]  # letters stay readable on lines


def label_ends(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> Axes:
    """Name each line (last y, text, colour) right of the panel, apart where they would overlap."""
    low, high = (ax.transScale.transform((1, y))[1] for y in ax.get_ylim())
    wanted = [
        ((ax.transScale.transform((1, y))[1] - low) / (high - low), *rest) for y, *rest in ends
    ]
    wanted.sort(key=lambda end: end[0])
    heights: list[float] = []
    for height, *_ in wanted:
        heights.append(max(height, heights[-1] + LABEL_GAP if heights else height))
    limit = HIGHEST
    for height, (end, text, tint) in reversed(list(zip(heights, wanted, strict=True))):
        placed = min(height, limit)
        ax.text(
            1.05, placed, text, transform=ax.transAxes, va="center", fontsize=SIZE, color=ink(tint)
        )
        line = {"linewidth": 0.5, "color": tint, "clip_on": False, "transform": ax.transAxes}
        ax.plot([1.0, 1.04], [end, placed], **line)
        limit = placed - LABEL_GAP  # only those that are pushed from above move down
    return ax


def name_points(
    ax: Axes,
    points: Sequence[tuple[str, float, float, str]],
    lines: Iterable[Sequence[tuple[float, float]]] = (),
) -> Axes:
    """A label beside each point (name, x, y, colour), at the nearest place free of points and `lines`."""
    canvas = ax.figure.canvas
    canvas.draw()  # the layout must stand before places in pixels mean anything
    scale = ax.figure.dpi / 72
    spots = [ax.transData.transform((x, y)) for _, x, y, _ in points]
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    taken += [box for line in lines for box in _along(ax.transData.transform(line), 2 * scale)]
    inside = ax.get_window_extent()
    for (name, x, y, tint), _ in sorted(
        zip(points, spots, strict=True), key=lambda pair: pair[1][1]
    ):
        for reach, angle in product(REACHES, ANGLES):
            label = _label(ax, name, (x, y), reach, math.radians(angle), tint)
            label.update_positions(canvas.get_renderer())
            # Of the letters alone: the line to the point may cross others.
            box = Text.get_window_extent(label).padded(scale)
            within = inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0
            if within and box.y1 < inside.y1 and not any(box.overlaps(o) for o in taken):
                taken.append(box)
                break
            label.remove()
    return ax


def _along(line: np.ndarray, width: float) -> list[Bbox]:
    """Boxes that cover a line in pixels."""
    found = []
    for start, end in zip(line, line[1:], strict=False):
        steps = max(2, math.ceil(math.hypot(*(end - start)) / width))
        for x, y in np.linspace(start, end, steps):
            found.append(Bbox.from_extents(x, y, x, y).padded(width / 2))
    return found


def _label(
    ax: Axes, name: str, at: tuple[float, float], reach: float, angle: float, tint: str
) -> Annotation:
    across, up = math.cos(angle), math.sin(angle)
    side = "center" if abs(across) < 0.1 else "left" if across > 0 else "right"
    line = {"arrowstyle": "-", "lw": 0.5, "color": tint, "relpos": (across < 0, 0.5)}
    return ax.annotate(
        name, at, (across * reach, up * reach), textcoords="offset points", ha=side, va="center",
        fontsize=SIZE, color=ink(tint), path_effects=HALO,
        arrowprops=line if reach > REACHES[0] else None,
    )  # fmt: skip


def ink(tint: str) -> str:
    """The colour as text: as dark as reading on white needs, of the same hue."""
    shade = to_rgb(tint)
    while contrast(shade) < CONTRAST:
        shade = tuple(0.95 * part for part in shade)
    return to_hex(shade)


def contrast(shade: Sequence[float]) -> float:
    """To white, from 1 to 21 (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shade[:3]]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 1.05 / (luminance + 0.05)
