"""QKVShare's accuracy table: are answers after a relay of n_hops handoffs as right, and how far did each hop go astray?

Answers the published rows `accuracy` (relay=gsm8k). Beside accuracy stands the teacher-forced KL divergence
to the fp16 relay, which tells policies apart long before accuracy does.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

from experiments import common
from polykv import loading, models
from polykv.errors import PolyKVError
from polykv.evaluation import continuation, gsm8k, missing, statistics
from polykv.evaluation.continuation import Comparison, why_not_finite
from polykv.evaluation.statistics import document_interval, interval_name
from polykv.handoff import allocate, mixed, relay, signals, tasks
from polykv.handoff.card import CacheCard
from polykv.handoff.policy import Policy
from polykv.handoff.relay import (
    RESEALS,
    Handoff,
    Turn,
    divergence,
    force,
    play,
    prompts_of,
    text_of,
)
from polykv.handoff.signing import SigningKey
from polykv.handoff.tasks import Task, load_tasks
from polykv.progress import track
from polykv.results import Rows
from polykv.tokens import opening

CARDS = (mixed, allocate, signals)
MADE_BY = (*CARDS, tasks, relay, gsm8k, continuation, statistics)
# What the fp16 relay depends on; cells that agree here share it.
SHARED = ("model", "device", "relay", "n_problems", "n_hops", "seed", "backend")
FP16 = Policy("fp16", store="float16")  # what all others are held to, whatever conf/policy says


def settle(cfg: DictConfig) -> DictConfig:
    """A policy without a budget is one cell, whatever the budget and the way of resealing: nothing is lost."""
    settled = settle_key(common.settle(cfg))
    if not Policy.from_config(cfg.policy).has_budget:
        settled.budget_bits, settled.reseal = None, RESEALS[0]
    return settled


def check(cfg: DictConfig) -> None:
    """Refuse bad input, random weights above all, and problems that are too long as they are tokenised.

    Raises:
        PolyKVError: one clear line.
    """
    common.check_common(cfg)
    common.check_injects(cfg)
    Policy.from_config(cfg.policy)
    for name in ("n_hops", "n_problems"):
        if not isinstance(cfg[name], int) or cfg[name] < 1:
            raise PolyKVError(f"{name}={cfg[name]!r}; it takes a whole number from 1 up")
    check_budget(cfg.budget_bits)
    key_of(cfg)
    if cfg.reseal not in RESEALS:
        raise PolyKVError(f"no reseal {cfg.reseal!r}; there are: {', '.join(RESEALS)}")
    if cfg.weights == "random":
        raise PolyKVError(
            f"quality cannot be measured on random weights (model={cfg.model.name}); leave weights "
            "out, or use experiment=handoff_ttft"
        )
    if cfg.relay.name == "gsm8k":
        gsm8k.check_available(cfg.relay.path, cfg.n_problems)
    elif cfg.weights != "reference":
        raise PolyKVError(
            f"relay=reference is written for the reference model, not for {cfg.model.name}; "
            "use relay=gsm8k"
        )
    common.check_hub(cfg)
    architecture, tokenizer = models.load_config(cfg.model), models.load_tokenizer(cfg.model)
    for number, task in enumerate(tasks_of(cfg)):
        prompts_of(task, tokenizer, architecture, f"the relay of problem {number}")


def settle_key(settled: DictConfig) -> DictConfig:
    """A cell of signed cards is another cell, as they are longer; which key signed them does not matter."""
    if OmegaConf.select(settled, "card.key_file"):
        settled.signed = True
    return settled


def key_of(cfg: DictConfig) -> SigningKey | None:
    """The key in `card.key_file`, read anew each time: only its path is ever in a config.

    Raises:
        PolyKVError: missing, too short, or readable by everyone.
    """
    path = OmegaConf.select(cfg, "card.key_file")
    return SigningKey.read(path) if path else None


def check_budget(bits: Any) -> None:
    """None stands for a policy without a budget."""
    if bits is not None and (not isinstance(bits, int | float) or not 0 < bits <= 32):
        raise PolyKVError(f"budget_bits={bits!r}; it takes a number of bits such as 4.0")


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Accuracy, KL at the last hop, and the bits that the last card really took."""
    rows, policy = new_rows(cfg, common.label(cfg, "policy")), Policy.from_config(cfg.policy)
    _, tokenizer = loaded(cfg)
    tasks, bits, texts = tasks_of(cfg), [], []
    for task in track(tasks, f"relays under {policy.name}"):
        handoff = new_handoff(cfg, policy)
        texts.append(text_of(play(task, handoff)[-1], tokenizer))
        bits.append(card_bits(handoff.card) if handoff.card else None)
    gsm8k.add_rows(rows, texts, [task.answer for task in tasks], cfg.reseal)
    found = forced(cfg, policy)
    add_divergence(rows, found, cfg)
    if cfg.n_hops > 1:
        add_depth(rows, found, cfg, policy)
    add_bits(rows, bits, cfg)
    return rows


