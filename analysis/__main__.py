"""`python -m analysis`: results -> tables and figures beside the published ones.

Commands: `report` (one page, analysis/report.py), `upload` (to Weights & Biases), `pack` (all cells in two files for
git, polykv/archive.py). Exit codes: 0; 1 if a damaged cell was skipped (all else is written); 2 for an error of use.
"""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from analysis import published, render, report
from analysis.catalog import FIRST, PAPERS, modules, names_of, pieces
from analysis.load import Results, drawing, load
from analysis.statistics import BASELINE
from analysis.style import Picture, save
from polykv import archive
from polykv.config import load_group
from polykv.errors import PolyKVError
from polykv.progress import track
from polykv.wandb_run import open_run, unsynced

WRITERS = {"md": render.markdown, "tex": render.latex, "csv": render.to_csv}
PICTURES = ("png", "pdf")
LOCAL = Path("results/local")
OF_ANSWERS = ["model", "document", "context_tokens", "n_agents", "reader"]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command = COMMANDS.get(argv[0]) if argv else None
    return _exit_code(partial(command, argv[1:]) if command else partial(_render, argv))


def show(root: str, study: str, cells: Sequence[str], preset: str = "") -> int:
    """Run `after_sweep` for run.py: print errors and warnings as lines, return the exit code."""
    return _exit_code(partial(after_sweep, Path(root), study, cells, preset))


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
    parser.add_argument("--results", type=Path, default=LOCAL, metavar="FOLDER")
    parser.add_argument("--only", metavar="NAME", help=", ".join(names_of(())))
    parser.add_argument("--format", default=",".join(formats), metavar="A,B", help="default: all")
    arguments = parser.parse_args(argv)
    names = names_of(())
    only = _chosen("--only", arguments.only, names) if arguments.only else names
    kinds = _chosen("--format", arguments.format, formats)
    root = arguments.results
    with drawing(root):
        results = load(root)
        undrawn = _write(results, root, only, kinds)
    for name, reason in undrawn.items():
        print(f"figure {name} is not drawn: {reason}")
    _print(results.rows, only[:1] if len(only) == 1 else [FIRST])
    _say_where(root)
    return results.damaged


def after_sweep(root: Path, study: str, cells: Sequence[str], preset: str = "") -> tuple[str, ...]:
    """Write the study's tables and figures and print the table of these cells; return the damaged cells."""
    names = names_of((study,))
    with drawing(root):
        found = load(root)
        _write(found, root, names, [*WRITERS, *PICTURES])
    asked = found.rows[(found.rows["study"] == study) & found.rows["cell"].isin(cells)]
    if len(asked):
        _print(asked, [_first_table(study, preset, asked)])
        _say_published(asked, root)
    _say_where(root)
    return found.damaged


def _print(rows: pd.DataFrame, names: Sequence[str]) -> None:
    """Print the tables, texts and lines of these names."""
    width = shutil.get_terminal_size((100, 24)).columns
    for name in names:
        if name in pieces("TEXTS") and (text := pieces("TEXTS")[name](rows)):
            print(text)
        if name in pieces("TABLES") and (table := pieces("TABLES")[name](rows)):
            print(render.plain(render.measured(table), width))
        if name in pieces("BELOW"):
            for line in pieces("BELOW")[name](rows) or ():
                print(textwrap.fill(line, width, subsequent_indent="  ") + "\n")


def _first_table(study: str, preset: str, rows: pd.DataFrame) -> str:
    """The first table that rows fill: the one named as the preset, the study's own, the others of its module."""
    tables, own = pieces("TABLES"), getattr(modules().get(study), "TABLES", ())
    presets = [preset] if preset in tables and study in tables[preset].studies else []
    names = [name for name in (*presets, study, *own) if name in tables]
    return next((name for name in names if tables[name](rows)), study)


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


def _write(
    results: Results, root: Path, only: Sequence[str], kinds: Sequence[str]
) -> dict[str, str]:
    """Write the tables, figures and texts of these names; return, by name, why a figure could not be drawn."""
    undrawn = {}
    rows, tables, pictures = results.rows, root / "tables", root / "figures"
    try:
        tables.mkdir(parents=True, exist_ok=True)
        pictures.mkdir(parents=True, exist_ok=True)
        rows.to_csv(root / "rows.csv", index=False)
        _write_answers(results, root / "answers")
        for name in track(only, "tables and figures"):
            if name in pieces("TEXTS") and (text := pieces("TEXTS")[name](rows)):
                (tables / f"{name}.md").write_text(text, encoding="utf-8")
            if name in pieces("TABLES") and (table := pieces("TABLES")[name](rows)):
                for kind in filter(WRITERS.get, kinds):
                    text = WRITERS[kind](table)
                    (tables / f"{name}.{kind}").write_text(text, encoding="utf-8")
            if name in pieces("FIGURES") and (asked := [k for k in kinds if k in PICTURES]):
                drawn = pieces("FIGURES")[name](rows)
                if isinstance(drawn, Picture):
                    save(drawn.canvas, pictures / name, asked)
                    caption = f"{render.tex(drawn.caption)}\n"
                    (pictures / f"{name}.tex").write_text(caption, encoding="utf-8")
                elif drawn:
                    undrawn[name] = drawn
    except OSError as error:
        raise PolyKVError(
            f"cannot write {error.filename or root} ({error.strerror or error}); free space or give "
            "a folder that can be written"
        ) from error
    return undrawn


def _write_answers(results: Results, folder: Path) -> None:
    """What agents said, for reading: a Markdown file in `folder` for each setting, every question with all answers."""
    rows = results.rows[results.rows["recipe"] != BASELINE]
    firsts = rows[rows["metric"] == "bertscore_f1"].drop_duplicates(["study", "cell"])
    for key, part in firsts.sort_values("created_at").groupby(OF_ANSWERS, sort=False):
        by_recipe = {
            recipe: results.cells[study, cell].answers
            for recipe, study, cell in zip(part["recipe"], part["study"], part["cell"], strict=True)
        }
        folder.mkdir(parents=True, exist_ok=True)
        named = dict(zip(OF_ANSWERS, key, strict=True))
        name = "-".join(f"{_plain(value)}" for value in named.values())
        name = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
        (folder / f"{name}.md").write_text(_answers_page(named, by_recipe), encoding="utf-8")


def _answers_page(named: dict, by_recipe: dict[str, list[dict]]) -> str:
    about = ", ".join(f"{name} {_plain(value)}" for name, value in named.items())
    pages = [f"# Answers: {about}"]
    for place, asked in enumerate(next(iter(by_recipe.values()))):
        who = f"Document {asked['document']}, agent {asked['agent']}"
        lines = [("right answer", asked["gold"]), ("uncompressed", asked["reference"])]
        lines += [(name, of[place]["answer"]) for name, of in by_recipe.items() if place < len(of)]
        shown = [
            (name, " ".join(text.split()) or "(empty)") for name, text in lines if text is not None
        ]
        pages.append(f"## {who}: {asked['question']}")
        pages.append("\n".join(f"- **{name}**: {text}" for name, text in shown))
    return "\n\n".join(pages) + "\n"


def _plain(value: object) -> object:
    return f"{value:.0f}" if isinstance(value, float) else value


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
