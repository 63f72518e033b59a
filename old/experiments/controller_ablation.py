"""Which signals earn their bits? Signal x alpha x tiers x budget x reseal, each against `uniform` and `random`.

Answers no published row: QKVShare names controller ablations as its own future work. All three policies of a
cell hand on the same relays under the same budget, so that their differences are paired by problem. No accuracy
here: KL against the fp16 relay separates policies at a hundredth of the cost.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from experiments.handoff_accuracy import add_divergence, forced, new_rows, per_problem
from omegaconf import DictConfig, OmegaConf

from experiments import common, handoff_accuracy
from polykv import config
from polykv.errors import PolyKVError
from polykv.evaluation import missing
from polykv.evaluation.continuation import Comparison, why_not_finite
from polykv.evaluation.statistics import document_interval, interval_name
from polykv.handoff.mixed import TIERS
from polykv.handoff.policy import Policy

MADE_BY = handoff_accuracy.MADE_BY
BASELINES = ("uniform", "random")


def settle(cfg: DictConfig) -> DictConfig:
    """Signals that alpha leaves no weight are dropped, so that equal policies are one cell.

    What a policy is held to belongs to the cell as well: BASELINES, with the tiers of the policy.
    """
    settled = handoff_accuracy.settle(cfg)
    if settled.policy.alpha == 0:
        settled.policy.importance = []
    if settled.policy.alpha == 1:
        settled.policy.demand = []
    settled.baselines = {
        name: OmegaConf.merge(config.load_group("policy", name), {"tiers": settled.policy.tiers})
        for name in BASELINES
    }
    return settled


def check(cfg: DictConfig) -> None:
    """Refuse bad input.

    Raises:
        PolyKVError: one clear line.
    """
    handoff_accuracy.check(cfg)
    if not Policy.from_config(cfg.policy).has_budget:
        raise PolyKVError(f"policy {cfg.policy.name!r} has no budget to ablate; choose another")


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """KL of the cell's policy, and its difference to each baseline with a paired interval."""
    policy = Policy.from_config(cfg.policy)
    rows = new_rows(cfg, label(policy))
    found = forced(cfg, policy)
    add_divergence(rows, found, cfg)
    mine = per_problem(found)
    for name, baseline in cfg.baselines.items():
        theirs = per_problem(_baseline(common.as_key(baseline), _key(cfg)))
        apart = [a - b for a, b in zip(mine, theirs, strict=True)]
        missing.add(
            rows,
            f"kl_minus_{name}",
            float(np.mean(apart)),
            "nats",
            why_not_finite(found),
            ci=document_interval(apart),
            n=len(apart),
            protocol=f"teacher-forced; {cfg.reseal}",
            note=f"paired by problem; below 0 the policy beats {name}; {interval_name(apart, 'problems')}",
        )
    return rows


def label(policy: Policy) -> str:
    """What the policy does, in one line: its signals, alpha where it matters, tiers if not all."""
    sides = [(policy.alpha, policy.importance), (1 - policy.alpha, policy.demand)]
    named = [(weight, " + ".join(names)) for weight, names in sides if weight and names]
    if len(named) > 1:
        parts = [" + ".join(f"{weight:g} ({names})" for weight, names in named)]
    else:
        parts = [names for _, names in named] or ["none"]
    parts += ["inverse"] if policy.inverse else []
    if policy.tiers != TIERS:
        parts += ["tiers " + "/".join(map(str, policy.tiers))]
    return "; ".join(parts)


def _key(cfg: DictConfig) -> str:
    needed = (*handoff_accuracy.SHARED, "budget_bits", "reseal")
    return common.as_key({name: cfg[name] for name in needed})


@lru_cache(maxsize=8)
def _baseline(policy: str, key: str) -> list[Comparison]:
    return forced(common.from_key(key), Policy.from_config(common.from_key(policy)))
