"""A relay: agents work on a task in turn, each continuing from the card of the previous one.

Each card is serialized and parsed, so that every handoff is verified as it would be between processes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from polykv.errors import PolyKVError
from polykv.evaluation.continuation import Comparison, compare
from polykv.greedy import greedy
from polykv.handoff.card import CacheCard
from polykv.handoff.policy import Policy
from polykv.handoff.signals import Topology
from polykv.handoff.signing import SigningKey
from polykv.handoff.tasks import Task
from polykv.supported import check_length, check_rope
from polykv.tokens import encode

VERSION = 1  # of the relay protocol
RESEALS = ("append", "requantize")


@dataclass(frozen=True)
class Turn:
    """Token ids that one agent read and wrote."""

    prompt_T: Tensor
    answer_T: Tensor


@dataclass
class Handoff:
    """The handoff of a cache to the next agent. Stateful, one per relay: `card` is the last card.

    `reseal`: "requantize" seals the whole cache at each hop; "append" quantizes each token once, at its first hop. With
    a `key` every card is signed and its signature verified.
    """

    model: PreTrainedModel
    tokenizer: Any
    policy: Policy
    budget_bits: float
    reseal: str
    seed: int = 0
    key: SigningKey | None = None
    backend: str = "auto"
    card: CacheCard | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.reseal not in RESEALS:
            raise PolyKVError(f"no reseal {self.reseal!r}; there are: {', '.join(RESEALS)}")

    def __call__(self, cache: Cache, ids_T: Tensor, topology: Topology) -> DynamicCache:
        """Hand on a cache with its token ids (tokens,); returns the receiver's cache."""
        if self.policy.store == "text":
            return _read(self.model, DynamicCache(config=self.model.config), ids_T)[0]
        options = (
            cache,
            ids_T,
            self.model,
            self.tokenizer,
            self.policy,
            self.budget_bits,
            topology,
        )
        if self.card is not None and self.reseal == "append":
            card = self.card.append(*options, seed=self.seed)
        else:
            card = CacheCard.seal(*options, parent=self.card, seed=self.seed, backend=self.backend)
        content = card.to_bytes(self.key)
        self.card = CacheCard.from_bytes(
            content, self.model, self.tokenizer, self.key, self.backend
        )
        return self.card.dequantize()


def play(task: Task, handoff: Handoff) -> list[Turn]:
    """Play a relay in which every agent answers greedily; one Turn per agent."""
    prompts = prompts_of(task, handoff.tokenizer, handoff.model.config)
    nothing = torch.empty(0, dtype=torch.long)
    script = [Turn(prompt_T, nothing) for prompt_T in prompts]
    return [turn for turn, _ in _turns(script, task.max_new_tokens, handoff)]


def prompts_of(
    task: Task, tokenizer: Any, model_config: Any, name: str = "the relay"
) -> list[Tensor]:
    """Token ids (tokens,) of each agent's prompt; the first begins the sequence.

    Raises:
        PolyKVError: prompts and answers may exceed the model's positions, or its rotary frequencies change along them.
    """
    prompts = [
        encode(tokenizer, prompt, begins=number == 0)[0]
        for number, prompt in enumerate(task.prompts)
    ]
    n_most = sum(map(len, prompts)) + sum(task.max_new_tokens)
    check_length(model_config, n_most, name)
    check_rope(model_config, len(prompts[0]), n_most, name)
    return prompts


def force(
    script: Sequence[Turn], handoff: Handoff, n_handoffs: int | None = None, n_passes: int = 1
) -> list[Tensor]:
    """Replay a relay with given tokens; per turn, the answer's log-probabilities (tokens, vocabulary) in fp32.

    To measure the cost of depth on the same tokens: `n_handoffs` performs only the last so many handoffs, as if one
    agent had taken all turns before; `n_passes` hands each card on so many times, without adding tokens in between.
    """
    forced = _turns(script, None, handoff, n_handoffs, n_passes)
    return [log_probs for _, log_probs in forced]


def divergence(
    script: Sequence[Turn], exact: Sequence[Tensor], other: Sequence[Tensor]
) -> list[Comparison]:
    """Per turn, the comparison of two forced relays over one script; turn h comes after h hops."""
    return [
        compare(p, q, torch.cat([turn.prompt_T[-1:], turn.answer_T])[None])
        for turn, p, q in zip(script, exact, other, strict=True)
    ]


def text_of(turn: Turn, tokenizer: Any) -> str:
    """The agent's answer as text."""
    return tokenizer.decode(turn.answer_T, skip_special_tokens=True)


@torch.no_grad()
def _turns(
    script: Sequence[Turn],
    limits: Sequence[int] | None,
    handoff: Handoff,
    n_handoffs: int | None = None,
    n_passes: int = 1,
) -> Iterator[tuple[Turn, Tensor]]:
    """Play a script (`limits`: maximum new tokens per turn) or force it (None), with a handoff between turns."""
    model = handoff.model
    cache: Cache = DynamicCache(config=model.config)
    ids_T = torch.empty(0, dtype=torch.long)
    n_shared = len(script[0].prompt_T)
    first = 1 if n_handoffs is None else len(script) - n_handoffs
    for number, turn in enumerate(script):
        for _ in range(n_passes if number >= first else 0):
            cache = handoff(cache, ids_T, Topology(n_shared, len(script) - number))
        if limits is None:
            cache, logits_TV = _read(model, cache, torch.cat([turn.prompt_T, turn.answer_T]))
            log_probs = logits_TV[len(turn.prompt_T) - 1 : -1].float().log_softmax(-1)
        else:
            turn = Turn(turn.prompt_T, _answer(handoff, cache, turn.prompt_T, limits[number]))
            log_probs = torch.empty(0)
        ids_T = torch.cat([ids_T, turn.prompt_T, turn.answer_T])
        yield turn, log_probs


def _read(model: PreTrainedModel, cache: Cache, ids_T: Tensor) -> tuple[Cache, Tensor]:
    """Read tokens; returns (the grown cache, logits (tokens, vocabulary))."""
    return cache, model(input_ids=ids_T[None].to(model.device), past_key_values=cache).logits[0]


def _answer(handoff: Handoff, cache: Cache, prompt_T: Tensor, limit: int) -> Tensor:
    """The agent's greedy answer; afterwards the cache includes its last token too."""
    (written_T,) = greedy(handoff.model, cache, [prompt_T], limit, handoff.tokenizer)
    _read(handoff.model, cache, written_T[-1:])
    return written_T
