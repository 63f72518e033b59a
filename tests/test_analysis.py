"""The analysis from the command line, on synthetic rows: what is written, and what is refused."""

import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
from analysis.figures import FIGURES
from analysis.reduce import points
from analysis.tables import TABLES
from analysis_rows import RATIO, cell_rows, paper_memory, quickstart, run, write

from analysis.__main__ import PICTURES, WRITERS


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A results folder with all its tables and figures, and what was printed."""
    root = write(tmp_path_factory.mktemp("results"), quickstart() + paper_memory())
    with redirect_stdout(StringIO()) as said:
        assert run(root) == 0
    return root, said.getvalue()


def test_every_table_and_figure_is_written_in_every_format(rendered):
    root, said = rendered
    for name, kind in product(TABLES, WRITERS):
        assert (root / "tables" / f"{name}.{kind}").stat().st_size > 200
    for name, kind in product(FIGURES, PICTURES):
        assert (root / "figures" / f"{name}.{kind}").stat().st_size > 2000
    assert (root / "tables" / "polykv_memory_decomposition.md").is_file()
    assert str(root / "tables") in said and str(root / "figures") in said
    assert "BERT F1" in said and "not drawn" not in said
    assert max(map(len, said.splitlines()[:-2])) <= 100


def test_same_rows_give_identical_tables_and_figures(rendered, tmp_path):
    root, _ = rendered
    again = write(tmp_path, list(reversed(quickstart() + paper_memory())))
    assert run(again) == 0
    files = [*(root / "tables").iterdir(), *(root / "figures").iterdir()]
    assert {file.suffix for file in files} == {".md", ".tex", ".csv", ".png", ".pdf"}
    for file in files:
        assert file.read_bytes() == (again / file.relative_to(root)).read_bytes(), file.name


def test_newest_measurement_counts_and_seeds_are_averaged():
    base = cell_rows("reference", "reference", 512, 3, "polykv", True)
    old = [row | {"value": 99.0, "created_at": "2025-01-01", "cell": "old"} for row in base]
    other = [row | {"seed": 1, "cell": "other"} for row in base]
    for row in other:
        if row["metric"] == "perplexity_delta":
            row |= {"value": row["value"] + 1, "ci_low": -5.0, "ci_high": 50.0}
    frame = pd.DataFrame(old + other + base).fillna({"note": "", "reader": "", "protocol": ""})
    (point,) = points(frame.assign(head_dim=64.0))
    delta = next(row["value"] for row in base if row["metric"] == "perplexity_delta")
    value = point["perplexity_delta"]
    assert value.value == pytest.approx(delta + 0.5)
    assert (value.low, value.high) == (-5.0, 50.0)
    assert "2 seeds" in value.note


def test_figure_that_cannot_be_drawn_is_said(tmp_path, capsys):
    assert run(write(tmp_path, paper_memory()), "--only", "perplexity_context") == 0
    assert "figure perplexity_context is not drawn: no perplexity_delta" in capsys.readouterr().out
    assert not (tmp_path / "figures" / "perplexity_context.png").exists()


@pytest.mark.parametrize("make", [lambda p: p / "nowhere", lambda p: p])
def test_missing_or_empty_results_are_one_line_and_exit_2(tmp_path, capsys, make):
    assert run(make(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error


@pytest.mark.parametrize("option", ["--only", "--format"])
def test_unknown_name_is_one_line_and_exit_2(rendered, capsys, option):
    assert run(rendered[0], option, "sumary") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "sumary" in error and ("compare" in error or "png" in error)


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"rows": [{"value": 1}]}', '{"rows": 3}', "\udcff\x00"]
)
def test_damaged_cell_is_named_skipped_and_not_forgiven(tmp_path, capsys, damage):
    write(tmp_path, quickstart((512,), (3,)))
    bad = tmp_path / "cells" / "synthetic" / "broken.json"
    bad.write_text(damage, errors="surrogateescape")
    assert run(tmp_path, "--only", "compare") == 1
    said = capsys.readouterr()
    assert "broken.json" in said.err and "polykv_q8_0" in said.out


def test_cell_with_text_for_a_number_is_damaged(tmp_path, capsys):
    rows = quickstart((512,), (3,))
    rows[0]["value"] = "plenty"
    assert run(write(tmp_path, rows), "--only", "compare") == 1
    assert rows[0]["cell"] in capsys.readouterr().err


def test_only_and_format_write_nothing_else(tmp_path):
    assert run(write(tmp_path, quickstart()), "--only", "polykv_ratio", "--format", "csv") == 0
    written = [p.name for folder in ("tables", "figures") for p in (tmp_path / folder).iterdir()]
    assert written == ["polykv_ratio.csv"]
    frame = pd.read_csv(tmp_path / "tables" / "polykv_ratio.csv", comment="#")
    assert set(frame["recipe"]) == set(RATIO)


def test_analysis_never_imports_torch():
    code = "import sys, analysis.__main__; sys.exit('torch' in sys.modules)"
    place = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=place, check=False).returncode == 0
