"""Rows of results, the identity of a cell, and the store of finished cells, one file each.

Torch-free, since the analysis reads through this module.
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

# Settings that do not change a cell's numbers: where it runs, where its result is stored, how progress is shown.
NOT_IDENTITY = ("results_dir", "render", "logger", "launcher", "card")

PROBE_BYTES = 65536

_PACKAGES = ("torch", "transformers", "datasets", "bert-score", "numpy", "scipy")


def cell_id(config: dict[str, Any]) -> str:
    """The identity of a cell: a hash of the settings that affect its numbers."""
    kept = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    canonical = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


@functools.cache
def commit() -> str:
    """The checkout's commit, with `+dirty` if files differ from it; `unknown` outside a checkout."""
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


@functools.cache
def versions() -> Mapping[str, str | None]:
    """The versions of the packages that numbers depend on; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def provenance() -> dict[str, Any]:
    """The provenance of a cell: commit, date, machine and versions."""
    return {
        "commit": commit(),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": dict(versions()),
    }


class Rows(list):
    """A cell's rows, each a dict of columns; `shared` columns are given once for all rows.

    Attributes:
        answers: agents' questions and answers for inspection, a dict each.
    """

    def __init__(self, columns: Mapping[str, type] | None = None, **shared: Any) -> None:
        """`columns`: column -> type, those that the study adds to cellfile.COLUMNS."""
        super().__init__()
        self._types = {**COLUMNS, **(columns or {})}
        self._shared = self._checked(shared)
        self.answers: list[dict[str, Any]] = []

    def add(
        self, metric: str, value: float | None, unit: str, *, why: str = "", **columns: Any
    ) -> None:
        """Add one observation. A value that is None, NaN or infinite is stored as None and needs a reason, `why`.

        Raises:
            ValueError: a missing value without a reason, an unknown column, or a value of the wrong type.
        """
        if value is None or not math.isfinite(value):
            value, columns = None, columns | {"note": why or columns.get("note")}
            if not columns["note"]:
                raise ValueError(f"{metric} is missing without a reason")
        row = {"metric": metric, "value": None if value is None else float(value), "unit": unit}
        self.append(self._shared | self._checked(row | columns))

    def by_column(self) -> dict[str, list[Any]]:
        """Column -> values, without columns that are empty in all rows."""
        columns = {name: [row.get(name) for row in self] for name in self._types}
        return {
            name: values
            for name, values in columns.items()
            if any(value is not None for value in values)
        }

    def _checked(self, row: dict[str, Any]) -> dict[str, Any]:
        for name, value in row.items():
            if name not in self._types:
                raise ValueError(f"{name} is not a column of these rows")
            cellfile.check_type(name, value, self._types[name])
        return row


class StoreError(PolyKVError):
    """The results folder cannot be read or written."""


class Store:
    """A results folder with one file per cell, `ROOT/cells/STUDY/CELL.json`; a cell is done if its file is valid."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, study: str, cell: str) -> Path:
        return self.root / "cells" / study / f"{cell}.json"

    def done(self, study: str, cell: str) -> bool:
        """Whether the cell has a valid file.

        Raises:
            StoreError: the file exists but cannot be read.
        """
        path = self.path(study, cell)
        try:
            cellfile.read(path)
        except (FileNotFoundError, DamagedCell):
            return False
        except OSError as error:
            raise StoreError(
                f"cannot read {path} ({error.strerror or error}); make it readable, or set results_dir "
                "to another folder"
            ) from error
        return True

    @contextmanager
    def claim(self, study: str, cell: str) -> Iterator[bool]:
        """Context that yields True if this process now holds the cell's lock, which is released if the process dies.

        Leftovers of a killed process are removed; a damaged file is renamed, with a warning on stderr.

        Raises:
            StoreError: the folder is not writable.
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
            raise unwritable(path.parent, error) from error
        try:
            _clear(path)
            yield True
        finally:
            # Where the folder has become read-only, the lock is released all the same.
            with suppress(OSError):
                marker.unlink(missing_ok=True)
            lock.release()

    def write(
        self, study: Mapping[str, Any], cell: str, config: Mapping[str, Any], rows: Rows
    ) -> Cell:
        """Write a finished cell atomically.

        Args:
            study: its declaration (cellfile.Cell).

        Raises:
            StoreError: the folder is not writable, or the disk is full.
        """
        done = Cell(study, cell, config, provenance(), rows.by_column(), rows.answers)
        path = self.path(study["name"], cell)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            cellfile.write_atomically(path, cellfile.compose(done))
        except OSError as error:
            raise unwritable(path.parent, error) from error
        return done

    def check_writable(self) -> None:
        """Check, before long work starts, that results can be written.

        Raises:
            StoreError: the folder is not writable, or the disk is full.
        """
        folder = self.root / "cells"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Unnamed, so that concurrent processes do not interfere and a kill leaves nothing behind.
            with TemporaryFile(dir=folder) as probe:
                probe.write(bytes(PROBE_BYTES))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            raise unwritable(self.root, error) from error


def unwritable(folder: Path, error: OSError) -> StoreError:
    return StoreError(
        f"cannot write into {folder} ({error.strerror or error}); free space or set results_dir to a "
        "writable folder, then run again: finished cells are kept"
    )


def _clear(path: Path) -> None:
    """Remove leftovers of a cell that this process has claimed, and rename its damaged file."""
    try:
        cellfile.remove_leftovers(path)
        try:
            cellfile.read(path)
        except FileNotFoundError:
            return
        except DamagedCell as reason:
            aside = cellfile.set_aside(path)
            warning = f"{path} is damaged ({reason}); renamed to {aside.name} and measured again"
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    except OSError as error:
        raise unwritable(path.parent, error) from error


def load_rows(root: str | Path, study: str = "") -> tuple[pd.DataFrame, list[str]]:
    """The rows of all cells in ROOT (of one study) as a `frame`, and the names of unreadable files.

    Raises:
        PolyKVError: the packed rows (polykv/archive.py) are damaged.
    """
    cells, damaged = all_cells(root, study)
    return frame(cells), damaged


def frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """The rows of cells as a DataFrame with all their columns.

    Missing values are NA in Int64 and boolean columns, NaN in float columns, and "" in text columns.

    Raises:
        PolyKVError: two studies declare a column with different types.
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
    """A column in the dtype that `frame` uses."""
    if kind is str:
        return values.astype(object).where(values.notna(), "").astype(str)
    return values.astype({int: "Int64", bool: "boolean", float: float}[kind])
