"""The sweeper: compose and check every cell, skip the finished ones, launch the rest.

Hydra finds sweepers in the namespace package `hydra_plugins` only; experiments/sweep.py has the cell. Any of Hydra's
launchers runs the cells: one after the other, in processes, on a cluster.
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

from experiments import command_line, declared, processes, progress, sweep
from experiments.sweep import Outcome
from polykv.config import REPO
from polykv.errors import PolyKVError
from polykv.progress import track
from polykv.results import Store


@dataclass(frozen=True)
class Plan:
    """A planned cell: its overrides, composed config, and identity on the machine that planned it."""

    overrides: Sequence[str]
    config: DictConfig
    identity: str


@dataclass(frozen=True)
class Job:
    """The function that the launcher calls for each job: runs the job's share of the cells. Pickled to its machine."""

    shares: Sequence[Sequence[Plan]]
    task: TaskFunction
    planned_on: str

    def __call__(self, cfg: DictConfig) -> list[Outcome]:
        """Outcomes of the share's cells. `cfg`, the first cell's config, is not needed."""
        processes.settle_into_worker()
        return [self.run(plan) for plan in self.shares[HydraConfig.get().job.num]]

    def run(self, plan: Plan) -> Outcome:
        """The outcome of one cell, which fails where it settles otherwise than where it was planned."""
        try:
            cell = sweep.prepare(plan.config)
        except Exception as error:  # such as a file that this machine lacks
            return Outcome(plan.identity, "failed", f"on {platform.node()}: {error}")
        if cell.identity != plan.identity:
            what = "a setting that is auto (device, backend, scorer) or a file that it reads has changed"
            where = f"planned on {self.planned_on}, run on {platform.node()}"
            mend = "set it by name, or run again with the file as it is"
            return Outcome(plan.identity, "failed", f"{what} ({where}); {mend}")
        return self.task(cell)


class CellSweeper(Sweeper):
    """Hydra's basic sweeper, with identities and resume.

    `max_jobs`: the most jobs that the launcher gets. Neighbouring cells go to one job, since they share a model and
    its caches. null: every cell is a job, and the launcher balances them.
    """

    def __init__(self, params: dict[str, str] | None, max_jobs: int | None) -> None:
        self.params = params or {}
        self.max_jobs = max_jobs

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra once, before `sweep`."""
        self.context, self.task, self.config = hydra_context, task_function, config
        self.elsewhere = "slurm" in config.hydra.launcher._target_.lower()

    def sweep(self, arguments: list[str]) -> None:
        """Run all cells; the result is in `experiments.sweep.ended`.

        Raises:
            PolyKVError: bad input, before any cell runs.
        """
        if self.max_jobs is not None and self.max_jobs < 1:
            raise PolyKVError(
                f"hydra.sweeper.max_jobs={self.max_jobs}; it takes 1 or more, or null"
            )
        if not isinstance(self.config.render, bool):
            raise PolyKVError(f"render={self.config.render!r}; it takes true or false")
        Store(self.config.results_dir).check_writable()
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        given = [*(f"{axis}={names}" for axis, names in self.params.items()), *arguments]
        parsed = parser.parse_overrides(given)
        command_line.check_paths(parsed)
        [jobs] = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        typed = [override.key_or_group for override in parser.parse_overrides(arguments)]
        asked, cells = self._plan(jobs, typed)
        place = (self.config.results_dir, self.config.study)
        preset = self.config.hydra.runtime.choices.experiment
        how = {"render": self.config.render, "queued": self.elsewhere}
        sweep.ended = sweep.Ended(*place, tuple(asked), preset, **how)
        if cells:
            self._launch(cells)

    def _plan(
        self, jobs: Sequence[Sequence[str]], typed: Sequence[str]
    ) -> tuple[list[str], list[Plan]]:
        """Identities of all cells, and plans of those that are not done, sorted so that neighbours share work.

        `typed`: the names of the settings that were given on the command line.
        """
        # Imports torch, which `run.py --help` does without.
        from experiments.session import of_process

        planned: dict[str, tuple[list[Any], Plan]] = {}
        asked: list[str] = []
        for job in track(jobs, "checking the settings"):
            cfg = compose(self.context, self.config, job)
            if self.elsewhere and cfg.device == "auto":
                raise PolyKVError(
                    "device=auto is resolved here, and this launcher's cells run on other machines; "
                    "add device=cuda (or cpu)"
                )
            cell = sweep.prepare(cfg)
            preset = cfg.hydra.runtime.choices.experiment
            declared.check_given(typed, preset, cell.settled, cell.study.reads)
            cell.study.check(cell.settled, of_process())
            if not self.elsewhere:
                sweep.check_device(cell.settled)
            asked.append(cell.identity)
            if not Store(cfg.results_dir).done(cell.study.name, cell.identity):
                plan = Plan(job, cfg, cell.identity)
                planned[cell.identity] = (sweep.sharing_key(cell.settled), plan)
        n_cells = len(set(asked))  # settings that change nothing give a cell twice
        finished = n_cells - len(planned)
        progress.say(f"{n_cells} cells: {finished} done before, {len(planned)} to run")
        return asked, [cell for _, cell in sorted(planned.values(), key=lambda item: item[0])]

    def _launch(self, cells: list[Plan]) -> None:
        ended = sweep.ended
        shares = deal(cells, self.max_jobs or len(cells))
        job = Job(shares, self.task, platform.node())
        launcher = Plugins.instance().instantiate_launcher(self.context, job, self.config)
        # A job in another process imports this checkout, whatever is installed there.
        paths = [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        if self.max_jobs and not self.elsewhere:  # without max_jobs joblib does this
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
            except Exception as error:  # of the launcher: a worker was killed, or there is no SLURM
                if not self.elsewhere:
                    processes.stop_workers()
                ended.died = f"{type(error).__name__}: {error}"
                ended.outcomes = [
                    sweep.outcome_on_disk(ended.results_dir, ended.study, cell.identity)
                    for cell in cells
                ]


def compose(context: HydraContext, config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config of one cell."""
    return context.config_loader.load_sweep_config(config, list(overrides))


def deal(cells: list[Plan], n_jobs: int) -> list[list[Plan]]:
    """The cells split into at most `n_jobs` runs of neighbours, whose lengths differ by at most one."""
    n_jobs = min(n_jobs, len(cells))
    bounds = [len(cells) * number // n_jobs for number in range(n_jobs + 1)]
    return [cells[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
