"""Attention of one decode step of many agents: to one compressed prefix in place, or each to an unshared cache.

    python benchmarks/decode_step.py                (15 agents, 8 kv heads x 128, group 4, 4,096 tokens, one thread)
    python benchmarks/decode_step.py --dtypes bfloat16 --agents 30 --threads 2

One layer. Every agent has the prefix, its own suffix, and one query token. An unshared cache has the whole decoded
prefix, as in polykv-llm and in transformers' DynamicCache. The fair baseline reads it with grouped queries
q.view(1, kv_heads, group, d); SDPA's enable_gqa, which is slower on a CPU, is shown for comparison.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from context import of_layer
from report import Report, show
from timing import interleaved, peak_bytes, quartiles, timed
from torch import Tensor, nn

from polykv import kernels
from polykv.attention.cascade import cascade_attention
from polykv.attention.layers import CascadeLayer
from polykv.attention.prefix import attend_prefix
from polykv.recipe import load_recipe
from polykv.segment import Segment, decode_segments

FAIR = ("unshared caches, matmul + softmax", "unshared caches, sdpa")
# "recipe,backend" that are read in place.
SHARED = [f"{r},{b}" for b in ("cpu", "torch") for r in ("polykv", "polykv_q8_0", "waterfill_4")]


class Step:
    """The tensors of one decode step: N(0, 1) keys and values, queries (agents, heads, 1, dim)."""

    def __init__(self, arguments: argparse.Namespace, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        heads, dim = arguments.heads, arguments.dim

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.k, self.v = (normal(1, heads, arguments.tokens, dim) for _ in range(2))
        suffix = (arguments.agents, heads, arguments.suffix, dim)
        self.own_k, self.own_v = normal(*suffix), normal(*suffix)
        self.q = normal(arguments.agents, heads * arguments.group, 1, dim)
        self.group, self.scaling = arguments.group, dim**-0.5

    @property
    def grouped(self) -> Tensor:
        """The queries as (agents, kv_heads, group, dim)."""
        return self.q.squeeze(2).unflatten(1, (-1, self.group))

    def segments(self, recipe: str, backend: str) -> list[Segment]:
        context = of_layer(*self.k.shape[1:])
        loaded = load_recipe(recipe)
        loaded.check_exact_suffix("this benchmark")
        return loaded.encode_layer(self.k, self.v, 0, 1, backend, context)

    def unshared(self, segments: list[Segment]) -> list[tuple[Tensor, Tensor]]:
        """Every agent's own full cache (1, kv_heads, tokens + suffix, dim)."""
        keys, values = decode_segments(segments)
        return [
            (torch.cat([keys, k[None]], dim=2), torch.cat([values, v[None]], dim=2))
            for k, v in zip(self.own_k, self.own_v, strict=True)
        ]

    def in_place(self, segments: list[Segment], backend: str) -> Callable[[], Tensor]:
        """The attention call of a step, with the new token's key and value already appended."""
        layer, module = CascadeLayer(segments, backend), nn.Module()
        keys, values = layer.update(self.own_k, self.own_v)
        mask = torch.ones(len(self.q), 1, 1, keys.shape[2], dtype=torch.bool)

        def attend() -> Tensor:
            out, _ = cascade_attention(module, self.q, keys, values, mask, scaling=self.scaling)
            return out.squeeze(1).unflatten(1, (-1, self.group))

        return attend

    def prefix_only(self, segments: list[Segment], backend: str) -> Callable[[], object]:
        q_HQD = self.grouped.transpose(0, 1).flatten(1, 2).contiguous()
        return lambda: attend_prefix(q_HQD, segments, self.scaling, backend)

    def truth(self, segments: list[Segment]) -> Tensor:
        """Attention in fp64 over the decoded cache: (agents, kv_heads, group, dim)."""
        out = []
        for q, (k, v) in zip(self.grouped.double(), self.unshared(segments), strict=True):
            out.append((q @ k[0].double().mT * self.scaling).softmax(-1) @ v[0].double())
        return torch.stack(out)


def unshared_cases(
    step: Step, caches: list[tuple[Tensor, Tensor]]
) -> dict[str, Callable[[], Tensor]]:
    """Ways to attend to unshared caches; the last one reads a batched copy of them."""
    grouped = list(step.grouped.split(1))
    stacked = [torch.cat(tensors) for tensors in zip(*caches, strict=True)]
    sdpa = partial(F.scaled_dot_product_attention, scale=step.scaling)

    def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * step.scaling).softmax(-1) @ v

    def each(attend: Callable[..., Tensor], queries: list[Tensor]) -> Tensor:
        return torch.cat([attend(q, k, v) for q, (k, v) in zip(queries, caches, strict=True)])

    return {
        FAIR[0]: lambda: each(matmul, grouped),
        FAIR[1]: lambda: each(sdpa, grouped),
        "unshared caches, sdpa enable_gqa": lambda: each(
            partial(sdpa, enable_gqa=True), list(step.q.split(1))
        ).view_as(step.grouped),
        "unshared caches in one batch, sdpa": lambda: sdpa(step.grouped, *stacked),
    }


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        name, dtype = arguments.peak_of
        recipe, backend = name.split(",")
        step = Step(arguments, getattr(torch, dtype))
        print(peak_bytes(step.in_place(step.segments(recipe, backend), backend)))
        return
    load = os.getloadavg()[0]
    names = ("threads", "heads", "group", "dim", "suffix")
    report = Report(
        "decode_step",
        {name: getattr(arguments, name) for name in names} | {"load": load, "timed": "in turn"},
        context_tokens=arguments.tokens,
        n_agents=arguments.agents,
    )
    for dtype in arguments.dtypes:
        compare(arguments, dtype, report)
    print(
        f"Load average at the start {load:.1f}, on {os.cpu_count()} cores; cpu ms is processor time."
    )
    print(
        "Peak: resident set above what a step finds, its output included, in a process of its own."
    )
    print("Error: largest difference to attention in fp64 over the same decoded cache.")
    print(f"rows: {report.write(arguments.out)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=4096, help="of the prefix")
    parser.add_argument("--suffix", type=int, default=64, help="each agent's own tokens")
    parser.add_argument("--heads", type=int, default=8, help="kv heads")
    parser.add_argument("--group", type=int, default=4, help="query heads of a kv head")
    parser.add_argument("--dim", type=int, default=128, help="head_dim")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--in-place", nargs="+", default=SHARED, metavar="RECIPE,BACKEND", help="read in place"
    )
    parser.add_argument(
        "--out", type=Path, help="CSV (default: results/local/benchmarks/decode_step.csv)"
    )
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


