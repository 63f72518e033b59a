"""The one entry: compose a config, run its cells, say where the table and the figures are."""

import os
import sys

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments import sweep
from polykv.errors import PolyKVError


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def task(cfg: DictConfig) -> object:
    """One cell, called by the launcher."""
    return sweep.run_cell(cfg)


def main() -> int:
    """Run the sweep and render what its folder holds; the exit code."""
    # Hydra prints its own errors over several lines and exits; with this it lets us see them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        task()
    except KeyboardInterrupt:
        print("stopped; finished cells are kept, the same command goes on", file=sys.stderr)
        return 130
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except PolyKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return report(sweep.results_dir, sweep.experiment_name, sweep.outcomes)


def report(results_dir: str, experiment: str, outcomes: list[sweep.Outcome]) -> int:
    """Tables and figures of the folder, then what did not end well; the exit code."""
    from analysis.__main__ import main as render

    code = render(["--results", results_dir, "--show", experiment])
    for outcome in outcomes:
        if outcome.status == "held":
            print(f"cell {outcome.cell} is being measured by another process", file=sys.stderr)
    reasons: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.status == "failed":
            reasons.setdefault(outcome.reason, []).append(outcome.cell)
    for reason, cells in reasons.items():
        print(f"error: cell {', '.join(cells)} failed: {reason}", file=sys.stderr)
    if reasons:
        print("finished cells are kept; the same command tries the others again", file=sys.stderr)
        return 1
    return code


def one_line(error: Exception) -> str:
    """Hydra's message without its line breaks, and with the cause that it hides."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    parts = [str(error), str(cause or "")]
    return " ".join(" ".join(parts).split())


if __name__ == "__main__":
    sys.exit(main())
