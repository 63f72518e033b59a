"""`python -m analysis`: results -> tables and figures beside the published ones.

`python -m analysis report` puts them on one page (analysis/report.py), `python -m analysis upload` sends
them to Weights & Biases (analysis/upload.py).
Exit codes: 0; 1 if a damaged cell was skipped (all else is written); 2 for an error of use.
"""

import argparse
import shutil
import sys
from pathlib import Path

import pandas as pd

from analysis import render, report
from analysis.captions import caption
from analysis.figures import save
from analysis.latex import tex
from analysis.load import drawing, load
from analysis.registry import FIGURES, NAMES, SUMMARY, TABLES, TEXTS
from analysis.upload import upload
from polykv.errors import PolyKVError

WRITERS = {"md": render.markdown, "tex": render.latex, "csv": render.to_csv}
PICTURES = ("png", "pdf")
LOCAL = Path("results/local")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        command = COMMANDS.get(argv[0]) if argv else None
        damaged = command(argv[1:]) if command else _render(argv)
    except PolyKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for cell in damaged:
        print(
            f"warning: skipped damaged cell {cell}; the sweep, run again, sets it aside and measures it anew",
            file=sys.stderr,
        )
    return 1 if damaged else 0


def _upload(argv: list[str]) -> tuple[str, ...]:
    parser = argparse.ArgumentParser(
        "python -m analysis upload", description="Figures and tables to Weights & Biases."
    )
    parser.add_argument("--results", type=Path, default=LOCAL, metavar="FOLDER")
    print(upload(parser.parse_args(argv).results))
    return ()


COMMANDS = {report.COMMAND: report.main, "upload": _upload}


def _render(argv: list[str]) -> tuple[str, ...]:
    """Write tables and figures; the damaged cells."""
    parser = argparse.ArgumentParser(
        "python -m analysis",
        description=__doc__.splitlines()[0],
        epilog=f"commands: {', '.join(COMMANDS)}; python -m analysis COMMAND --help says what each takes",
    )
    formats = [*WRITERS, *PICTURES]
    parser.add_argument("--results", type=Path, default=LOCAL, metavar="FOLDER")
    parser.add_argument("--only", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--show", default="", metavar="EXPERIMENT", help="whose table to print")
    parser.add_argument("--format", default=",".join(formats), metavar="A,B", help="default: all")
    arguments = parser.parse_args(argv)
    only = _chosen("--only", arguments.only, NAMES) if arguments.only else list(NAMES)
    kinds = _chosen("--format", arguments.format, formats)
    with drawing(arguments.results):
        results = load(arguments.results)
        shown = only[0] if len(only) == 1 else arguments.show
        shown = shown if shown in NAMES else SUMMARY
        _write(results.rows, arguments.results, only, kinds, shown)
    if results.unsealed:
        said = "cells are from before there were digests; an edit in them would not show"
        print(f"note: {results.unsealed} {said}", file=sys.stderr)
    return results.damaged


def _chosen(option: str, text: str, known: tuple[str, ...] | list[str]) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise PolyKVError(f"{option}: no {', '.join(unknown)}; choose from {', '.join(known)}")
    return chosen


def _write(rows: pd.DataFrame, root: Path, only: list[str], kinds: list[str], shown: str) -> None:
    tables, pictures = root / "tables", root / "figures"
    try:
        tables.mkdir(parents=True, exist_ok=True)
        pictures.mkdir(parents=True, exist_ok=True)
        rows.to_csv(root / "rows.csv", index=False)
        for name in only:
            if name in TEXTS:
                _write_text(rows, name, tables, shown)
            if name in TABLES:
                _write_table(rows, name, tables, kinds, shown)
            if name in FIGURES:
                _write_figure(rows, name, pictures, [kind for kind in kinds if kind in PICTURES])
    except OSError as error:
        raise PolyKVError(
            f"cannot write {error.filename or root} ({error.strerror or error}); free space or give "
            "a folder that can be written"
        ) from error
    print(f"rows: {root / 'rows.csv'}\ntables: {tables}\nfigures: {pictures}")


def _write_text(rows: pd.DataFrame, name: str, tables: Path, shown: str) -> None:
    if text := TEXTS[name].of(rows):
        (tables / f"{name}.md").write_text(text, encoding="utf-8")
        if shown in (SUMMARY, name, *TEXTS[name].beside):
            print(text)


def _write_table(rows: pd.DataFrame, name: str, tables: Path, kinds: list[str], shown: str) -> None:
    """What was not run has no table."""
    if table := TABLES[name](rows):
        for kind in filter(WRITERS.get, kinds):
            (tables / f"{name}.{kind}").write_text(WRITERS[kind](table), encoding="utf-8")
        if name == shown:
            print(render.plain(render.measured(table), shutil.get_terminal_size((100, 24)).columns))


def _write_figure(rows: pd.DataFrame, name: str, pictures: Path, kinds: list[str]) -> None:
    """The figure, and beside it its caption for LaTeX; what was not run has neither."""
    canvas = FIGURES[name](rows) if kinds else None
    if isinstance(canvas, str):
        print(f"figure {name} is not drawn: {canvas}")
    elif canvas:
        save(canvas, pictures / name, kinds)
        text = tex(caption(name, rows))
        (pictures / f"{name}.tex").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
