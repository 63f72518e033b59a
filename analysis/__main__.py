"""`python -m analysis`: results -> tables and figures beside the published ones.

Commands: `report` (one page, analysis/report.py), `upload` (to Weights & Biases), `pack` (all cells in two files for
git, polykv/archive.py). Exit codes: 0; 1 if a damaged cell was skipped (all else is written); 2 for an error of use.
"""

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from analysis import published, render, report
from analysis.catalog import FIRST, PAPERS, modules, names_of, pieces
from analysis.load import drawing, load
from analysis.write import PICTURES, WRITERS, Made, write
from polykv import archive
from polykv.config import load_group
from polykv.errors import PolyKVError
from polykv.wandb_run import open_run, unsynced

LOCAL = Path("results/local")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command = COMMANDS.get(argv[0]) if argv else None
    return _exit_code(partial(command, argv[1:]) if command else partial(_render, argv))


def show(root: str, study: str, cells: Sequence[str], preset: str = "", files: bool = True) -> int:
    """Run `after_sweep` for run.py: print errors and warnings as lines, return the exit code."""
    return _exit_code(partial(after_sweep, Path(root), study, cells, preset, files))


def _exit_code(render: Callable[[], tuple[str, ...]]) -> int:
    try:
        damaged = render()
    except PolyKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for cell in damaged:
        print(
            f"warning: skipped damaged cell {cell}; the sweep, run again, sets it aside and measures it again",
            file=sys.stderr,
        )
    return 1 if damaged else 0


def _pack(argv: list[str]) -> tuple[str, ...]:
    """Pack a folder's cells; return the names of damaged ones."""
    folder = _folder(argv, "pack", "All cells of a results folder in two files, for git.")
    n_cells, damaged = archive.pack(folder)
    print(f"{n_cells} cells: {folder / archive.ROWS}, {folder / archive.CELLS}")
    return damaged


def _upload(argv: list[str]) -> tuple[str, ...]:
    print(upload(_folder(argv, "upload", "Send figures and tables to Weights & Biases.")))
    return ()


def _folder(argv: list[str], command: str, description: str) -> Path:
    parser = argparse.ArgumentParser(f"python -m analysis {command}", description=description)
    parser.add_argument("--results", type=Path, default=LOCAL, metavar="FOLDER")
    return parser.parse_args(argv).results


COMMANDS: dict[str, Callable[[list[str]], tuple[str, ...]]] = {
    "report": report.main,
    "upload": _upload,
    "pack": _pack,
}


def _render(argv: list[str]) -> tuple[str, ...]:
    """Write tables and figures; return the names of damaged cells."""
    parser = argparse.ArgumentParser(
        "python -m analysis",
        description=__doc__.splitlines()[0],
        epilog=f"commands: {', '.join(COMMANDS)}; python -m analysis COMMAND --help says what each takes",
    )
    formats = [*WRITERS, *PICTURES]
    several = "of a cell in several, the newest copy counts"
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[LOCAL], metavar="FOLDER", help=several
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: the first of --results"
    )
    parser.add_argument("--only", metavar="NAME", help=", ".join(names_of(())))
    parser.add_argument("--format", default=",".join(formats), metavar="A,B", help="default: all")
    parser.add_argument("--print", metavar="A,B", help=f"default: {FIRST}, or what --only names")
    arguments = parser.parse_args(argv)
    names = names_of(())
    only = _chosen("--only", arguments.only, names) if arguments.only else names
    kinds = _chosen("--format", arguments.format, formats)
    default = only[0] if len(only) == 1 else FIRST
    printed = _chosen("--print", arguments.print or default, names)
    root = arguments.out or arguments.results[0]
    with drawing(root):
        results = load(*arguments.results)
        made = Made(results.rows)
        undrawn = write(results, made, root, only, kinds)
    for name, reason in undrawn.items():
        print(f"figure {name} is not drawn: {reason}")
    for name in printed:
        _print(made, name)
    _say_where(root)
    return results.damaged


def after_sweep(
    root: Path, study: str, cells: Sequence[str], preset: str = "", files: bool = True
) -> tuple[str, ...]:
    """Print the table of these cells; return the damaged cells. With `files`, write the study's tables and figures."""
    with drawing(root):
        found = load(root)
        made = Made(found.rows)
        if files:
            write(found, made, root, names_of((study,)), [*WRITERS, *PICTURES])
    asked = (found.rows["study"] == study) & found.rows["cell"].isin(cells)
    if asked.any():
        shown = made if asked.all() else Made(found.rows[asked])
        _print(shown, _first_table(study, preset, shown))
    if files:
        _say_published(found.rows[asked], root)
        _say_where(root)
    else:
        print(f"tables and figures are written by: python -m analysis --results {root}")
    return found.damaged


def _print(made: Made, name: str) -> None:
    """Print the text, table and lines of this name."""
    width = shutil.get_terminal_size((100, 24)).columns
    whole = not sys.stdout.isatty() and "COLUMNS" not in os.environ  # a file, say
    if text := made("TEXTS", name):
        print(text)
    if table := made("TABLES", name):
        print(render.plain(render.measured(table), width, whole))
    for line in made("BELOW", name) or ():
        print(textwrap.fill(line, width, subsequent_indent="  ") + "\n")


def _first_table(study: str, preset: str, made: Made) -> str:
    """The first table that rows fill: the one named as the preset, the study's own, the others of its module."""
    tables, own = pieces("TABLES"), getattr(modules().get(study), "TABLES", ())
    presets = [preset] if preset in tables and study in tables[preset].studies else []
    return next((name for name in (*presets, study, *own) if made("TABLES", name)), study)


def _say_published(rows: pd.DataFrame, root: Path) -> None:
    """Print how many published figures are of these models, and the file that compares them."""
    for paper in PAPERS:
        found = published.of_models(paper, rows["model"])
        file = root / "tables" / f"published_{paper}.md"
        if found and file.is_file():
            print(f"{len(found)} published figures of this model: {file}")


def _say_where(root: Path) -> None:
    places = {"tables": root / "tables", "figures": root / "figures", "answers": root / "answers"}
    for what, place in {"rows": root / "rows.csv", **places}.items():
        if place.exists():
            print(f"{what}: {place}")


def _chosen(option: str, text: str, known: tuple[str, ...] | list[str]) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise PolyKVError(f"{option}: no {', '.join(unknown)}; choose from {', '.join(known)}")
    return chosen


def upload(folder: str | Path) -> str:
    """Send the figures (PNG) and tables (CSV) below FOLDER as one run; a line that says where it is.

    Raises:
        PolyKVError: nothing was drawn there, or wandb refuses.
    """
    import wandb

    folder = Path(folder)
    figures, tables = sorted(folder.glob("figures/*.png")), sorted(folder.glob("tables/*.csv"))
    if not figures and not tables:
        raise PolyKVError(f"no figures or tables in {folder}; run `python -m analysis` on it first")
    cfg = load_group("logger", "wandb")
    about = {"project": cfg.project, "entity": cfg.entity, "name": folder.name}
    try:
        with open_run(folder, job_type="analysis", **about) as run:
            run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in figures})
            rendered = wandb.Artifact(f"analysis-{folder.name}", type="analysis")
            for path in (*tables, *sorted(folder.glob("figures/*.pdf"))):
                rendered.add_file(str(path), name=str(path.relative_to(folder)))
            run.log_artifact(rendered)
            return run.url or unsynced(folder)
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        raise PolyKVError(f"wandb takes no upload ({reason}); see `wandb login --help`") from error


if __name__ == "__main__":
    sys.exit(main())
