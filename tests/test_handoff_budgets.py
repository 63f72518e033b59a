"""experiment=handoff_budgets: replays alone are those beside answers, and what the table makes of them."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from analysis_rows import cell, write
from conftest import checked_cell, rows_of
from figure_checks import assert_readable
from scipy import stats
from test_handoff_accuracy import SMALL

from analysis import catalog, handoff_budgets, render
from analysis.load import load
from polykv.errors import PolyKVError

N = 12
SPREAD = np.linspace(-0.5, 0.5, N)  # of log KL between the problems
NOISE = 0.2 * np.sin(np.arange(N))  # of a pair


def of(rows, *metrics):
    names = ("metric", "value", "sample", "hop", "policy", "budget_bits")
    return [tuple(row[name] for name in names) for row in rows if row["metric"] in metrics]


def test_replays_alone_are_those_beside_played_relays():
    small = (*SMALL, "policy=topology", "budget_bits=3.5", "n_hops=2")
    whole, alone = rows_of(*small), rows_of(*small, "answers=false")
    assert of(alone, "kl", "same_top1") == of(whole, "kl", "same_top1")
    assert {row["metric"] for row in alone} == {
        "kl", "same_top1", "digit_flip", "mean_bits", "file_bits", "replay_minutes",
    }  # fmt: skip
    bits = {row["dtype"]: row["value"] for row in alone if row["metric"] == "mean_bits"}
    assert set(bits) == {"float32"} and 3.5 < bits["float32"] < 6


def test_answers_is_true_or_false():
    with pytest.raises(PolyKVError, match="answers='no'"):
        checked_cell(*SMALL, "answers=no")


def budget_cells(ratios, budgets=(3.0, 4.0), reseals=("append",), noise=NOISE):
    """Cells in which a policy's KL is `ratios` times that of uniform bits."""
    made = []
    for bits in budgets:
        for reseal in reseals:
            for policy, ratio in {"uniform": 1, **ratios}.items():
                about = {
                    "document": "gsm8k",
                    "policy": policy,
                    "budget_bits": bits,
                    "model": "m",
                    "weights": "w",
                }
                one = cell("handoff_accuracy", f"{policy}-{bits}-{reseal}", **about)
                kl = np.exp(SPREAD + noise * (policy != "uniform")) * ratio * 10**-bits
                for sample, value in enumerate(kl):
                    where = {"sample": sample, "n_hops": 2, "hop": 2, "reseal": reseal}
                    one[3].add("kl", value, "nats", n=9, **where)
                    one[3].add("mean_bits", bits + 0.4, "bits", **where)
                made.append(one)
    return made


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    cells = budget_cells(
        {"qkvshare": 3, "trellis": 0.25, "local": 1}, reseals=("append", "requantize")
    )
    return load(write(tmp_path_factory.mktemp("budgets"), cells)).rows


def test_a_policy_is_held_to_uniform_bits_on_the_same_problems(measured):
    shown = catalog.pieces("TABLES")["handoff_budgets"](measured)
    by_policy = {}
    for line in shown.rows:
        by_policy.setdefault(line["policy"], []).append(line)
    assert {policy: len(lines) for policy, lines in by_policy.items()} == dict.fromkeys(
        ("uniform", "trellis", "local", "qkvshare"), 4
    )
    expected = {
        "qkvshare": (3, "worse"),
        "trellis": (0.25, "better"),
        "local": (1, "no difference shown"),
    }
    p = stats.ttest_1samp(NOISE + np.log(3), 0).pvalue
    assert by_policy["qkvshare"][0]["p"].value >= p  # corrected
    for policy, (ratio, verdict) in expected.items():
        for line in by_policy[policy]:
            assert line["ratio"].value == pytest.approx(ratio * np.exp(NOISE.mean()))
            assert line["verdict"] == verdict
            assert 1 < line["detectable"].value < 1.5
    assert by_policy["uniform"][0]["ratio"].value is None
    render.markdown(shown)


def test_findings_say_what_would_have_shown(measured):
    (sentences,) = handoff_budgets.findings(measured).values()
    said = {sentence.split()[0]: sentence for sentence in sentences}
    assert (
        "better in 4 and worse in 0 of 4" in said["trellis"] and "would have" not in said["trellis"]
    )
    assert "better in 0 and worse in 4 of 4" in said["qkvshare"]
    assert "no difference shown" in said["local"] and said["local"].count("would have shown") == 4


def test_the_figure_has_a_panel_for_each_way_of_resealing(measured):
    canvas = catalog.pieces("FIGURES")["handoff_budgets"](measured).canvas
    assert [ax.get_title(loc="left") for ax in canvas.axes] == ["append", "requantize"]
    assert_readable(canvas)
    plt.close(canvas)


def test_cells_without_answers_leave_no_empty_panels_of_accuracy(measured):
    assert isinstance(catalog.pieces("FIGURES")["handoff_hops"](measured), str)


def test_equal_divergence_is_said_to_be_of_the_same_cards(tmp_path):
    cells = budget_cells({"topology": 1}, noise=0 * NOISE)
    rows = load(write(tmp_path, cells)).rows
    shown = catalog.pieces("TABLES")["handoff_budgets"](rows)
    told = [line["verdict"] for line in shown.rows if line["policy"] == "topology"]
    assert told == ["the same cards"] * 2
    (sentences,) = handoff_budgets.findings(rows).values()
    assert "**the same cards**" in sentences[0]


def test_other_problems_are_not_compared_and_seeds_are_corrected_apart(tmp_path):
    cells = budget_cells({"trellis": 0.5})
    del cells[1][3][-2:]  # the last problem of trellis at 3 bits
    rows = load(write(tmp_path, cells)).rows
    shown = catalog.pieces("TABLES")["handoff_budgets"](rows)
    ratios = {line["budget"]: line["ratio"] for line in shown.rows if line["policy"] == "trellis"}
    assert ratios["3 bits"].value is None and "same problems" in ratios["3 bits"].note
    assert ratios["4 bits"].value == pytest.approx(0.5 * np.exp(NOISE.mean()))
    more = rows.assign(seed=1, cell=rows["cell"] + "b")
    again = catalog.pieces("TABLES")["handoff_budgets"](pd.concat([rows, more]))
    assert {line["section"][-6:] for line in again.rows} == {"seed 0", "seed 1"}
    for line in again.rows:
        if line["policy"] == "trellis" and line["budget"] == "4 bits":
            (alone,) = (
                one
                for one in shown.rows
                if one["policy"] == "trellis" and one["budget"] == "4 bits"
            )
            assert line["p"].value == alone["p"].value  # the same problems count once


def test_one_policy_is_no_comparison(tmp_path):
    rows = load(write(tmp_path, budget_cells({}))).rows
    assert catalog.pieces("TABLES")["handoff_budgets"](rows) is None
    assert isinstance(catalog.pieces("FIGURES")["handoff_budgets"](rows), str)
    assert not handoff_budgets.findings(rows)
