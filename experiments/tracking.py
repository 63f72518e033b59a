"""Tracking: what a finished cell tells a logger (conf/logger), beside the store that keeps it.

A logger is any class with `log(cell, config, rows, provenance)` that a YAML names by `_target_`.
The cell is on disk before its logger hears of it: what goes wrong here costs a warning, never a cell.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from polykv.errors import PolyKVError
from polykv.results import COLUMNS
from polykv.wandb_run import open_run

LOCK_TIMEOUT = 60  # seconds; an append takes milliseconds
OBSERVED = ("metric", "value", "unit", "ci_low", "ci_high", "n")


def record(
    cfg: DictConfig, cell: str, rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]
) -> None:
    """Tell the cell's logger (`cfg.logger`; an empty one is none) of a cell that the store has.

    `rows` are the experiment's, `provenance` is that of polykv.results. Never raises: a failure is a
    warning on stderr.
    """
    if not cfg.get("logger"):
        return
    try:
        stamp = {"experiment": cfg.experiment_name, "cell": cell}
        stamp |= {key: provenance[key] for key in ("commit", "created_at")}
        own = OmegaConf.masked_copy(cfg, [key for key in cfg if key not in ("hydra", "logger")])
        config = OmegaConf.to_container(own, resolve=True)
        # Objects, so that a whole number beside a missing one stays whole.
        stamped = [{**row, **stamp} for row in rows]
        frame = pd.DataFrame(stamped, columns=list(COLUMNS), dtype=object)
        instantiate(cfg.logger).log(cell, config, frame, dict(provenance))
    except Exception as error:  # whatever a logger, a disk or a network does
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"warning: cell {cell} is kept, but was not logged ({reason})", file=sys.stderr)


@dataclass(frozen=True)
class CsvLogger:
    """All cells' rows in one CSV file, which several processes may write."""

    path: str

    def log(self, cell: str, config: Any, rows: pd.DataFrame, provenance: Any) -> None:
        """Append the rows: all of them or, where this process is killed, none.

        The file is replaced, not extended: a reader never sees half a line.

        Raises:
            PolyKVError: the file has other columns than a result row.
        """
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = f"{','.join(COLUMNS)}\n".encode()
        with FileLock(f"{path}.lock", timeout=LOCK_TIMEOUT):
            before = path.read_bytes() if path.exists() else header
            if not before.startswith(header):
                raise PolyKVError(f"{path} has other columns than results have; move it away")
            temporary = path.with_name(f".{path.name}.part")
            with temporary.open("wb") as file:
                file.write(before)
                file.write(rows.to_csv(header=False, index=False, lineterminator="\n").encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)


@dataclass(frozen=True)
class WandbLogger:
    """A Weights & Biases run for each cell, named by the cell's identity."""

    project: str
    entity: str | None
    group: str
    tags: Sequence[str]
    folder: str

    def log(
        self, cell: str, config: dict[str, Any], rows: pd.DataFrame, provenance: dict[str, Any]
    ) -> None:
        """Send the config and provenance, each metric as a summary, and the rows as a table."""
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
            run.log({"rows": wandb.Table(dataframe=rows)})
            run.summary.update(summary(rows))


def summary(rows: pd.DataFrame) -> dict[str, float | None]:
    """Metric -> value. Where a metric has several, `metric/column=value/...` says what tells them apart."""
    values = {}
    for metric, group in rows.groupby("metric", sort=False):
        told_apart = [
            column
            for column in COLUMNS
            if column not in OBSERVED and group[column].nunique(dropna=False) > 1
        ]
        for _, row in group.iterrows():
            marks = [f"{column}={row[column]}" for column in told_apart]
            values["/".join([metric, *marks])] = row["value"]
    return values
