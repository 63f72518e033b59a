"""Relays of a cell (polykv/handoff/relay.py): played for their answers, and replayed for their divergence.

They are played in batches, in `model.answer_dtype` if set. They are replayed one by one, on the tokens of the fp16
relay, in `model.dtype`, since bfloat16 alone moves KL by as much as a card.
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
    Answered,
    Handoff,
    OnReply,
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
# Of the first agents' caches that are kept; the first turns beyond it are played again by every cell.
KEPT_BYTES = 2 << 30
Way = tuple[int | None, int]  # `n_handoffs` and `n_passes` of relay.force
ALL: Way = (None, 1)  # every handoff of the relay takes place, once
PROBLEMS = "problems"  # what progress counts


@dataclass(frozen=True)
class Played:
    """The relay of one problem: its turns, and the bits of each of its cards (`Handoff.bits`)."""

    turns: list[Turn]
    bits: list[tuple[float, float]]


def tasks_of(cfg: DictConfig) -> list[Task]:
    """The cell's problems, the same under every policy."""
    return load_tasks(cfg.relay, cfg.n_problems, cfg.n_hops + 1, cfg.seed)


def style_of(cfg: DictConfig) -> str:
    """How agents are prompted: the model's question style."""
    return cfg.model.get("question_style", "plain")


def key_of(cfg: DictConfig) -> SigningKey | None:
    """The key in `card.key_file`, if set."""
    path = OmegaConf.select(cfg, "card.key_file")
    return SigningKey.read(path) if path else None


def shared_needs(cfg: DictConfig) -> Any:
    """The settings that the fp16 relays depend on, as plain values."""
    return settings.plain(OmegaConf.masked_copy(cfg, SHARED))


def played(cfg: DictConfig, session: Session, policy: Policy, name: str) -> list[Played]:
    """The relays of all problems under a policy, in batches of `batch`; progress is shown as `name`."""
    tasks, loaded, done = tasks_of(cfg), session.answering(cfg), count(1)
    n_turns = cfg.n_hops + 1

    def on_reply() -> None:
        phase(name, next(done) / n_turns, len(tasks), PROBLEMS)

    found = []
    phase(name, 0, len(tasks), PROBLEMS)
    for start in range(0, len(tasks), cfg.batch):
        together = tasks[start : start + cfg.batch]
        handoffs = [_handoff(cfg, session, loaded, policy, start + n) for n in range(len(together))]
        first = _first(cfg, session, start, together, on_reply)
        turns = play(together, handoffs, style_of(cfg), on_reply, first)
        found += [Played(own, handoff.bits) for own, handoff in zip(turns, handoffs, strict=True)]
    return found


def _first(
    cfg: DictConfig, session: Session, start: int, together: Sequence[Task], on_reply: OnReply
) -> list[Answered]:
    """The first turns of the problems from number `start` on, kept for other cells up to KEPT_BYTES.

    They precede all cards, so that they are the same under every policy.
    """
    kept: dict[int, list[Answered]] = session.kept(
        "first turns", shared_needs(cfg), dict, of=(MODEL,)
    )
    if start in kept:
        for _ in together:
            on_reply()
        return kept[start]
    found = first_turns(together, *session.answering(cfg), style_of(cfg), on_reply)
    held = (cache for batch in (*kept.values(), found) for _, cache in batch)
    if sum(map(_nbytes, held)) < KEPT_BYTES:
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
    """Answers on the tokens of the fp16 relays, compared token by token with those under fp16 cards.

    Returns a list by way, by problem (the first `n_forced`) and by turn.
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
    # What was rounded to fp16 stays the same when it is rounded again: both ways of resealing give the same card.
    return OmegaConf.merge(cfg, {"budget_bits": 16.0, "reseal": RESEALS[0]})


def _handoff(
    cfg: DictConfig,
    session: Session,
    loaded: tuple[PreTrainedModel, Any],
    policy: Policy,
    sample: int,
) -> Handoff:
    """The handoff of caches under this policy in the relay of problem number `sample`."""
    donors = None if policy.carries == OWN else _donors(cfg, session, policy.carries, sample)
    how = (replace(policy, carries=OWN), cfg.budget_bits, cfg.reseal, cfg.seed, key_of(cfg))
    return Handoff(*loaded, *how, cfg.backend, donors)


def _donors(cfg: DictConfig, session: Session, carries: str, sample: int) -> list[Tensor]:
    """For each handoff of problem number `sample`, the ids (tokens,) whose cache a control hands on (`Handoff.donors`).

    OTHER_PROBLEM: those of the next problem's fp16 relay; RANDOM_TOKENS: as many as in the problem's own; NOTHING: none
    """
    relays = fp16_relays(cfg, session)
    other = sample + (carries == OTHER_PROBLEM)
    turns = relays[other % len(relays)].turns
    read = [ids_of(turns[:number]) for number in range(1, len(turns))]
    if carries == NOTHING:
        return [ids_T[:0] for ids_T in read]
    if carries == RANDOM_TOKENS:
        generator = torch.Generator().manual_seed(cfg.seed * len(relays) + sample)
        _, tokenizer = session.answering(cfg)
        random_T = torch.randint(len(tokenizer), read[-1].shape, generator=generator)
        return [random_T[: len(ids_T)] for ids_T in read]
    return read
