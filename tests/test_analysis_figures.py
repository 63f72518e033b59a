"""The analysis's figures: nothing empty, cut off, overlapping or too small; the same bytes for the same rows."""

import matplotlib.pyplot as plt
import pytest
from analysis.colours import family, looks
from analysis_rows import write
from figure_checks import assert_readable, names_in
from test_frontier_analysis import asymmetry_rows, frontier_rows, layer_rows

from analysis import registry
from analysis.frontier_figures import FRONTIER_FIGURES
from analysis.load import load


def drawn(tmp_path, name, rows):
    """The figure of these rows, and the rows."""
    rows = load(write(tmp_path, rows)).rows
    return registry.FIGURES[name](rows), rows


@pytest.mark.parametrize(
    "name", ["recipe_frontier", "recipe_ranking", "kv_asymmetry", "layer_sensitivity"]
)
def test_frontier_figures_are_readable(tmp_path, name):
    rows = [*frontier_rows(), *asymmetry_rows(), *layer_rows()]
    assert_readable(FRONTIER_FIGURES[name](load(write(tmp_path, rows)).rows))


def test_the_frontier_names_every_recipe_once_and_apart(tmp_path):
    canvas, rows = drawn(tmp_path, "recipe_frontier", frontier_rows())
    shown = rows[(rows["metric"] == "kl_mean") & (rows["value"] > 0)]["recipe"]
    assert sorted(names_in(canvas)) == sorted(set(shown))
    plt.close(canvas)
    found = looks(["turboquant_2bit", "turboquant_3bit", "uniform", "uniform_rotated", "q4_0"])
    assert len(set(found.values())) == 5
    assert found["uniform"][0] == found["uniform_rotated"][0] == family("uniform")[1]
