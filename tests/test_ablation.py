"""experiment=controller_ablation: a cell of it, and what the findings say after correction, on made-up differences."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import checked_cell, rows_of
from figure_checks import assert_readable

from analysis import catalog, controller_ablation, render
from analysis.controller_ablation import Comparison, sides
from analysis.load import load
from analysis.statistics import Value
from experiments.controller_ablation import COLUMNS, STUDY
from experiments.session import Session
from polykv.evaluation.statistics import skewed_interval
from polykv.results import Rows, Store

SMALL = (
    "experiment=controller_ablation", "n_problems=3", "relay.n_facts=8", "relay.max_new_tokens=12", "budget_bits=3",
    "n_hops=1", "device=cpu",
)  # fmt: skip
PUBLISHED = sides() | {"alpha": 0.5}
N = 8  # problems of a made-up cell
SPREAD = np.linspace(-1, 1, N)
HALF = skewed_interval(SPREAD)[1]  # half width of the interval of a symmetric sample of this spread


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    made = rows_of(*SMALL, "policy.alpha=0.5")
    Store(root).write(STUDY.declaration(), "a", {}, made)
    return load(root).rows


def cells(differences, half_width=1e-3):
    """Cells whose KL is above that of uniform bits by `differences`: (policy, budget, reseal) -> nats.

    A policy is the name of one signal, or PUBLISHED.
    """
    found = []
    for number, ((policy, bits, reseal), apart) in enumerate(differences.items()):
        about = {"importance": policy, "demand": "", "alpha": 1.0} if policy != "published" else PUBLISHED  # fmt: skip
        rows = Rows(COLUMNS, model="m", weights="w", device="cpu", dtype="float32", document="d", seed=0,
                    n_hops=1, budget_bits=bits, reseal=reseal)  # fmt: skip
        about = about | {"inverse": False, "tiers": "3/4/8/16", "policy": "ablated"}
        for sample, part in enumerate(SPREAD * half_width / HALF):
            rows.add("kl", 0.1 + apart + part, "nats", sample=sample, n=9, **about)
            for name in ("uniform", "random"):
                rows.add("kl", 0.1, "nats", sample=sample, n=9, policy=name, baseline=name)
        found.append((number, rows))
    return found


def loaded(tmp_path, differences):
    for number, rows in cells(differences):
        Store(tmp_path).write(STUDY.declaration(), str(number), {}, rows)
    return load(tmp_path).rows


def said(tmp_path, differences):
    (lines,) = controller_ablation.findings(loaded(tmp_path, differences)).values()
    return " ".join(lines)


def settings(policy, *differences):
    """Four settings of one policy."""
    places = [(bits, reseal) for bits in (3.0, 4.0) for reseal in ("append", "requantize")]
    return {(policy, *place): d for place, d in zip(places, differences, strict=True)}


@pytest.mark.slow
def test_cells_of_a_sweep_over_the_problems_replayed_have_baselines_of_their_own():
    session, found = Session(), []
    for n_forced in (1, 2):
        _, settled = checked_cell(*SMALL, f"n_forced={n_forced}")
        rows = STUDY.run(settled, session)
        found.append([row.get("baseline", "") for row in rows if row["metric"] == "kl"])
    assert found == [["", "uniform", "random"], [""] * 2 + ["uniform"] * 2 + ["random"] * 2]


def test_a_cell_has_the_policy_and_both_baselines_on_the_same_problems(measured):
    kl = measured[measured["metric"] == "kl"]
    assert sorted(kl["baseline"]) == sorted(["", "uniform", "random"] * 3)
    mine = kl[kl["baseline"] == ""]
    assert set(mine["alpha"]) == {0.5} and set(mine["demand"]) == {"shared + anchors"}
    (line,) = catalog.pieces("TABLES")["controller_ablation"](measured).rows
    for name in ("uniform", "random"):
        theirs = kl[kl["baseline"] == name].sort_values("sample")["value"].to_numpy(float)
        apart = mine.sort_values("sample")["value"].to_numpy(float) - theirs
        value = line[f"minus_{name}"]
        assert value.value == pytest.approx(apart.mean())
        assert (value.low, value.high) == pytest.approx(skewed_interval(apart))
        outcome = "better" if value.high < 0 else "worse" if value.low > 0 else "no difference"
        assert line[f"verdict_{name}"] == outcome


def test_signals_without_weight_make_no_other_cell():
    cells = {
        STUDY.identity(checked_cell(*SMALL, "policy.alpha=0", f"policy.importance=[{signal}]")[1])
        for signal in ("surprisal", "value_norm")
    }
    assert len(cells) == 1


def test_the_table_renders_and_the_figure_is_readable(tmp_path):
    rows = loaded(
        tmp_path, settings("surprisal", *[1e-3] * 4) | settings("published", *[-1e-3] * 4)
    )
    table = catalog.pieces("TABLES")["controller_ablation"](rows)
    assert len(table.rows) == 8 and not any(c.name.startswith("set.") for c in table.columns)
    for text in (render.markdown(table), render.latex(table), render.to_csv(table)):
        assert "nan" not in text.lower()
    canvas = catalog.pieces("FIGURES")["controller_ablation"](rows).canvas
    assert_readable(canvas)
    plt.close(canvas)
    assert catalog.pieces("TABLES")["controller_ablation"](rows.iloc[:0]) is None


def test_p_is_the_normal_one_that_the_width_implies():
    at_edge = Comparison("s", "append", "", Value(-1e-3, -2e-3, 0.0))
    assert at_edge.p == pytest.approx(0.05)
    skewed = Comparison("s", "append", "", Value(-1e-3, -2.9e-3, -1e-4))
    assert skewed.better and skewed.p > 0.05  # its near end flatters, its width does not
    assert Comparison("s", "append", "", Value(0.0, 0.0, 0.0)).p == 1
    assert Comparison("s", "append", "", Value(1.0, 1.0, 1.0)).p == 0


@pytest.mark.slow
def test_four_of_a_hundred_that_win_by_their_own_interval_are_no_finding(tmp_path):
    wins = settings("surprisal", -1.2e-3, -1.3e-3, -1.4e-3, -1.5e-3)
    none = {(f"signal{n}", 4.0, "append"): 1e-4 for n in range(96)}
    text = said(tmp_path, wins | none)
    assert "**no signal beats equal bits** after Holm over all 100 comparisons" in text
    assert "4 are better and 0 worse" in text and "2.5 of either" in text
    assert "Most often better: surprisal" in text and "2 of 2 under append" in text


@pytest.mark.slow
def test_a_difference_that_survives_correction_is_said(tmp_path):
    none = {(f"signal{n}", 4.0, "append"): 1e-4 for n in range(96)}
    text = said(tmp_path, settings("surprisal", -5e-3, -1e-4, -1e-4, 5e-3) | none)
    assert "**better in 1** after Holm over all 100 comparisons" in text
    assert "1 are worse after it" in text


@pytest.mark.parametrize(
    ("apart", "outcome"),
    [
        (
            (-1.1e-3, 1e-4, 1e-4, 1e-4),
            "a tie",
        ),  # its interval leaves out 0, not so after Holm over four
        ((-1.4e-3, 1e-4, 1e-4, 1e-4), "better"),
        ((1.1e-3, -1e-4, -1e-4, -1e-4), "a tie"),
        ((1.4e-3, -1e-4, -1e-4, -1e-4), "worse"),
        ((1.4e-3, -1.4e-3, 1e-4, 1e-4), "a tie"),
    ],
)
def test_the_published_controller_is_held_to_its_own_settings_after_holm(tmp_path, apart, outcome):
    """p of 1.1 and 1.4 half widths: 0.031 and 0.0061, times four."""
    text = said(tmp_path, settings("published", *apart) | settings("other", *[1e-4] * 4))
    assert f"ones of equal bits: **{outcome}**" in text


def test_a_policy_with_other_tiers_is_not_the_published_one(tmp_path):
    made = cells(settings("published", *[-5e-3] * 4))
    for number, rows in made:
        for row in rows:
            row["tiers"] = row.get("tiers") and "3/8"
        Store(tmp_path).write(STUDY.declaration(), str(number), {}, rows)
    (lines,) = controller_ablation.findings(load(tmp_path).rows).values()
    assert not any("equal bits: **" in line for line in lines[-1:])
