"""Which tables, figures, texts and claims there are: those of the modules here that are named as a study.

A module has, as far as it needs: TABLES, FIGURES, TEXTS and BELOW (name -> from the study's rows to a render.Table,
style.Picture, Markdown, or lines below the table on a terminal), CLAIMS (from the study's rows, of which there may be
none, to Claims) and FINDINGS (from the study's rows to sentences, by heading). None stands for what was not run; of a
figure, a text says why it cannot be drawn. STUDY names the study, or the studies any of which gives it rows, where the
module is not named as it; EVERY stands for all of them.
"""

import pkgutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import pandas as pd

import analysis
from analysis.load import of_paper
from analysis.statistics import Value

KINDS = ("TABLES", "FIGURES", "TEXTS", "BELOW")
COLLECTED = ("CLAIMS", "FINDINGS")
EVERY = ()
STUDY = EVERY
FIRST = "compare"  # shown where nothing else is asked for
WIDTH = 100

PAPERS = {"polykv": "PolyKV", "qkvshare": "QKVShare"}
REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
AGREES = "arithmetic agrees"  # computed from the same definitions: nothing was measured that could differ
INCONCLUSIVE, NOT_MEASURED = "inconclusive", "not measured"


@dataclass(frozen=True)
class Claim:
    """What a paper says, and what the rows say to it.

    Attributes:
        paper, table: of published.csv; the published rows that the claim is about.
        verdict: REPRODUCED, NOT_REPRODUCED, AGREES, INCONCLUSIVE (there are numbers, and they do not decide) or
            NOT_MEASURED (no row speaks to the claim).
        claim: ends in the weights or the device that the verdict holds for, where it holds for no others.
        said: the numbers that decide, or the reason and the command that would.
    """

    paper: str
    table: str
    verdict: str
    claim: str
    said: str

    @property
    def measured(self) -> bool:
        """Whether any row speaks to the claim."""
        return self.verdict != NOT_MEASURED

    def markdown(self) -> str:
        """One line."""
        return f"**{self.verdict}**: {self.claim}. {self.said}"


def decided(holds: bool, fails: bool) -> str:
    """The verdict from whether the numbers show that a claim holds, or that it fails; INCONCLUSIVE for neither."""
    return REPRODUCED if holds else NOT_REPRODUCED if fails else INCONCLUSIVE


def equivalent(got: Value, low: float, high: float) -> str:
    """REPRODUCED where the whole interval of `got` lies within low to high, NOT_REPRODUCED where none of it does.

    Few data give a wide interval, which is INCONCLUSIVE.
    """
    if got.low is None or got.high is None:
        return INCONCLUSIVE
    return decided(low <= got.low and got.high <= high, got.high < low or high < got.low)


@dataclass(frozen=True)
class Piece:
    """A table, figure, text or lines of one study (or of several that it has in common), made from all rows."""

    studies: tuple[str, ...]
    name: str
    of: Callable[[pd.DataFrame], Any]

    def __call__(self, rows: pd.DataFrame) -> Any:
        """None where none of the studies was run."""
        if self.studies == EVERY:
            return self.of(rows)
        ours = rows["study"].isin(self.studies)
        if not ours.any():
            return None
        return self.of(rows if ours.all() else rows[ours])


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
        name: Piece(studies_of(own), name, of)
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
    """The claims of both papers with their verdicts (protocol `paper`), including those that were not measured."""
    found, rows = [], of_paper(rows)
    for name, module in modules().items():
        if hasattr(module, "CLAIMS"):
            studies = studies_of(name)
            found += module.CLAIMS(rows[rows["study"].isin(studies)])
    return sorted(found, key=lambda claim: list(PAPERS).index(claim.paper))


def findings(rows: pd.DataFrame) -> dict[str, list[str]]:
    """Findings on our own questions from the studies that were run, by heading."""
    found = {}
    for name, module in modules().items():
        if hasattr(module, "FINDINGS"):
            of = Piece(studies_of(name), name, module.FINDINGS)
            found |= of(rows) or {}
    return found


def findings_page(rows: pd.DataFrame) -> str | None:
    """One page in plain sentences, as Markdown: both papers' claims with their verdicts, then our own questions.

    None where no row speaks to a claim or to a question of ours.
    """
    said, own = claims(rows), findings(rows)
    if not own and not any(claim.measured for claim in said):
        return None
    parts = ["# Findings"]
    for paper, name in PAPERS.items():
        mine = [claim for claim in said if claim.paper == paper]
        judged = [claim.markdown() for claim in mine if claim.measured]
        if judged:
            parts += [f"## {name}'s claims", *map(_bullet, judged)]
        if n_open := len(mine) - len(judged):
            parts.append(
                f"{n_open} {'more ' * bool(judged)}claims of {name} were not measured here: published_{paper} says "
                "why, figure by figure."
            )
    for heading, lines in own.items():
        parts += [f"## {heading}", *map(_bullet, lines)]
    return "\n\n".join(parts) + "\n"


def _bullet(line: str) -> str:
    return textwrap.fill(line, WIDTH, initial_indent="- ", subsequent_indent="  ")


TEXTS = {"findings": findings_page}
