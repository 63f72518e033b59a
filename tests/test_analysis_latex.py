"""Every table as LaTeX, set by pdflatex in one document: nothing off the page, no character lost."""

import re
import shutil
import subprocess

import pytest
from analysis.captions import caption
from analysis.registry import FIGURES, TABLES
from analysis_rows import handoff_rows, paper_memory, quickstart, write
from hypothesis import given, settings
from hypothesis import strategies as st
from test_frontier_analysis import (
    agent_rows,
    asymmetry_rows,
    context_rows,
    frontier_rows,
    layer_rows,
    search_rows,
)

from analysis import render
from analysis.latex import LANDSCAPE, PORTRAIT, Part, environment, tex
from analysis.load import load

needs_pdflatex = pytest.mark.skipif(
    not shutil.which("pdflatex"), reason="pdflatex is not installed"
)
PREAMBLE = r"""\documentclass[10pt,a4paper]{article}
\usepackage[T1]{fontenc}
\usepackage[margin=1in]{geometry}
\usepackage{booktabs,array,longtable,pdflscape}
\begin{document}
"""
SPECIAL = "5 % of a_b & c#d $1 {x} ~ ^ \\ | <y> 3×4 Δppl ±2 10⁻³ x¹² 1–2 a—b ≥1 ≤2 µs → ½ · −1 …"


def pdflatex(folder, parts):
    """Sets the parts on pages of their own; what LaTeX said."""
    body = "\n\\clearpage\n".join(parts)
    (folder / "all.tex").write_text(f"{PREAMBLE}{body}\n\\end{{document}}\n", encoding="ascii")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    return (folder / "all.log").read_text(encoding="latin-1")


@needs_pdflatex
def test_all_tables_and_captions_compile_and_none_leaves_its_page(tmp_path):
    made = [*quickstart(), *paper_memory(), *handoff_rows(), *frontier_rows(), *asymmetry_rows(),
            *layer_rows(), *context_rows(-0.5), *agent_rows(), *search_rows()]  # fmt: skip
    rows = load(write(tmp_path, made)).rows
    tables = {name: build(rows) for name, build in TABLES.items()}
    parts = {name: render.latex(table) for name, table in tables.items() if table}
    assert len(parts) >= 16
    captions = "\n\n".join(tex(caption(name, rows)) for name in FIGURES)
    log = pdflatex(tmp_path, [*parts.values(), captions])
    assert not re.findall(r"Overfull \\[hv]box.*", log)
    assert "Missing character" not in log and "multiply defined" not in log


@needs_pdflatex
@pytest.mark.skipif(not shutil.which("pdftotext"), reason="pdftotext is not installed")
def test_special_characters_are_set_as_they_are(tmp_path):
    column = render.Column("a", "a | b", key=True)
    table = render.Table("special", SPECIAL, [column], [{"a": "[0, 1]"}, {"a": SPECIAL}])
    pdflatex(tmp_path, [render.latex(table)])
    text = subprocess.run(
        ["pdftotext", "-layout", "all.pdf", "-"], cwd=tmp_path, capture_output=True, check=True
    )
    # the dashes as T1 numbers them, where a font does not say what they are
    decoded = text.stdout.decode().translate({0x15: "–", 0x16: "—"})
    shown = "".join(decoded.split())
    for kept in ("5%ofa_b&c#d$1{x}~", "\\|<y>3×4", "±2", "1–2", "a—b", "≥1≤2", "→", "·", "[0,1]"):
        assert kept in shown, kept
    assert re.search("[Δ∆]ppl", shown) and re.search("[µμ]s", shown)


def test_an_unknown_character_is_refused_by_name():
    with pytest.raises(ValueError, match="漢"):
        tex("漢")


@given(st.text(st.sampled_from(SPECIAL + "abc"), max_size=30))
def test_any_known_text_becomes_ascii_without_a_bare_special_character(text):
    written = tex(text)
    assert written.isascii()
    assert not re.search(r"(?<!\\)[%#&_]", written)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=30),
    st.integers(1, 80),
)
@settings(max_examples=50, deadline=None)
def test_no_block_is_wider_than_its_page_and_no_column_is_lost(columns, n_lines):
    line = ["x" * length for length, _ in columns]
    headers = [f"h{i}" for i in range(len(columns))]
    keys = [key and length < 10 and i < 4 for i, (length, key) in enumerate(columns)]
    text = environment("t", "caption", [Part("", headers, keys, [line] * n_lines)], [])
    assert text.count(r"\begin{") == text.count(r"\end{")
    for header in headers:
        assert f"{{{header}}}" in text
    for block in re.findall(
        r"\\begin{(?:longtable|tabular)}{([^\n]*)}\n(.*?)\\end", text, re.DOTALL
    ):
        rows = [row for row in block[1].splitlines() if "xxxxxx" in row and row.endswith(r"\\")]
        room = LANDSCAPE if "landscape" in text else PORTRAIT
        for row in rows:
            assert sum(len(cell.strip(" \\")) * 7 * 0.53 + 6 for cell in row.split("&")) <= room
