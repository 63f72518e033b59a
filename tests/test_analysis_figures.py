"""The analysis's figures: nothing empty, cut off, overlapping or too small; the same bytes for the same rows."""

from itertools import combinations

import matplotlib.pyplot as plt
import pytest
from analysis_rows import handoff_rows, paper_memory, quickstart, write
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from test_frontier_analysis import asymmetry_rows, frontier_rows, layer_rows

from analysis import labels, published, registry
from analysis.captions import caption
from analysis.colours import colours, family
from analysis.figures import FIGURES
from analysis.frontier_figures import FRONTIER_FIGURES
from analysis.handoff_figures import HANDOFF_FIGURES
from analysis.layout import COLUMN, PAGE
from analysis.load import load
from analysis.reduce import points


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
    assert min(text.get_fontsize() for text in texts) >= labels.SIZE >= 7
    for text in texts:
        drawn = to_rgb(text.get_color())
        assert labels.contrast(drawn) >= labels.CONTRAST or drawn == (1, 1, 1), text.get_text()
    plt.close(canvas)


@pytest.mark.parametrize("contexts, agents", [((512,), (3,)), ((256, 512), (3,))])
@pytest.mark.parametrize("recipes", [("polykv",), ("full",), ("full", "polykv")])
def test_figures_have_no_empty_panel_and_no_label_cut_off(tmp_path, contexts, agents, recipes):
    found = points(load(write(tmp_path, quickstart(contexts, agents, recipes))).rows)
    for name, build in FIGURES.items():
        canvas = build(found, published.load("polykv"))
        if isinstance(canvas, str):
            assert recipes == ("full",) and "compressed recipe" in canvas, name
            continue
        assert_readable(canvas)


@pytest.mark.parametrize("name", sorted(HANDOFF_FIGURES))
def test_handoff_figures_are_readable(tmp_path, name):
    rows = load(write(tmp_path, handoff_rows())).rows
    assert_readable(HANDOFF_FIGURES[name](rows))


@pytest.mark.parametrize(
    "name", ["recipe_frontier", "recipe_ranking", "kv_asymmetry", "layer_sensitivity"]
)
def test_frontier_figures_are_readable(tmp_path, name):
    rows = [*frontier_rows(), *asymmetry_rows(), *layer_rows()]
    assert_readable(FRONTIER_FIGURES[name](load(write(tmp_path, rows)).rows))


def test_published_points_are_drawn_open_and_only_beside_their_own_model(tmp_path):
    figures = published.load("polykv")
    for rows, expected in ((paper_memory(), 10), (quickstart(), 0)):
        canvas = FIGURES["memory_agents"](
            points(load(write(tmp_path / str(expected), rows)).rows), figures
        )
        drawn = [line for ax in canvas.findobj(Axes) for line in ax.lines]
        open_ones = [line for line in drawn if line.get_fillstyle() == "none"]
        assert sum(len(line.get_xdata()) for line in open_ones) == expected
        plt.close(canvas)


def test_each_recipe_has_a_colour_of_its_own_and_keeps_it():
    names = ["full", "fp16", "polykv", "polykv_q8_0", "turboquant_3bit", "turboquant_4bit", "q4_0"]
    found = colours(names)
    assert len(set(found.values())) == len(names)
    assert found["polykv"] == colours(["polykv"])["polykv"] == family("polykv")[1]


def test_every_figure_has_a_caption_with_where_its_rows_come_from(tmp_path):
    rows = load(write(tmp_path, quickstart() + paper_memory() + handoff_rows())).rows
    for name in registry.FIGURES:
        said = caption(name, rows)
        assert said.endswith("."), name
        if said.endswith("Nothing of this was run here."):
            continue
        for part in ("(reference weights)", "cpu, ", "commit 0123456789ab", "2026-01-02"):
            assert part in said, (name, part)
    assert "Open markers: published, on llama-3-8b-instruct." in caption("memory_agents", rows)
    assert "not drawn, but in table published_polykv" in caption("perplexity_context", rows)
    assert "n = 80" in caption("handoff_hops", rows)
    with pytest.raises(KeyError):
        caption("no_such_figure", rows)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.booleans())
@settings(max_examples=25, deadline=None)
def test_labels_keep_their_order_and_their_distance(ends, is_log):
    canvas, ax = plt.subplots()
    ax.set_yscale("log" if is_log else "linear")
    ax.set_ylim(1e-3, 1e3)
    labels.label_ends(ax, [(y, str(y), "k") for y in ends])
    placed = sorted((text.get_position()[1], float(text.get_text())) for text in ax.texts)
    plt.close(canvas)
    assert [y for _, y in placed] == sorted(ends)
    heights = [height for height, _ in placed]
    gaps = [b - a for a, b in zip(heights, heights[1:], strict=False)]
    assert all(gap >= labels.LABEL_GAP - 1e-9 for gap in gaps)
    assert heights[-1] <= labels.HIGHEST + 1e-9
