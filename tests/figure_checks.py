"""What every figure has to be: nothing empty, cut off, overlapping or too small."""

from itertools import combinations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from analysis.style import COLUMN, CONTRAST, PAGE, SIZE, contrast


def legends_of(canvas):
    return [*canvas.legends, *(ax.get_legend() for ax in canvas.axes if ax.get_legend())]


def names_in(canvas):
    return [text.get_text() for legend in legends_of(canvas) for text in legend.get_texts()]


def assert_readable(canvas):
    """No panel empty, no text cut off, none below 7 points, no two labels of a panel on each other."""
    canvas.draw_without_rendering()
    renderer = canvas.canvas.get_renderer()
    inches = canvas.dpi_scale_trans.inverted()
    width, height = canvas.get_size_inches()
    assert width in (COLUMN, PAGE)
    for ax in canvas.findobj(Axes):
        assert ax.lines or ax.patches or ax.images or ax.collections
        extent = ax.get_tightbbox(renderer).transformed(inches)
        assert extent.x0 >= 0 and extent.x1 <= width, ax.get_title()
        assert extent.y0 >= 0 and extent.y1 <= height, ax.get_title()
        boxes = [(t, Text.get_window_extent(t, renderer)) for t in ax.texts if t.get_text()]
        for (one, a), (other, b) in combinations(boxes, 2):
            across, up = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(across, up) < 1, (one.get_text(), other.get_text())  # pixel
    texts = [text for text in canvas.findobj(Text) if text.get_text().strip()]
    assert min(text.get_fontsize() for text in texts) >= SIZE >= 7
    for text in texts:
        drawn = to_rgb(text.get_color())
        assert contrast(drawn) >= CONTRAST or drawn == (1, 1, 1), text.get_text()
    for legend in legends_of(canvas):
        box = legend.get_window_extent(renderer)
        extent = box.transformed(inches)
        assert extent.x0 >= 0 and extent.x1 <= width and extent.y0 >= 0 and extent.y1 <= height
        for ax in canvas.axes:  # beside the panels, never on their data
            assert not box.padded(-1).overlaps(ax.patch.get_window_extent(renderer))
    plt.close(canvas)
