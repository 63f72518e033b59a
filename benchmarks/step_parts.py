"""Where the time of a decode step of many agents goes, on a real model, beside what this machine allows.

    python benchmarks/step_parts.py /my/model.gguf      (or a folder, or a name in conf/model)
    python benchmarks/step_parts.py /my/model.gguf --agents 30 --tokens 8192 --dtype float32 --threads 1

Unshared caches read with sdpa, and recipes read in place, take turns. Time is wall-clock and exclusive: a part does not
hold the parts that it calls. `rest` is what the model does between them: norms, RoPE, activations, embedding, Python.

The bound of a part is the larger of two times: of reading its bytes once (weights, stored prefix, suffixes) at the
bandwidth of a copy, and of its multiply-adds at the rate of a large matrix product in the same dtype. Both are measured
here, with the same threads.
"""

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from report import Report, show
from timing import quartiles
from torch import nn
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import polykv
from polykv.attention import cascade
from polykv.codecs.identity import Identity
from polykv.evaluation.concurrency import QUERY_TOKENS, WARMUP, caches_of, decode, pool_of
from polykv.prefill import prefill

UNSHARED = "unshared"
PROJECTIONS, PREFIX, SUFFIX = "projections", "prefix attention", "suffix attention"
OTHER, CACHE, REST = "attention, other", "cache update", "rest"
PARTS = (PROJECTIONS, PREFIX, SUFFIX, OTHER, CACHE, REST)


class Parts:
    """Exclusive seconds of each part since `start`."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open = [REST]
        self._since = time.perf_counter()

    def enter(self, part: str) -> None:
        self._lap()
        self._open.append(part)

    def leave(self) -> None:
        self._lap()
        self._open.pop()

    def stop(self) -> dict[str, float]:
        self._lap()
        return dict(self.seconds)

    def _lap(self) -> None:
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts to `part`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return run


@contextmanager
def watched(model: PreTrainedModel, parts: Parts) -> Iterator[None]:
    """Context in which the model's projections, attention and caches report to `parts`."""
    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(lambda *_: parts.enter(PROJECTIONS)))
            hooks.append(module.register_forward_hook(lambda *_: parts.leave()))
    places = [
        (cascade, "attend_prefix", PREFIX),
        (cascade, "attend_suffix", SUFFIX),
        (Cache, "update", CACHE),
    ]
    before = [getattr(owner, name) for owner, name, _ in places]
    functions = {cascade.NAME: (cascade.cascade_attention, OTHER)}
    functions["sdpa"] = (sdpa_attention_forward, PREFIX)  # of prefix and suffix
    try:
        for owner, name, part in places:
            setattr(owner, name, parts.timed(part, getattr(owner, name)))
        for name, (function, part) in functions.items():
            AttentionInterface.register(name, parts.timed(part, function))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for (owner, name, _), function in zip(places, before, strict=True):
            setattr(owner, name, function)
        for name, (function, _) in functions.items():
            AttentionInterface.register(name, function)


class Machine:
    """Measured copy bandwidth, bytes/s (read and written), and multiply-adds/s of a matrix product."""

    def __init__(self, dtype: torch.dtype) -> None:
        block = torch.ones(1 << 26)
        copy, square = torch.empty_like(block), torch.ones(2048, 2048, dtype=dtype)
        self.bandwidth = 2 * block.nbytes / best(lambda: copy.copy_(block))
        self.products = 2048**3 / best(lambda: square @ square)

    def bound(self, n_bytes: float, products: float) -> float:
        """Seconds that a part needs at least."""
        return max(n_bytes / self.bandwidth, products / self.products)


def best(work: Callable[[], object]) -> float:
    """The shortest of 10 runs, in seconds."""
    taken = []
    for _ in range(10):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


