"""What a study is, and how studies are found: one module of this folder each, which ends in `STUDY = Study(...)`."""

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
    """One question and how it is answered.

    Its name is that of its module here, of `analysis/NAME.py` (tables, figures, claims) and of
    `conf/experiment/NAME.yaml`; further YAML files there may be presets that sweep the same study.

    Attributes:
        title, question: for people: of the report's section and the page of the docs.
        run: the cell's rows, from its settled config.
        check: raises PolyKVError in one line for bad input, before any work.
        settle: the config with everything that depends on this machine made explicit.
        settings: the keys of the config that the numbers depend on; they are a cell's identity.
        made_by: modules whose numbers its rows hold: their `VERSION` belongs to the identity too.
        columns: what its rows have beside cellfile.COLUMNS, each with its type (str, int, float, bool).
        answers: the published tables (published.csv, column `table`) whose rows it answers.
        depends_on: studies whose rows it reads.
    """

    name: str
    title: str
    question: str
    run: Callable[[DictConfig, Session], Rows]
    check: Callable[[DictConfig, Session], None]
    settings: tuple[str, ...]
    made_by: tuple[ModuleType, ...]
    settle: Callable[[DictConfig], DictConfig] = settings.settle
    columns: Mapping[str, type] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    depends_on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if taken := set(self.columns) & set(COLUMNS):
            raise ValueError(f"study {self.name}: every row has {sorted(taken)}")

    def versions(self, settled: DictConfig) -> dict[str, int | str]:
        """The versions of all code that makes the numbers of a cell (polykv/versions.py)."""
        config = OmegaConf.to_container(settled)
        return versions.of({key: config.get(key) for key in self.settings}, self.made_by)

    def identity(self, settled: DictConfig) -> str:
        """The identity of a cell: a hash of those settings that its numbers depend on, and of the code's versions."""
        config = OmegaConf.to_container(settled)
        return cell_id({key: config.get(key) for key in ("study", "versions", *self.settings)})

    def declaration(self) -> dict[str, Any]:
        """What a cell's file says of its study, for the analysis, which imports nothing of this package."""
        return {
            "name": self.name,
            "title": self.title,
            "question": self.question,
            "answers": list(self.answers),
            "settings": list(self.settings),
            "columns": {name: kind.__name__ for name, kind in self.columns.items()},
        }


@cache
def studies() -> Mapping[str, Study]:
    """Every study by name.

    Raises:
        ValueError: one is not named as its module, or two give a column two types.
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
    """The study of this name; no other module is imported where there is one.

    Raises:
        PolyKVError: there is none.
    """
    study = None
    if name in _modules():
        study = getattr(import_module(f"experiments.{name}"), "STUDY", None)
    if study is None:
        raise PolyKVError(f"no study named {name!r}{did_you_mean(name, list(studies()))}")
    return study


def _modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(experiments.__path__)]
