"""Memory and decode steps of N agents that decode at the same time, by reader.

Answers no published row: the published memory is computed, and its reader rebuilds a full-precision copy per agent.
Here memory and every decode step are measured. The readers of a cell take turns, so that drift affects all alike.
"""

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments import settings
from experiments.session import Session
from experiments.study import Study
from polykv import loading
from polykv.attention import cascade
from polykv.errors import PolyKVError
from polykv.evaluation import concurrency as decoding
from polykv.evaluation import memory, process
from polykv.evaluation.concurrency import (
    QUERY_TOKENS,
    WARMUP,
    Steps,
    is_prefilled,
    step_times,
)
from polykv.evaluation.memory import GB, check_fits, resident_bytes
from polykv.evaluation.process import KEPT
from polykv.models import ModelSource
from polykv.progress import phase
from polykv.recipe import Recipe
from polykv.results import Rows

# accounting: stored (the tensors kept of the prefix) or resident (peak above the loaded model); n_tokens: of the
# prefix; synthetic: it is Gaussian, not prefilled; n_threads: CPU threads of the timed steps.
COLUMNS = {
    "accounting": str,
    "n_tokens": int,
    "synthetic": bool,
    "n_threads": int,
    "quantization": str,
}


def settle(cfg: DictConfig) -> DictConfig:
    """The settled config; backend=auto is the fastest one here, which reader `in_place` uses."""
    return settings.settle(OmegaConf.merge(cfg, {"reader": "in_place"}))


def check(cfg: DictConfig, session: Session) -> None:
    """Check the settings; random weights are allowed, since memory and time do not depend on them."""
    process.start_early(memory.__name__)
    settings.check_common(cfg)
    settings.check_readers(cfg)
    settings.check_whole(cfg, "repeats")
    if cfg.max_new_tokens <= WARMUP:
        raise PolyKVError(
            f"max_new_tokens={cfg.max_new_tokens}, and {WARMUP} are for warming up; raise it"
        )
    if cfg.repeats * (cfg.max_new_tokens - WARMUP) < 2:
        raise PolyKVError("one step has no spread; raise max_new_tokens or repeats")
    settings.check_context(cfg, 1024)
    if prefix_tokens(cfg) < 1:
        own = cfg.context - prefix_tokens(cfg)
        raise PolyKVError(
            f"context={cfg.context} has no prefix beside the agents' own {own} tokens; raise it"
        )
    settings.check_hub(cfg, "use weights=random, which needs the same, or model=reference")


def prefix_tokens(cfg: DictConfig) -> int:
    """Length of the shared part of the context: all but an agent's own query and new tokens."""
    return cfg.context - QUERY_TOKENS - cfg.max_new_tokens


def run(cfg: DictConfig, session: Session) -> Rows:
    """Memory of every reader in GB and its decode steps in ms; a reader that does not fit says why in its rows."""
    n_tokens = prefix_tokens(cfg)
    about = {
        "n_tokens": n_tokens,
        "synthetic": not is_prefilled(ModelSource.of(cfg.model), n_tokens),
    }
    about |= {"quantization": loading.quantized(cfg.model), "document": None}
    rows = settings.new_rows(cfg, COLUMNS, **about)
    for reader, (resident, steps) in _measured(cfg).items():
        of = {"reader": reader, "backend": cfg.backend if reader == "in_place" else "torch"}
        timed = isinstance(steps, Steps)
        if timed:
            of["n_threads"] = steps.n_threads
        kept = steps.kept_bytes if timed else steps
        for accounting, found in (("stored", kept), ("resident", resident)):
            value, why = (None, found) if isinstance(found, str) else (found / GB, "")
            rows.add("kv_memory", value, "GB", why=why, accounting=accounting, **of)
        if not timed:
            rows.add("step_time", None, "ms", why=steps, **of)
            continue
        for sample, milliseconds in enumerate(steps.milliseconds):
            rows.add("step_time", milliseconds, "ms", sample=sample, n=1, note=KEPT, **of)
    return rows


def _measured(cfg: DictConfig) -> dict[str, tuple[int | str, Steps | str]]:
    """Resident bytes and decode steps of each reader, or the reason why they are missing."""
    resident = {reader: _attempt(_resident, cfg, reader) for reader in cfg.readers}
    unfit = {reader: _attempt(_check_fits, cfg, reader) for reader in cfg.readers}
    steps = {reader: reason for reader, reason in unfit.items() if reason}
    if timed := [reader for reader, reason in unfit.items() if not reason]:
        found = _attempt(_steps, cfg, timed)
        steps |= dict.fromkeys(timed, found) if isinstance(found, str) else found
    return {reader: (resident[reader], steps[reader]) for reader in cfg.readers}


def _attempt(measure: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return measure(*arguments)
    except PolyKVError as error:
        return str(error)


def _check_fits(cfg: DictConfig, reader: str) -> None:
    source = ModelSource.of(cfg.model)
    check_fits(source, reader, prefix_tokens(cfg), cfg.n_agents, cfg.device)


def _resident(cfg: DictConfig, reader: str) -> int:
    sizes = (prefix_tokens(cfg), cfg.n_agents, cfg.device, cfg.backend)
    phase(f"memory of reader {reader}")
    source, recipe = ModelSource.of(cfg.model), Recipe.from_config(cfg.recipe)
    return resident_bytes(source, recipe, reader, *sizes, n_steps=cfg.max_new_tokens)


def _steps(cfg: DictConfig, readers: list[str]) -> dict[str, Steps]:
    phase("timing decode steps")
    return step_times(
        ModelSource.of(cfg.model),
        Recipe.from_config(cfg.recipe),
        readers,
        n_tokens=prefix_tokens(cfg),
        n_agents=cfg.n_agents,
        n_steps=cfg.max_new_tokens - WARMUP,
        repeats=cfg.repeats,
        device=cfg.device,
        backend=cfg.backend,
    )


STUDY = Study(
    name="concurrency",
    title="Agents that decode together",
    question="What does sharing one prefix save, in memory and in the time of a step, while all agents decode?",
    run=run,
    check=check,
    settle=settle,
    made_by=(cascade, memory, decoding),
    settings=("model", "weights", "context", "n_agents", "recipe", "readers", "max_new_tokens",
              "repeats", "backend", "device"),
    columns=COLUMNS,
)  # fmt: skip
