"""QKVShare's time to first token: how much sooner does a receiver speak that gets its context by card, not by text?

Answers the published rows `ttft`. All paths of a context are timed in one cell, in turn.
"""

from functools import lru_cache
from itertools import product
from typing import Any

from omegaconf import DictConfig

from experiments import common
from experiments.handoff_accuracy import check_budget, key_of, loaded, settle_key
from polykv import config, kernels, loading, models
from polykv.errors import PolyKVError
from polykv.evaluation.process import KEPT
from polykv.evaluation.ttft import TRANSPORTS, Route, Timing, measure, quartiles
from polykv.handoff.policy import Policy
from polykv.models import load_config
from polykv.pool import check_reader
from polykv.results import Rows
from polykv.supported import check_length

__all__ = ["check", "run", "settle"]
LEAST_REPEATS = 10
REPREFILL = Policy("reprefill", store="text")
# What times depend on.
TIMED = (
    "model", "device", "context", "turn_tokens", "policies", "transports", "readers", "budget_bits", "repeats",
    "seed", "card", "backend",
)  # fmt: skip


def settle(cfg: DictConfig) -> DictConfig:
    """Policies are given by name, and become their settings: a YAML that says otherwise makes another cell.

    backend=auto is the fastest one here, whatever the reader: it writes the bits that torch writes.

    Raises:
        PolyKVError: an unknown policy, or a backend that cannot be had.
    """
    settled = settle_key(common.settle(cfg))
    settled.backend = kernels.pick_backend(cfg.backend, models.pick_device(settled.device))
    settled.policies = {name: config.load_group("policy", name) for name in cfg.policies}
    return settled


def check(cfg: DictConfig) -> None:
    """Refuse bad input; random weights are fine, time does not depend on them.

    Raises:
        PolyKVError: one clear line.
    """
    common.check_common(cfg)
    common.check_injects(cfg)
    routes_of(cfg)
    if cfg.context is None:
        raise PolyKVError(
            "context=null is the length of a text, and none is read here; set context=1024"
        )
    if not isinstance(cfg.turn_tokens, int) or not 0 < cfg.turn_tokens < cfg.context:
        raise PolyKVError(
            f"turn_tokens={cfg.turn_tokens!r}; it takes a whole number from 1 up, below context"
        )
    if not isinstance(cfg.repeats, int) or cfg.repeats < LEAST_REPEATS:
        raise PolyKVError(
            f"repeats={cfg.repeats!r}; it takes a whole number from {LEAST_REPEATS} up"
        )
    check_budget(cfg.budget_bits)
    key_of(cfg)
    check_length(load_config(cfg.model), cfg.context, f"context={cfg.context}")
    common.check_hub(cfg, "use weights=random, which times the same, or model=reference")


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Time to first token of every route, and how many times faster than re-prefill it is."""
    rows, timings = new_rows(cfg), timed(cfg)
    for (route, timing), described in zip(timings, columns(cfg, timings), strict=True):
        low, mid, high = quartiles(timing.total)
        about = {"n": len(timing.total), **described}
        rows.add(
            "ttft", mid, "ms", ci=(low, high), note=f"median; interval: quartiles; {KEPT}", **about
        )
        if route.policy.store != "text":
            text = next(t for r, t in timings if r.policy.store == "text")
            # Each repeat timed both, one after the other.
            low, mid, high = quartiles(text.total / timing.total)
            rows.add("ttft_speedup", mid, "x", ci=(low, high), **about,
                     note=f"re-prefill over card, median of pairs; interval: quartiles; {KEPT}")  # fmt: skip
    return rows


def routes_of(cfg: DictConfig) -> list[Route]:
    """Re-prefill, then every policy by every transport, read in every way.

    Raises:
        PolyKVError: unknown transport or reader, or a policy that is none.
    """
    for transport in cfg.transports:
        if transport not in TRANSPORTS:
            raise PolyKVError(f"no transport {transport!r}; there are: {', '.join(TRANSPORTS)}")
    for reader in cfg.readers:
        check_reader(reader)
    policies = [Policy.from_config(policy) for policy in cfg.policies.values()]
    ways = product(policies, cfg.transports, cfg.readers)
    return [Route(REPREFILL), *(Route(*way, cfg.backend) for way in ways)]


def timed(cfg: DictConfig) -> list[tuple[Route, Timing]]:
    """Every route and its times; the experiments that show them share one measurement."""
    return _timed(common.as_key({name: cfg[name] for name in TIMED}))


@lru_cache(maxsize=1)
def _timed(key: str) -> list[tuple[Route, Timing]]:
    cfg = common.from_key(key)
    model, tokenizer = loaded(cfg)
    routes = routes_of(cfg)
    setting = (cfg.context, cfg.turn_tokens, routes, cfg.budget_bits, cfg.repeats, cfg.seed)
    timings = measure(model, tokenizer, *setting, key_of(cfg))
    return list(zip(routes, timings, strict=True))


def new_rows(cfg: DictConfig) -> Rows:
    """Rows of one receiver; `context_tokens` counts its own turn too."""
    return Rows(
        model=common.label(cfg, "model"),
        weights=models.weights_label(cfg.model),
        context_tokens=cfg.context,
        n_agents=2,
        n_hops=1,
        seed=cfg.seed,
        device=cfg.device,
        dtype=loading.dtype_label(cfg.model),
    )


def columns(cfg: DictConfig, timings: list[tuple[Route, Timing]]) -> list[dict[str, Any]]:
    """The policy, budget, reader and transport columns of each route."""
    found = []
    for route, _ in timings:
        policy = route.policy
        about = {"policy": policy.name, "protocol": "text"}
        about["budget_bits"] = cfg.budget_bits if policy.has_budget else None
        if policy.store != "text":
            how = ", in place" if route.reader == "cascade" else ""
            # Not the fastest one here: another route, which was asked for by name.
            if route.backend != kernels.pick_backend("auto", models.pick_device(cfg.device)):
                how += f", {route.backend}"
            about |= {"protocol": route.transport + how, "reader": route.reader}
            about["backend"] = route.backend
        found.append(about)
    return found
