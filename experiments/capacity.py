"""Capacity computed from data sheets: agents and documents that fit on a device, step times, where sharing pays.

Answers no published row. Everything is computed from the architecture, the recipe's stored bytes and a data sheet (the
formulas are in polykv/evaluation/capacity.py). Measurements of `experiment=concurrency` on the same model and recipe
are quoted beside the computed values (capacity_measured.py).
"""

from bisect import bisect_left
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from experiments import capacity_measured, settings
from experiments.session import Session
from experiments.study import Study
from polykv import config
from polykv.errors import PolyKVError
from polykv.evaluation import capacity as formulas
from polykv.evaluation.capacity import Architecture, DecodeWorkload, gain_range
from polykv.evaluation.hardware import Hardware, Replica, check_number
from polykv.evaluation.memory import GB
from polykv.models import load_config
from polykv.recipe import Recipe
from polykv.results import Rows

# source: input, computed, or measured (quoted from study concurrency); assumed: kind of an input, hardware or
# assumption; suffix_tokens: an agent's own tokens; part: one of the parts that add up to a decode step (formulas.Step).
COLUMNS = {
    "source": str,
    "assumed": str,
    "suffix_tokens": int,
    "part": str,
    **capacity_measured.COLUMNS,
}
MOST_AGENTS = 100_000  # the most agents for which sharing is computed
# Units of the hardware's figures; all but the first two are per device.
UNITS = {
    "nodes": "nodes",
    "devices": "devices",
    "memory_gb": "GB",
    "usable": "",
    "bandwidth_gb_s": "GB/s",
    "tflops": "TFLOPS",
}
WHY = {
    "bandwidth_fraction": "assumed; vLLM was reported to reach 0.77 where it decodes llama-3.1-8b alone on an A100 "
    "(johnmusgrave.com/p/vllm-throughput-latency-sweep-on)",
    "flops_fraction": "assumed; attention kernels were reported to reach 0.5 to 0.75 (arXiv 2307.08691, 2407.08608)",
    "gain": "chosen",
}
PARTS = ("linear", "prefix", "suffix")
COMPUTED, INPUT = {"source": "computed"}, {"source": "input"}
# Costs that sharing can reduce: seconds of a step, bytes of a replica.
COSTS = {
    "time": lambda workload, reader, agents: workload.step(reader, agents).seconds,
    "memory": lambda workload, reader, agents: (
        workload.model.weights_bytes + workload.cache_bytes(reader, workload.on_replica(agents))
    ),
}


def settle(cfg: DictConfig) -> DictConfig:
    """The settled config; settings without effect are fixed, and a digest of the quoted rows is added."""
    unused = {"reader": "dequantize", "backend": "torch", "device": "cpu"}
    settled = settings.settle(OmegaConf.merge(cfg, unused))
    settled.measured_digest = capacity_measured.digest(cfg)
    return settled


def check(cfg: DictConfig, session: Session) -> None:
    """Check the settings, the hardware and the folder to quote from."""
    settings.check_common(cfg)
    settings.check_context(cfg, 32768)
    settings.check_readers(cfg)
    for name, top in (("agents", MOST_AGENTS), ("suffix_tokens", cfg.context - 1)):
        for number in cfg[name] or (None,):
            if not isinstance(number, int) or not 1 <= number <= top:
                raise PolyKVError(
                    f"{name}={list(cfg[name])}; list whole numbers from 1 to {top}, one or more"
                )
    for name, above, most in (
        ("bandwidth_fraction", 0, 1),
        ("flops_fraction", 0, 1),
        ("gain", 1, 100),
    ):
        check_number(name, cfg[name], above, most)
    capacity_measured.check(cfg)
    _replica(cfg, _architecture(cfg, session))


def run(cfg: DictConfig, session: Session) -> Rows:
    """Inputs, capacity and speed for each reader and suffix, and quoted measurements."""
    about = {"device": settings.label(cfg, "hardware")}
    about |= dict.fromkeys(("document", "backend", "n_agents"))
    rows = settings.new_rows(cfg, COLUMNS, **about)
    model = _architecture(cfg, session)
    replica, recipe = _replica(cfg, model), Recipe.from_config(cfg.recipe)
    _add_inputs(rows, cfg, model)
    for n_suffix in cfg.suffix_tokens:
        workload = DecodeWorkload.of(model, replica, recipe, cfg.context - n_suffix, n_suffix)
        for reader in cfg.readers:
            about = COMPUTED | {"reader": reader, "suffix_tokens": n_suffix}
            _add_capacity(rows, cfg, workload, about)
            _add_speed(rows, cfg, workload, about)
            if reader != "unshared":
                _add_paying(rows, cfg, workload, about)
                _add_least_shared(rows, cfg, workload, recipe, about)
    capacity_measured.add_rows(rows, cfg, model, replica)
    return rows


def _architecture(cfg: DictConfig, session: Session) -> Architecture:
    """The model's architecture, cached for cells that differ in hardware or recipe."""
    needs = settings.plain(cfg.model)
    return session.kept(
        "the architecture", needs, lambda: Architecture.of(load_config(cfg.model), cfg.model.dtype)
    )


def _replica(cfg: DictConfig, model: Architecture) -> Replica:
    hardware = Hardware.from_config(cfg.hardware)
    fractions = (cfg.bandwidth_fraction, cfg.flops_fraction)
    return hardware.replica(model.geometry.shape[0], model.dtype, *fractions)


