"""A drawn figure as an image that a page can hold: SVG in a data URI, the same bytes for the same rows."""

import io
import re
from dataclasses import dataclass
from urllib.parse import quote

import matplotlib.pyplot as plt
from analysis.layout import STYLE
from analysis.report_tables import titled
from markupsafe import Markup
from matplotlib.figure import Figure as Canvas

# Ids are hashes of the content and of this; by default they are random.
REPEATABLE = {"svg.hashsalt": "polykv"}
UNDATED = {"Date": None, "Creator": None}
PIXELS_PER_POINT = 1.25 * 96 / 72  # larger than on paper: text of 8 points is for print
UNQUOTED = " /:;=,'()@!*+$?[]{}|~^"  # what a URI in double quotes may hold as it is


@dataclass(frozen=True)
class Image:
    """`uri` is safe within double quotes; width and height in CSS pixels; `alt` stands for the picture."""

    name: str
    title: str
    caption: str
    alt: str
    uri: Markup
    width: int
    height: int


def image(canvas: Canvas, name: str, caption: str) -> Image:
    """The figure, closed."""
    out = io.StringIO()
    with plt.style.context(STYLE), plt.rc_context(REPEATABLE):
        canvas.savefig(out, format="svg", metadata=UNDATED)
    plt.close(canvas)
    drawn = out.getvalue()
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn).groups()
    title, rest = titled(caption)
    return Image(
        name,
        title,
        rest,
        re.split(r"(?<=[.:;]) ", caption)[0],
        Markup("data:image/svg+xml," + quote(_compact(drawn), safe=UNQUOTED)),
        round(float(width) * PIXELS_PER_POINT),
        round(float(height) * PIXELS_PER_POINT),
    )


def _compact(svg: str) -> str:
    """Without its prologue and the space between its elements; quotes that need no escape."""
    svg = re.sub(r"\s+", " ", svg[svg.index("<svg") :])
    return svg.replace("> <", "><").replace('"', "'")
