"""A relay: agents work on a task in turn, each continuing from the card of the previous one.

Each card is serialized and parsed, so that every handoff is verified as it would be between processes. Relays of
several problems are played together, in batches; each still has cards of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from polykv.chat import around_replies, end_of_turn, is_wanted
from polykv.errors import PolyKVError
from polykv.evaluation.continuation import Comparison, compare
from polykv.handoff.card import CacheCard
from polykv.handoff.policy import Policy
from polykv.handoff.replies import replies
from polykv.handoff.signals import Topology
from polykv.handoff.signing import SigningKey
from polykv.handoff.tasks import Task
from polykv.supported import check_length, check_rope
from polykv.tokens import encode, last_places

VERSION = 2  # of the relay protocol
RESEALS = ("append", "requantize")


@dataclass(frozen=True)
class Turn:
    """Token ids that one agent read and wrote."""

    prompt_T: Tensor
    answer_T: Tensor


Answered = tuple[Turn, Cache]  # a turn, and the agent's cache after it
OnReply = Callable[[], None]


@dataclass
class Handoff:
    """A function that hands a cache on to the next agent, by card. It has state, so each relay needs its own.

    Attributes:
        reseal: "requantize" seals the whole cache at each hop; "append" quantizes each token once, at its first hop.
        key: if given, every card is signed and its signature verified.
        donors: a control. For each handoff of the relay, the ids (tokens,) whose cache the receiver gets instead of the
            sender's. Where there are none, there is no card, and the receiver's cache is empty.
        card: the last card, None before the first handoff.
        bits: for each card (bits of its tensors, which the budget limits; bits of its file, header included), both per
            cached value. Empty under a policy of text, and without cards.
    """

    model: PreTrainedModel
    tokenizer: Any
    policy: Policy
    budget_bits: float
    reseal: str
    seed: int = 0
    key: SigningKey | None = None
    backend: str = "auto"
    donors: Sequence[Tensor] | None = None
    card: CacheCard | None = field(default=None, init=False)
    bits: list[tuple[float, float]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.reseal not in RESEALS:
            raise PolyKVError(f"no reseal {self.reseal!r}; there are: {', '.join(RESEALS)}")

    @torch.no_grad()
    def __call__(self, cache: Cache, ids_T: Tensor, topology: Topology) -> DynamicCache:
        """The receiver's cache, from the sender's cache and its token ids (tokens,)."""
        if self.donors is not None:
            ids_T = self.donors[len(self.donors) - topology.hops_left]
            cache = DynamicCache(config=self.model.config)
            if not len(ids_T):
                return cache
            _read(self.model, cache, ids_T, logits_to_keep=last_places(ids_T[None]))
        if self.policy.store == "text":
            cache = DynamicCache(config=self.model.config)
            _read(self.model, cache, ids_T, logits_to_keep=last_places(ids_T[None]))
            return cache
        sealed = (cache, ids_T, self.model, self.tokenizer, self.policy, self.budget_bits, topology)
        if self.card is not None and self.reseal == "append":
            card = self.card.append(*sealed, seed=self.seed)
        else:
            card = CacheCard.seal(*sealed, parent=self.card, seed=self.seed, backend=self.backend)
        content = card.to_bytes(self.key)
        self.bits.append((card.mean_bits, card.mean_bits * len(content) / card.nbytes))
        self.card = CacheCard.from_bytes(
            content, self.model, self.tokenizer, self.key, self.backend
        )
        return self.card.dequantize()


def play(
    tasks: Sequence[Task],
    handoffs: Sequence[Handoff],
    style: str = "plain",
    on_reply: OnReply = lambda: None,
    first: Sequence[Answered] | None = None,
) -> list[list[Turn]]:
    """Play relays of one length in a batch, in which every agent answers greedily; for each task, one Turn per agent.

    Args:
        handoffs: one per task, of the same model.
        style: of the prompts (`prompts_of`).
        on_reply: called after each finished reply.
        first: the first agents' turns, if known (`first_turns`).
    """
    model, tokenizer = handoffs[0].model, handoffs[0].tokenizer
    if first is None:
        first = first_turns(tasks, model, tokenizer, style, on_reply)
    prompts = [prompts_of(task, tokenizer, model.config, style=style) for task in tasks]
    end = end_of_turn(tokenizer) if _is_chat(tasks[0], tokenizer, style) else None
    caches = [cache for _, cache in first]
    played = [[turn] for turn, _ in first]
    n_turns = len(tasks[0].prompts)
    for number in range(1, n_turns):
        ways = zip(handoffs, caches, played, strict=True)
        caches = [
            handoff(cache, ids_of(turns), Topology(len(turns[0].prompt_T), n_turns - number))
            for handoff, cache, turns in ways
        ]
        asked = [
            _after(turns, own[number], end) for turns, own in zip(played, prompts, strict=True)
        ]
        limits = [task.max_new_tokens[number] for task in tasks]
        found = _answered(model, tokenizer, caches, asked, limits, on_reply)
        caches = [cache for _, cache in found]
        for turns, (turn, _) in zip(played, found, strict=True):
            turns.append(turn)
    return played


def first_turns(
    tasks: Sequence[Task],
    model: PreTrainedModel,
    tokenizer: Any,
    style: str = "plain",
    on_reply: OnReply = lambda: None,
) -> list[Answered]:
    """The first agents' turns, which precede all cards; arguments as of `play`."""
    caches = [DynamicCache(config=model.config) for _ in tasks]
    asked = [prompts_of(task, tokenizer, model.config, style=style)[0] for task in tasks]
    limits = [task.max_new_tokens[0] for task in tasks]
    return _answered(model, tokenizer, caches, asked, limits, on_reply)


