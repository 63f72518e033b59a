"""llama.cpp's side of peers.py: agents that decode after one prompt, each a sequence of one unified KV cache.

python benchmarks/peers_llama_cpp.py FOLDER ...    (peers.py starts it, in an environment of its own)

FOLDER holds `prompt.npy` (tokens,) and `queries.npy` (agents, tokens). The prompt is evaluated once, as sequence 0, and
every agent's sequence is a copy of that (llama_memory_seq_cp), which marks its cells as the agent's and copies no data.
A request is "CACHE AGENTS", such as "q8_0 15".
"""

import argparse
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
from llama_cpp_side import LlamaCpp, start_backends
from timing import answer_requests

PREFILL_BATCH = 512
BUFFER = re.compile(
    r"KV buffer size = +([\d.]+) MiB"
)  # what llama.cpp logs of each cache that it makes


class Log:
    """What llama.cpp said while it made a cache."""

    def __init__(self) -> None:
        self.text = ""
        self._callback = lib.llama_log_callback(self._hear)  # a reference, as llama.cpp has none
        lib.llama_log_set(self._callback, None)

    def _hear(self, level: int, text: bytes, about: Any) -> None:
        self.text += text.decode(errors="replace")


class Agents:
    """A unified cache with room for the prompt and for what all agents add to it."""

    def __init__(
        self, model: LlamaCpp, cache: str, ids_T: np.ndarray, queries_NQ: np.ndarray, log: Log, n_own: int
    ) -> None:  # fmt: skip
        """Evaluates the prompt; `n_own` tokens are those of each agent."""
        self.model, self.queries_NQ, self.n_prompt = model, queries_NQ, len(ids_T)
        n_agents = len(queries_NQ)
        self.n_cells = self.n_prompt + n_agents * n_own
        log.text = ""
        batch = max(min(PREFILL_BATCH, self.n_prompt), queries_NQ.size)
        types = f"{cache}/{cache}"
        self._context = model.context(types, self.n_cells, batch, sequences=1 + n_agents)
        self._memory = lib.llama_get_memory(self._context)
        of_buffers = sum(float(size) for size in BUFFER.findall(log.text)) * 2**20
        self.cell_bytes = of_buffers / lib.llama_n_ctx(self._context)
        tokens = [(int(one), place, 0, False) for place, one in enumerate(ids_T)]
        start = time.perf_counter()
        for first in range(0, len(tokens), PREFILL_BATCH):
            model.decode(self._context, tokens[first : first + PREFILL_BATCH])
        self.prefill_seconds = time.perf_counter() - start

    def round(self, warmup: int, n_steps: int) -> list[float]:
        """Seconds of each step after the warm-up: one token of each agent, and the choice of the next."""
        for agent in range(1, 1 + len(self.queries_NQ)):
            lib.llama_memory_seq_rm(self._memory, agent, -1, -1)
            lib.llama_memory_seq_cp(self._memory, 0, agent, -1, -1)
        last = self.queries_NQ.shape[1] - 1
        ids = self._next(
            [
                (int(one), self.n_prompt + place, agent, place == last)
                for agent, query in enumerate(self.queries_NQ, 1)
                for place, one in enumerate(query)
            ]
        )
        found = []
        for position in range(
            self.n_prompt + last + 1, self.n_prompt + last + 1 + warmup + n_steps
        ):
            start = time.perf_counter()
            ids = self._next([(one, position, agent, True) for agent, one in enumerate(ids, 1)])
            found.append(time.perf_counter() - start)
        return found[warmup:]

    def _next(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        return [int(row.argmax()) for row in self.model.decode(self._context, tokens)]

    def free(self) -> None:
        lib.llama_free(self._context)


class Side:
    """The caches that were asked for; those of one number of agents at a time."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.given = arguments
        start_backends()
        self._log = Log()
        self._model = LlamaCpp(arguments.model, arguments.threads)
        self._prompt_T = np.load(arguments.folder / "prompt.npy")
        self._queries_NQ = np.load(arguments.folder / "queries.npy")
        self._n_agents = 0
        self._agents: dict[str, tuple[Agents, Agents]] = {}

    def round(self, cache: str, n_agents: int) -> dict[str, Any]:
        """A round after the prompt, and `empty`, one after a prompt of one token."""
        given = self.given
        if n_agents != self._n_agents:
            for pair in self._agents.values():
                for one in pair:
                    one.free()
            self._agents, self._n_agents = {}, n_agents
        if cache not in self._agents:
            self._agents[cache] = (
                self._new(cache, self._prompt_T),
                self._new(cache, self._prompt_T[:1]),
            )
        agents, empty = self._agents[cache]
        n_bytes = agents.cell_bytes * agents.n_cells
        return {
            "steps": agents.round(given.warmup, given.steps),
            "empty": empty.round(given.warmup, given.steps),
            "bytes": n_bytes or None,
            "prefill": agents.prefill_seconds,
        }

    def _new(self, cache: str, ids_T: np.ndarray) -> Agents:
        queries_NQ = self._queries_NQ[: self._n_agents]
        n_own = queries_NQ.shape[1] + self.given.warmup + self.given.steps
        return Agents(self._model, cache, ids_T, queries_NQ, self._log, n_own)


def start(arguments: argparse.Namespace) -> tuple[str, dict[str, Callable[[], object]]]:
    """llama.cpp's account of the processor, and what each request does."""
    side = Side(arguments)
    actions = {
        f"{cache} {n}": partial(side.round, cache, n)
        for cache in arguments.caches
        for n in arguments.agents
    }
    return lib.llama_print_system_info().decode(), actions


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--caches", nargs="+", required=True)
    parser.add_argument("--agents", nargs="+", type=int, required=True)
    for name in ("threads", "warmup", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    answer_requests(partial(start, parser.parse_args()))


if __name__ == "__main__":
    main()
