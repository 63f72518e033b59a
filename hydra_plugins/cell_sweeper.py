"""The sweep: compose every cell, refuse bad input before any work, skip what is done, run the rest.

Hydra takes a sweeper from the namespace package `hydra_plugins` only; what a cell is stands in
experiments/sweep.py. Any of Hydra's launchers runs the cells: one after the other, in processes, on a cluster.
"""

import os
import platform
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from experiments import command_line, processes, progress, sweep
from experiments.sweep import Outcome
from polykv.config import REPO
from polykv.errors import PolyKVError
from polykv.progress import track
from polykv.results import Store


@dataclass(frozen=True)
class Plan:
    """A planned cell: Hydra's overrides, what they compose, and the identity that it has where it was planned."""

    overrides: Sequence[str]
    config: DictConfig
    identity: str


@dataclass(frozen=True)
class Job:
    """What each of the launcher's jobs does: its share of the cells, in turn. Pickled to where it runs."""

    shares: Sequence[Sequence[Plan]]
    task: TaskFunction
    planned_on: str

    def __call__(self, cfg: DictConfig) -> list[Outcome]:
        """`cfg` is the config of the share's first cell, which the share has too."""
        processes.settle_into_worker()
        return [self._run(plan) for plan in self.shares[HydraConfig.get().job.num]]

    def _run(self, plan: Plan) -> Outcome:
        try:
            cell = sweep.prepare(plan.config)
        except Exception as error:  # what could be planned cannot be prepared here
            return Outcome(plan.identity, "failed", f"on {platform.node()}: {error}")
        if cell.identity != plan.identity:
            what = "a setting that is auto (device, backend, scorer) or a file that it reads became another"
            where = f"planned on {self.planned_on}, run on {platform.node()}"
            mend = "give the setting by name, or run again with the file as it is"
            return Outcome(plan.identity, "failed", f"{what} ({where}); {mend}")
        return self.task(cell)


class CellSweeper(Sweeper):
    """Hydra's basic sweeper over cells, with identity and resume.

    `max_jobs` deals the cells to at most so many of the launcher's jobs, neighbours to the same job, because
    they share a model and its caches; null makes every cell a job and leaves the balance to the launcher.
    """

    def __init__(self, params: dict[str, str] | None, max_jobs: int | None) -> None:
        self.params = params or {}
        self.max_jobs = max_jobs

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """As Hydra calls it, once, before `sweep`."""
        self.context, self.task, self.config = hydra_context, task_function, config
        self.elsewhere = "slurm" in config.hydra.launcher._target_.lower()

    def sweep(self, arguments: list[str]) -> None:
        """Run all cells; how they ended is in `experiments.sweep.ended`.

        Raises:
            PolyKVError: bad input, before any cell runs.
        """
        if self.max_jobs is not None and self.max_jobs < 1:
            raise PolyKVError(
                f"hydra.sweeper.max_jobs={self.max_jobs}; it takes 1 or more, or null"
            )
        Store(self.config.results_dir).check_writable()
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        given = [*(f"{axis}={names}" for axis, names in self.params.items()), *arguments]
        parsed = parser.parse_overrides(given)
        command_line.check_paths(parsed)
        [jobs] = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        asked, cells = self._plan(jobs)
        place = (self.config.results_dir, self.config.study)
        preset = self.config.hydra.runtime.choices.experiment
        sweep.ended = sweep.Ended(*place, tuple(asked), preset, queued=self.elsewhere)
        if cells:
            self._launch(cells)

    def _plan(self, jobs: Sequence[Sequence[str]]) -> tuple[list[str], list[Plan]]:
        """All cells, and those that are not done yet in an order in which they share their work."""
        # Brings torch, which `run.py --help` does without.
        from experiments.session import of_process

        planned: dict[str, tuple[list[Any], Plan]] = {}
        asked: list[str] = []
        for job in track(jobs, "checking the settings"):
            cfg = compose(self.context, self.config, job)
            if self.elsewhere and cfg.device == "auto":
                raise PolyKVError(
                    "device=auto is settled here, and this launcher's cells run on other machines; "
                    "add device=cuda (or cpu)"
                )
            cell = sweep.prepare(cfg)
            cell.study.check(cell.settled, of_process())
            if not self.elsewhere:
                sweep.check_device(cell.settled)
            asked.append(cell.identity)
            if not Store(cfg.results_dir).done(cell.study.name, cell.identity):
                plan = Plan(job, cfg, cell.identity)
                planned[cell.identity] = (sweep.sharing_key(cell.settled), plan)
        finished = len(jobs) - len(planned)
        progress.say(f"{len(jobs)} cells: {finished} done before, {len(planned)} to run")
        return asked, [cell for _, cell in sorted(planned.values(), key=lambda item: item[0])]

    def _launch(self, cells: list[Plan]) -> None:
        ended = sweep.ended
        shares = deal(cells, self.max_jobs or len(cells))
        job = Job(shares, self.task, platform.node())
        launcher = Plugins.instance().instantiate_launcher(self.context, job, self.config)
        # A job in another process imports this checkout, wherever it starts and whatever is installed there.
        paths = [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        if self.max_jobs and not self.elsewhere:  # joblib does this by itself
            threads = max((os.cpu_count() or 1) // len(shares), 1)
            os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        identities = {cell.identity for cell in cells}
        pooled = "joblib" in self.config.hydra.launcher._target_
        with progress.shown(ended.results_dir, ended.study, identities):
            try:
                overrides = [share[0].overrides for share in shares]
                with processes.workers_watched() if pooled else nullcontext():
                    returned = launcher.launch(overrides, initial_job_idx=0)
                ended.outcomes = [outcome for job in returned for outcome in job.return_value]
            except Exception as error:  # the launcher's own: a worker was killed, or no SLURM here
                if not self.elsewhere:
                    processes.stop_workers()  # nothing goes on behind the user's back
                ended.died = f"{type(error).__name__}: {error}"
                ended.outcomes = [
                    sweep.outcome_on_disk(ended.results_dir, ended.study, cell.identity)
                    for cell in cells
                ]


def compose(context: HydraContext, config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config of one cell."""
    return context.config_loader.load_sweep_config(config, list(overrides))


def deal(cells: list[Plan], n_jobs: int) -> list[list[Plan]]:
    """The cells in at most `n_jobs` runs of neighbours, whose lengths differ by one at most."""
    n_jobs = min(n_jobs, len(cells))
    bounds = [len(cells) * number // n_jobs for number in range(n_jobs + 1)]
    return [cells[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
