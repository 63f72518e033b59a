"""Loggers of finished cells (conf/logger): one CSV file, or Weights & Biases.

A logger is any class with `log(cell, config, rows, provenance)` that a YAML names by `_target_`. It is called after the
cell was written, so an error in it is a warning and loses nothing.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock
from hydra.utils import instantiate
from omegaconf import DictConfig

from polykv.cellfile import STAMPED, Cell, write_atomically
from polykv.errors import PolyKVError
from polykv.results import frame
from polykv.wandb_run import open_run

LOCK_TIMEOUT = 60  # seconds; an append takes milliseconds
OBSERVED = ("metric", "value", "unit", "n")


def record(cfg: DictConfig, cell: Cell) -> None:
    """Pass a stored cell to its logger, if `cfg.logger` names one.

    Never raises: a failure is a warning on stderr.
    """
    if not cfg.get("logger"):
        return
    try:
        config = {key: value for key, value in cell.config.items() if key != "logger"}
        instantiate(cfg.logger).log(cell.name, config, frame([cell]), dict(cell.provenance))
    except Exception as error:  # of a logger, a disk or a network
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"warning: cell {cell.name} is kept, but was not logged ({reason})", file=sys.stderr)


@dataclass(frozen=True)
class CsvLogger:
    """The rows of all cells in one CSV file, which several processes may write."""

    path: str

    def log(self, cell: str, config: Any, rows: pd.DataFrame, provenance: Any) -> None:
        """Append the rows by replacing the file, so that neither a reader nor a kill sees half of them.

        Raises:
            PolyKVError: the file has other columns than these rows.
        """
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = f"{','.join(rows.columns)}\n".encode()
        with FileLock(f"{path}.lock", timeout=LOCK_TIMEOUT):
            before = path.read_bytes() if path.exists() else header
            if not before.startswith(header):
                raise PolyKVError(f"{path} has columns of another study; move it away")
            added = rows.to_csv(header=False, index=False, lineterminator="\n").encode()
            write_atomically(path, before + added)


@dataclass(frozen=True)
class WandbLogger:
    """One Weights & Biases run for each cell, named by the cell's identity."""

    project: str
    entity: str | None
    group: str
    tags: Sequence[str]
    folder: str

    def log(
        self, cell: str, config: dict[str, Any], rows: pd.DataFrame, provenance: dict[str, Any]
    ) -> None:
        """Log config and provenance, each metric as a summary, and the rows as a table."""
        import wandb

        with open_run(
            self.folder,
            project=self.project,
            entity=self.entity,
            group=self.group,
            tags=list(self.tags),
            job_type="cell",
            name=cell,
            config=config | {"provenance": provenance},
        ) as run:
            plain = rows.astype(object).where(rows.notna(), None)  # JSON has no pandas.NA
            run.log({"rows": wandb.Table(dataframe=plain)})
            run.summary.update(summary(rows))


def summary(rows: pd.DataFrame) -> dict[str, float | None]:
    """Mean of each metric's samples; `metric/column=value/...` of one whose rows differ in other columns."""
    values = {}
    told = [
        name
        for name in rows.columns
        if name not in (*OBSERVED, *STAMPED, "sample", "block", "note")
    ]
    for metric, group in rows.groupby("metric", sort=False):
        apart = [name for name in told if group[name].nunique(dropna=False) > 1]
        for key, part in group.groupby(apart, dropna=False, sort=False) if apart else [((), group)]:
            marks = [f"{name}={value}" for name, value in zip(apart, key, strict=True)]
            mean = part["value"].mean()
            values["/".join([metric, *marks])] = None if pd.isna(mean) else float(mean)
    return values
