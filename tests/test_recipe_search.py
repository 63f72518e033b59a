"""experiment=recipe_search on a tiny model: the budget, the best table, resuming, refusals, and its table."""

import sqlite3

import pytest
from conftest import checked_cell

from analysis import recipe_search
from analysis.load import load
from experiments.recipe_search import go_on, open_search
from experiments.session import of_process
from polykv.errors import PolyKVError
from polykv.results import Store


def cell(checkpoint, tmp_path, *overrides):
    return checked_cell("experiment=recipe_search", "model=local", f"model.path={checkpoint}", "document=file",
                        f"document.path={checkpoint}/text.txt", "context=60", "n_documents=4",
                        f"results_dir={tmp_path}", *overrides)  # fmt: skip


@pytest.mark.slow
def test_search_keeps_the_budget_beats_no_table_it_tried_and_resumes(checkpoint, tmp_path):
    pytest.importorskip("optuna")
    study, settled = cell(checkpoint, tmp_path, "widths=[2,4]", "budget_bits=5.0", "n_trials=6")
    session = of_process()
    search = open_search(settled, session)
    go_on(settled, session, search)
    assert len([t for t in search.trials if t.value is not None]) == 6
    rows = study.run(settled, session)  # nothing is left to try: the search holds all six
    database = next((tmp_path / "search").glob("*.db"))
    assert sqlite3.connect(database).execute("select count(*) from trials").fetchone() == (6,)
    stored = [row for row in rows if row.get("accounting") == "stored"]
    assert {row["recipe"] for row in stored} == {"search_per_layer", "search_uniform"}
    assert max(16 / row["value"] for row in stored) <= 5
    best = min((t for t in search.trials if t.user_attrs["over"] <= 0), key=lambda t: t.value)
    assert f"{best.user_attrs['table']}" in {row["layer_bits"] for row in rows}
    assert {row["seed"] for row in rows} == {1}  # measured on documents that it did not see
    Store(tmp_path).write(study.declaration(), "c", {}, rows)
    lines = recipe_search.table(load(tmp_path).rows).rows
    assert [line["budget"] for line in lines] == [5.0, 5.0]
    assert all(line["kl_mean"].value > 0 for line in lines)


@pytest.mark.parametrize(
    ("override", "said"), [("budget_bits=1", "budget_bits"), ("n_trials=0", "n_trials"), ("widths=[2,99]", "bits=99"),
                          ("recipe=streaming_4", "recipe=uniform_rotated")]
)  # fmt: skip
def test_search_refuses_what_cannot_be_had(override, said, checkpoint, tmp_path):
    pytest.importorskip("optuna")
    with pytest.raises(PolyKVError, match=said):
        cell(checkpoint, tmp_path, override)