class Bench:
    """A model, its prefilled prefix, and a pool per recipe."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.given, self.parts = arguments, Parts()
        dtype = getattr(torch, arguments.dtype)
        self.machine = Machine(dtype)
        self.model = polykv.load_model(arguments.model, "cpu", arguments.dtype)[0]
        vocabulary = self.model.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        ids_BT = torch.randint(vocabulary, (1, arguments.tokens), generator=generator)
        cache = prefill(self.model, ids_BT)
        self.layers = [(layer.keys, layer.values) for layer in cache.layers]
        self.pools = {
            name: pool_of(
                ["in_place"], self.layers, polykv.load_recipe(name), "cpu", cache.contexts
            )
            for name in arguments.recipes
        }

    @torch.no_grad()
    def round(self, name: str) -> list[dict[str, float]]:
        """Seconds of each part in every step of one round, without its warm-up; `name`: UNSHARED or a recipe."""
        given, pool = self.given, self.pools.get(name)
        reader = "in_place" if pool else UNSHARED
        caches = caches_of(reader, self.layers, pool, given.agents, True)
        steps = decode(self.model, caches, given.tokens, given.agents, WARMUP + given.steps)
        next(steps)
        found = []
        with watched(self.model, self.parts):
            self.parts.start()
            for _ in steps:
                found.append(self.parts.stop())
                self.parts.start()
        return found[WARMUP:]

    def needs(self, name: str) -> dict[str, tuple[float, float]]:
        """Bytes that a step has to read, and its multiply-adds, of the parts that have a bound."""
        given, layers = self.given, self.layers
        linear = [m.weight for m in self.model.modules() if isinstance(m, nn.Linear)]
        projections = {id(weight): weight for weight in linear}.values()
        # The output layer counts once, whether or not its weights are the embedding's.
        n_weights = sum(weight.numel() for weight in projections)
        group = self.model.config.num_attention_heads // layers[0][0].shape[1]
        per_token = sum(2 * group * k.shape[1] * k.shape[3] for k, _ in layers) * given.agents
        own = QUERY_TOKENS + WARMUP + given.steps / 2  # tokens of a suffix, on average
        of_token = sum(k.nbytes + v.nbytes for k, v in layers) / given.tokens
        full = of_token * given.tokens
        prefix = self.pools[name].stored_bytes if name in self.pools else given.agents * full
        found = {PROJECTIONS: (sum(w.nbytes for w in projections), n_weights * given.agents)}
        if name not in self.pools:
            n_bytes = prefix + given.agents * own * of_token
            return found | {PREFIX: (n_bytes, (given.tokens + own) * per_token)}
        codec = self.pools[name].recipe.suffix or Identity()
        n_bytes = sum(
            codec.stored_bytes((given.agents, x.shape[1], 1, x.shape[3]), x.dtype)
            for x in chain(*layers)
        )
        suffix = n_bytes * own, own * per_token
        return found | {PREFIX: (prefix, given.tokens * per_token), SUFFIX: suffix}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--agents", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=4096, help="of the prefix")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--recipes", nargs="+", default=["polykv", "waterfill_4"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=8, help="timed in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    bench = Bench(arguments)
    names = [UNSHARED, *arguments.recipes]
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(arguments.rounds):
        for name in names:
            print(f"round {turn + 1} of {arguments.rounds}: {name}", flush=True)
            steps[name] += bench.round(name)
    tell(bench, steps, load)


def tell(bench: Bench, steps: dict[str, list[dict[str, float]]], load: float) -> None:
    """The table and the CSV."""
    given, machine = bench.given, bench.machine
    about = {"threads": given.threads, "load": load}
    shared = {"model": Path(given.model).parent.name or given.model, "dtype": given.dtype}
    report = Report(
        "step_parts", about, n_agents=given.agents, context_tokens=given.tokens, **shared
    )
    whole = {name: [sum(step.values()) for step in found] for name, found in steps.items()}
    unshared = quartiles(whole[UNSHARED])[1]
    lines = []
    for name, found in steps.items():
        needs = bench.needs(name)
        for part in ("whole step", *PARTS):
            times = whole[name] if part not in PARTS else [step.get(part, 0.0) for step in found]
            low, median, high = (1e3 * seconds for seconds in quartiles(times))
            bound = 1e3 * machine.bound(*needs[part]) if part in needs else None
            line = [f"{name}: {part}", f"{median:.1f}", f"{low:.1f}-{high:.1f}"]
            line.append(f"{median / (1e3 * quartiles(whole[name])[1]):.0%}")
            line.append("" if part in PARTS else f"{1e3 * unshared / median:.2f}x")
            line += ["", "", ""] if bound is None else [f"{needs[part][0] / 2**20:.1f}"] + [
                f"{bound:.1f}", f"{median / bound:.1f}x"
            ]  # fmt: skip
            lines.append(line)
            columns = {"recipe": name, "n": len(times)}
            report.add(part, "step_ms", median, "ms", (low, high), **columns)
            if bound is not None:
                report.add(part, "bound_ms", bound, "ms", **columns)
    title = (
        f"Decode step: {shared['model']}, {given.agents} agents, {given.tokens:,} tokens, {given.dtype}, "
        f"{given.threads} threads; load average at the start {load:.1f}"
    )
    columns = ["", "ms", "quartiles", "of the step", "unshared takes", "MiB read", "bound ms", "of it"]  # fmt: skip
    notes = [
        f"Copies {machine.bandwidth / 1e9:.1f} GB/s, read and written; {machine.products / 1e9:.0f} G multiply-adds/s "
        f"in {given.dtype}.",
        "unshared: prefix attention is sdpa's, suffixes included; cache update copies the whole cache.",
        f"written to {report.write(given.csv)}",
    ]
    show(title, columns, lines, notes)


if __name__ == "__main__":
    main()
