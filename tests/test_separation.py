"""recipe_separation on a few documents of the evaluation set: pairing, order, refusals, table and figure."""

import pandas as pd
import pytest
from analysis.separation import draw_separation, recipe_separation
from conftest import checked_cell

from polykv.errors import PolyKVError
from polykv.results import COLUMNS

N = 10


def cell(*overrides):
    return checked_cell(
        "experiment=recipe_separation", "context=256", f"n_documents={N}", *overrides
    )


@pytest.fixture(scope="module")
def rows():
    found = []
    for recipe in ("full", "int8_token", "uniform_2bit"):
        module, settled = cell(f"recipe={recipe}")
        found += module.run(settled)
    return pd.DataFrame(found, columns=COLUMNS).assign(
        experiment="recipe_separation", cell="0", created_at="2026", commit="0"
    )


def of(rows, recipe, metric, group=""):
    mine = rows[(rows["recipe"] == recipe) & (rows["metric"] == metric)]
    return mine[mine["protocol"].fillna("").str.startswith(group)].iloc[0]


def test_the_full_cache_changes_nothing(rows):
    assert of(rows, "full", "kl_mean")["value"] == 0
    for group, asked in (("questions", 4 * N), ("problems", 2 * N)):
        for metric in ("answers_lost", "answers_won", "exact_match_change"):
            assert of(rows, "full", metric, group)["value"] == 0
        assert of(rows, "full", "mcnemar_p", group)["value"] == 1
        assert of(rows, "full", "exact_match", group)["n"] == asked


def test_answers_add_up_and_damage_grows_as_bits_fall(rows):
    for group in ("questions", "problems"):
        full, low = (of(rows, r, "exact_match", group) for r in ("full", "uniform_2bit"))
        lost, won = (of(rows, "uniform_2bit", f"answers_{x}", group) for x in ("lost", "won"))
        assert (full["value"] - low["value"]) * full["n"] == pytest.approx(
            lost["value"] - won["value"]
        )
    high, low = (of(rows, recipe, "kl_mean") for recipe in ("int8_token", "uniform_2bit"))
    assert 0 < high["ci_high"] < low["ci_low"]


def test_table_and_figure(rows):
    table = recipe_separation(rows)
    assert [line["recipe"] for line in table.rows] == ["full", "int8_token", "uniform_2bit"]
    assert len(draw_separation(rows).axes) == 2
    nothing = rows[rows["recipe"] == "none"]
    assert recipe_separation(nothing) is None and draw_separation(nothing) is None


@pytest.mark.parametrize(
    ("override", "said"),
    [("n_documents=501", "has 500"), ("context=null", "context=512"), ("weights=random", "model=reference")],
)  # fmt: skip
def test_refusals(override, said):
    with pytest.raises(PolyKVError, match=said):
        cell(override)
