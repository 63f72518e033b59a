"""Which tables, figures, texts and claims there are: those of the modules here that are named as a study.

A module has, as far as it needs: TABLES, FIGURES, TEXTS and BELOW (name -> from the study's rows to a render.Table,
style.Picture, Markdown, or lines below the table on a terminal), CLAIMS (from the study's rows, of which there may be
none, to published.Claim) and FINDINGS (from the study's rows to sentences, by heading). None stands for what was not
run; of a figure, a text says why it cannot be drawn. STUDY names the study, or the studies any of which gives it rows,
where the module is not named as it; EVERY stands for all of them. ALSO names others whose rows it reads as well.
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
from analysis.published import PAPERS, Claim

KINDS = ("TABLES", "FIGURES", "TEXTS", "BELOW")
COLLECTED = ("CLAIMS", "FINDINGS")
EVERY = ()
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
        if self.studies == EVERY:
            return self.of(rows)
        mine = rows[rows["study"].isin((*self.studies, *self.also))]
        return None if not mine["study"].isin(self.studies).any() else self.of(mine)


@cache
def modules() -> Mapping[str, ModuleType]:
    """The modules of studies by name, FIRST first."""
    names = sorted(m.name for m in pkgutil.iter_modules(analysis.__path__) if m.name != "__main__")
    found = {name: import_module(f"analysis.{name}") for name in names}
    kinds = (*KINDS, *COLLECTED)
    found = {n: module for n, module in found.items() if any(hasattr(module, k) for k in kinds)}
    return dict(sorted(found.items(), key=lambda item: item[0] != FIRST))


@cache
def pieces(kind: str) -> Mapping[str, Piece]:
    """Every piece of one of KINDS, by name."""
    return {
        name: Piece(studies_of(own), name, of, getattr(module, "ALSO", ()))
        for own, module in modules().items()
        for name, of in getattr(module, kind, {}).items()
    }


def names_of(studies: Sequence[str]) -> list[str]:
    """The names of all pieces of these studies; of all where none is named."""
    found = [piece for kind in KINDS for piece in pieces(kind).values()]
    mine = [p for p in found if not studies or p.studies == EVERY or {*studies} & {*p.studies}]
    return list(dict.fromkeys(piece.name for piece in mine))


def studies_of(module: str) -> tuple[str, ...]:
    """The studies whose rows a module shows."""
    named = getattr(modules()[module], "STUDY", module)
    return (named,) if isinstance(named, str) else tuple(named)


def claims(rows: pd.DataFrame) -> list[Claim]:
    """The claims of both papers, paper by paper, those that no row speaks to among them."""
    found = []
    for name, module in modules().items():
        if hasattr(module, "CLAIMS"):
            studies = (*studies_of(name), *getattr(module, "ALSO", ()))
            found += module.CLAIMS(rows[rows["study"].isin(studies)])
    return sorted(found, key=lambda claim: list(PAPERS).index(claim.paper))


def findings(rows: pd.DataFrame) -> dict[str, list[str]]:
    """What the studies that were run say of our own questions, by heading."""
    found = {}
    for name, module in modules().items():
        if hasattr(module, "FINDINGS"):
            of = Piece(studies_of(name), name, module.FINDINGS, getattr(module, "ALSO", ()))
            found |= of(rows) or {}
    return found
