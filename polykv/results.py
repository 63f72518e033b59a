"""The tidy row, the identity of a cell, and the store in which a finished cell is one atomic file.

Torch-free: the analysis reads through this module.
"""

import functools
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from polykv import cellfile
from polykv.archive import all_cells
from polykv.cellfile import COLUMNS, Cell, DamagedCell
from polykv.errors import PolyKVError

# Where a cell runs, where its result is kept and how progress is shown do not change its numbers.
NOT_IDENTITY = ("results_dir", "logger", "launcher", "card")

PROBE_BYTES = 65536

_PACKAGES = ("torch", "transformers", "datasets", "bert-score", "numpy", "scipy")


def cell_id(config: dict[str, Any]) -> str:
    """The identity of a cell: a hash of the resolved config that affects its numbers."""
    kept = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    canonical = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


@functools.cache
def commit() -> str:
    """The checkout's commit; `+dirty` where files differ from it; `unknown` outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no", "--", ":!results"]
        dirty = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+dirty" if dirty else head


def provenance() -> dict[str, Any]:
    """What produced a cell: commit, machine and versions."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "commit": commit(),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": versions,
    }


class Rows(list):
    """A cell's rows, each a dict of columns; what all of them share is said once.

    Attributes:
        answers: what agents were asked and said, for whoever wants to read it: a dict each.
    """

    def __init__(self, columns: Mapping[str, type] | None = None, **shared: Any) -> None:
        """`columns`: those that the study adds to cellfile.COLUMNS."""
        super().__init__()
        self._types = {**COLUMNS, **(columns or {})}
        self._shared = self._checked(shared)
        self.answers: list[dict[str, Any]] = []

    def add(
        self, metric: str, value: float | None, unit: str, *, why: str = "", **columns: Any
    ) -> None:
        """One observation. One that cannot be had is None, NaN or infinite, is kept as None, and `why` says why.

        Raises:
            ValueError: a value is missing without a reason, or a column is unknown or of another type.
        """
        if value is None or not math.isfinite(value):
            value, columns = None, columns | {"note": why or columns.get("note")}
            if not columns["note"]:
                raise ValueError(f"{metric} is missing without a reason")
        row = {"metric": metric, "value": None if value is None else float(value), "unit": unit}
        self.append(self._shared | self._checked(row | columns))

    def by_column(self) -> dict[str, list[Any]]:
        """Column -> values; columns in which no row has any are left out."""
        columns = {name: [row.get(name) for row in self] for name in self._types}
        return {
            name: values
            for name, values in columns.items()
            if any(value is not None for value in values)
        }

    def _checked(self, row: dict[str, Any]) -> dict[str, Any]:
        for name, value in row.items():
            if name not in self._types:
                raise ValueError(f"{name} is no column of these rows")
            cellfile.check_type(name, value, self._types[name])
        return row


class StoreError(PolyKVError):
    """The results folder cannot be written."""