@torch.no_grad()
def compare(arguments: argparse.Namespace, dtype: str, report: Report) -> None:
    step = Step(arguments, getattr(torch, dtype))
    published = step.segments("polykv", "torch")
    caches, truth = step.unshared(published), step.truth(published)
    cases: dict[str, Callable[[], object]] = dict(unshared_cases(step, caches))
    errors = {name: largest_error(run(), truth) for name, run in cases.items()}
    n_private = len(caches) * 2 * step.k.nbytes  # of the prefix: the suffixes are the same for all
    resident, peaks = dict.fromkeys(cases, n_private), {}
    for shared in arguments.in_place:
        recipe, asked = shared.split(",")
        backend = kernels.pick_backend(asked, torch.device("cpu"))
        segments = step.segments(recipe, backend)
        name = f"{recipe}, in place, {backend}"
        cases[name] = step.in_place(segments, backend)
        errors[name] = largest_error(cases[name](), step.truth(segments))
        peaks[name] = peak_of(f"{recipe},{backend}", dtype)
        cases[f"{name}, prefix alone"] = step.prefix_only(segments, backend)
        resident[name] = resident[f"{name}, prefix alone"] = sum(
            segment.nbytes for segment in segments
        )
    times = interleaved(
        {name: partial(timed, run) for name, run in cases.items()}, arguments.repeats
    )
    record(report, dtype, times, resident, peaks, errors)
    print_table(describe(arguments, dtype), times, resident, peaks, errors)


def largest_error(out: Tensor, truth: Tensor) -> float:
    return (out.double() - truth).abs().max().item()


def peak_of(name: str, dtype: str) -> int | None:
    """Peak bytes of a step in a fresh process with the same arguments."""
    command = [sys.executable, *sys.argv, "--peak-of", name, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return None if done.stdout.strip() == "None" else int(done.stdout)


def record(
    report: Report, dtype: str, times: dict, resident: dict, peaks: dict, errors: dict
) -> None:
    for name, seconds in times.items():
        system, *rest = name.split(", ")
        shared = rest and rest[0] == "in place"
        columns = {"recipe": system, "backend": rest[1]} if shared else {"recipe": "full"}
        columns |= {"dtype": dtype, "reader": "in_place" if shared else "unshared"}
        for metric, each in zip(("ms", "processor_ms"), zip(*seconds, strict=True), strict=True):
            low, median, high = (1e3 * s for s in quartiles(each))
            report.add(name, f"step_{metric}", median, "ms", (low, high), n=len(each), **columns)
        report.add(name, "resident_prefix_bytes", resident[name], "bytes", **columns)
        if name in errors:
            report.add(name, "largest_error", errors[name], "", **columns)
        if name in peaks:
            why = None if peaks[name] is not None else "peak memory is read on Linux only"
            report.add(name, "step_peak_bytes", peaks[name], "bytes", note=why, **columns)


def describe(arguments: argparse.Namespace, dtype: str) -> str:
    plural = "" if arguments.threads == 1 else "s"
    return (
        f"One decode step: {arguments.agents} agents, {arguments.heads} kv heads x {arguments.dim}, group "
        f"{arguments.group}, {arguments.tokens:,} + {arguments.suffix} tokens, {dtype}, "
        f"{arguments.threads} thread{plural}, medians of {arguments.repeats} interleaved runs"
    )


def print_table(title: str, times: dict, resident: dict, peaks: dict, errors: dict) -> None:
    clock, processor = (
        {name: quartiles([s[which] for s in seconds])[1] for name, seconds in times.items()}
        for which in (0, 1)
    )
    fair, fair_processor = (min(median[name] for name in FAIR) for median in (clock, processor))
    columns = [
        "attention to",
        "ms",
        "quartiles",
        "cpu ms",
        "fair unshared takes",
        "(cpu)",
    ]
    columns += ["prefix MiB", "unshared holds", "peak MiB", "error"]
    lines = []
    for name, seconds in times.items():
        low, median, high = (1e3 * s for s in quartiles([s[0] for s in seconds]))
        line = [name, f"{median:.2f}", f"{low:.2f}-{high:.2f}", f"{1e3 * processor[name]:.2f}"]
        line += [f"{fair / clock[name]:.2f}x", f"{fair_processor / processor[name]:.2f}x"]
        line += [f"{resident[name] / 2**20:.1f}", f"{resident[FAIR[0]] / resident[name]:.1f}x"]
        line.append(f"{peaks[name] / 2**20:.1f}" if peaks.get(name) is not None else "-")
        line.append(f"{errors[name]:.1e}" if name in errors else "-")
        lines.append(line)
    show(title, columns, lines, [])


if __name__ == "__main__":
    main()
