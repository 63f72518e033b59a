"""One cell: what it is, when it is done, and that its failure costs the others nothing.

A sweep's state is its results folder: `cells/` holds what is done, `failed/` why the rest is not. So it does
not matter which launcher runs the cells, in how many processes, on which machines.
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

# The order in which cells share a model, its documents' caches, and a recipe's pools.
SHARED_FIRST = ("weights", "model", "document", "context", "seed", "recipe")

LONGEST = 400  # characters of a reason on the terminal; all of it is in its file


@dataclass(frozen=True)
class Cell:
    """One point of a sweep, ready to be measured: its study, its settled config and its identity."""

    study: "Study"
    settled: DictConfig
    identity: str


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: `done`, `held` (by another process), `failed` with the reason, or `lost` with its worker."""

    cell: str
    status: str
    reason: str = ""


@dataclass
class Ended:
    """The sweep that this process planned, for run.py: `cells` are all of `study` that it asked for, done before or
    now, and `preset` the YAML of conf/experiment that it was asked for by.

    `died` says why its launcher gave up, if it did; `queued` that its jobs are a cluster's, and go on without
    this process.
    """

    results_dir: str
    study: str
    cells: tuple[str, ...]
    preset: str = ""
    queued: bool = False
    outcomes: list[Outcome] = field(default_factory=list)
    died: str = ""

    @property
    def well(self) -> bool:
        """Whether nothing is left that should be tried again."""
        return not self.died and all(outcome.status != "failed" for outcome in self.outcomes)

    @property
    def empty(self) -> bool:
        """Whether not one of its cells is done, so that there is nothing to show."""
        left = {outcome.cell for outcome in self.outcomes if outcome.status != "done"}
        return left.issuperset(self.cells)

    def complaints(self) -> list[str]:
        """What did not end well, a line each."""
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
            lines.append("finished cells are kept; the same command tries the others again")
        return lines + held


ended: Ended | None = None  # also where Hydra only showed a config


def stopped() -> str:
    """What to say after Ctrl-C."""
    queued = ", queued jobs go on (scancel)" if ended and ended.queued else ""
    return f"stopped{queued}; finished cells are kept, the same command goes on"


def run_cell(cell: Cell) -> Outcome:
    """Measure one cell and write it. A cell that fails does not stop the others."""
    from experiments.session import of_process  # brings torch, which `run.py --help` does without

    session = of_process()
    if session.storage_failed:
        return Outcome(cell.identity, "failed", session.storage_failed)
    results_dir, name = cell.settled.results_dir, cell.study.name
    store = Store(results_dir)
    log = failure_path(results_dir, name, cell.identity)
    try:
        with store.claim(name, cell.identity) as mine:
            if not mine:
                return Outcome(cell.identity, "held")
            log.unlink(missing_ok=True)
            # A process beside this one may have finished it since the sweep was planned.
            if not store.done(name, cell.identity):
                rows = cell.study.run(cell.settled, session)
                config = OmegaConf.to_container(cell.settled)
                done = store.write(cell.study.declaration(), cell.identity, config, rows)
                tracking.record(cell.settled, done)
    except StoreError as error:
        session.storage_failed = str(error)
        return Outcome(cell.identity, "failed", session.storage_failed)
    except Exception as error:  # one cell's bug or lack of memory must not cost the others
        return Outcome(cell.identity, "failed", _keep(error, log, cell.settled))
    return Outcome(cell.identity, "done")


def prepare(cfg: DictConfig) -> Cell:
    """The cell that a composed config describes.

    Raises:
        PolyKVError: a setting that nothing reads, or what cannot be settled here.
    """
    from experiments.study import named  # as above

    study = named(cfg.study)
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    declared.check(own)
    settled = study.settle(own)
    settled.versions = study.versions(settled)
    return Cell(study, settled, study.identity(settled))


def check_device(settled: DictConfig) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        PolyKVError: names the device.
    """
    from polykv import models  # as above

    models.check_device(settled.device)


def failure_path(results_dir: str, study: str, cell: str) -> Path:
    """Where a failed cell keeps its reason, settings and traceback until it succeeds."""
    return Path(results_dir) / "failed" / study / f"{cell}.txt"


def outcome_on_disk(results_dir: str, study: str, cell: str) -> Outcome:
    """How a cell ended whose worker did not come back to say so."""
    if Store(results_dir).done(study, cell):
        return Outcome(cell, "done")
    try:
        text = failure_path(results_dir, study, cell).read_text(encoding="utf-8")
    except OSError:
        return Outcome(cell, "lost")
    return Outcome(cell, "failed", text.partition("\n")[0])


def sharing_key(cfg: DictConfig) -> list[Any]:
    return [str(cfg[axis]) for axis in SHARED_FIRST]


def _keep(error: Exception, log: Path, settled: DictConfig) -> str:
    """The reason in one line; all of it goes into a file, for a worker has no terminal."""
    reason = " ".join(str(error).split())
    if not isinstance(error, PolyKVError):
        reason = f"{type(error).__name__}: {reason}"
    text = "\n".join([reason, "", traceback.format_exc(), OmegaConf.to_yaml(settled)])
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(text, encoding="utf-8")
    except OSError:
        traceback.print_exc()  # the folder takes no more: then it is at least said here
    return reason
