"""The sweep: compose every cell, refuse bad input before any work, skip what is done, run the rest.

Hydra takes a sweeper from the namespace package `hydra_plugins` only; what a cell is stands in
experiments/sweep.py. Hydra's launchers (processes, clusters) run the cells unchanged.
"""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from tqdm import tqdm

from experiments import sweep
from polykv.results import Store


class CellSweeper(BasicSweeper):
    """Hydra's basic sweeper over cells, with identity and resume."""

    def get_job_batch(self) -> Sequence[Sequence[str]]:
        """The jobs that are not done yet, in an order in which they share their work."""
        jobs = super().get_job_batch()
        planned, finished = {}, 0
        for job in tqdm(jobs, desc="check", leave=False, disable=None):
            cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(job))
            experiment, settled, cell = sweep.prepare(cfg)
            experiment.check(settled)
            if Store(cfg.results_dir).done(cfg.experiment_name, cell):
                finished += 1
            else:
                planned[cell] = (sweep.sharing_key(settled), job)
        print(f"{len(jobs)} cells: {finished} done before, {len(planned)} to run", flush=True)
        return [job for _, job in sorted(planned.values(), key=lambda item: item[0])]

    def sweep(self, arguments: list[str]) -> None:
        """Run all cells.

        Raises:
            PolyKVError: bad input, before any cell runs.
        """
        Store(self.config.results_dir).check_writable()
        sweep.bar = tqdm(desc="cells", unit="cell", disable=None)
        try:
            returned = super().sweep(arguments)
        finally:
            sweep.bar.close()
        sweep.outcomes[:] = [job.return_value for batch in returned for job in batch]
        sweep.results_dir = self.config.results_dir
        sweep.experiment_name = self.config.experiment_name

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Every cell was composed and checked in `get_job_batch`."""
        sweep.bar.reset(total=len(batch))