class Store:
    """`ROOT/cells/STUDY/CELL.json`, one file a cell: done means that the file is there and whole."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, study: str, cell: str) -> Path:
        return self.root / "cells" / study / f"{cell}.json"

    def done(self, study: str, cell: str) -> bool:
        """Whether the cell needs no measuring; a damaged file does not count.

        Raises:
            StoreError: the file is there and cannot be read.
        """
        path = self.path(study, cell)
        try:
            cellfile.read(path)
        except (FileNotFoundError, DamagedCell):
            return False
        except OSError as error:
            raise StoreError(
                f"cannot read {path} ({error.strerror or error}); let it be read, or set results_dir "
                "to another folder"
            ) from error
        return True

    @contextmanager
    def claim(self, study: str, cell: str) -> Iterator[bool]:
        """True while this process alone may run the cell; the lock dies with the process.

        What a killed process left of the cell is removed; a damaged file is set aside, named on stderr.

        Raises:
            StoreError: the folder cannot be written.
        """
        path = self.path(study, cell)
        marker = path.with_suffix(".lock")
        lock = FileLock(marker)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        except OSError as error:
            raise _unwritable(path.parent, error) from error
        try:
            _clear(path)
            yield True
        finally:
            with suppress(OSError):  # a folder that became read-only: the lock is free all the same
                marker.unlink(missing_ok=True)
            lock.release()

    def write(
        self, study: Mapping[str, Any], cell: str, config: Mapping[str, Any], rows: Rows
    ) -> Cell:
        """Write a finished cell: temporary file, fsync, rename. Nothing half-written is ever seen.

        Args:
            study: its declaration (cellfile.Cell).

        Raises:
            StoreError: the folder cannot be written or the disk is full; what was done before stays.
        """
        done = Cell(study, cell, config, provenance(), rows.by_column(), rows.answers)
        path = self.path(study["name"], cell)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            cellfile.write_atomically(path, cellfile.compose(done))
        except OSError as error:
            raise _unwritable(path.parent, error) from error
        return done

    def check_writable(self) -> None:
        """Fail before long work starts rather than after.

        Raises:
            StoreError: the results folder cannot be written, or its disk is full.
        """
        folder = self.root / "cells"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Without a name: processes that start together do not meet, and a kill leaves nothing.
            with TemporaryFile(dir=folder) as probe:
                probe.write(bytes(PROBE_BYTES))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            raise _unwritable(self.root, error) from error


def _unwritable(folder: Path, error: OSError) -> StoreError:
    return StoreError(
        f"cannot write into {folder} ({error.strerror or error}); free space or set results_dir to a "
        "folder that can be written, then run again: finished cells are kept"
    )


def _clear(path: Path) -> None:
    """Make room for a cell that this process has claimed."""
    try:
        cellfile.remove_leftovers(path)
        try:
            cellfile.read(path)
        except FileNotFoundError:
            return
        except DamagedCell as reason:
            aside = cellfile.set_aside(path)
            said = f"{path} is damaged ({reason}); set aside as {aside.name} and measured again"
            print(f"warning: {said}", file=sys.stderr, flush=True)
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def load_rows(root: str | Path, study: str = "") -> tuple[pd.DataFrame, list[str]]:
    """Every row of every cell in ROOT (of one study) as `frame` gives them, and the names of files that cannot be read.

    Raises:
        PolyKVError: the rows that were packed there (polykv/archive.py) are damaged.
    """
    cells, damaged = all_cells(root, study)
    return frame(cells), damaged


def frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """The cells' rows under all their columns.

    Whole numbers are Int64 and truths boolean (missing: NA), other numbers float (missing: NaN), texts str
    (missing: "").

    Raises:
        PolyKVError: two studies give a column two types.
    """
    types: dict[str, type] = dict(COLUMNS)
    for cell in cells:
        for name, kind in cell.columns.items():
            if types.setdefault(name, kind) is not kind:
                raise PolyKVError(
                    f"column {name} of {cell.study['name']} is of two types: cell {cell.name} has it as "
                    f"{kind.__name__}, others as {types[name].__name__}; measure the older cells again"
                )
    stamped = [
        pd.DataFrame(cell.rows, columns=list(types), dtype=object).assign(
            study=cell.study["name"],
            cell=cell.name,
            **{name: cell.provenance[name] for name in ("commit", "created_at")},
        )
        for cell in cells
    ]
    rows = pd.concat(stamped, ignore_index=True) if stamped else pd.DataFrame(columns=list(types))
    return rows.assign(**{name: typed(rows[name], kind) for name, kind in types.items()})


def typed(values: pd.Series, kind: type) -> pd.Series:
    """A column as `frame` gives it."""
    if kind is str:
        return values.astype(object).where(values.notna(), "").astype(str)
    return values.astype({int: "Int64", bool: "boolean", float: float}[kind])