def new_rows(cfg: DictConfig, policy_name: str) -> Rows:
    """Rows of a relay; `document` names its problems."""
    return Rows(
        model=common.label(cfg, "model"),
        weights=models.weights_label(cfg.model),
        document=common.label(cfg, "relay"),
        n_agents=cfg.n_hops + 1,
        n_hops=cfg.n_hops,
        policy=policy_name,
        budget_bits=cfg.budget_bits,
        seed=cfg.seed,
        device=cfg.device,
        dtype=loading.dtype_label(cfg.model),
        bos=bool(opening(loaded(cfg)[1])),
    )


def add_divergence(rows: Rows, found: list[Comparison], cfg: DictConfig) -> None:
    """Mean KL and same-top-1 against the fp16 relay on the last agent's answer."""
    shared = {"n": len(found), "protocol": f"teacher-forced; {cfg.reseal}"}
    for metric, unit, samples, most in (
        ("relay_kl", "nats", per_problem(found), np.inf),
        ("relay_same_top1", "rate", [np.array([c.top1.mean()]) for c in found], 1),
    ):
        mean, why = float(np.concatenate(samples).mean()), why_not_finite(found)
        about = shared | {"note": interval_name(samples, "problems")}
        interval = document_interval(samples, (0, most))
        missing.add(rows, metric, mean, unit, why, ci=interval, **about)


def add_depth(rows: Rows, found: list[Comparison], cfg: DictConfig, policy: Policy) -> None:
    """What n_hops handoffs cost above the last one alone, on the same tokens, paired by problem.

    `kl_depth_working`: the agents between wrote their turns, on caches that were handed to them.
    `kl_depth_passing`: one agent wrote them all, and the others only passed its card on.
    """
    once = per_problem(forced(cfg, policy, n_handoffs=1))
    passed = per_problem(forced(cfg, policy, n_handoffs=1, n_passes=cfg.n_hops))
    shared = {"n": len(once), "protocol": f"teacher-forced; {cfg.reseal}"}
    how = interval_name(once, "problems")
    shared["note"] = f"KL less the one after the last handoff alone, paired by problem; {how}"
    for name, deep in (("working", per_problem(found)), ("passing", passed)):
        apart = [a - b for a, b in zip(deep, once, strict=True)]
        mean, interval = float(np.mean(apart)), document_interval(apart)
        why = why_not_finite(found)
        missing.add(rows, f"kl_depth_{name}", mean, "nats", why, ci=interval, **shared)


def per_problem(found: list[Comparison]) -> list[np.ndarray]:
    """Each problem's mean KL, so that problems are the unit of every interval."""
    return [np.array([comparison.kl.mean()]) for comparison in found]


def card_bits(card: CacheCard) -> dict[str, float]:
    """Bits per cached value: of the tensors, which the budget bounds, and of the whole file, header and all."""
    file_bits = card.mean_bits * len(card.to_bytes()) / card.nbytes
    return {"mean_bits": card.mean_bits, "file_bits": file_bits}


def add_bits(rows: Rows, bits: list[dict[str, float] | None], cfg: DictConfig) -> None:
    """What the last cards took on average; `full` and `reprefill` are what they are."""
    protocol = f"last card; {cfg.reseal}"
    for name in ("mean_bits", "file_bits"):
        if None in bits:
            rows.add(name, None, "bits", protocol=protocol, note="text is handed on, no card")
            continue
        taken = [of_card[name] for of_card in bits]
        rows.add(name, sum(taken) / len(taken), "bits", n=len(taken), protocol=protocol,
                 ci=(min(taken), max(taken)), note="interval: least and most")  # fmt: skip


def forced(
    cfg: DictConfig, policy: Policy, n_handoffs: int | None = None, n_passes: int = 1
) -> list[Comparison]:
    """Per problem, the last agent's answer under the policy against the fp16 relay, token by token."""
    found = []
    for script, exact in zip(*fp16_relays(cfg), strict=True):
        other = force(script, new_handoff(cfg, policy), n_handoffs, n_passes)
        found.append(divergence(script, exact, other)[-1])
    return found


def new_handoff(cfg: DictConfig, policy: Policy) -> Handoff:
    model, tokenizer = loaded(cfg)
    settings = (policy, cfg.budget_bits, cfg.reseal, cfg.seed, key_of(cfg), cfg.backend)
    return Handoff(model, tokenizer, *settings)


def loaded(cfg: DictConfig) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer, kept between cells."""
    return common.model_of(cfg)


def tasks_of(cfg: DictConfig) -> list[Task]:
    return load_tasks(cfg.relay, cfg.n_problems, cfg.n_hops + 1, cfg.seed)


def fp16_relays(cfg: DictConfig) -> tuple[list[list[Turn]], list[list[Any]]]:
    """What the agents write when cards lose nothing but fp16's rounding, and its log-probabilities."""
    return _fp16_relays(common.as_key({name: cfg[name] for name in SHARED}))


@lru_cache(maxsize=1)
def _fp16_relays(key: str) -> tuple[list[list[Turn]], list[list[Any]]]:
    cfg = common.from_key(key)
    # Under fp16 both ways of resealing are the same.
    cfg = OmegaConf.merge(cfg, {"budget_bits": 16.0, "reseal": "append"})
    scripts, exact = [], []
    for task in track(tasks_of(cfg), "fp16 relays"):
        scripts.append(play(task, new_handoff(cfg, FP16)))
        exact.append(force(scripts[-1], new_handoff(cfg, FP16)))
    return scripts, exact