def _answered(
    model: PreTrainedModel,
    tokenizer: Any,
    caches: Sequence[Cache],
    asked: Sequence[Tensor],
    limits: Sequence[int],
    on_reply: OnReply,
) -> list[Answered]:
    found = replies(model, tokenizer, caches, asked, limits, on_reply)
    return [
        (Turn(prompt_T, answer_T), cache)
        for prompt_T, (answer_T, cache) in zip(asked, found, strict=True)
    ]


def prompts_of(
    task: Task, tokenizer: Any, model_config: Any, name: str = "the relay", style: str = "plain"
) -> list[Tensor]:
    """Token ids (tokens,) of each agent's prompt; the first begins the sequence.

    Args:
        name: what error messages call the relay.
        style: `plain`, or `chat` or `auto` (polykv/chat.py) for the chat template's turns, if the task has messages. A
            turn then begins with the end of the previous reply.

    Raises:
        PolyKVError: prompts and answers may exceed the model's positions, or its rotary frequencies change along them.
    """
    if _is_chat(task, tokenizer, style):
        prompts = [encode(tokenizer, text)[0] for text in around_replies(tokenizer, task.messages)]
    else:
        prompts = [
            encode(tokenizer, prompt, begins=number == 0)[0]
            for number, prompt in enumerate(task.prompts)
        ]
    n_most = sum(map(len, prompts)) + sum(task.max_new_tokens)
    check_length(model_config, n_most, name)
    check_rope(model_config, len(prompts[0]), n_most, name)
    return prompts


def force(
    script: Sequence[Turn],
    handoff: Handoff,
    n_handoffs: int | None = None,
    n_passes: int = 1,
    first: Cache | None = None,
) -> Iterator[Tensor]:
    """Replay a relay on the tokens of `script`; per turn, the answer's log-probabilities (tokens, vocabulary) in fp32.

    A turn is replayed when it is asked for, so that its log-probabilities can be dropped before those of the next.

    Args:
        first: the first agent's cache after its turn (`read_first`), from which the replay continues with the second
            turn; not modified.
        n_handoffs: only this many handoffs, the last ones, take place, as if one agent had taken all turns before
            them; None: all.
        n_passes: each handoff takes place this many times in a row, with no tokens added in between.
    """
    cache: Cache = DynamicCache(config=handoff.model.config)
    if first is not None:
        cache = DynamicCache([(layer.keys, layer.values) for layer in first.layers])
    earliest = 1 if n_handoffs is None else len(script) - n_handoffs
    for number in range(0 if first is None else 1, len(script)):
        for _ in range(n_passes if number >= earliest else 0):
            topology = Topology(len(script[0].prompt_T), len(script) - number)
            cache = handoff(cache, ids_of(script[:number]), topology)
        yield _answer_log_probs(handoff.model, cache, script[number])


def read_first(script: Sequence[Turn], model: PreTrainedModel) -> tuple[Cache, Comparison]:
    """The first agent's cache after its turn, which precedes all cards, and its answer compared with itself."""
    cache = DynamicCache(config=model.config)
    exact_TV = _answer_log_probs(model, cache, script[0])
    return cache, compare(exact_TV, exact_TV, _compared_ids(script[0]))


def divergence(
    script: Sequence[Turn], exact: Iterator[Tensor], others: Sequence[Iterator[Tensor]]
) -> list[list[Comparison]]:
    """For each of `others`, its comparison with `exact` by turn of `script`, the turns that they replay.

    All are replays of one relay (`force`). They advance together, so that of each at most one turn is in memory.
    """
    found: list[list[Comparison]] = [[] for _ in others]
    for turn in script:
        exact_TV = next(exact)
        for own, other in zip(found, others, strict=True):
            own.append(compare(exact_TV, next(other), _compared_ids(turn)))
        del exact_TV  # before the next is computed; zip(script, exact) would hold it
    return found


def _compared_ids(turn: Turn) -> Tensor:
    """The answer's ids after the token that predicts the first, (1, tokens)."""
    return torch.cat([turn.prompt_T[-1:], turn.answer_T])[None]


def text_of(turn: Turn, tokenizer: Any) -> str:
    """The agent's answer as text."""
    return tokenizer.decode(turn.answer_T, skip_special_tokens=True)


def _is_chat(task: Task, tokenizer: Any, style: str) -> bool:
    return bool(task.messages) and is_wanted(style, tokenizer)


def _after(turns: Sequence[Turn], prompt_T: Tensor, end: int | None) -> Tensor:
    """The prompt, without the token `end` of the previous turn (None: no chat format) if the reply has written it."""
    if end is None or turns[-1].answer_T[-1] != end:
        return prompt_T
    return prompt_T[int((prompt_T == end).nonzero()[0]) + 1 :]


def ids_of(turns: Sequence[Turn]) -> Tensor:
    """All tokens of these turns, (tokens,)."""
    return torch.cat([part for turn in turns for part in (turn.prompt_T, turn.answer_T)])


@torch.no_grad()
def _answer_log_probs(model: PreTrainedModel, cache: Cache, turn: Turn) -> Tensor:
    """Log-probabilities (tokens, vocabulary) in fp32 of a turn's answer; `cache` grows by the turn."""
    logits_TV = _read(model, cache, ids_of([turn])).logits[0]
    return logits_TV[len(turn.prompt_T) - 1 : -1].float().log_softmax(-1)


def _read(model: PreTrainedModel, cache: Cache, ids_T: Tensor, **options: Any) -> Any:
    """Read tokens (tokens,) into the cache; the model's output."""
    return model(input_ids=ids_T[None].to(model.device), past_key_values=cache, **options)
