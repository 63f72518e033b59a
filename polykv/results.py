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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from polykv import cellfile
from polykv.cellfile import COLUMNS, Cell, DamagedCell, read_cells
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
    """A cell's rows, each a dict of COLUMNS; what all of them share is said once.

    Attributes:
        answers: what agents were asked and said, for whoever wants to read it: a dict each.
    """

    def __init__(self, **shared: Any) -> None:
        unknown = set(shared) - set(COLUMNS)
        if unknown:
            raise ValueError(f"not columns of a result row: {sorted(unknown)}")
        super().__init__()
        self._shared = shared
        self.answers: list[dict[str, Any]] = []

    def add(
        self,
        metric: str,
        value: float | None,
        unit: str,
        ci: tuple[float, float] | None = None,
        **columns: Any,
    ) -> None:
        """One observation. A value that cannot be had is None, and `note` must say why.

        Raises:
            ValueError: it does not, or a number is NaN or infinite (polykv/evaluation/missing.py).
        """
        if not all(x is None or math.isfinite(x) for x in (value, *(ci or ()))):
            raise ValueError(
                f"{metric} is {value} with interval {ci}; only finite numbers are rows"
            )
        if value is None and not columns.get("note"):
            raise ValueError(f"{metric} is missing without a reason")
        low, high = ci or (None, None)
        row = {**self._shared, "metric": metric, "value": value, "unit": unit}
        row |= {"ci_low": low, "ci_high": high, **columns}
        self.append({column: row.get(column) for column in COLUMNS})


class StoreError(PolyKVError):
    """The results folder cannot be written."""


class Store:
    """`ROOT/cells/EXPERIMENT/CELL.json`, one file a cell: done means that the file is there and whole."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, experiment: str, cell: str) -> Path:
        return self.root / "cells" / experiment / f"{cell}.json"

    def done(self, experiment: str, cell: str) -> bool:
        """Whether the cell needs no measuring; a damaged file does not count.

        Raises:
            StoreError: the file is there and cannot be read.
        """
        path = self.path(experiment, cell)
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
    def claim(self, experiment: str, cell: str) -> Iterator[bool]:
        """True while this process alone may run the cell; the lock dies with the process.

        What a killed process left of the cell is removed; a damaged file is set aside, named on stderr.

        Raises:
            StoreError: the folder cannot be written.
        """
        path = self.path(experiment, cell)
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
        self,
        experiment: str,
        cell: str,
        config: dict[str, Any],
        rows: list[dict[str, Any]],
        answers: list[dict[str, Any]] | None = None,
    ) -> Path:
        """Write a finished cell: temporary file, fsync, rename. Nothing half-written is ever seen.

        Raises:
            StoreError: the folder cannot be written or the disk is full; what was done before stays.
        """
        origin = provenance()
        stamp = {"experiment": experiment, "cell": cell}
        stamp |= {key: origin[key] for key in ("commit", "created_at")}
        stamped = [row | stamp for row in rows]
        path = self.path(experiment, cell)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            cellfile.write_atomically(
                path, cellfile.compose(experiment, cell, config, origin, stamped, answers)
            )
        except OSError as error:
            raise _unwritable(path.parent, error) from error
        return path

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


def load_rows(root: str | Path) -> tuple[pd.DataFrame, list[str]]:
    """Every row of every cell below ROOT, in a stable order, and the names of files that cannot be read.

    Raises:
        PolyKVError: the folder holds no cells.
    """
    cells, damaged = read_cells(root)
    return frame(root, cells, damaged), damaged


def frame(root: str | Path, cells: list[Cell], damaged: list[str]) -> pd.DataFrame:
    """The rows of `read_cells(root)` under COLUMNS.

    Raises:
        PolyKVError: there are none.
    """
    rows = [row for cell in cells for row in cell.rows]
    if not rows:
        listing = f"; damaged: {', '.join(damaged)}" if damaged else ""
        raise PolyKVError(f"no results in {root}{listing}; run `make run` or `python run.py` first")
    return pd.DataFrame(rows, columns=list(COLUMNS))
