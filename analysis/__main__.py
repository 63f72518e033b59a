"""`python -m analysis`: results -> tables and figures beside the published ones.

Exit codes: 0; 1 if a damaged cell was skipped (all else is written); 2 for an error of use.
"""

import argparse
import shutil
import sys
from pathlib import Path

import pandas as pd

from analysis import decomposition, findings, published, render
from analysis.concurrency import CONCURRENCY_FIGURES, CONCURRENCY_TABLES
from analysis.concurrency import EXPERIMENT as CONCURRENCY
from analysis.figures import FIGURES, save
from analysis.frontier import EXPERIMENTS
from analysis.frontier_figures import FRONTIER_FIGURES
from analysis.frontier_tables import FRONTIER_TABLES
from analysis.handoff_figures import HANDOFF_FIGURES
from analysis.handoff_reduce import EXPERIMENTS as HANDOFF
from analysis.handoff_tables import HANDOFF_TABLES
from analysis.load import load
from analysis.reduce import points
from analysis.separation import EXPERIMENT as SEPARATION
from analysis.separation import SEPARATION_FIGURES, SEPARATION_TABLES
from analysis.tables import TABLES
from polykv.errors import PolyKVError

WRITERS = {"md": render.markdown, "tex": render.latex, "csv": render.to_csv}
PICTURES = ("png", "pdf")
# Beside the papers' own: rows -> table or figure, None where nothing of it was run.
MEASURED_TABLES = FRONTIER_TABLES | HANDOFF_TABLES | SEPARATION_TABLES | CONCURRENCY_TABLES
MEASURED_FIGURES = FRONTIER_FIGURES | HANDOFF_FIGURES | SEPARATION_FIGURES | CONCURRENCY_FIGURES
NOTE = "polykv_memory_decomposition"
MEMORY = "polykv_memory"  # the table that the note takes apart
FINDINGS = "findings"
SHOWN = "summary"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m analysis", description=__doc__.splitlines()[0])
    names = [*TABLES, NOTE, *FIGURES, FINDINGS, *(MEASURED_TABLES | MEASURED_FIGURES)]
    formats = [*WRITERS, *PICTURES]
    parser.add_argument("--results", type=Path, default=Path("results/local"), metavar="FOLDER")
    parser.add_argument("--only", metavar="NAME", help=", ".join(names))
    parser.add_argument("--show", default="", metavar="EXPERIMENT", help="whose table to print")
    parser.add_argument("--format", default=",".join(formats), metavar="A,B", help="default: all")
    arguments = parser.parse_args(argv)
    try:
        only = _chosen("--only", arguments.only, names) if arguments.only else names
        kinds = _chosen("--format", arguments.format, formats)
        results = load(arguments.results)
        shown = only[0] if len(only) == 1 else arguments.show
        shown = shown if shown in names else SHOWN
        _write(results.rows, arguments.results, only, kinds, shown)
    except PolyKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for cell in results.damaged:
        print(
            f"warning: skipped damaged cell {cell}; delete it and run the sweep again",
            file=sys.stderr,
        )
    return 1 if results.damaged else 0


def _chosen(option: str, text: str, known: list[str]) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise PolyKVError(f"{option}: no {', '.join(unknown)}; choose from {', '.join(known)}")
    return chosen


def _write(rows: pd.DataFrame, root: Path, only: list[str], kinds: list[str], shown: str) -> None:
    tables, pictures = root / "tables", root / "figures"
    frontier = rows["experiment"].isin(EXPERIMENTS)
    papers = ~frontier & ~rows["experiment"].isin((*HANDOFF, SEPARATION, CONCURRENCY))
    try:
        tables.mkdir(parents=True, exist_ok=True)
        pictures.mkdir(parents=True, exist_ok=True)
        rows.to_csv(root / "rows.csv", index=False)
        if papers.any():
            _write_papers(rows[papers], tables, pictures, only, kinds, shown)
        _write_measured(rows, tables, pictures, only, kinds, shown)
        if FINDINGS in only and frontier.any():
            _write_text(
                findings.text(rows, published.load("polykv")),
                FINDINGS,
                tables,
                shown in (SHOWN, FINDINGS, *FRONTIER_TABLES),
            )
    except OSError as error:
        raise PolyKVError(
            f"cannot write {error.filename or root} ({error.strerror or error}); free space or give "
            "a folder that can be written"
        ) from error
    print(f"rows: {root / 'rows.csv'}\ntables: {tables}\nfigures: {pictures}")


def _write_papers(
    rows: pd.DataFrame, tables: Path, pictures: Path, only: list[str], kinds: list[str], shown: str
) -> None:
    """What the papers' experiments measured."""
    figures = published.load("polykv")
    reduced = points(rows)
    if NOTE in only:
        text = decomposition.text(reduced, figures)
        _write_text(text, NOTE, tables, shown in (SHOWN, NOTE, MEMORY))
    for name in filter(TABLES.get, only):
        _write_table(TABLES[name](rows, figures), tables, kinds, name == shown)
    for name in filter(FIGURES.get, only):
        canvas = FIGURES[name](reduced, figures)
        if isinstance(canvas, str):
            print(f"figure {name} is not drawn: {canvas}")
        else:
            save(canvas, pictures / name, [kind for kind in kinds if kind in PICTURES])


def _write_measured(
    rows: pd.DataFrame, tables: Path, pictures: Path, only: list[str], kinds: list[str], shown: str
) -> None:
    """What was measured beside the papers' tables; what was not run has no table and no figure."""
    for name in filter(MEASURED_TABLES.get, only):
        if table := MEASURED_TABLES[name](rows):
            _write_table(table, tables, kinds, name == shown)
    for name in filter(MEASURED_FIGURES.get, only):
        if canvas := MEASURED_FIGURES[name](rows):
            save(canvas, pictures / name, [kind for kind in kinds if kind in PICTURES])


def _write_text(text: str, name: str, tables: Path, shown: bool) -> None:
    (tables / f"{name}.md").write_text(text, encoding="utf-8")
    if shown:
        print(text)


def _write_table(table: render.Table, tables: Path, kinds: list[str], shown: bool) -> None:
    for kind in filter(WRITERS.get, kinds):
        (tables / f"{table.name}.{kind}").write_text(WRITERS[kind](table), encoding="utf-8")
    if shown:
        print(render.plain(render.measured(table), shutil.get_terminal_size((100, 24)).columns))


if __name__ == "__main__":
    sys.exit(main())
