"""Relays of a cell (polykv/handoff/relay.py): played for their answers, and replayed for their divergence.

They are played in batches, in `model.answer_dtype` if set. They are replayed one by one, on the tokens of the fp16
relay, in `model.dtype`, since bfloat16 alone moves KL by as much as a card.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import Cache, PreTrainedModel

from experiments import settings
from experiments.relay_arrays import (
    Played,
    Replays,
    of_played,
    of_replays,
    to_played,
    to_replays,
)
from experiments.session import MODEL, Session
from polykv import versions
from polykv.evaluation import gsm8k
from polykv.evaluation.continuation import Comparison
from polykv.evaluation.process import return_freed_memory
from polykv.handoff import allocate, mixed, relay, signals, tasks
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
    read_first,
)
from polykv.handoff.signing import SigningKey
from polykv.handoff.tasks import Task, load_tasks
from polykv.parts import Arrays, Parts
from polykv.progress import phase

# Settings that the fp16 relays depend on; cells that agree in them share the relays.
SHARED = (
    "model", "device", "relay", "n_problems", "n_hops", "batch", "seed", "backend", "signed",
)  # fmt: skip
FP16 = Policy("fp16", store="float16")  # the reference of all policies, independent of conf/policy
FP16_RELAYS = "fp16 relays"
# Of the first agents' caches that are kept, of those played and of those read; every cell makes the others again.
KEPT_BYTES = 2 << 30
CARDS = (mixed, allocate, signals)
MADE_BY = (*CARDS, tasks, relay, gsm8k)  # the modules on whose VERSION the relays depend
Way = tuple[int | None, int]  # `n_handoffs` and `n_passes` of relay.force
ALL: Way = (None, 1)  # every handoff of the relay takes place, once
PROBLEMS = "problems"  # what progress counts


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


def played(
    cfg: DictConfig, session: Session, policy: Policy, name: str, parts: Parts
) -> list[Played]:
    """The relays of all problems under a policy, in batches of `batch`, each one of the `parts`.

    Progress is shown as `name`.
    """
    found: list[Played] = []
    for start in range(0, cfg.n_problems, cfg.batch):
        make = partial(_batch, cfg, session, policy, name, start)
        found += to_played(parts.kept(f"played-{start}", make), cfg.n_hops + 1)
    return found


def _batch(cfg: DictConfig, session: Session, policy: Policy, name: str, start: int) -> Arrays:
    """The relays of the batch that begins with problem number `start`."""
    problems, loaded = tasks_of(cfg), session.answering(cfg)
    n_turns = cfg.n_hops + 1
    done = count(start * n_turns + 1)

    def on_reply() -> None:
        phase(name, next(done) / n_turns, len(problems), PROBLEMS)

    phase(name, start, len(problems), PROBLEMS)
    together = problems[start : start + cfg.batch]
    handoffs = [_handoff(cfg, session, loaded, policy, start + n) for n in range(len(together))]
    first = _first(cfg, session, start, together, on_reply)
    turns = play(together, handoffs, style_of(cfg), on_reply, first)
    return of_played(
        [Played(own, handoff.bits) for own, handoff in zip(turns, handoffs, strict=True)]
    )


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
    """The relays under fp16 cards, saved for all cells that agree in SHARED."""
    needs = shared_needs(cfg)
    given = needs | {"weights": cfg.weights}
    parts = session.parts.shared(
        "fp16_relays", {"settings": given, "versions": versions.of(given, MADE_BY)}
    )
    make = partial(played, _under_fp16(cfg), session, FP16, FP16_RELAYS, parts)
    return session.kept(FP16_RELAYS, needs, make, of=(MODEL,))


def forced(
    cfg: DictConfig,
    session: Session,
    policy: Policy,
    ways: Sequence[Way] = (ALL,),
    part: str = "forced",
) -> list[Replays]:
    """Answers on the tokens of the fp16 relays, compared token by token with those under fp16 cards, by problem.

    They are the first `n_forced` problems. Each is a part of the cell; `part` begins its name.
    """
    fp16_relays(cfg, session)  # not counted in the time of the first replay
    found = []
    for sample in range(cfg.n_forced):
        make = partial(_replayed, cfg, session, policy, ways, sample)
        arrays = session.parts.kept(f"{part}-{sample}", make)
        found.append(to_replays(arrays, len(ways), cfg.n_hops + 1))
    return found


def _replayed(
    cfg: DictConfig, session: Session, policy: Policy, ways: Sequence[Way], sample: int
) -> Arrays:
    """The replays of problem number `sample`, compared with that under fp16 cards."""
    relays, loaded = fp16_relays(cfg, session)[: cfg.n_forced], session.model(cfg)
    phase(f"replaying under {policy.name}", sample, len(relays), PROBLEMS)
    script = relays[sample].turns
    first, itself = _first_read(cfg, session, script, sample)
    exact = force(script, _handoff(_under_fp16(cfg), session, loaded, FP16, sample), first=first)
    handoffs = [_handoff(cfg, session, loaded, policy, sample) for _ in ways]
    others = [
        force(script, handoff, *way, first=first)
        for handoff, way in zip(handoffs, ways, strict=True)
    ]
    compared = divergence(script[1:], exact, others)
    return_freed_memory()
    return of_replays(Replays([[itself, *turns] for turns in compared], handoffs[0].bits))


def _first_read(
    cfg: DictConfig, session: Session, script: Sequence[Turn], sample: int
) -> tuple[Cache, Comparison]:
    """The first agent's turn of problem number `sample` (`read_first`), kept for other cells up to KEPT_BYTES."""
    kept: dict[int, tuple[Cache, Comparison]] = session.kept(
        "first turns, read", shared_needs(cfg), dict, of=(MODEL, FP16_RELAYS)
    )
    if sample in kept:
        return kept[sample]
    model, _ = session.model(cfg)
    found = read_first(script, model)
    if sum(_nbytes(cache) for cache, _ in (*kept.values(), found)) < KEPT_BYTES:
        kept[sample] = found
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
