"""Which tables, figures, texts and claims there are: those of the modules here that are named as a study.

A module has, as far as it needs: TABLES, FIGURES, TEXTS and BELOW (name -> from the study's rows to a render.Table,
style.Picture, Markdown, or lines below the table on a terminal), and CLAIMS (from the study's rows to claims). None
stands for what was not run; of a figure, a text says why it cannot be drawn. STUDY names the study, or the studies
any of which gives it rows, where the module is not named as it; ALSO names others whose rows it reads as well.
"""

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import pandas as pd

import analysis

KINDS = ("TABLES", "FIGURES", "TEXTS", "BELOW")
FIRST = "compare"  # shown where nothing else is asked for


@dataclass(frozen=True)
class Piece:
    """A table, figure, text or lines of one study (or of several that it has in common), made from all rows."""

    studies: tuple[str, ...]
    name: str
    of: Callable[[pd.DataFrame], Any]
    also: Sequence[str] = ()

    def __call__(self, rows: pd.DataFrame) -> Any:
        """None where none of the studies was run."""
        mine = rows[rows["study"].isin((*self.studies, *self.also))]
        return None if not mine["study"].isin(self.studies).any() else self.of(mine)


@cache
def modules() -> Mapping[str, ModuleType]:
    """The modules of studies by name, FIRST first."""
    names = sorted(m.name for m in pkgutil.iter_modules(analysis.__path__) if m.name != "__main__")
    found = {name: import_module(f"analysis.{name}") for name in names}
    found = {name: module for name, module in found.items() if hasattr(module, "TABLES")}
    return dict(sorted(found.items(), key=lambda item: item[0] != FIRST))


@cache
def pieces(kind: str) -> Mapping[str, Piece]:
    """Every piece of one of KINDS, by name."""
    return {
        name: Piece(_studies(own, module), name, of, getattr(module, "ALSO", ()))
        for own, module in modules().items()
        for name, of in getattr(module, kind, {}).items()
    }


def names_of(studies: Sequence[str]) -> list[str]:
    """The names of all pieces of these studies; of all where none is named."""
    found = [piece for kind in KINDS for piece in pieces(kind).values()]
    return list(dict.fromkeys(p.name for p in found if not studies or {*studies} & {*p.studies}))


def _studies(own: str, module: ModuleType) -> tuple[str, ...]:
    named = getattr(module, "STUDY", own)
    return (named,) if isinstance(named, str) else tuple(named)
