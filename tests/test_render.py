"""How tables are written, whatever they hold."""

import re

import pytest
from analysis_rows import cell, paper_memory, quickstart, run, write
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import catalog, render
from analysis.load import load
from analysis.statistics import Value


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    cells = quickstart((256,), (3, 15), n_documents=2) + paper_memory()
    rows = load(write(tmp_path_factory.mktemp("results"), cells)).rows
    made = {name: build(rows) for name, build in catalog.pieces("TABLES").items()}
    return {name: table for name, table in made.items() if table}


@pytest.mark.slow
def test_no_table_says_nan_none_or_inf(tmp_path):
    cells = quickstart((256,), (3,), ("full", "polykv"), n_documents=2)
    cells[1][3].add("kl", None, "nats", why="one token only", statistic="p99")
    assert run(write(tmp_path, cells), "--format", "md,tex,csv") == 0
    for file in (tmp_path / "tables").iterdir():
        assert not re.search(r"\b(nan|None|inf)\b", file.read_text(), re.IGNORECASE), file.name


def test_a_captions_n_is_of_whole_documents(tmp_path):
    made = cell("compare", "one", model="m", weights="reference")
    for n, about in (
        (50, {"sample": 0}),
        (4, {"sample": 0, "block": 0}),
        (900, {"statistic": "p99"}),
    ):
        made[3].add("kl", 0.1, "nats", n=n, **about)
    said = render.describe(load(write(tmp_path, [made])).rows)
    assert "; n = 50; " in said


def test_a_missing_value_has_a_footnote_with_its_reason():
    column = render.Column("a", "a", render.fixed(2))
    rows = [{"a": Value(1.0)}, {"a": Value(None, note="no two answers differ")}]
    text = render.markdown(render.Table("t", "c", [column], rows))
    assert "| –¹ |" in text and "¹ no two answers differ" in text


@pytest.mark.slow
def test_latex_is_ascii_and_balanced(tables):
    for table in tables.values():
        text = render.latex(table)
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


@given(st.floats(1e-12, 1e-6, exclude_max=True), st.sampled_from([1, -1]), st.integers(0, 5))
def test_a_number_below_the_last_digit_keeps_two(number, sign, digits):
    number *= sign * 10 ** (6 - digits)
    assert float(render.fixed(digits)(number, {})) == pytest.approx(number, rel=0.051)


@pytest.mark.slow
def test_plain_text_fits_the_width_and_names_what_it_leaves_out(tables):
    table = tables["compare"]
    for width in (80, 100, 300):
        text = render.plain(table, width)
        assert max(map(len, text.splitlines())) <= width
        head = next(line for line in text.splitlines() if line.startswith(table.columns[0].header))
        shown = re.split(r" {2,}", head)
        assert shown == [column.header for column in table.columns][: len(shown)]
        assert all(column.header in text for column in table.columns)
    assert len(shown) == len(table.columns)
    whole = render.plain(table, 80, whole=True)
    assert all(column.header in whole for column in table.columns) and "Too wide" not in whole


SPECIAL = "5 % of a_b & c#d $1 {x} ~ ^ \\ | <y> 3×4 Δppl ±2 10⁻³ x¹² 1–2 a—b ≥1 ≤2 µs → ½ · −1 …"


@given(st.text(st.sampled_from(SPECIAL + "abc[]"), max_size=30))
def test_any_known_text_becomes_ascii_without_a_bare_special_character(text):
    written = render.tex(text)
    assert written.isascii() and not re.search(r"(?<!\\)[%#&_]", written)


def test_an_unknown_character_is_refused_by_name():
    with pytest.raises(ValueError, match="漢"):
        render.tex("漢")


@given(
    st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=30),
    st.integers(1, 3),
)
@settings(max_examples=20, deadline=None)
def test_latex_loses_no_column_of_a_wide_table_and_repeats_its_keys(given_columns, n_lines):
    made = [
        render.Column(f"c{i}", f"h{i}", key=key and i < 4)
        for i, (_, key) in enumerate(given_columns)
    ]
    line = {c.name: "x" * width for c, (width, _) in zip(made, given_columns, strict=True)}
    text = render.latex(render.Table("t", "caption", made, [line] * n_lines))
    tables = re.findall(r"\\begin{longtable}.*?\\endfirsthead", text, re.DOTALL)
    heads = [re.findall(r"\bh\d+\b", table) for table in tables]
    assert {head for mine in heads for head in mine} == {column.header for column in made}
    keys = [column.header for column in made if column.key]
    assert all(mine[: len(keys)] == keys for mine in heads)
    assert text.count(r"\label{") == 1


def test_html_is_escaped_and_marks_what_a_line_is_about():
    columns = [render.Column("a", "<a>", key=True), render.Column("b", "b & c", render.fixed(1))]
    found, _ = render.sections(render.Table("t", "c", columns, [{"a": "<i>{0}", "b": 1.0}]))
    text = render.html(found[0])
    assert "<span>&lt;i&gt;{0}</span>" in text and "b &amp; c" in text and "<i>" not in text
    assert text.count("<span>") == 2 and "style" not in text
