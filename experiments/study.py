"""The declaration of a study, and the discovery of all: the modules of this folder that have `STUDY = Study(...)`."""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf

import experiments
from experiments import settings
from experiments.session import Session
from polykv import versions
from polykv.cellfile import COLUMNS
from polykv.config import did_you_mean
from polykv.errors import PolyKVError
from polykv.results import Rows, cell_id


@dataclass(frozen=True)
class Study:
    """One question and how it is measured.

    Its module here, `analysis/NAME.py` (tables, figures, claims) and `conf/experiment/NAME.yaml` share its name; other
    YAML files there may be presets that sweep the same study.

    Attributes:
        title, question: shown in the report's section and on the page of the docs.
        run: measures a cell; returns its rows, given the settled config.
        check: raises PolyKVError with one line for bad input, before any cell runs.
        settle: returns the config with everything explicit that depends on the machine.
        settings: config keys that the numbers depend on; a cell's identity is a hash of them.
        also_read: config keys that only checks and the choice of texts depend on.
        made_by: modules that compute the numbers; their `VERSION` is part of the identity.
        options: settings that only some cells have, and the module that reads each. They and its `VERSION` are part of
            the identity of cells that have them: a new one leaves that of the others as it is.
        columns: columns beside cellfile.COLUMNS, each with its type (str, int, float, bool).
        answers: published tables that the rows answer (published.csv, column `figure_or_table`).
        depends_on: other studies whose rows its cells quote, where the results folder holds them.
    """

    name: str
    title: str
    question: str
    run: Callable[[DictConfig, Session], Rows]
    check: Callable[[DictConfig, Session], None]
    settings: tuple[str, ...]
    made_by: tuple[ModuleType, ...]
    options: Mapping[str, ModuleType] = field(default_factory=dict)
    settle: Callable[[DictConfig], DictConfig] = settings.settle
    columns: Mapping[str, type] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    depends_on: tuple[str, ...] = ()
    also_read: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if taken := set(self.columns) & set(COLUMNS):
            raise ValueError(f"study {self.name}: every row has {sorted(taken)} already")

    @property
    def reads(self) -> list[str]:
        """All config keys that the study reads."""
        return [*self.settings, *self.options, *self.also_read]

    def versions(self, settled: DictConfig) -> dict[str, int | str]:
        """Versions of the code that computes a cell's numbers (polykv/versions.py)."""
        config = OmegaConf.to_container(settled)
        given = [module for key, module in self.options.items() if key in settled]
        known = {key: config.get(key) for key in self.settings}
        return versions.of(known, [*self.made_by, *given])

    def identity(self, settled: DictConfig) -> str:
        """A cell's identity: a hash of the settings that its numbers depend on and of the code's versions."""
        config = OmegaConf.to_container(settled)
        kept = {key: config.get(key) for key in ("study", "versions", *self.settings)}
        return cell_id(kept | {key: config[key] for key in self.options if key in config})

    def declaration(self) -> dict[str, Any]:
        """The study as a cell's file describes it, for the analysis, which does not import this package."""
        return {
            "name": self.name,
            "title": self.title,
            "question": self.question,
            "answers": list(self.answers),
            "settings": [*self.settings, *self.options],
            "columns": {name: kind.__name__ for name, kind in self.columns.items()},
        }


@cache
def studies() -> Mapping[str, Study]:
    """Every study by name.

    Raises:
        ValueError: a study's name is not its module's, or two studies give one column different types.
    """
    found: dict[str, Study] = {}
    types: dict[str, type] = {}
    for name in _modules():
        study = getattr(import_module(f"experiments.{name}"), "STUDY", None)
        if study is None:
            continue
        if study.name != name:
            raise ValueError(f"experiments/{name}.py holds a study named {study.name}")
        for column, kind in study.columns.items():
            if types.setdefault(column, kind) is not kind:
                raise ValueError(f"column {column} of {name} has another type elsewhere")
        found[name] = study
    return found


def named(name: str) -> Study:
    """The study of this name. Imports no other study if there is one.

    Raises:
        PolyKVError: no study has the name.
    """
    study = None
    if name in _modules():
        study = getattr(import_module(f"experiments.{name}"), "STUDY", None)
    if study is None:
        raise PolyKVError(f"no study named {name!r}{did_you_mean(name, list(studies()))}")
    return study


def _modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(experiments.__path__)]
