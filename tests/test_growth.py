"""Lines of step time and memory over agents and tokens, against SciPy's fit and made-up cells."""

import numpy as np
import pytest
from analysis_rows import cell, write
from scipy import stats

from analysis import catalog, render
from analysis.growth import line_of
from analysis.load import load


def test_an_exact_line_is_found():
    x = [1, 5, 15, 30, 60]
    found = line_of(x, [3 + 0.5 * one for one in x])
    assert found.slope.value == pytest.approx(0.5) and found.start == pytest.approx(3)
    assert found.departure == pytest.approx(0, abs=1e-9)
    assert found.slope.low == pytest.approx(found.slope.high) == pytest.approx(0.5)


def test_the_fit_is_the_least_squares_of_relative_distances():
    rng = np.random.default_rng(0)
    x = np.array([1.0, 4, 9, 20, 50])
    y = (2 + 0.3 * x) * np.exp(0.05 * rng.normal(size=5))
    found = line_of(x, y)
    # y = a + b x with weights 1 / y² is 1 = a / y + b x / y without a constant.
    slopes = np.linspace(0.2, 0.4, 2001)
    starts = [((1 - b * x / y) / y).sum() / (1 / y**2).sum() for b in slopes]
    errors = [((1 - a / y - b * x / y) ** 2).sum() for a, b in zip(starts, slopes, strict=True)]
    assert found.slope.value == pytest.approx(slopes[int(np.argmin(errors))], abs=1e-4)
    same = line_of(x, 7 + 0.001 * rng.normal(size=5) + 0 * x)  # nearly equal weights
    theirs = stats.linregress(x, np.full(5, 7.0))
    assert same.slope.value == pytest.approx(theirs.slope, abs=1e-3)


def test_the_interval_holds_the_slope_in_19_of_20_samples():
    rng, x = np.random.default_rng(1), np.array([1.0, 5, 10, 15, 30, 60])
    held = 0
    for _ in range(400):
        slope = line_of(x, (20 + 2 * x) * (1 + 0.02 * rng.normal(size=6))).slope
        held += slope.low <= 2 <= slope.high
    assert 0.91 < held / 400 < 0.98


def test_each_reader_has_a_line_along_agents_and_tokens(tmp_path):
    cells = []
    for n_agents, tokens in (
        (1, 1024),
        (5, 1024),
        (15, 1024),
        (30, 1024),
        (15, 2048),
        (15, 4096),
        (15, 8192),
    ):
        about = {
            "model": "m",
            "weights": "w",
            "n_agents": n_agents,
            "context_tokens": tokens,
            "recipe": "polykv",
        }
        one = cell("concurrency", f"{n_agents}-{tokens}", document=None, **about)
        for sample in range(3):
            value = 4.0 + 0.5 * n_agents + 0.001 * tokens * n_agents
            one[3].add("step_time", value, "ms", sample=sample, reader="in_place", n=1)
        one[3].add("kv_memory", 0.002 * n_agents, "GB", accounting="resident", reader="in_place")
        cells.append(one)
    rows = load(write(tmp_path, cells)).rows.assign(n_threads=2, synthetic=True)
    shown = catalog.pieces("TABLES")["growth"](rows)
    lines = {(line["along"], line["what"]): line for line in shown.rows}
    assert lines["agents", "step, ms"]["slope"].value == pytest.approx(0.5 + 1.024)
    assert lines["tokens", "step, ms"]["slope"].value == pytest.approx(15)
    assert lines["agents", "resident, MB"]["slope"].value == pytest.approx(2)
    assert lines["agents", "step, ms"]["points"] == "1, 5, 15, 30"
    assert ("tokens", "resident, MB") in lines
    assert "largest departure" in render.markdown(shown)


def test_three_points_make_no_line(tmp_path):
    cells = []
    for n_agents in (1, 5, 15):
        about = {
            "model": "m",
            "weights": "w",
            "n_agents": n_agents,
            "context_tokens": 8,
            "recipe": "polykv",
        }
        one = cell("concurrency", str(n_agents), document=None, **about)
        one[3].add("step_time", 4.0 * n_agents, "ms", sample=0, reader="in_place", n=1)
        cells.append(one)
    rows = load(write(tmp_path, cells)).rows.assign(n_threads=2, synthetic=True)
    assert catalog.pieces("TABLES")["growth"](rows) is None
