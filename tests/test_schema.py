"""Rows, the cell's file and the numbers that the analysis computes from samples."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import catalog, load
from analysis.catalog import PAPERS
from analysis.published import load as load_published
from analysis.statistics import QUALITY
from experiments.rows import SCORES, add_scores
from experiments.study import studies
from polykv import cellfile
from polykv.cellfile import COLUMNS, DamagedCell
from polykv.config import CONF
from polykv.evaluation.continuation import Comparison
from polykv.evaluation.statistics import document_interval
from polykv.results import Rows, Store, frame

DECLARED = {"name": "compare", "title": "t", "question": "q", "answers": [], "settings": [],
            "columns": {name: kind.__name__ for name, kind in SCORES.items()}}  # fmt: skip


def comparisons(n_documents: int, n_tokens: int) -> list[Comparison]:
    rng = np.random.default_rng(n_documents)
    full, other = rng.exponential(2, (2, n_documents, n_tokens)).astype(np.float32)
    kl = rng.exponential(0.01, (n_documents, n_tokens)).astype(np.float32)
    return [
        Comparison(a, b, k, {"same_top1": k < 0.01})
        for a, b, k in zip(full, other, kl, strict=True)
    ]


def stored(tmp_path, made: Rows, config: dict | None = None, cell: str = "abc") -> pd.DataFrame:
    Store(tmp_path).write(DECLARED, cell, config or {}, made)
    return load.load(tmp_path).rows


@pytest.mark.parametrize("n_documents", [1, 2, 7, 8, 12])
def test_the_analysis_computes_from_samples_what_the_tokens_give(tmp_path, n_documents):
    found = comparisons(n_documents, 50)
    made = Rows(SCORES, model="m", recipe="r", reader="dequantize", dtype="float32")
    add_scores(made, found, [f"{n}" for n in range(len(found))])
    rows = stored(tmp_path, made)
    kl = QUALITY["kl_mean"].of(rows)
    tokens = [c.kl.astype(float) for c in found]
    assert kl.value == pytest.approx(np.concatenate(tokens).mean(), rel=1e-12)
    assert (kl.low, kl.high) == pytest.approx(document_interval(tokens, (0, np.inf)), rel=1e-12)
    delta = QUALITY["perplexity_delta"].of(rows)
    apart = [c.nll.astype(float) - c.nll_full for c in found]
    ends = [100 * np.expm1(end) for end in document_interval(apart)]
    assert (delta.low, delta.high) == pytest.approx(ends, rel=1e-12)
    assert delta.value == pytest.approx(100 * np.expm1(np.concatenate(apart).mean()), rel=1e-9)
    p99 = QUALITY["kl_p99"].of(rows)
    assert p99.value == pytest.approx(np.percentile(np.concatenate(tokens), 99), rel=1e-6)


def test_documents_of_different_lengths_weigh_by_their_tokens(tmp_path):
    made = Rows(SCORES, model="m", recipe="r")
    found = [c for n in (10, 90) for c in comparisons(1, n)]
    add_scores(made, found, [f"{n}" for n in range(len(found))])
    mean = np.concatenate([c.kl for c in found]).astype(float).mean()
    assert QUALITY["kl_mean"].of(stored(tmp_path, made)).value == pytest.approx(mean, rel=1e-12)


def test_a_document_that_is_not_finite_makes_the_mean_missing_with_its_reason(tmp_path):
    found = comparisons(2, 20)
    found[1].nll[3] = np.nan
    made = Rows(SCORES, model="m", recipe="r")
    add_scores(made, found, [f"{n}" for n in range(len(found))])
    value = QUALITY["perplexity_delta"].of(stored(tmp_path, made))
    assert value.value is None and "1 of 20" in value.note


@pytest.mark.parametrize(
    "wrong", [{"layr": 1}, {"sample": 1.5}, {"sample": -1}, {"block": "a"}, {"n": True}]
)
def test_a_row_with_an_unknown_column_or_another_type_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Rows(SCORES).add("kl", 1.0, "nats", **wrong)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_missing_value_needs_a_reason(value):
    with pytest.raises(ValueError):
        Rows().add("kl", value, "nats")
    rows = Rows()
    rows.add("kl", value, "nats", why="no text")
    assert rows[0]["value"] is None and rows[0]["note"] == "no text"


VALUES = {
    bool: st.booleans(),
    int: st.integers(0, 2**62),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
}
ABOUT = st.fixed_dictionaries(
    {},
    optional={
        name: VALUES[kind]
        for name, kind in {**COLUMNS, **SCORES}.items()
        if name not in (*cellfile.STAMPED, "metric", "value", "unit", "note")
    },
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(VALUES[float], ABOUT), min_size=1, max_size=5))
def test_what_is_written_is_read(tmp_path_factory, observed):
    rows = Rows(SCORES)
    for value, about in observed:
        rows.add("m", value, "u", **about)
    store = Store(tmp_path_factory.mktemp("cells"))
    written = store.write(DECLARED, "c", {"a": 1}, rows)
    read = cellfile.read(store.path("compare", "c"))
    assert read.rows == written.rows and read.config == {"a": 1}
    found = frame([read])
    for place, row in enumerate(rows):
        for name, value in row.items():
            assert found[name].iloc[place] == value
    assert found["sample"].dtype == "Int64" and found["value"].dtype == float


def test_a_file_of_another_format_or_changed_by_hand_is_damaged(tmp_path):
    made = Rows()
    made.add("kl", 1.0, "nats")
    store = Store(tmp_path)
    store.write(DECLARED, "c", {}, made)
    path = store.path("compare", "c")
    content = json.loads(path.read_text())
    for wrong in ({"format": 1}, {"cell": "d"}, {"config": {"b": 2}}, {"n_rows": 2}):
        path.write_text(json.dumps(content | wrong))
        with pytest.raises(DamagedCell):
            cellfile.read(path)
        assert not store.done("compare", "c")


def test_settings_that_differ_on_one_line_are_columns_and_others_are_not(tmp_path):
    for tokens, seed in ((16, 0), (32, 0), (32, 1)):
        made = Rows(model="m", recipe="r", seed=seed)
        made.add("kl", 1.0, "nats")
        # A cell measured again by newer code is the same line: versions of code are no setting.
        versions = {"evaluation.continuation": tokens}
        config = {"max_new_tokens": tokens, "seed": seed, "results_dir": f"{tokens}"}
        config["versions"] = versions
        Store(tmp_path).write(DECLARED, f"{tokens}-{seed}", config, made)
    rows = load.load(tmp_path).rows
    assert load.swept(rows) == ["set.max_new_tokens"]
    assert set(rows["set.max_new_tokens"]) == {"16", "32"}


@pytest.mark.parametrize("name", studies())
def test_every_study_declares_what_it_asks_and_is_shown(name):
    study = studies()[name]
    assert study.title and study.question.endswith("?") and study.settings
    assert [table for table in catalog.pieces("TABLES").values() if name in table.studies]


def test_every_claim_is_of_published_rows():
    published = {paper: {row.table for row in load_published(paper)} for paper in PAPERS}
    for claim in catalog.claims(frame([])):
        assert claim.table in published[claim.paper], claim.claim


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["capacity", "smollm2-135m"])
def test_whatever_is_shown_has_rows_and_a_caption(folder):
    rows = load.load(CONF.parent / "results" / folder).rows
    for name, piece in catalog.pieces("TABLES").items():
        table = piece(rows)
        assert table is None or (table.rows and table.caption), f"table {name}"
    for name, piece in catalog.pieces("FIGURES").items():
        figure = piece(rows)
        assert figure is None or isinstance(figure, str) or figure.caption, f"figure {name}"
        others = rows[~rows["study"].isin(piece.studies)]
        assert piece.studies and piece(others) is None, (
            f"figure {name} needs rows of {piece.studies}"
        )
        plt.close("all")
