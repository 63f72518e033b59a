"""The entry point: compose a config, run its cells, print the study's table and where the rest is."""

import os
import sys

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments import command_line, processes, progress, sweep
from polykv.errors import PolyKVError


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def task(cell: sweep.Cell) -> sweep.Outcome:
    """Measure one cell; the sweeper (hydra_plugins/cell_sweeper.py) composes cells and has a launcher call it."""
    return sweep.run_cell(cell)


def main() -> int:
    """Run the sweep, then show what it found; the exit code."""
    # Hydra would print errors over several lines and exit; with this it raises them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    processes.settle_signals()
    try:
        with progress.Reporter():
            task()
            return report(sweep.ended) if sweep.ended else 0
    except KeyboardInterrupt:
        processes.stop_after_interrupt()
        print(sweep.stopped(), file=sys.stderr)
        return processes.INTERRUPTED
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        print(f"error: {command_line.explained(error)}", file=sys.stderr)
        return 2
    except PolyKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def report(ended: sweep.Ended) -> int:
    """Show the cells, if any is done, then print what failed; the exit code."""
    from analysis.__main__ import show
    from polykv.wandb_run import unsynced

    shown = (ended.results_dir, ended.study, ended.cells, ended.preset, ended.render)
    code = 0 if ended.empty else show(*shown)
    if line := unsynced(ended.results_dir):
        print(line)
    for line in ended.complaints():
        print(line, file=sys.stderr)
    return code if ended.well else 1


if __name__ == "__main__":
    sys.exit(main())
