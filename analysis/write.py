"""Writes what the pieces of analysis/catalog.py make of a results folder: tables, figures, texts, answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import render
from analysis.catalog import pieces
from analysis.load import Results
from analysis.statistics import BASELINE
from analysis.style import Picture, save
from polykv.errors import PolyKVError
from polykv.progress import track

WRITERS = {"md": render.markdown, "tex": render.latex, "csv": render.to_csv}
PICTURES = ("png", "pdf")
OF_ANSWERS = ["model", "document", "context_tokens", "n_agents", "reader"]


@dataclass(frozen=True)
class Made:
    """Tables, texts and lines of these rows. Each is made once, since a table may be both written and printed."""

    rows: pd.DataFrame
    _kept: dict[tuple[str, str], Any] = field(default_factory=dict)

    def __call__(self, kind: str, name: str) -> Any:
        """The piece `name` of a catalog.KINDS; None where there is no such piece, or its studies were not run."""
        if (kind, name) not in self._kept:
            piece = pieces(kind).get(name)
            self._kept[kind, name] = piece(self.rows) if piece else None
        return self._kept[kind, name]


def write(
    results: Results, made: Made, root: Path, names: Sequence[str], kinds: Sequence[str]
) -> dict[str, str]:
    """Write rows, answers, and the pieces of these names in these formats; why a figure could not be drawn, by name.

    Raises:
        PolyKVError: the folder cannot be written.
    """
    undrawn = {}
    tables, pictures = root / "tables", root / "figures"
    try:
        tables.mkdir(parents=True, exist_ok=True)
        pictures.mkdir(parents=True, exist_ok=True)
        made.rows.to_csv(root / "rows.csv", index=False)
        _write_answers(results, root / "answers")
        for name in track(names, "tables and figures"):
            if text := made("TEXTS", name):
                (tables / f"{name}.md").write_text(text, encoding="utf-8")
            if table := made("TABLES", name):
                for kind in filter(WRITERS.get, kinds):
                    (tables / f"{name}.{kind}").write_text(WRITERS[kind](table), encoding="utf-8")
            if name in pieces("FIGURES"):
                shown = [kind for kind in kinds if kind in PICTURES]
                reason = _write_figure(made.rows, name, pictures, shown)
                undrawn |= {name: reason} if reason else {}
    except OSError as error:
        raise PolyKVError(
            f"cannot write {error.filename or root} ({error.strerror or error}); free space or give "
            "a folder that can be written"
        ) from error
    return undrawn


def _write_figure(rows: pd.DataFrame, name: str, pictures: Path, kinds: list[str]) -> str:
    """Write a figure and its caption in LaTeX and Markdown; return why it cannot be drawn, or ""."""
    drawn = pieces("FIGURES")[name](rows) if kinds else None
    if isinstance(drawn, Picture):
        save(drawn.canvas, pictures / name, kinds)
        for ending, caption in (("tex", render.tex(drawn.caption)), ("md", drawn.caption)):
            (pictures / f"{name}.{ending}").write_text(f"{caption}\n", encoding="utf-8")
    return drawn if isinstance(drawn, str) else ""


def _write_answers(results: Results, folder: Path) -> None:
    """What agents said, for reading: a Markdown file in `folder` for each setting, every question with all answers.

    Raises:
        OSError: it cannot be written.
    """
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
