"""The analysis's figures: nothing empty, cut off, overlapping or too small; the same bytes for the same rows."""

import matplotlib.pyplot as plt
import pytest
from analysis.colours import family, looks
from analysis.handoff_figures import HANDOFF_FIGURES
from analysis_rows import handoff_rows, write
from figure_checks import assert_readable, names_in
from test_frontier_analysis import asymmetry_rows, frontier_rows, layer_rows

from analysis import registry
from analysis.frontier_figures import FRONTIER_FIGURES
from analysis.load import load


def bars_in(ax):
    """The ends of every interval of the panel that has a length."""
    found = [segment for part in ax.collections for segment in part.get_segments()]
    return [(tuple(a), tuple(b)) for a, b in found if tuple(a) != tuple(b)]


def drawn(tmp_path, name, rows):
    """The figure of these rows, and the rows."""
    rows = load(write(tmp_path, rows)).rows
    return registry.FIGURES[name](rows), rows


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


def test_the_fp16_relay_stands_beside_what_is_held_to_it(tmp_path):
    canvas, _ = drawn(tmp_path, "handoff_hops", handoff_rows(loss=8))
    kl, accuracy = canvas.axes
    lines = {c.get_label(): list(c[0].get_ydata()) for c in accuracy.containers}
    assert lines["fp16"] == lines["uniform"] == [90.0] * 3 and lines["topology"] == [80.0] * 3
    assert "fp16" not in {c.get_label() for c in kl.containers}  # it is what KL is to
    plt.close(canvas)


def test_the_frontier_names_every_recipe_once_and_apart(tmp_path):
    canvas, rows = drawn(tmp_path, "recipe_frontier", frontier_rows())
    shown = rows[(rows["metric"] == "kl_mean") & (rows["value"] > 0)]["recipe"]
    assert sorted(names_in(canvas)) == sorted(set(shown))
    plt.close(canvas)
    found = looks(["turboquant_2bit", "turboquant_3bit", "uniform", "uniform_rotated", "q4_0"])
    assert len(set(found.values())) == 5
    assert found["uniform"][0] == found["uniform_rotated"][0] == family("uniform")[1]
