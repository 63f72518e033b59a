"""One cell: what it is, when it is done, and that its failure costs the others nothing."""

import traceback
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from polykv.errors import PolyKVError
from polykv.results import Store, StoreError, cell_id

# The order in which cells share a model, its documents' caches, and a recipe's pools.
SHARED_FIRST = ("weights", "model", "document", "context", "seed", "recipe")

bar: tqdm | None = None  # the sweeper's, in cells that run in its process

outcomes: list["Outcome"] = []  # of the sweep that ran in this process, for run.py
results_dir = ""
experiment_name = ""
unwritable = ""  # why the results folder takes no more; then no further cell is measured in vain


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: `done`, `held` (by another process) or `failed`, with the reason."""

    cell: str
    status: str
    reason: str = ""


def run_cell(cfg: DictConfig) -> Outcome:
    """Measure one cell and write it. A cell that fails does not stop the others."""
    global unwritable
    experiment, settled, cell = prepare(cfg)
    if unwritable:
        return Outcome(cell, "failed", unwritable)
    store, name = Store(cfg.results_dir), cfg.experiment_name
    with store.claim(name, cell) as mine:
        if not mine:
            return Outcome(cell, "held")
        try:
            # A process beside this one may have finished it since the sweep was planned.
            if not store.done(name, cell):
                rows = experiment.run(settled)
                store.write(name, cell, OmegaConf.to_container(settled), rows)
        except StoreError as error:
            unwritable = str(error)
            return Outcome(cell, "failed", unwritable)
        except PolyKVError as error:
            return Outcome(cell, "failed", str(error))
        except Exception as error:  # one cell's bug or lack of memory must not cost the others
            traceback.print_exc()
            return Outcome(cell, "failed", f"{type(error).__name__}: {error}")
    if bar is not None:
        bar.update()
    return Outcome(cell, "done")


def prepare(cfg: DictConfig) -> tuple[ModuleType, DictConfig, str]:
    """The experiment's module, the settled config of a cell, and the cell's identity."""
    experiment = import_module(f"experiments.{cfg.experiment_name}")
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    settled = experiment.settle(own)
    return experiment, settled, cell_id(OmegaConf.to_container(settled))


def sharing_key(cfg: DictConfig) -> list[Any]:
    return [str(cfg[axis]) for axis in SHARED_FIRST]
