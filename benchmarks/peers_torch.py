"""The sides of peers.py that run in torch: transformers' caches, and recipes read in place.

python benchmarks/peers_torch.py FOLDER ...     (peers.py starts it and asks for rounds, in turn with llama.cpp's side)

Writes `prompt.npy` and `queries.npy` into FOLDER: random tokens, the queries those that `concurrency.decode` feeds. A
request is "SIDE AGENTS", such as "unshared 15".
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from step_parts import CACHE, OTHER, PREFIX, SUFFIX, UNSHARED, Parts, watched
from timing import answer_requests
from transformers import Cache, QuantizedCache

import polykv
from polykv.attention.cache import CascadeCache
from polykv.evaluation.concurrency import QUERY_TOKENS, WARMUP, caches_of, decode, pool_of
from polykv.evaluation.process import keep_freed_memory
from polykv.pool import SharedKVPool
from polykv.prefill import prefill
from polykv.recurrent import layer_bytes
from polykv.unshared import unshared_cache

EXPANDED = "expanded"
# QuantizedCache's backends, and what each is given; hqq refuses the default axes.
QUANTIZED: dict[str, dict[str, int]] = {
    "hqq": {"nbits": 4, "axis_key": 1, "axis_value": 1},
    "quanto": {"nbits": 4},
    "fp8": {},
}
ATTENTION = (PREFIX, SUFFIX, OTHER)
OWN = ("keys", "values", "_quantized_keys", "_quantized_values")  # what transformers' layers keep
PARTS_STEPS = 4  # further steps of a round: to time parts takes time itself
ROUND_SECONDS = 4.0  # a round whose steps took longer has no more of them,
FEWEST = 2  # but so many


class Sides:
    """A model, its prefilled prompt, and what the sides keep of it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.given, self._parts = arguments, Parts()
        self.model = polykv.load_model(str(arguments.model), "cpu", arguments.dtype)[0]
        prompt_BT = self._random(1, arguments.tokens)
        np.save(arguments.folder / "prompt.npy", prompt_BT[0].numpy())
        queries_NQ = self._random(max(arguments.agents), QUERY_TOKENS)
        np.save(arguments.folder / "queries.npy", queries_NQ.numpy())
        start = time.perf_counter()
        prefilled = prefill(self.model, prompt_BT)
        self._prefill_seconds = time.perf_counter() - start
        self._layers = [(layer.keys, layer.values) for layer in prefilled.layers]
        self._contexts = prefilled.contexts
        self._pool = cache(self._new_pool)

    def _random(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.model.config.vocab_size, shape, generator=generator)

    def _new_pool(self, recipe: str) -> tuple[SharedKVPool, float]:
        """The compressed prompt, and the seconds that compressing it took."""
        start = time.perf_counter()
        about = (polykv.load_recipe(recipe), "cpu", self._contexts)
        return pool_of(["in_place"], self._layers, *about), time.perf_counter() - start

    @torch.no_grad()
    def round(self, side: str, n_agents: int) -> dict[str, Any]:
        """Seconds of steps and of their parts; bytes of the caches after them; seconds until the caches were there."""
        given = self.given
        agents, n_bytes, seconds = self._cache(side, n_agents)
        n_steps = WARMUP + given.steps + PARTS_STEPS
        stepping = decode(self.model, [agents], given.tokens, n_agents, n_steps)
        for _ in range(1 + WARMUP):
            next(stepping)
        steps: list[float] = []
        while len(steps) < given.steps and (len(steps) < FEWEST or sum(steps) < ROUND_SECONDS):
            start = time.perf_counter()
            next(stepping)
            steps.append(time.perf_counter() - start)
        parts = self._parts_of(stepping, min(PARTS_STEPS, len(steps)))
        if isinstance(agents, CascadeCache):
            n_bytes += sum(map(layer_bytes, agents.layers))
        else:
            n_bytes += bytes_of([getattr(one, name, None) for one in agents.layers for name in OWN])
        return {
            "steps": steps,
            "attends": [sum(step.get(part, 0.0) for part in ATTENTION) for step in parts],
            "update": [step.get(CACHE, 0.0) for step in parts],
            "bytes": n_bytes,
            "prefill": self._prefill_seconds + seconds,
        }

    def _parts_of(self, stepping: Iterator[None], n_steps: int) -> list[dict[str, float]]:
        found = []
        with watched(self.model, self._parts):
            for _ in range(n_steps):
                self._parts.start()
                next(stepping)
                found.append(self._parts.stop())
        return found

    def _cache(self, side: str, n_agents: int) -> tuple[Cache, int, float]:
        """The agents' cache, bytes of the pool that it refers to, and seconds that compressing the prompt took."""
        layers = self._layers
        if side not in (UNSHARED, EXPANDED, *QUANTIZED):
            pool, seconds = self._pool(side)
            (agents,) = caches_of("in_place", layers, pool, n_agents, True)
            return agents, pool.stored_bytes, seconds
        self._check_memory(n_agents)
        if side == UNSHARED:
            return caches_of(side, layers, None, n_agents, True)[0], 0, 0.0
        rows = [tuple(x.expand(n_agents, -1, -1, -1) for x in layer) for layer in layers]
        if side == EXPANDED:
            return unshared_cache(rows), 0, 0.0
        start = time.perf_counter()
        quantized = QuantizedCache(side, self.model.config, **QUANTIZED[side])
        for number, layer in enumerate(rows):
            quantized.update(*layer, number)
        return quantized, 0, time.perf_counter() - start

    def _check_memory(self, n_agents: int) -> None:
        """Raises MemoryError where copies for all agents have no room; an update has two copies of one layer."""
        sizes = [k.nbytes + v.nbytes for k, v in self._layers]
        needed = n_agents * (sum(sizes) + max(sizes))
        free = psutil.virtual_memory().available
        if needed > free:
            raise MemoryError(f"caches of {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free")


def bytes_of(kept: Any) -> int:
    """Bytes of all tensors in nested containers; of a tensor that is made of others, of these."""
    if isinstance(kept, dict):
        return bytes_of(list(kept.values()))
    if isinstance(kept, list | tuple):
        return sum(bytes_of(one) for one in kept)
    if hasattr(kept, "__tensor_flatten__"):
        return bytes_of([getattr(kept, name) for name in kept.__tensor_flatten__()[0]])
    return kept.nbytes if isinstance(kept, torch.Tensor) else 0


def start(arguments: argparse.Namespace) -> tuple[str, dict[str, Callable[[], object]]]:
    """No note, and what each request does."""
    keep_freed_memory()
    sides = Sides(arguments)
    return "", {
        f"{side} {n}": partial(sides.round, side, n)
        for side in arguments.sides
        for n in arguments.agents
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sides", nargs="+", required=True)
    parser.add_argument("--agents", nargs="+", type=int, required=True)
    for name in ("tokens", "threads", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    answer_requests(partial(start, arguments))


if __name__ == "__main__":
    main()
