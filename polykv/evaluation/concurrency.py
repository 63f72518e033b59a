"""N agents that decode after one shared prefix: their caches, the decode loop, and the time of a step.

Read modes `unshared` and `dequantize` give every agent a full-precision copy of the prefix in a DynamicCache, read with
sdpa. `in_place` attends to the compressed pool.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from polykv.attention.cache import CascadeCache
from polykv.attention.cascade import attend_in_place
from polykv.codecs.context import LayerContext
from polykv.evaluation.process import in_fresh_process, keep_freed_memory
from polykv.evaluation.ttft import Clock
from polykv.geometry import Geometry
from polykv.models import ModelSource
from polykv.pool import READERS as POOL_READERS
from polykv.pool import Kept, SharedKVPool, prefill
from polykv.recipe import Recipe
from polykv.recurrent import STATES, State, layer_bytes
from polykv.tokens import last_places
from polykv.unshared import unshared_cache

VERSION = 1  # of how steps are timed
READERS = ("unshared", *POOL_READERS)
QUERY_TOKENS = 8  # per agent, padding included
WARMUP = 2  # steps of each round that are not counted
# Parameters x tokens. Larger prefills take minutes on a CPU, and neither bytes nor times depend on the content.
PREFILL_LIMIT = 1e11

Layers = Sequence[Kept]


@dataclass(frozen=True)
class Steps:
    """Decode steps in one read mode: the time of each, bytes stored of the prefix, and CPU threads."""

    milliseconds: list[float]
    kept_bytes: int
    n_threads: int


def step_times(
    source: ModelSource, recipe: Recipe, readers: Sequence[str], **options: Any
) -> dict[str, Steps]:
    """Decode steps of each read mode, timed in a process of their own; `options` are those of `_step_times`.

    Raises:
        PolyKVError: the measurement failed.
    """
    return in_fresh_process(_step_times, source, recipe, tuple(readers), **options)


@torch.no_grad()
def _step_times(
    source: ModelSource,
    recipe: Recipe,
    readers: Sequence[str],
    n_tokens: int,
    n_agents: int,
    n_steps: int,
    repeats: int,
    device: str,
    backend: str,
) -> dict[str, Steps]:
    """Time `n_steps` steps of every read mode in each of `repeats` rounds, from new caches and after a warm-up.

    The read modes take turns, so that a temporary load on the machine affects all of them. `backend` encodes the pool
    and attends to it.
    """
    keep_freed_memory()
    model, _ = source.load(device)
    layers, contexts = prefix_layers(source, model, n_tokens)
    windows = Geometry.of(model.config).windows
    pool = pool_of(readers, layers, recipe, backend, contexts, windows, n_tokens)
    times: dict[str, list[float]] = {reader: [] for reader in readers}
    kept = {}
    for reader in list(readers) * repeats:
        caches = caches_of(reader, layers, pool, n_agents, True, windows, n_tokens)
        kept[reader] = kept_bytes(None if reader == "unshared" else pool, caches)
        times[reader] += _times(model, caches, n_tokens, n_agents, n_steps)
        del caches  # before the next ones are allocated
    threads = torch.get_num_threads()
    return {reader: Steps(times[reader], kept[reader], threads) for reader in readers}


def _times(
    model: PreTrainedModel, caches: list[Cache], n_tokens: int, n_agents: int, n_steps: int
) -> list[float]:
    steps = decode(model, caches, n_tokens, n_agents, WARMUP + n_steps)
    next(steps)
    clock, times = Clock(model.device), []
    for _ in steps:
        clock.lap("step")
        times.append(clock.laps["step"])
    return times[WARMUP:]


def prefix_layers(
    source: ModelSource, model: PreTrainedModel, n_tokens: int
) -> tuple[Layers, Sequence[LayerContext | None]]:
    """Keys and values of each layer, each (1, kv_heads, tokens, head_dim), or its state, and what codecs may know of it
    (nothing if synthetic): see `is_prefilled`. Layers with a sliding window have the last tokens only.
    """
    if not is_prefilled(source, n_tokens):
        geometry = Geometry.of(model.config)
        return list(synthetic_layers(geometry, n_tokens, model.dtype, model.device)), ()
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.config.vocab_size, (1, n_tokens), generator=generator)
    cache = prefill(model, ids_BT)
    layers: Layers = [
        State.of(layer) if type(layer) in STATES else (layer.keys, layer.values)
        for layer in cache.layers
    ]
    return layers, cache.contexts


def is_prefilled(source: ModelSource, n_tokens: int) -> bool:
    """Whether the prefix is random tokens, really prefilled; otherwise its keys and values are Gaussian."""
    return source.n_parameters() * n_tokens <= PREFILL_LIMIT


def synthetic_layers(
    geometry: Geometry, n_tokens: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Kept]:
    """Gaussian keys and values of each layer, each (1, kv_heads, tokens, head_dim), or a state, generated lazily.

    Layers with a sliding window have the last tokens only.
    """
    generator = torch.Generator(device).manual_seed(0)

    def gaussian(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    for layer in geometry.layers:
        if layer.state is not None:
            yield State(
                {one.key: gaussian(one.shape).to(one.dtype or dtype) for one in layer.state}
            )
            continue
        shape = (1, layer.n_kv_heads, layer.kept(n_tokens), layer.head_dim)
        yield gaussian(shape).to(dtype), gaussian(shape).to(dtype)


def pool_of(
    readers: Sequence[str],
    layers: Layers,
    recipe: Recipe,
    backend: str,
    contexts: Sequence[LayerContext | None] = (),
    windows: Sequence[int | None] = (),
    n_tokens: int | None = None,
) -> SharedKVPool | None:
    """The pool that these read modes share, or None where all caches are unshared.

    `windows`, `n_tokens`: as in `SharedKVPool.from_layers`.
    """
    if set(readers) == {"unshared"}:
        return None
    about = (contexts, windows, n_tokens)
    return SharedKVPool.from_layers(layers, recipe, len(layers), backend, *about)


def caches_of(
    reader: str,
    layers: Layers,
    pool: SharedKVPool | None,
    n_agents: int,
    together: bool,
    windows: Sequence[int | None] = (),
    n_tokens: int | None = None,
) -> list[Cache]:
    """The caches of all agents: one for all if they decode `together` in a batch, else one for each.

    Agents of `in_place` are always in one batch. Caches of the other modes share no memory with each other or with
    `layers`. `windows` and `n_tokens` are those of `layers`, as in `SharedKVPool.from_layers`.
    """
    if reader == "in_place":
        return [pool.reader(n_agents)]
    batch = n_agents if together else 1

    if pool is not None:
        pool.recipe.check_exact_suffix(f"reader={reader}")
        windows, n_tokens = pool.windows, pool.n_tokens

    def copies() -> DynamicCache:
        rows = (
            kept.layer(batch, copied=True)
            if isinstance(kept, State)
            else tuple(x.repeat_interleave(batch, 0) for x in kept)
            for kept in (layers if reader == "unshared" else pool.kept())
        )
        return unshared_cache(rows, windows, n_tokens)

    return [copies() for _ in range(n_agents // batch)]


def kept_bytes(pool: SharedKVPool | None, caches: Sequence[Cache]) -> int:
    """Bytes of the pool's tensors and of the agents' caches (none at first with `in_place`)."""
    own = sum(layer_bytes(layer) for cache in caches for layer in cache.layers)
    return (pool.stored_bytes if pool else 0) + own


def decode(
    model: PreTrainedModel, caches: Sequence[Cache], n_tokens: int, n_agents: int, n_steps: int
) -> Iterator[None]:
    """Feed every agent a query of its own, then its greedy tokens; yields after the queries and after each step.

    `n_tokens` is the length of the prefix. Several caches take turns. Queries have 1 to 7 tokens, padded to 8, so that
    agents differ and there is a mask: without one, transformers uses `enable_gqa`, several times slower on a CPU.
    """
    in_place = isinstance(caches[0], CascadeCache)
    generator = torch.Generator().manual_seed(0)
    ids_NQ = torch.randint(model.config.vocab_size, (n_agents, QUERY_TOKENS), generator=generator)
    mask_NT = torch.ones(n_agents, n_tokens + QUERY_TOKENS, dtype=torch.long)
    # In place there is always a mask, and states refuse padding there.
    for agent in range(0 if in_place and Geometry.of(model.config).stateful else n_agents):
        n_padding = QUERY_TOKENS - 1 - agent % (QUERY_TOKENS - 1)
        mask_NT[agent, n_tokens : n_tokens + n_padding] = 0
    inputs = list(
        zip(*(x.to(model.device).chunk(len(caches)) for x in (ids_NQ, mask_NT)), strict=True)
    )
    with attend_in_place(model) if in_place else nullcontext():
        for _ in range(1 + n_steps):
            for turn, (cache, (ids, mask)) in enumerate(zip(caches, inputs, strict=True)):
                inputs[turn] = _greedy(model, cache, ids, mask), F.pad(mask, (0, 1), value=1)
            yield


def _greedy(model: PreTrainedModel, cache: Cache, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The next token of each agent, (agents, 1). Its logits are freed before the next forward pass."""
    out = model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        past_key_values=cache,
        logits_to_keep=last_places(ids_BT),
    )
    return out.logits[:, -1].argmax(-1, keepdim=True)
