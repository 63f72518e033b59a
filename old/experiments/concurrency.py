"""What does sharing save when N agents decode at the same time, under every reader?

Answers no published row: the rows `memory` are arithmetic, and their reader rebuilds a full-precision copy for
each agent. Here memory is measured, beside the time of a decode step. The readers of a cell are timed in turn.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from experiments import common
from polykv.attention import cascade
from polykv.errors import PolyKVError
from polykv.evaluation import concurrency as decoding
from polykv.evaluation import memory, process
from polykv.evaluation.concurrency import (
    QUERY_TOKENS,
    READERS,
    WARMUP,
    Steps,
    is_prefilled,
    step_times,
)
from polykv.evaluation.memory import GB, check_fits, resident_bytes
from polykv.evaluation.process import KEPT
from polykv.evaluation.statistics import spread_warning
from polykv.evaluation.ttft import quartiles
from polykv.progress import phase
from polykv.results import Rows

__all__ = ["MADE_BY", "check", "run", "settle"]

MADE_BY = (cascade, memory, decoding)

MB = 1e6
RUNS = "as transformers runs it: DynamicCache and sdpa, one padded batch"
HOW = {
    "private": RUNS,
    "inject": RUNS,
    "cascade": "attention to the pool in place, one padded batch",
}


def settle(cfg: DictConfig) -> DictConfig:
    """As everywhere; backend=auto is the fastest one here, which `cascade` uses."""
    return common.settle(OmegaConf.merge(cfg, {"reader": "cascade"}))


def check(cfg: DictConfig) -> None:
    """Refuse bad input; random weights are fine, memory and time do not depend on them.

    Raises:
        PolyKVError: one clear line.
    """
    process.start_early(memory.__name__)
    common.check_common(cfg)
    for reader in cfg.readers:
        if reader not in READERS:
            raise PolyKVError(f"no reader named {reader!r}; there are: {', '.join(READERS)}")
    if not cfg.readers:
        raise PolyKVError(f"readers=[]; name one or more of {', '.join(READERS)}")
    if not isinstance(cfg.repeats, int) or cfg.repeats < 1:
        raise PolyKVError(f"repeats={cfg.repeats!r}; it takes a whole number from 1 up")
    if cfg.max_new_tokens <= WARMUP:
        raise PolyKVError(
            f"max_new_tokens={cfg.max_new_tokens}, and {WARMUP} are for warming up; raise it"
        )
    if cfg.repeats * (cfg.max_new_tokens - WARMUP) < 2:
        raise PolyKVError("one step has no spread; raise max_new_tokens or repeats")
    if cfg.context is None:
        raise PolyKVError(
            "context=null is the length of a text, and none is read here; set context=1024"
        )
    if prefix_tokens(cfg) < 1:
        own = cfg.context - prefix_tokens(cfg)
        raise PolyKVError(
            f"context={cfg.context} has no prefix beside the agents' own {own} tokens; raise it"
        )
    common.check_hub(cfg, "use weights=random, which needs the same, or model=reference")


def prefix_tokens(cfg: DictConfig) -> int:
    """The shared part of the context; an agent's query and new tokens are its own."""
    return cfg.context - QUERY_TOKENS - cfg.max_new_tokens


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Memory and time of every reader; one that does not fit has its reason in its rows."""
    rows = common.new_rows(cfg, document="random tokens" if _prefilled(cfg) else "synthetic cache")
    for reader, (resident, steps) in _measured(cfg).items():
        about = {"reader": reader, "backend": cfg.backend if reader == "cascade" else "torch"}
        _add_memory(rows, cfg, resident, steps, about)
        _add_time(rows, cfg, steps, about)
    return rows


def _measured(cfg: DictConfig) -> dict[str, tuple[int | str, Steps | str]]:
    """Resident bytes and decode steps of each reader, or why they cannot be had."""
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
    check_fits(cfg.model, cfg.recipe, reader, prefix_tokens(cfg), cfg.n_agents, cfg.device)


def _resident(cfg: DictConfig, reader: str) -> int:
    crowd = (prefix_tokens(cfg), cfg.n_agents, cfg.device, cfg.backend)
    phase(f"memory of reader {reader}")
    return resident_bytes(cfg.model, cfg.recipe, reader, *crowd, n_steps=cfg.max_new_tokens)


def _steps(cfg: DictConfig, readers: list[str]) -> dict[str, Steps]:
    phase("timing decode steps")
    return step_times(
        cfg.model,
        cfg.recipe,
        readers,
        n_tokens=prefix_tokens(cfg),
        n_agents=cfg.n_agents,
        n_steps=cfg.max_new_tokens - WARMUP,
        repeats=cfg.repeats,
        device=cfg.device,
        backend=cfg.backend,
    )


def _prefilled(cfg: DictConfig) -> bool:
    return is_prefilled(cfg.model, prefix_tokens(cfg))


def _add_memory(
    rows: Rows, cfg: DictConfig, resident: int | str, steps: Steps | str, about: dict[str, str]
) -> None:
    """kv_memory, and one agent's share of it: `stored` are the tensors of the prefix, `resident` is a peak."""
    prefix = f"a shared prefix of {prefix_tokens(cfg)} tokens"
    threads = "" if isinstance(steps, str) else f"; {_threads(steps)}"
    kept = steps if isinstance(steps, str) else steps.kept_bytes
    for protocol, found, note in (
        ("stored", kept, f"sum of the tensors kept of {prefix}"),
        (
            "resident",
            resident,
            f"peak above the loaded model with {prefix}; {HOW[about['reader']]}",
        ),
    ):
        missing = isinstance(found, str)
        said = about | {"protocol": protocol, "note": found if missing else note + threads}
        rows.add("kv_memory", None if missing else found / GB, "GB", **said)
        share = None if missing else found / cfg.n_agents / MB
        rows.add("kv_memory_per_agent", share, "MB", **said)


def _add_time(rows: Rows, cfg: DictConfig, steps: Steps | str, about: dict[str, str]) -> None:
    """Milliseconds of a step, which gives every agent a token, and tokens per second of all together."""
    if isinstance(steps, str):
        rows.add("step_time", None, "ms", **about, note=steps)
        rows.add("throughput", None, "tokens/s", **about, note=steps)
        return
    low, mid, high = quartiles(np.array(steps.milliseconds))
    about = about | {"protocol": _threads(steps), "n": len(steps.milliseconds)}
    told = ("median over steps, interval: quartiles", HOW[about["reader"]], KEPT)
    about["note"] = "; ".join(filter(None, (*told, spread_warning(low, high))))
    rows.add("step_time", mid, "ms", ci=(low, high), **about)
    slow, median, fast = (1e3 * cfg.n_agents / ms for ms in (high, mid, low))
    rows.add("throughput", median, "tokens/s", ci=(slow, fast), **about)


def _threads(steps: Steps) -> str:
    return f"{steps.n_threads} CPU thread{'s' if steps.n_threads > 1 else ''}"
