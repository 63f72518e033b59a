"""Relays of a cell: played in batches, and replayed with the tokens of the fp16 relay.

Relays are played in `model.answer_dtype`, if set, and replayed in `model.dtype`, since bfloat16 alone moves KL by as
much as a card.
"""

from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from experiments import settings
from experiments.session import MODEL, Session
from polykv.evaluation.continuation import Comparison
from polykv.handoff.policy import Policy
from polykv.handoff.relay import RESEALS, Handoff, Turn, divergence, force, play
from polykv.handoff.signing import SigningKey
from polykv.handoff.tasks import Task, load_tasks
from polykv.progress import phase, track

# Settings that the fp16 relays depend on; cells that agree in them share the relays.
SHARED = (
    "model", "device", "relay", "n_problems", "n_hops", "batch", "seed", "backend", "signed",
)  # fmt: skip
FP16 = Policy("fp16", store="float16")  # the reference of all policies, independent of conf/policy
FP16_RELAYS = "fp16 relays"
KEPT_BYTES = 1 << 30  # of the fp16 relays' log-probabilities; the others are computed by each cell
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
    for first in range(0, len(tasks), cfg.batch):
        together = tasks[first : first + cfg.batch]
        handoffs = [_handoff(cfg, loaded, policy) for _ in together]
        turns = play(together, handoffs, style_of(cfg), heard)
        found += [Played(own, way.bits) for own, way in zip(turns, handoffs, strict=True)]
    return found


def fp16_relays(cfg: DictConfig, session: Session) -> list[Played]:
    """The relays under fp16 cards."""
    make = partial(played, _under_fp16(cfg), session, FP16, FP16_RELAYS)
    return session.kept(FP16_RELAYS, shared_needs(cfg), make, of=(MODEL,))


def forced(
    cfg: DictConfig,
    session: Session,
    policy: Policy,
    n_handoffs: int | None = None,
    n_passes: int = 1,
) -> list[list[Comparison]]:
    """For each of the first `n_forced` problems and each turn, the answer under the policy against the fp16 relay.

    Token by token, on the tokens of the fp16 relay; `n_handoffs` and `n_passes` as in relay.force.
    """
    relays = fp16_relays(cfg, session)[: cfg.n_forced]
    found = []
    for sample, relay in enumerate(track(relays, f"replaying under {policy.name}", PROBLEMS)):
        exact = _exact(cfg, session, sample, relay.turns)
        handoff = _handoff(cfg, session.model(cfg), policy)
        other = force(relay.turns, handoff, n_handoffs, n_passes)
        found.append(divergence(relay.turns, exact, other))
    return found


def _exact(cfg: DictConfig, session: Session, sample: int, script: list[Turn]) -> list[Tensor]:
    """The fp16 relay's log-probabilities of a problem, kept for other cells up to KEPT_BYTES."""
    what = "fp16 log-probabilities"
    kept: dict[int, list[Tensor]] = session.kept(what, shared_needs(cfg), dict, of=(FP16_RELAYS,))
    if sample in kept:
        return kept[sample]
    exact = force(script, _handoff(_under_fp16(cfg), session.model(cfg), FP16))
    if sum(x.nbytes for turns in (*kept.values(), exact) for x in turns) < KEPT_BYTES:
        kept[sample] = exact
    return exact


def _under_fp16(cfg: DictConfig) -> DictConfig:
    # Under fp16 both ways of resealing are the same.
    return OmegaConf.merge(cfg, {"budget_bits": 16.0, "reseal": RESEALS[0]})


def _handoff(cfg: DictConfig, loaded: tuple[PreTrainedModel, Any], policy: Policy) -> Handoff:
    """How caches are handed on in one relay under this policy."""
    how = (policy, cfg.budget_bits, cfg.reseal, cfg.seed, key_of(cfg), cfg.backend)
    return Handoff(*loaded, *how)