def _add_inputs(rows: Rows, cfg: DictConfig, model: Architecture) -> None:
    """Rows of the inputs: the data sheet with its sources, our assumptions, and two sizes."""
    for name, unit in UNITS.items():
        figure = cfg.hardware[name]
        figure = figure[cfg.model.dtype] if name == "tflops" else figure
        rows.add(name, figure, unit, **INPUT, assumed="hardware", note=_source(cfg, name))
    for name, why in WHY.items():
        rows.add(name, cfg[name], "", **INPUT, assumed="assumption", note=why)
    cache = model.kept_bytes(cfg.context)
    rows.add("weights", model.weights_bytes / GB, "GB", **COMPUTED)
    rows.add("agent_cache", cache / GB, "GB", **COMPUTED)


def _source(cfg: DictConfig, name: str) -> str:
    """The source of a figure of the hardware, or that an override set it."""
    known = cfg.hardware.name in config.available("hardware")
    sheet = config.load_group("hardware", cfg.hardware.name) if known else {}
    if sheet.get(name) != cfg.hardware[name]:
        return "set by an override"
    return str(sheet.get("sources", {}).get(name, f"conf/hardware/{cfg.hardware.name}.yaml"))


def _add_capacity(
    rows: Rows, cfg: DictConfig, workload: DecodeWorkload, about: dict[str, Any]
) -> None:
    """Rows max_agents of one document, and max_documents of `n_agents` agents each; 0 comes with the reason."""
    reader, n = about["reader"], cfg.n_agents
    agents, documents = workload.max_agents(reader), workload.max_documents(reader, n)
    none_fits = None if agents else _too_much(workload, reader, 1)
    rows.add("max_agents", agents, "agents", **about, note=none_fits)
    none_fits = None if documents else _too_much(workload, reader, n)
    rows.add("max_documents", documents, "documents", **about, n_agents=n, note=none_fits)


def _too_much(workload: DecodeWorkload, reader: str, n_agents: int) -> str:
    """Why that many agents do not fit on a replica: the weights alone, or the caches beside them."""
    weights, need = workload.model.weights_bytes / GB, workload.cache_bytes(reader, n_agents) / GB
    usable = f"of {workload.replica.usable_bytes / GB:.1f} GB usable on {workload.replica.split} device(s)"
    if workload.room <= 0:
        return f"does not fit: weights alone need {weights:.1f} GB {usable}"
    return f"does not fit: {n_agents} agent(s) need {need:.2f} GB beside {weights:.1f} GB of weights, {usable}"


def _add_speed(
    rows: Rows, cfg: DictConfig, workload: DecodeWorkload, about: dict[str, Any]
) -> None:
    """Rows step_time by part, at the requested numbers of agents and at the most that fit."""
    reader = about["reader"]
    most = workload.max_agents(reader)
    for n_agents in sorted({*cfg.agents, cfg.n_agents, most} - {0}):
        if n_agents > most:
            why = _too_much(workload, reader, workload.on_replica(n_agents))
            rows.add("step_time", None, "ms", why=why, **about, n_agents=n_agents)
            continue
        step = workload.step(reader, n_agents)
        for part in PARTS:
            seconds = float(getattr(step, part))
            rows.add("step_time", 1e3 * seconds, "ms", part=part, **about, n_agents=n_agents)


def _add_paying(
    rows: Rows, cfg: DictConfig, workload: DecodeWorkload, about: dict[str, Any]
) -> None:
    """Rows of the number of agents from which sharing reduces step time, and memory with weights, by the factor `gain`.

    Also the number up to which it does, if it stops, and the largest factor.
    """
    agents = np.arange(1, MOST_AGENTS + 1)
    for what, cost in COSTS.items():
        unshared, shared = (
            cost(workload, reader, agents) for reader in ("unshared", about["reader"])
        )
        first, last = gain_range(cfg.gain, unshared, shared)
        never = f"never up to {MOST_AGENTS:,} agents"
        rows.add(f"{what}_pays_agents", first, "agents", why=never, **about)
        if last:
            rows.add(f"{what}_pays_until", last, "agents", **about)
        rows.add(f"{what}_gain_most", float((unshared / shared).max()), "x", **about)


def _add_least_shared(
    rows: Rows, cfg: DictConfig, workload: DecodeWorkload, recipe: Recipe, about: dict[str, Any]
) -> None:
    """A row of the fewest shared tokens at which a step of `n_agents` is `gain` times faster."""

    def pays(n_tokens: int) -> bool:
        shorter = DecodeWorkload.of(
            workload.model, workload.replica, recipe, n_tokens, workload.n_suffix
        )
        unshared, shared = (
            shorter.step(reader, cfg.n_agents).seconds for reader in ("unshared", about["reader"])
        )
        return bool(unshared >= cfg.gain * shared)

    lengths = range(1, workload.n_prefix + 1)
    place = bisect_left(lengths, True, key=pays)
    found = lengths[place] if place < len(lengths) else None
    never = f"never up to {workload.n_prefix:,} tokens"
    rows.add("time_pays_tokens", found, "tokens", why=never, **about, n_agents=cfg.n_agents)


STUDY = Study(
    name="capacity",
    title="Capacity on paper",
    question="How many agents and documents fit on a device, how fast do they decode, and where does sharing pay?",
    run=run,
    check=check,
    settle=settle,
    made_by=(formulas,),
    settings=("model", "weights", "hardware", "context", "suffix_tokens", "recipe", "readers",
              "agents", "n_agents", "bandwidth_fraction", "flops_fraction", "gain",
              "measured_digest"),
    columns=COLUMNS,
    depends_on=("concurrency",),
)  # fmt: skip
