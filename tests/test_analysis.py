"""The analysis from the command line, on synthetic rows: what is written, and what is refused."""

import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
from analysis_rows import RATIO, compare_cell, paper_memory, quickstart, run, write
from pairwise import slow

from analysis import catalog, compare
from analysis.__main__ import PICTURES, WRITERS, show
from analysis.load import load

SMALL = {"n_documents": 2}
TABLES = ("compare", "polykv_memory", "polykv_ratio", "polykv_quality", "published_polykv")
FIGURES = ("compare", "memory_agents", "perplexity_context", "bertscore_agents")


def cells():
    return quickstart(**SMALL) + paper_memory(("full", "polykv"))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A results folder with all its tables and figures, and what was printed."""
    root = write(tmp_path_factory.mktemp("results"), cells())
    with redirect_stdout(StringIO()) as said:
        assert run(root) == 0
    return root, said.getvalue()


@pytest.mark.slow
def test_every_table_and_figure_is_written_in_every_format(rendered):
    root, said = rendered
    for name, kind in product(TABLES, WRITERS):
        assert (root / "tables" / f"{name}.{kind}").stat().st_size > 200
    for name, kind in product(FIGURES, PICTURES):
        assert (root / "figures" / f"{name}.{kind}").stat().st_size > 2000
    assert (root / "tables" / "polykv_memory_decomposition.md").is_file()
    assert str(root / "tables") in said and str(root / "figures") in said
    assert "BERT F1" in said and "not drawn" not in said
    assert max(map(len, said.splitlines()[:-3])) <= 100


@pytest.mark.slow
def test_several_folders_have_the_findings_of_one_with_all_their_cells(tmp_path):
    ratio, memory = quickstart(**SMALL), paper_memory(("full", "polykv"))
    parts = [write(tmp_path / name, made) for name, made in (("a", ratio), ("b", memory))]
    whole, out = write(tmp_path / "whole", ratio + memory), tmp_path / "out"
    only = ("--only", "findings", "--format", "md")
    assert run(parts[0], str(parts[1]), "--out", str(out), *only) == 0 == run(whole, *only)
    found = (out / "tables" / "findings.md").read_text()
    assert found == (whole / "tables" / "findings.md").read_text()
    assert not any((part / "tables").exists() for part in parts)


@pytest.mark.slow
def test_the_order_in_which_cells_are_written_changes_no_table(rendered, tmp_path):
    root, _ = rendered
    again = write(tmp_path, list(reversed(cells())))
    assert run(again, "--format", "csv") == 0
    for name in TABLES:
        one, other = (
            sorted((place / "tables" / f"{name}.csv").read_text().splitlines()[1:])
            for place in (root, again)
        )
        assert one == other, name


def test_a_sweep_ends_in_its_own_table_and_counts_published_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("analysis.__main__.PICTURES", ())
    root = write(tmp_path, paper_memory(("polykv",)))
    names = sorted({place[1] for place in load(root).cells})
    assert show(str(root), "polykv_memory", names[:1]) == 0
    said = capsys.readouterr().out
    assert "paper accounting" in said
    assert f"23 published figures of this model: {root / 'tables' / 'published_polykv.md'}" in said
    assert "published_qkvshare" not in said


def test_a_sweep_without_files_prints_the_table_of_its_cells_alone(tmp_path, capsys):
    root = write(tmp_path, quickstart((256, 512), (3,), **SMALL))
    rows = load(root).rows
    asked = set(rows.loc[rows["context_tokens"] == 256, "cell"])
    before = {path for path in root.rglob("*") if path.is_file()}
    assert show(str(root), "compare", sorted(asked), files=False) == 0
    said = capsys.readouterr().out
    assert "256 tokens" in said and "512" not in said and "polykv_q8_0" in said
    assert {path for path in root.rglob("*") if path.is_file()} == before


def test_what_is_printed_can_be_chosen_beside_what_is_written(tmp_path, capsys):
    root = write(tmp_path, quickstart((256,), (3,), **SMALL))
    chosen = ("--only", "polykv_ratio,compare", "--format", "csv", "--print", "polykv_ratio")
    assert run(root, *chosen) == 0
    said = capsys.readouterr().out
    assert "nominal" in said and "BERT F1" not in said
    assert (root / "tables" / "compare.csv").is_file()


@pytest.mark.parametrize("make", [lambda p: p / "nowhere", lambda p: p])
def test_missing_or_empty_results_are_one_line_and_exit_2(tmp_path, capsys, make):
    assert run(make(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error


@pytest.mark.parametrize("option", ["--only", "--format", "--print"])
def test_unknown_name_is_one_line_and_exit_2(tmp_path, capsys, option):
    write(tmp_path, cells())
    assert run(tmp_path, option, "sumary") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "sumary" in error and ("compare" in error or "png" in error)


@pytest.mark.parametrize(
    "damage", ["{", *slow("[]", '{"rows": [{"value": 1}]}', '{"rows": 3}', "\udcff\x00")]
)
def test_damaged_cell_is_named_skipped_and_not_forgiven(tmp_path, capsys, damage):
    write(tmp_path, quickstart((512,), (3,), **SMALL))
    bad = tmp_path / "cells" / "compare" / "broken.json"
    bad.write_text(damage, errors="surrogateescape")
    assert run(tmp_path, "--only", "compare", "--format", "csv") == 1
    said = capsys.readouterr()
    assert "broken.json" in said.err and "polykv_q8_0" in said.out


def test_only_and_format_write_nothing_else(tmp_path):
    cells = quickstart((256,), (3,), **SMALL)
    assert run(write(tmp_path, cells), "--only", "polykv_ratio", "--format", "csv") == 0
    written = [p.name for folder in ("tables", "figures") for p in (tmp_path / folder).iterdir()]
    assert written == ["polykv_ratio.csv"]
    frame = pd.read_csv(tmp_path / "tables" / "polykv_ratio.csv", comment="#")
    assert set(frame["recipe"]) == set(RATIO)


def test_every_name_that_can_be_asked_for_is_listed():
    names = catalog.names_of(())
    assert {*TABLES, *FIGURES, "polykv_memory_decomposition"} <= set(names)
    assert "polykv_memory" not in catalog.names_of(("capacity",))


@pytest.mark.slow
def test_analysis_never_imports_torch():
    code = "import sys, analysis.__main__; sys.exit('torch' in sys.modules)"
    place = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=place, check=False).returncode == 0


def test_backends_of_one_sweep_are_lines_of_their_own(tmp_path):
    cells = [
        compare_cell(256, 1, recipe, name=f"{recipe}-{backend}", backend=backend, delta=delta)
        for recipe in ("full", "polykv")
        for backend, delta in (("torch", 1.0), ("cpu", 2.0))
    ]
    rows = load(write(tmp_path, cells)).rows
    lines = catalog.pieces("TABLES")["compare"](rows).rows
    assert [(line["recipe"], line["backend"]) for line in lines] == [
        ("full", ""), ("polykv", "cpu"), ("polykv", "torch"),
    ]  # fmt: skip
    assert lines[1]["perplexity_delta"].value > 1.5 * lines[2]["perplexity_delta"].value


def test_panels_of_several_models_say_which(tmp_path):
    cells = [
        compare_cell(256, 1, recipe, name=f"{recipe}-{model}", model=model)
        for recipe in RATIO
        for model in ("reference", "llama-3-8b")
    ]
    drawn = compare.figure(load(write(tmp_path, cells)).rows)
    titles = [ax.get_title(loc="left") for ax in drawn.canvas.axes]
    assert {title.splitlines()[0] for title in titles} == {"reference", "llama-3-8b"}
    assert all("256 tokens" in title.splitlines()[1] for title in titles)
