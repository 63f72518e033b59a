"""N agents that decode together after one prefix, on a GPU: memory, time, and how many of them fit.

    python benchmarks/gpu/concurrency.py            one GPU; goes on where it was stopped (an H200: 3 x 10 minutes)
    python benchmarks/gpu/concurrency.py --models llama-3-8b --prefixes 5035      a part of it
    python benchmarks/gpu/concurrency.py --tiny     the same path on a CPU, tiny shapes

Exact architectures with random weights; the prefix's keys and values are Gaussian, for neither bytes nor time
depend on what they say. Readers: `unshared` and `dequantize` as transformers runs them (a DynamicCache of 16-bit
copies, sdpa), `in_place` on the compressed copy. All agents are one batch and their queries one length: then sdpa
needs no mask and shares kv heads without copying them, which is its faster way on a GPU. Memory is
max_memory_allocated while all agents decode, above the weights.
"""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
from common import Bench, add_times, parser
from transformers import Cache, PreTrainedModel

from analysis import published
from polykv import config, kernels, models
from polykv.attention.cache import CascadeCache
from polykv.attention.cascade import attend_in_place
from polykv.errors import PolyKVError
from polykv.evaluation.concurrency import (
    QUERY_TOKENS,
    READERS,
    caches_of,
    kept_bytes,
    synthetic_layers,
)
from polykv.evaluation.memory import GB, paper_bytes
from polykv.evaluation.process import meter_of
from polykv.evaluation.ttft import Clock
from polykv.geometry import Geometry
from polykv.pool import SharedKVPool
from polykv.recipe import load_recipe
from polykv.results import Rows

EXPERIMENT = "concurrency"
MODELS = ("llama-3-8b", "smollm2-1.7b")
PREFIXES = (1285, 5035, 8192, 32768)
AGENTS = (1, 3, 5, 10, 15, 30)
STEPS, WARMUP = 25, 4
MOST_AGENTS = 256  # no more are tried
CLOSE = 0.02  # how exactly the largest number is sought
TINY = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000,
}  # fmt: skip


class Decoding:
    """A model with which N agents decode; caches are freed after each measurement."""

    def __init__(self, bench: Bench, name: str) -> None:
        cfg = config.load_group("model", name)
        cfg.weights = "random"
        if bench.tiny:
            cfg.geometry.update(TINY)
        self.device, self.name, self.recipe = bench.device, name, load_recipe("polykv")
        self.model: PreTrainedModel = models.load_weights(cfg, str(bench.device))[0]
        self.geometry = Geometry.of(self.model.config)
        self.backend = kernels.pick_backend("torch" if bench.tiny else "auto", bench.device)
        # What the first steps leave behind, compiled kernels and workspaces, is not KV memory.
        for reader in READERS:
            self.run(reader, 64, 1, 2)
        self.meter = meter_of(bench.device)

    def run(self, reader: str, n_tokens: int, n_agents: int, n_steps: int) -> list[float]:
        """Milliseconds of each step after the agents' queries."""
        pool, caches = self._caches(reader, n_tokens, n_agents)
        times = self._steps(caches, n_agents, n_steps)
        del pool  # kept while agents that were made from it decode
        return times

    def measured(self, reader: str, n_tokens: int, n_agents: int) -> tuple[list[float], int, int]:
        """Milliseconds of each step, peak bytes above the weights, bytes kept of the prefix."""
        self.meter.start()
        pool, caches = self._caches(reader, n_tokens, n_agents)
        kept = kept_bytes(pool, caches)
        self.meter.reset_peak()
        times = self._steps(caches, n_agents, WARMUP + STEPS)
        return times[WARMUP:], self.meter.peak(), kept

    def _caches(
        self, reader: str, n_tokens: int, n_agents: int
    ) -> tuple[SharedKVPool | None, list[Cache]]:
        layers = synthetic_layers(self.geometry, n_tokens, self.model.dtype, self.device)
        pool = None
        if reader != "unshared":
            n_layers = self.geometry.n_layers
            pool = SharedKVPool.from_layers(layers, self.recipe, n_layers, backend=self.backend)
        return pool, caches_of(reader, layers, pool, n_agents, together=True)

    @torch.no_grad()
    def _steps(self, caches: list[Cache], n_agents: int, n_steps: int) -> list[float]:
        """One cache for all; every agent is given its query, then its own greedy tokens."""
        (cache,), generator = caches, torch.Generator().manual_seed(0)
        shape = (n_agents, QUERY_TOKENS)
        ids_NQ = torch.randint(self.model.config.vocab_size, shape, generator=generator)
        ids_NQ, times = ids_NQ.to(self.device), []
        with attend_in_place(self.model) if isinstance(cache, CascadeCache) else nullcontext():
            for step in range(1 + n_steps):
                clock = Clock(self.device)
                logits = self.model(ids_NQ, past_key_values=cache, logits_to_keep=1).logits
                ids_NQ = logits[:, -1].argmax(-1, keepdim=True)
                if step > 0:
                    times.append(clock.total())
        return times


