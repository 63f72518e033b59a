"""The pages beside the API, as Markdown: the README, the examples, the families of models, and every experiment.

Nothing is written a second time: an experiment's page is put together from its YAML, its module's docstring, and
the committed rows, figures and tables.
"""

import ast
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
from analysis.captions import caption
from jinja2 import Environment, FileSystemLoader
from omegaconf import OmegaConf

REPO = Path(__file__).resolve().parents[1]
CONF, RESULTS = REPO / "conf" / "experiment", REPO / "results"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
# Figures of an experiment that do not have its name.
FIGURES = {
    "handoff_accuracy": ("handoff_hops",),
    "polykv_memory": ("memory_agents",),
    "polykv_quality": ("perplexity_context", "bertscore_agents"),
    "compare": ("compare", "memory_agents", "bertscore_agents"),
    "recipe_frontier": ("recipe_frontier", "recipe_ranking"),
}

templates = Environment(
    loader=FileSystemLoader(REPO / "docs" / "templates"), trim_blocks=True, lstrip_blocks=True
)


def overview() -> str:
    """The README: its figures come along, its other links into the repository become plain text."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(results/([\w-]+)/figures/", r"](figures/\1/", text)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!http|#)[^)]+\)", r"\1", text)


def examples() -> str:
    """Every example with its source; what a folder of an example's name holds belongs to it."""
    folder = REPO / "examples"
    files = {
        path.stem: [path, *sorted(folder.glob(f"{path.stem}/**/*.[py]*"))]
        for path in sorted(folder.glob("*.py"))
    }
    shown = {name: [(path, path.relative_to(REPO)) for path in files[name]] for name in files}
    return templates.get_template("examples.md.jinja2").render(examples=shown, docstring=docstring)


def families() -> str:
    """Every family of models that transformers has, as docs/families.yaml says and the tests prove."""
    listed = OmegaConf.to_container(OmegaConf.load(REPO / "docs" / "families.yaml"))
    version = metadata.version("transformers")
    return templates.get_template("families.md.jinja2").render(**listed, version=version)


def experiment(name: str, rows: pd.DataFrame) -> str:
    """Question, command, what was run and how long it took, figures, table, settings.

    `rows` are `committed_rows()`.
    """
    yaml = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    config = OmegaConf.create(yaml)
    module = config.get("study") or config.defaults[0]
    figures = {
        f"{path.parts[-3]}/{path.name}": caption(figure, rows[rows["folder"] == path.parts[-3]])
        for figure in FIGURES.get(name, (name,))
        for path in committed(f"figures/{figure}.png")
    }
    tables = committed(f"tables/{name}.md")
    return templates.get_template("experiment.md.jinja2").render(
        name=name,
        module=module,
        docstring=docstring(REPO / "experiments" / f"{module}.py"),
        command=command(yaml),
        runs=runs(rows[rows["experiment"] == name]),
        figures=figures,
        tables=[path.read_text(encoding="utf-8") for path in tables],
        yaml=yaml,
    )


def command(yaml: str) -> str:
    """What an experiment's second line says: the command, without the remark some spaces after it."""
    return re.split(r"\s{3,}", yaml.splitlines()[1].removeprefix("# "))[0]


def docstring(path: Path) -> str:
    """A module's docstring; the module is not imported."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def committed(pattern: str) -> list[Path]:
    """The files of this pattern in every results folder but the one of this machine's own runs."""
    return sorted(set(RESULTS.glob(f"*/{pattern}")) - set(RESULTS.glob(f"local/{pattern}")))


def committed_rows() -> pd.DataFrame:
    """The rows of every committed results folder, which `folder` names."""
    return pd.concat(
        [
            pd.read_csv(path, low_memory=False).assign(folder=path.parent.name)
            for path in committed("rows.csv")
        ],
        ignore_index=True,
    )


def runs(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Of an experiment's rows, one entry for each folder and commit: cells, device, time."""
    found = []
    for (folder, commit), run in rows.groupby(["folder", "commit"], sort=False):
        ended = pd.to_datetime(run["created_at"])
        minutes, seconds = divmod(int((ended.max() - ended.min()).total_seconds()), 60)
        entry = {"folder": folder, "commit": commit, "cells": run["cell"].nunique()}
        entry |= {
            "device": ", ".join(run["device"].dropna().unique()),
            "time": f"{minutes} min {seconds} s",
        }
        found.append(entry)
    return found
