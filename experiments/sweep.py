"""One cell of a sweep: prepared, measured, and recorded as done or failed.

A sweep's only state is its results folder: `cells/` has the finished cells, `failed/` the reasons of the others, and
`parts/` the finished parts of those that were stopped. So any launcher can run the cells, in any number of processes
and machines.
"""

import traceback
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from experiments import declared, tracking
from polykv.errors import PolyKVError
from polykv.results import Store, StoreError

if TYPE_CHECKING:
    from experiments.study import Study

# Cells are sorted by these settings, so that neighbours share a model, its documents' caches and a recipe's pools.
SHARED_FIRST = ("weights", "model", "document", "context", "prompts", "seed", "recipe")

LONGEST = 400  # characters of a reason on the terminal; the file in `failed/` has all of it


@dataclass(frozen=True)
class Cell:
    """One point of a sweep, ready to be measured: its study, its settled config and its identity."""

    study: "Study"
    settled: DictConfig
    identity: str


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: `done`, `held` by another process, `failed` for a reason, or `lost` with its worker."""

    cell: str
    status: str
    reason: str = ""


@dataclass
class Ended:
    """How the sweep of this process ended.

    Attributes:
        cells: all that were asked for, whether they were done before or now.
        outcomes: of the cells that were not done before.
        preset: the YAML of conf/experiment that was chosen.
        render: whether the tables and figures are written.
        queued: whether the jobs are a cluster's and go on without this process.
        died: why the launcher gave up, if it did.
    """

    results_dir: str
    study: str
    cells: tuple[str, ...]
    preset: str = ""
    render: bool = True
    queued: bool = False
    outcomes: list[Outcome] = field(default_factory=list)
    died: str = ""

    @property
    def well(self) -> bool:
        """Whether no cell failed and the launcher did not give up."""
        return not self.died and all(outcome.status != "failed" for outcome in self.outcomes)

    @property
    def empty(self) -> bool:
        """Whether none of the cells is done."""
        left = {outcome.cell for outcome in self.outcomes if outcome.status != "done"}
        return left.issuperset(self.cells)

    def complaints(self) -> list[str]:
        """Lines about cells that are held or failed, and about a launcher that gave up."""
        held, lines = [], []
        reasons: dict[str, list[str]] = {}
        for outcome in self.outcomes:
            if outcome.status == "held":
                held.append(f"cell {outcome.cell} is being measured by another process")
            if outcome.status == "failed":
                reasons.setdefault(outcome.reason, []).append(outcome.cell)
        for reason, cells in reasons.items():
            lines.append(f"error: cell {', '.join(cells)} failed: {shorten(reason, LONGEST)}")
        if reasons:
            kept = failure_path(self.results_dir, self.study, "CELL")
            lines.append(f"tracebacks are in {kept}")
        if self.died:
            lost = sum(outcome.status == "lost" for outcome in self.outcomes)
            queued = "; what is queued goes on" if self.queued else ""
            died = shorten(self.died, LONGEST)
            lines.append(f"error: the launcher gave up, {lost} cells to go{queued}: {died}")
        if not self.well:
            lines.append("finished cells are kept; run the same command again for the others")
        return lines + held


# Set by the sweeper (hydra_plugins), read by run.py; stays None if Hydra only showed a config.
ended: Ended | None = None


def stopped() -> str:
    """The message after Ctrl-C or SIGTERM."""
    queued = ", queued jobs go on (scancel ends them)" if ended and ended.queued else ""
    return f"stopped{queued}; finished cells are kept, run the same command again for the others"


def run_cell(cell: Cell) -> Outcome:
    """Measure one cell and write it. A cell that fails does not stop the others.

    If the results folder cannot be written, the remaining cells of this process are skipped.
    """
    from experiments.session import of_process  # imports torch, which `run.py --help` does without
    from polykv.parts import Parts

    session = of_process()
    if session.storage_failed:
        return Outcome(cell.identity, "failed", session.storage_failed)
    results_dir, name = cell.settled.results_dir, cell.study.name
    store = Store(results_dir)
    parts = Parts(store.root, cell.identity, {"cell": cell.identity})
    log = failure_path(results_dir, name, cell.identity)
    try:
        with store.claim(name, cell.identity) as mine:
            if not mine:
                return Outcome(cell.identity, "held")
            log.unlink(missing_ok=True)
            # Another process may have finished it since the sweep was planned.
            if not store.done(name, cell.identity):
                with session.saving(parts):
                    rows = cell.study.run(cell.settled, session)
                config = OmegaConf.to_container(cell.settled)
                done = store.write(cell.study.declaration(), cell.identity, config, rows)
                tracking.record(cell.settled, done)
            parts.remove()
    except StoreError as error:
        session.storage_failed = str(error)
        return Outcome(cell.identity, "failed", session.storage_failed)
    except Exception as error:  # such as a bug or lack of memory in this cell
        return Outcome(cell.identity, "failed", _logged(error, log, cell.settled))
    return Outcome(cell.identity, "done")


def prepare(cfg: DictConfig) -> Cell:
    """The cell that a composed config describes."""
    from experiments.study import named  # imports torch

    study = named(cfg.study)
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    declared.check(own)
    settled = study.settle(own)
    settled.versions = study.versions(settled)
    return Cell(study, settled, study.identity(settled))


def check_device(settled: DictConfig) -> None:
    """Check that this machine has the device."""
    from polykv import models  # imports torch

    models.check_device(settled.device)


def failure_path(results_dir: str, study: str, cell: str) -> Path:
    """The file with a failed cell's reason, settings and traceback, which is removed once the cell succeeds."""
    return Path(results_dir) / "failed" / study / f"{cell}.txt"


def outcome_on_disk(results_dir: str, study: str, cell: str) -> Outcome:
    """How a cell ended, read from the results folder, if its worker did not return."""
    if Store(results_dir).done(study, cell):
        return Outcome(cell, "done")
    try:
        text = failure_path(results_dir, study, cell).read_text(encoding="utf-8")
    except OSError:
        return Outcome(cell, "lost")
    return Outcome(cell, "failed", text.partition("\n")[0])


def sharing_key(cfg: DictConfig) -> list[Any]:
    """The key that cells are sorted by (SHARED_FIRST)."""
    return [str(cfg.get(axis)) for axis in SHARED_FIRST]


def _logged(error: Exception, log: Path, settled: DictConfig) -> str:
    """The reason in one line, written to the file `log` with the traceback and the settings."""
    reason = " ".join(str(error).split())
    if not isinstance(error, PolyKVError):
        reason = f"{type(error).__name__}: {reason}"
    text = "\n".join([reason, "", traceback.format_exc(), OmegaConf.to_yaml(settled)])
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(text, encoding="utf-8")
    except OSError:
        traceback.print_exc()  # the folder cannot be written
    return reason