def attempt(work: Callable[[], Any]) -> Any:
    """What `work` gives, or why it cannot: out of memory, or refused. Then its memory is free again."""
    reason = None
    try:
        return work()
    except torch.OutOfMemoryError as error:
        reason = f"out of memory: {str(error).splitlines()[0]}"
    except PolyKVError as error:
        reason = str(error)
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return reason


def measure(decoding: Decoding, n_tokens: int, n_agents: int, rows: Rows) -> None:
    """Memory and time of every reader; one that does not fit has its reason in its rows."""
    for reader in READERS:
        columns = {
            "reader": reader,
            "backend": decoding.backend if reader == "in_place" else "torch",
        }
        ratio = (
            None if reader == "unshared" else decoding.recipe.nominal_ratio(decoding.model.dtype)
        )
        if (
            reader != "dequantize"
        ):  # the publication has no other reader of its pool, and counts none
            arithmetic = paper_bytes(decoding.geometry, n_tokens, n_agents, ratio) / GB
            rows.add("kv_memory", arithmetic, "GB", accounting="paper", **columns)
        found = attempt(partial(decoding.measured, reader, n_tokens, n_agents))
        if isinstance(found, str):
            rows.add("kv_memory", None, "GB", why=found, accounting="resident", **columns)
            rows.add("step_time", None, "ms", why=found, **columns)
            continue
        times, peak, kept = found
        rows.add("kv_memory", peak / GB, "GB", accounting="resident", **columns)
        rows.add("kv_memory", kept / GB, "GB", accounting="stored", **columns)
        add_times(rows, "step_time", times, timed="step", **columns)


def largest(decoding: Decoding, n_tokens: int, most: int, rows: Rows) -> None:
    """The largest number of agents that can decode together, by trying; no more than `most`."""
    for reader in READERS:
        columns = {
            "reader": reader,
            "backend": decoding.backend if reader == "in_place" else "torch",
        }
        fits, tried = 0, most + 1  # the most that do, the fewest that do not
        while tried - fits > max(1, CLOSE * fits):
            n_agents = most if tried > most else (fits + tried) // 2
            if isinstance(attempt(partial(decoding.run, reader, n_tokens, n_agents, 2)), str):
                tried = n_agents
            else:
                fits = n_agents
            if fits == most:
                break
        note = "no more were tried" if fits == most else f"{tried} do not fit"
        rows.add("most_agents", fits, "agents", note=note, **columns)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    options.add_argument("--prefixes", nargs="+", type=int)
    options.add_argument("--agents", nargs="+", type=int)
    arguments = options.parse_args()
    bench = Bench(arguments)
    prefixes = arguments.prefixes or ((40,) if bench.tiny else PREFIXES)
    agents = arguments.agents or ((1, 3) if bench.tiny else AGENTS)
    for name in arguments.models:
        decoding = Decoding(bench, name)
        shared = {
            "model": name,
            "weights": "random",
            "synthetic": True,
            "recipe": "polykv",
        }
        shared |= {"dtype": "bfloat16"}
        identity = {"model": name, "steps": STEPS, "backend": decoding.backend}
        for n_tokens, n_agents in product(prefixes, agents):
            about = {"context_tokens": n_tokens, "n_agents": n_agents, "n_tokens": n_tokens}
            work = partial(measure, decoding, n_tokens, n_agents)
            bench.cell(EXPERIMENT, identity | about, work, **shared, **about)
        most = 4 if bench.tiny else MOST_AGENTS
        for n_tokens in prefixes:
            about = {"context_tokens": n_tokens, "most": most}
            work = partial(largest, decoding, n_tokens, most)
            bench.cell("gpu_largest", identity | about, work, **shared, context_tokens=n_tokens)
        del decoding
        attempt(lambda: None)  # its memory is free again
    report(bench)


def report(bench: Bench) -> None:
    found = bench.rows(EXPERIMENT, "gpu_largest")
    keys = ["model", "context_tokens", "n_agents", "reader"]
    memory = found[found["metric"] == "kv_memory"].pivot_table(
        index=keys, columns="accounting", values="value"
    )
    step = found[found["metric"] == "step_time"].groupby(keys)["value"].median().rename("step_time")
    table = memory.join(step, how="outer")
    agents = table.index.get_level_values("n_agents").astype(float)
    table["throughput"] = 1e3 * agents / table["step_time"]
    title = "Memory in GB (resident: measured), ms of a step, tokens per second"
    bench.show("gpu_concurrency", title, table.reset_index())
    said = {
        f"{figure.prefilled_tokens} tokens, {figure.n_agents} agents, {figure.policy}: {figure.value.value} GB"
        for figure in published.load("polykv")
        if figure.metric == "kv_memory" and "llama" in figure.model
    }
    print("\nPublished for llama-3-8b, computed at fp32: " + "; ".join(sorted(said)))
    most = found[found["metric"] == "most_agents"]
    if len(most):
        table = most.pivot_table(index=keys[:2], columns="reader", values="value")
        bench.show("gpu_largest", "The most agents that fit", table.reset_index())


if __name__ == "__main__":
    main()
