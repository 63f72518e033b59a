"""The pages beside the API, as Markdown: the README, the examples, the model families, and every study.

A study's page comes from its declaration, its module's docstring, the YAML of its presets, and the tables and figures
of the committed rows.
"""

import ast
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from omegaconf import OmegaConf

from analysis.catalog import pieces
from analysis.load import Results, load
from experiments.study import Study
from polykv.archive import ROWS

REPO = Path(__file__).resolve().parents[1]
CONF, RESULTS = REPO / "conf" / "experiment", REPO / "results"
LONGEST = 200  # lines of a table that a page shows; a longer one is named

templates = Environment(
    loader=FileSystemLoader(REPO / "docs" / "templates"), trim_blocks=True, lstrip_blocks=True
)


def overview() -> str:
    """The README, with links to committed figures changed to the site's; other relative links become plain text."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(results/([\w-]+)/figures/", r"](figures/\1/", text)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!http|#)[^)]+\)", r"\1", text)


def examples() -> str:
    """Every example with its source, including the files in a folder of the example's name."""
    folder = REPO / "examples"
    files = {
        path.stem: [path, *sorted(folder.glob(f"{path.stem}/**/*.[py]*"))]
        for path in sorted(folder.glob("*.py"))
    }
    shown = {name: [(path, path.relative_to(REPO)) for path in files[name]] for name in files}
    return templates.get_template("examples.md.jinja2").render(examples=shown, docstring=docstring)


def families() -> str:
    """Every family of models in transformers, as docs/families.yaml lists and the tests check."""
    listed = OmegaConf.to_container(OmegaConf.load(REPO / "docs" / "families.yaml"))
    version = metadata.version("transformers")
    return templates.get_template("families.md.jinja2").render(**listed, version=version)


def study(declared: Study, folders: Mapping[str, Results], figures: Path) -> str:
    """A study's page: question, published tables it answers, presets with commands, columns, and committed results.

    Args:
        folders: `committed()`.
        figures: the folder that figures are drawn into.
    """
    name = declared.name
    presets = {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted(CONF.glob("*.yaml"), key=lambda path: path.stem != name)
        if study_of(path.stem) == name
    }
    return templates.get_template("study.md.jinja2").render(
        study=declared,
        docstring=docstring(REPO / "experiments" / f"{name}.py"),
        presets={preset: (command(yaml), yaml) for preset, yaml in presets.items()},
        columns={column: kind.__name__ for column, kind in declared.columns.items()},
        shown=[
            _shown(name, folder, results, figures / folder)
            for folder, results in folders.items()
            if name in results.studies
        ],
    )


def _shown(name: str, folder: str, results: Results, figures: Path) -> dict[str, Any]:
    """A study in a committed folder: how it was run, and the figures and tables that are committed there."""

    def paths(kind: str, ending: str) -> list[Path]:
        """Those of the study, in the catalog's order."""
        mine = [piece.name for piece in pieces(kind).values() if name in piece.studies]
        found = (RESULTS / folder / kind.lower() / f"{each}{ending}" for each in mine)
        return [path for path in found if path.exists()]

    pictures, tables = paths("FIGURES", ".png"), paths("TABLES", ".md")
    for path in pictures:
        figures.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, figures)
    texts = {path: path.read_text(encoding="utf-8") for path in tables}
    longer = [path for path, text in texts.items() if text.count("\n") > LONGEST]
    return {
        "folder": folder,
        "runs": runs(results.rows[results.rows["study"] == name]),
        "figures": {path.stem: path.with_suffix(".md").read_text("utf-8") for path in pictures},
        "tables": [text for path, text in texts.items() if path not in longer],
        "longer": [path.relative_to(REPO) for path in longer],
    }


def study_of(preset: str) -> str:
    """The study that a YAML of conf/experiment names, directly or through the YAML that it extends."""
    config = OmegaConf.load(CONF / f"{preset}.yaml")
    if "study" in config:
        return config.study
    return next(study_of(base) for base in config.defaults if isinstance(base, str))


def command(yaml: str) -> str:
    """The command in an experiment's second line, without the remark that follows it."""
    return re.split(r"\s{3,}", yaml.splitlines()[1].removeprefix("# "))[0]


def docstring(path: Path) -> str:
    """A module's docstring, without importing the module."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def committed() -> dict[str, Results]:
    """The packed results in the repository, by folder name."""
    folders = sorted(path.parent for path in RESULTS.glob(f"*/{ROWS}"))
    return {folder.name: load(folder) for folder in folders if folder.name != "local"}


def runs(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """One entry for each commit of a study's rows: cells, device, time."""
    found = []
    for commit, run in rows.groupby("commit", sort=False):
        ended = pd.to_datetime(run["created_at"])
        minutes, seconds = divmod(int((ended.max() - ended.min()).total_seconds()), 60)
        found.append(
            {
                "commit": commit,
                "cells": run["cell"].nunique(),
                "device": ", ".join(run["device"].unique()),
                "time": f"{minutes} min {seconds} s",
            }
        )
    return found
