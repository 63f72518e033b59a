"""The tidy row, the identity of a cell, and the store in which a finished cell is one atomic file.

Torch-free: the analysis reads through this module.
"""

import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import pandas as pd
from filelock import FileLock, Timeout

from polykv.errors import PolyKVError

COLUMNS = (
    "experiment", "cell", "model", "weights", "document", "context_tokens", "n_agents", "n_hops",
    "recipe", "policy", "budget_bits", "reader", "backend", "metric", "value", "unit", "ci_low", "ci_high",
    "n", "seed", "protocol", "device", "dtype", "commit", "created_at", "note",
)  # fmt: skip

# Older results lack these.
_ADDED = ("backend",)

# Where a result is kept and how its progress is shown do not change its numbers.
NOT_IDENTITY = ("results_dir", "logger")

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


class Rows:
    """Collects a cell's rows; what all of them share is said once."""

    def __init__(self, **shared: Any) -> None:
        unknown = set(shared) - set(COLUMNS)
        if unknown:
            raise ValueError(f"not columns of a result row: {sorted(unknown)}")
        self._shared = shared
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        metric: str,
        value: float | None,
        unit: str,
        ci: tuple[float, float] | None = None,
        **columns: Any,
    ) -> None:
        """One observation. A value that cannot be had is None, and `note` must say why."""
        if value is None and not columns.get("note"):
            raise ValueError(f"{metric} is missing without a reason")
        low, high = ci or (None, None)
        row = {**self._shared, "metric": metric, "value": value, "unit": unit}
        row |= {"ci_low": low, "ci_high": high, **columns}
        self.rows.append({column: row.get(column) for column in COLUMNS})


class StoreError(PolyKVError):
    """The results folder cannot be written."""


class Store:
    """`ROOT/cells/EXPERIMENT/CELL.json`, one file a cell: done means that the file is there."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, experiment: str, cell: str) -> Path:
        return self.root / "cells" / experiment / f"{cell}.json"

    def done(self, experiment: str, cell: str) -> bool:
        return self.path(experiment, cell).is_file()

    @contextmanager
    def claim(self, experiment: str, cell: str) -> Iterator[bool]:
        """True while this process alone may run the cell; the lock dies with the process."""
        path = self.path(experiment, cell).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            lock.release()

    def write(
        self, experiment: str, cell: str, config: dict[str, Any], rows: list[dict[str, Any]]
    ) -> Path:
        """Write a finished cell: temporary file, fsync, rename. Nothing half-written is ever seen.

        Raises:
            StoreError: the folder cannot be written or the disk is full; what was done before stays.
        """
        origin = provenance()
        stamp = {"experiment": experiment, "cell": cell}
        stamp |= {key: origin[key] for key in ("commit", "created_at")}
        content = {"config": config, "provenance": origin, "rows": [row | stamp for row in rows]}
        path = self.path(experiment, cell)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(path, json.dumps(content, indent=1, allow_nan=False))
        except OSError as error:
            raise StoreError(
                f"cannot write into {path.parent} ({error.strerror or error}); free space or set "
                "results_dir to a folder that can be written, then run again: finished cells are kept"
            ) from error
        return path

    def check_writable(self) -> None:
        """Fail before long work starts rather than after.

        Raises:
            StoreError: the results folder cannot be written, or its disk is full.
        """
        probe = self.root / "cells" / ".probe"
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(probe, " " * 65536)
            probe.unlink()
        except OSError as error:
            raise StoreError(
                f"cannot write into {self.root} ({error.strerror or error}); free space or set "
                "results_dir to a folder that can be written"
            ) from error


def _write_atomically(path: Path, text: str) -> None:
    # Not tempfile's: its files can be read by their owner only, and results are shared.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_rows(root: str | Path) -> tuple[pd.DataFrame, list[str]]:
    """Every row of every cell below ROOT, in a stable order, and the names of files that cannot be read.

    Raises:
        PolyKVError: the folder holds no cells.
    """
    rows: list[dict[str, Any]] = []
    damaged = []
    for path in sorted(Path(root).glob("cells/*/*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            older = dict.fromkeys(_ADDED)
            rows_read = [older | row for row in content["rows"]]
            cell_rows = [{column: row[column] for column in COLUMNS} for row in rows_read]
        except (ValueError, KeyError, TypeError, OSError) as error:
            damaged.append(f"{path} ({type(error).__name__}: {error})")
            continue
        rows.extend(cell_rows)
    if not rows:
        listing = f"; damaged: {', '.join(damaged)}" if damaged else ""
        raise PolyKVError(f"no results in {root}{listing}; run `make run` or `python run.py` first")
    return pd.DataFrame(rows, columns=list(COLUMNS)), damaged
