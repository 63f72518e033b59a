"""Relays of a cell: played in batches, and replayed with the tokens of the fp16 relay.

Relays are played in `model.answer_dtype`, if set, and replayed in `model.dtype`, since bfloat16 alone moves KL by as
much as a card.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import Cache, PreTrainedModel

from experiments import settings
from experiments.session import MODEL, Session
from polykv.evaluation.continuation import Comparison
from polykv.handoff.policy import NOTHING, OTHER_PROBLEM, OWN, RANDOM_TOKENS, Policy
from polykv.handoff.relay import (
    RESEALS,
    Handoff,
    Heard,
    Said,
    Turn,
    divergence,
    first_turns,
    force,
    ids_of,
    play,
)
from polykv.handoff.signing import SigningKey
from polykv.handoff.tasks import Task, load_tasks
from polykv.progress import phase, track

# Settings that the fp16 relays depend on; cells that agree in them share the relays.
SHARED = (
    "model", "device", "relay", "n_problems", "n_hops", "batch", "seed", "backend", "signed",
)  # fmt: skip
FP16 = Policy("fp16", store="float16")  # the reference of all policies, independent of conf/policy
FP16_RELAYS = "fp16 relays"
KEPT_BYTES = 2 << 30  # of the first agents' caches; each cell plays the others' first turns again
Way = tuple[int | None, int]
ALL: Way = (None, 1)  # every handoff of the relay takes place, once
PROBLEMS = "problems"


@dataclass(frozen=True)
class Played:
    """A problem's relay: its turns, and the bits of the card of each handoff (relay.Handoff)."""

    turns: list[Turn]
    bits: list[tuple[float, float]]


def tasks_of(cfg: DictConfig) -> list[Task]:
    """The cell's problems, the same under every policy."""
    return load_tasks(cfg.relay, cfg.n_problems, cfg.n_hops + 1, cfg.seed)


def style_of(cfg: DictConfig) -> str:
    """How agents are prompted: the model's question style."""
    return cfg.model.get("question_style", "plain")


def key_of(cfg: DictConfig) -> SigningKey | None:
    """The key in `card.key_file`, if set. It is read each time: a config only has the path."""
    path = OmegaConf.select(cfg, "card.key_file")
    return SigningKey.read(path) if path else None


def shared_needs(cfg: DictConfig) -> Any:
    """The settings that the fp16 relays depend on, as plain values."""
    return settings.plain(OmegaConf.masked_copy(cfg, SHARED))


def played(cfg: DictConfig, session: Session, policy: Policy, name: str) -> list[Played]:
    """The relays of all problems under a policy, `batch` of them together; `name` is shown with the progress."""
    tasks, loaded, done = tasks_of(cfg), session.answering(cfg), count(1)
    n_turns = cfg.n_hops + 1

    def heard() -> None:
        phase(name, next(done) / n_turns, len(tasks), PROBLEMS)

    found = []
    phase(name, 0, len(tasks), PROBLEMS)
    for start in range(0, len(tasks), cfg.batch):
        together = tasks[start : start + cfg.batch]
        handoffs = [_handoff(cfg, session, loaded, policy, start + n) for n in range(len(together))]
        first = _first(cfg, session, start, together, heard)
        turns = play(together, handoffs, style_of(cfg), heard, first)
        found += [Played(own, way.bits) for own, way in zip(turns, handoffs, strict=True)]
    return found


def _first(
    cfg: DictConfig, session: Session, start: int, together: Sequence[Task], heard: Heard
) -> list[Said]:
    """The first agents' turns, which precede all cards, kept for other cells up to KEPT_BYTES."""
    kept: dict[int, list[Said]] = session.kept("first turns", shared_needs(cfg), dict, of=(MODEL,))
    if start in kept:
        for _ in together:
            heard()
        return kept[start]
    found = first_turns(together, *session.answering(cfg), style_of(cfg), heard)
    if sum(_nbytes(cache) for said in (*kept.values(), found) for _, cache in said) < KEPT_BYTES:
        kept[start] = found
    return found


def _nbytes(cache: Cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def fp16_relays(cfg: DictConfig, session: Session) -> list[Played]:
    """The relays under fp16 cards."""
    make = partial(played, _under_fp16(cfg), session, FP16, FP16_RELAYS)
    return session.kept(FP16_RELAYS, shared_needs(cfg), make, of=(MODEL,))


def forced(
    cfg: DictConfig, session: Session, policy: Policy, ways: Sequence[Way] = (ALL,)
) -> list[list[list[Comparison]]]:
    """For each way and each of the first `n_forced` problems, every turn's answer against the fp16 relay.

    Token by token, on the tokens of the fp16 relay. A way is (`n_handoffs`, `n_passes`) of relay.force.
    """
    relays = fp16_relays(cfg, session)[: cfg.n_forced]
    loaded = session.model(cfg)
    found: list[list[list[Comparison]]] = [[] for _ in ways]
    for sample, relay in enumerate(track(relays, f"replaying under {policy.name}", PROBLEMS)):
        exact = force(relay.turns, _handoff(_under_fp16(cfg), session, loaded, FP16, sample))
        for own, way in zip(found, ways, strict=True):
            other = force(relay.turns, _handoff(cfg, session, loaded, policy, sample), *way)
            own.append(divergence(relay.turns, exact, other))
    return found


def _under_fp16(cfg: DictConfig) -> DictConfig:
    # Under fp16 both ways of resealing are the same.
    return OmegaConf.merge(cfg, {"budget_bits": 16.0, "reseal": RESEALS[0]})


def _handoff(
    cfg: DictConfig,
    session: Session,
    loaded: tuple[PreTrainedModel, Any],
    policy: Policy,
    sample: int,
) -> Handoff:
    """How caches are handed on in the relay of one problem under this policy."""
    donors = None if policy.carries == OWN else _donors(cfg, session, policy.carries, sample)
    how = (replace(policy, carries=OWN), cfg.budget_bits, cfg.reseal, cfg.seed, key_of(cfg))
    return Handoff(*loaded, *how, cfg.backend, donors)


def _donors(cfg: DictConfig, session: Session, carries: str, sample: int) -> list[Tensor]:
    """For each handoff of a problem the tokens that a control's card carries, from the fp16 relays.

    OTHER_PROBLEM takes those of the next problem, and RANDOM_TOKENS as many as the problem's own.
    """
    relays = fp16_relays(cfg, session)
    other = sample + (carries == OTHER_PROBLEM)
    turns = relays[other % len(relays)].turns
    known = [ids_of(turns[:number]) for number in range(1, len(turns))]
    if carries == NOTHING:
        return [ids_T[:0] for ids_T in known]
    if carries == RANDOM_TOKENS:
        generator = torch.Generator().manual_seed(cfg.seed * len(relays) + sample)
        _, tokenizer = session.answering(cfg)
        random_T = torch.randint(len(tokenizer), known[-1].shape, generator=generator)
        return [random_T[: len(ids_T)] for ids_T in known]
    return known
