"""Cells on disk -> one tidy DataFrame. The only module here that reads results."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from analysis.apart import Configs, told_apart
from polykv.cellfile import read_cells
from polykv.errors import PolyKVError
from polykv.results import frame

NUMBERS = ("context_tokens", "n_agents", "n_hops", "budget_bits", "value", "ci_low", "ci_high")
NUMBERS += ("n", "sample", "seed")


@dataclass(frozen=True)
class Results:
    """What the analysis works on.

    Attributes:
        rows: polykv.results.COLUMNS and head_dim.
        damaged: one line for each cell skipped.
        unsealed: cells from before there were digests, in which an edit would not show.
        configs: the settings of each cell, by experiment and cell.
        answers: what agents were asked and said in a cell, where it holds that, by experiment and cell.
    """

    rows: pd.DataFrame
    damaged: tuple[str, ...] = ()
    unsealed: int = 0
    configs: Configs = field(default_factory=dict)
    answers: Mapping[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)


@contextmanager
def drawing(root: Path) -> Iterator[None]:
    """Held from reading the rows to the last figure: who draws last has then read the most.

    Processes that share a folder all draw when they end; without it an early one's table can replace a later one's.

    Raises:
        PolyKVError: the folder cannot be written.
    """
    if not root.is_dir():
        yield  # `load` says so
        return
    marker = root / ".drawing.lock"
    lock = FileLock(marker)
    try:
        lock.acquire()
    except OSError as error:
        raise PolyKVError(
            f"cannot write into {root} ({error.strerror or error}); give a folder that can be written"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # the folder became read-only: the lock is free all the same
            marker.unlink(missing_ok=True)
        lock.release()


def load(root: Path) -> Results:
    """Every row of every readable cell below `root`; lines that several cells share are told apart.

    Raises:
        PolyKVError: as `read`.
    """
    found = read(root)
    return told(found)


def told(found: Results) -> Results:
    """The results, with lines that several cells share told apart."""
    return replace(found, rows=told_apart(found.rows, found.configs))


def read(root: Path) -> Results:
    """Every row of every readable cell below `root`, as it was written.

    Numbers become float (missing or not finite: NaN), everything else str (missing: "").

    Raises:
        PolyKVError: there is no such folder, or not one readable row in it.
    """
    cells, damaged = read_cells(root)
    unsealed = sum(not cell.sealed for cell in cells)
    rows = frame(root, cells, damaged)
    for name in NUMBERS:
        said = rows[name].notna() & (rows[name] != "")
        numbers = pd.to_numeric(rows[name], errors="coerce").astype(float)
        wrong = set(rows.loc[said & numbers.isna(), "cell"])
        damaged += [f"{root}: cell {cell} ({name} is no number)" for cell in sorted(wrong)]
        rows = rows.assign(**{name: numbers.where(numbers.abs() < math.inf)})
        rows = rows[~rows["cell"].isin(wrong)]
    if rows.empty:
        raise PolyKVError(f"no readable row in {root}: {'; '.join(damaged)}; measure again")
    texts = {
        name: rows[name].astype(object).where(rows[name].notna(), "").astype(str)
        for name in rows.columns.difference(NUMBERS)
    }
    rows = _with_head_dim(rows.assign(**texts))
    by_name = {
        (str(row["experiment"] or ""), str(row["cell"] or "")): cell
        for cell in cells
        for row in cell.rows
    }
    configs = {name: cell.config for name, cell in by_name.items()}
    answers = {name: cell.answers for name, cell in by_name.items() if cell.answers}
    return Results(rows, tuple(damaged), unsealed, configs, answers)


def _with_head_dim(rows: pd.DataFrame) -> pd.DataFrame:
    """The schema has no column for it: the notes of a cell's compression ratios name it."""
    ratio = rows["note"].where(rows["metric"] == "compression_ratio", "")
    named = ratio.str.extract(r"head_dim (\d+)", expand=False).astype(float)
    return rows.assign(head_dim=named.groupby(rows["cell"]).transform("max"))
