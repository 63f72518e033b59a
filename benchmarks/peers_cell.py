"""One table of peers.py: so many agents after a prompt of so many tokens, every side measured in turn."""

import argparse
from statistics import median
from typing import Any

from peers_torch import EXPANDED
from report import Report, show
from step_parts import UNSHARED
from timing import Worker, quartiles, saying

LLAMA_CPP = "llama.cpp"
MIB = 2**20
UNITS = {"tokens_per_s": "tokens/s", "attends_ms": "ms", "update_ms": "ms"}
UNITS |= {"cache_bytes": "bytes", "prefill_s": "s"}
COLUMNS = ["", "ms a step", "quartiles", "tokens/s", "unshared takes", "attends ms", "update ms"]
COLUMNS += ["cache MiB", "of unshared", "prefill s"]
NOTES = [
    "attends: of transformers and ours the time of attention (prefix, suffixes, masks) in 4 further steps a round; of "
    "llama.cpp the step less the step after a prompt of one token, in which all else is the same.",
    "update: what a cache does before attention reads it. DynamicCache (unshared, expanded) copies all that it holds "
    "in each step (torch.cat), QuantizedCache decodes all of it; ours appends to the suffixes.",
    f"{EXPANDED}: the cache starts as a view without a copy; the first update makes it a copy for each agent, and "
    "from then on it is what unshared is, in bytes too.",
    "cache MiB: prompt and all agents' tokens at the end of a round. llama.cpp: its own report of its KV buffers, "
    "which have room for a multiple of 256 tokens, times the share in use.",
    "prefill: the prompt once, with its compression; QuantizedCache compresses it for each agent.",
]

Found = dict[str, Any]


class Cell:
    """What was measured of every side, or why it was not."""

    def __init__(
        self, arguments: argparse.Namespace, tokens: int, agents: int, reasons: dict[str, str]
    ) -> None:
        """`reasons`: why sides cannot be measured."""
        self.given, self.tokens, self.agents = arguments, tokens, agents
        self.reasons = dict(reasons)
        self.found: dict[str, list[Found]] = {}
        torch_sides = [UNSHARED, EXPANDED, *arguments.quantized, *arguments.recipes]
        # Name of a side -> its process, and its name there.
        self.sides = {name: ("torch", name) for name in torch_sides}
        self.sides |= {f"{LLAMA_CPP} {one}": (LLAMA_CPP, one) for one in arguments.caches}

    def measure(self, workers: dict[str, Worker | str]) -> None:
        """A round of every side, and again, until there are enough."""
        for turn in range(self.given.rounds):
            for name, (where, request) in self.sides.items():
                worker = workers[where]
                if isinstance(worker, str):
                    self.reasons.setdefault(name, worker)
                if name in self.reasons:
                    continue
                about = f"{self.tokens} tokens, {self.agents} agents, round {turn + 1} of {self.given.rounds}"
                try:
                    with saying(f"{about}: {name}"):
                        answer = worker.ask(f"{request} {self.agents}")
                except (RuntimeError, OSError) as error:
                    self.reasons[name] = str(error)
                else:
                    self.found.setdefault(name, []).append(answer)

    def values(self, name: str) -> Found:
        """The figures of a side: of times (25th percentile, median, 75th) in ms."""
        rounds = self.found[name]
        parts = {
            part: [1e3 * seconds for one in rounds for seconds in one[part]]
            for part in ("steps", "attends", "update", "empty")
            if part in rounds[0]
        }
        step = quartiles(parts["steps"])
        if "empty" in parts:
            attends, update = step[1] - median(parts["empty"]), None
        else:
            attends, update = median(parts["attends"]), median(parts["update"])
        return {
            "step_ms": step,
            "tokens_per_s": 1e3 * self.agents / step[1],
            "attends_ms": attends,
            "update_ms": update,
            "cache_bytes": rounds[0]["bytes"],
            "prefill_s": rounds[0]["prefill"],
        }

    def record(self, report: Report) -> None:
        """Rows of the CSV."""
        cell = {"n_agents": self.agents, "context_tokens": self.tokens}
        for name in self.sides:
            columns = cell | ({"recipe": name} if name in self.given.recipes else {})
            if name in self.reasons:
                report.add(name, "step_ms", None, "ms", note=self.reasons[name], **columns)
                continue
            values = self.values(name)
            low, middle, high = values.pop("step_ms")
            n = sum(len(one["steps"]) for one in self.found[name])
            report.add(name, "step_ms", middle, "ms", (low, high), n=n, **columns)
            for metric, value in values.items():
                if value is not None:
                    report.add(name, metric, value, UNITS[metric], **columns)

    def tell(self, about: str) -> None:
        """The table on the screen."""
        measured = [name for name in self.sides if name not in self.reasons]
        values = {name: self.values(name) for name in measured}
        base = values.get(UNSHARED)
        lines = [line(name, values[name], base) for name in measured]
        lines += [[name, *["-"] * (len(COLUMNS) - 1)] for name in self.reasons]
        of_torch = f"{self.given.dtype}, {self.given.threads} threads"
        title = f"{self.agents} agents, {self.tokens:,} tokens, {of_torch}; {about}"
        notes = [f"{name}: not measured: {why}" for name, why in self.reasons.items()]
        show(title, COLUMNS, lines, notes)


def line(name: str, values: Found, base: Found | None) -> list[str]:
    """A side's line of the table; `base`: the values of unshared caches."""

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    low, middle, high = values["step_ms"]
    n_bytes = values["cache_bytes"]
    return [
        name,
        f"{middle:.1f}",
        f"{low:.1f}-{high:.1f}",
        f"{values['tokens_per_s']:.1f}",
        f"{base['step_ms'][1] / middle:.2f}x" if base else "-",
        number(values["attends_ms"], 1),
        number(values["update_ms"], 1),
        number(n_bytes / MIB if n_bytes else None, 1),
        f"{n_bytes / base['cache_bytes']:.3f}" if base and n_bytes else "-",
        number(values["prefill_s"], 1),
    ]
