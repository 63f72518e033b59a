"""What the analysis's tables hold and how they are written, on synthetic rows."""

import math
import re
from itertools import product

import pytest
from analysis.reduce import points
from analysis.tables import TABLES
from analysis_rows import BYTES, RATIO, cell_rows, paper_memory, quickstart, run, write
from hypothesis import given
from hypothesis import strategies as st

from analysis import decomposition, published, registry, render
from analysis.load import load

GB_FIGURES = [f for f in published.load("polykv") if f.metric == "kv_memory"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("results"), quickstart() + paper_memory())


def test_published_gb_are_met_to_three_decimals_under_paper_accounting(root):
    table = TABLES["polykv_memory"](load(root).rows, published.load("polykv"))
    met = [row for row in table.rows if row["section"] == "published configurations"]
    assert len(met) == len(GB_FIGURES) == 10
    for row in met:
        assert round(row["paper"].value, 3) == row["published"].value
        assert abs(row["difference"].value) < 0.0005
        assert row["stored"].value < row["paper"].value
        assert row["resident"].value is None and "GB" in row["resident"].note
    unshared = [row for row in met if row["recipe"] == "full"]
    assert all(math.isclose(r["fp16"].value, r["paper"].value / 2) for r in unshared)


def test_decomposition_is_computed_from_the_geometry_with_or_without_rows(root, tmp_path):
    figures = published.load("polykv")
    measured = decomposition.text(points(load(root).rows), figures)
    assert "262,144 bytes per token" in measured and "(stored, measured) 0.229 GB" in measured
    implied = decomposition.text(points(load(write(tmp_path, quickstart())).rows), figures)
    assert "262,144 bytes per token" in implied and "(stored" not in implied
    for text in (measured, implied):
        lines = re.findall(r"\| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
        assert len(lines) == 10 and all(computed == said for computed, said in lines)


def test_missing_values_are_dashes_with_a_reason(tmp_path):
    rows = quickstart(recipes=("full", "polykv"))
    for row in rows:
        if row["metric"] == "bertscore_floor" and row["context_tokens"] == 256:
            row |= {"value": None, "note": "no two answers differ"}
        if row["metric"] == "perplexity_delta" and row["context_tokens"] == 512:
            row |= {"ci_low": None, "ci_high": None}
    assert run(write(tmp_path, rows), "--only", "compare") == 0
    text = (tmp_path / "tables" / "compare.md").read_text()
    mark = re.search("^([⁰¹²³⁴⁵⁶⁷⁸⁹]+) no two answers differ", text, re.MULTILINE)[1]
    assert text.count(f"| –{mark} |") == 2  # of the baseline there is none
    for file in (tmp_path / "tables").iterdir():
        assert not re.search(r"\b(nan|None|inf)\b", file.read_text(), re.IGNORECASE), file.name


def test_another_model_stands_under_its_own_heading_and_is_not_subtracted(root):
    table = TABLES["polykv_quality"](load(root).rows, published.load("polykv"))
    heading = "published on llama-3-8b-instruct; measured on reference (reference weights)"
    rows = [row for row in table.rows if row["section"] == heading]
    assert len(rows) == 12
    assert all(row["difference"].value is None for row in rows)
    five = next(r for r in rows if r["agents"] == 5 and r["metric"] == "bertscore_f1")
    assert five["measured"].note == "not measured here: 5 agents were not run"
    three = next(r for r in rows if r["agents"] == 3 and r["metric"] == "bertscore_f1")
    assert three["measured"].note == "scored by minilm"


def test_the_same_model_is_matched_by_document_family_and_context(tmp_path, monkeypatch):
    monkeypatch.setitem(BYTES, "smollm2-1.7b", 393216)
    rows = []
    for recipe in ("full", "polykv"):
        rows += cell_rows("smollm2-1.7b", "hub", 612, 3, recipe, True, document="moon_landing")
    table = TABLES["polykv_quality"](load(write(tmp_path, rows)).rows, published.load("polykv"))
    mine = [row for row in table.rows if "smollm2" in row["section"]]
    assert {row["section"] for row in mine} == {
        "published on smollm2-1.7b-instruct; measured on it (hub weights)"
    }
    apollo = [row for row in mine if row["document"] == "apollo-11"]
    for row in apollo:
        assert (row["on"], row["at"]) == ("moon_landing", 612)
        expected = row["measured"].value - row["published"].value
        assert row["difference"].value == pytest.approx(expected)
        assert "another text" in row["measured"].note
    arpanet = [row for row in mine if row["document"] == "arpanet"]
    assert all(r["measured"].note.endswith("no document like arpanet was run") for r in arpanet)
    llama = [row for row in table.rows if "llama" in row["section"]]
    assert llama and all(r["measured"].note.endswith("instruct was not run") for r in llama)


def test_random_weights_answer_no_quality_figure(tmp_path):
    rows = paper_memory()
    table = TABLES["polykv_quality"](load(write(tmp_path, rows)).rows, published.load("polykv"))
    assert all(row["measured"].value is None for row in table.rows)


def test_ratio_stands_per_recipe_and_head_dim(root):
    table = TABLES["polykv_ratio"](load(root).rows, published.load("polykv"))
    by = {(row["recipe"], row["head_dim"]): row for row in table.rows}
    assert set(by) == set(product(RATIO, (64, 128)))
    assert by["polykv", 128]["published"].value == 2.91
    assert by["polykv", 128]["nominal_ratio_low"].value == pytest.approx(32 / 11)
    assert by["full", 64]["published"].value is None


def test_secondary_digest_is_marked():
    figures = published.load("qkvshare")
    marked = [f for f in figures if f.value.note]
    assert 0 < len(marked) < len(figures)
    assert all("secondary digest" in f.source for f in marked)
    column = render.Column("published", "published", render.fixed(2))
    table = render.Table("t", "c", [column], [{"published": marked[0].value}])
    assert "¹ secondary digest of the paper" in render.markdown(table)


def test_latex_is_ascii_and_balanced(root):
    for table in TABLES.values():
        text = render.latex(table(load(root).rows, published.load("polykv")))
        assert text.isascii()
        assert text.count(r"\begin{") == text.count(r"\end{")
        assert not re.search(r"(?<!\\)[_%#]", re.sub(r"\\label{.*?}", "", text))
        for body in re.findall(r"\\toprule(.*?)\\bottomrule", text, re.DOTALL):
            lines = [line for line in body.split("\\\\\n") if "&" in line]
            assert len({len(re.findall(r"(?<!\\)&", line)) for line in lines}) == 1


@given(st.floats(-1e4, 1e4, allow_nan=False), st.integers(0, 5))
def test_a_number_that_is_not_zero_is_never_shown_as_zero(number, digits):
    shown = render.fixed(digits)(number, {})
    assert (float(shown.replace(",", "")) == 0) == (number == 0)
    assert (float(render.memory(abs(number), {}).replace(",", "")) == 0) == (number == 0)


def test_plain_text_fits_the_width_and_names_what_it_leaves_out(root):
    table = registry.TABLES["compare"](load(root).rows)
    for width in (80, 100, 300):
        text = render.plain(table, width)
        assert max(map(len, text.splitlines())) <= width
        head = next(line for line in text.splitlines() if line.startswith(table.columns[0].header))
        shown = re.split(r" {2,}", head)
        assert shown == [column.header for column in table.columns][: len(shown)]
        assert all(column.header in text for column in table.columns)
    assert len(shown) == len(table.columns)
