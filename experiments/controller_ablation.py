"""Ablation of the controller: signal x alpha x tiers x budget x reseal, each against `uniform` and `random`.

QKVShare names this as its future work and publishes no numbers. The three policies of a cell play the same relays
under the same budget, so that their differences are paired by problem. Accuracy is not measured: KL against the fp16
relay separates policies at a hundredth of the cost.
"""

from omegaconf import DictConfig, OmegaConf

from experiments import handoff_accuracy, settings
from experiments.handoff_accuracy import add_divergence, new_rows
from experiments.relays import FP16_RELAYS, forced, shared_needs
from experiments.session import Session
from experiments.study import Study
from polykv import config
from polykv.errors import PolyKVError
from polykv.evaluation.continuation import Comparison
from polykv.handoff.policy import Policy
from polykv.results import Rows

BASELINES = ("uniform", "random")
# baseline: one of BASELINES, in its rows; the columns below describe the ablated policy, in its own.
COLUMNS = {
    **handoff_accuracy.RELAY,
    "baseline": str,
    "importance": str,
    "demand": str,
    "alpha": float,
    "inverse": bool,
    "tiers": str,
}


def settle(cfg: DictConfig) -> DictConfig:
    """The settled config: with BASELINES, which get the policy's tiers.

    Signals to which alpha gives no weight are dropped, so that equal policies are one cell.
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


def check(cfg: DictConfig, session: Session) -> None:
    """Check the settings and the problems."""
    handoff_accuracy.check(cfg, session)
    if not Policy.from_config(cfg.policy).has_budget:
        raise PolyKVError(f"policy {cfg.policy.name!r} has no budget to ablate; choose another")


def run(cfg: DictConfig, session: Session) -> Rows:
    """KL and same-top-1 of each problem's last answer, under the cell's policy and under each baseline."""
    policy = Policy.from_config(cfg.policy)
    rows = new_rows(cfg, session, COLUMNS)
    about = {
        "policy": settings.label(cfg, "policy"),
        "importance": " + ".join(policy.importance),
        "demand": " + ".join(policy.demand),
        "alpha": float(policy.alpha),
        "inverse": policy.inverse,
        "tiers": "/".join(map(str, policy.tiers)),
    }
    add_divergence(rows, _last(cfg, session, policy, "forced"), **about)
    for name, baseline in cfg.baselines.items():
        found = _baseline(cfg, session, name, Policy.from_config(baseline))
        add_divergence(rows, found, policy=name, baseline=name)
    return rows


def _baseline(cfg: DictConfig, session: Session, name: str, policy: Policy) -> list[Comparison]:
    """Last answers of a baseline's relays, cached for all cells that are compared with it."""
    kept = session.kept("relays of baselines", shared_needs(cfg), dict, of=(FP16_RELAYS,))
    key = (policy, cfg.budget_bits, cfg.reseal, cfg.n_forced)
    if key not in kept:
        kept[key] = _last(cfg, session, policy, f"baseline-{name}")
    return kept[key]


def _last(cfg: DictConfig, session: Session, policy: Policy, part: str) -> list[Comparison]:
    """The last answers of relays, which come after all handoffs."""
    return [one.ways[0][-1] for one in forced(cfg, session, policy, part=part)]


STUDY = Study(
    name="controller_ablation",
    title="Ablation of the controller",
    question="Which signals of the controller make a card better than the same bits for every token?",
    run=run,
    check=check,
    settle=settle,
    also_read=("reader",),
    made_by=handoff_accuracy.MADE_BY,
    settings=(*handoff_accuracy.SETTINGS, "baselines"),
    columns=COLUMNS,
)
