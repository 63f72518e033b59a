"""Fused attention to a packed prefix on a GPU: one decode step of N agents, beside fp16 attention.

    python benchmarks/gpu/attention_kernels.py            one GPU with 40 GB; goes on where it was stopped
    python benchmarks/gpu/attention_kernels.py --sweep    how attention is best launched here
    python benchmarks/gpu/attention_kernels.py --tiny     the same path on a CPU, through Triton's interpreter

One layer's shared prefix under recipe polykv, one new token of every agent. Held against the fastest that torch
offers over unshared 16-bit copies, and over one shared 16-bit copy. Prefixes take turns and are together several
times the L2 cache. `graph` is the device's time (CUDA graph replay), `call` what a caller in Python waits for.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton loads

import numpy as np
import torch
from baselines import shared_attentions, unshared_attentions
from checks import attention_error
from common import Bench, add_times, captured, copies, parser
from torch import Tensor

from polykv import kernels
from polykv.kernels.triton_attend import Launch
from polykv.kernels.triton_attend import attend as attend_launched
from polykv.kernels.triton_bits import n_multiprocessors
from polykv.recipe import load_recipe
from polykv.results import Rows
from polykv.segment import Segment

EXPERIMENT = "gpu_attention"
SWEEP = "gpu_attention_sweep"
PREFIXES = (5035, 8192, 32768)
AGENTS = (1, 3, 5, 10, 15, 30)
SWEPT_AGENTS = 15
MOST_UNSHARED = 4  # inputs by turns; the smallest of them take 4 times the L2 cache alone
GIGA, TERA = 1e9, 1e12
TOLERANCE = 2e-3  # relative; 16-bit queries, weights and levels leave 3e-4
Calls = list[Callable[[], object]]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--sweep", action="store_true", help="time the ways to launch attention")
    arguments = options.parse_args()
    bench = Bench(arguments)
    prefixes, agents = ((70,), (1, 3)) if bench.tiny else (PREFIXES, AGENTS)
    settings = [(prefixes[-1], SWEPT_AGENTS)] if arguments.sweep else [*product(prefixes, agents)]
    for model, (n_tokens, n_agents) in product(bench.heads, settings):
        work = partial(sweep if arguments.sweep else compare, bench, model, n_tokens, n_agents)
        about = {"model": model, "context_tokens": n_tokens, "n_agents": n_agents}
        shared = {"weights": "random", "dtype": "bfloat16", "recipe": "polykv"}
        bench.cell(SWEEP if arguments.sweep else EXPERIMENT, about, work, **about, **shared)
    report_sweep(bench) if arguments.sweep else report(bench)


def compare(bench: Bench, model: str, n_tokens: int, n_agents: int, rows: Rows) -> None:
    """Ours against the fastest over unshared copies, and over one shared copy."""
    heads, dim = bench.heads[model][1:]
    segments, q_NHQD = (
        segments_of(bench, model, n_tokens),
        queries_of(bench, model, n_agents),
    )
    q_HQD = stacked(q_NHQD, heads)
    error = attention_error(q_HQD, segments[0], dim**-0.5, "triton")
    note = f"relative, against fp64 over the decoded prefix; to be below {TOLERANCE}"
    rows.add("attention_error", error, "relative", reader="in_place", backend="triton", note=note)
    shared = caches_of(bench.device, (1, heads, n_tokens, dim))
    unshared = caches_of(bench.device, (n_agents, heads, n_tokens, dim))[:MOST_UNSHARED]
    ways = {
        "in_place": {"triton": [partial(attend, q_HQD, segment) for segment in segments]},
        "unshared": unshared_attentions(q_NHQD, unshared),
        "shared": shared_attentions(q_HQD, shared, n_multiprocessors(bench.device)),
    }
    best = {reader: fastest(bench, of_reader) for reader, of_reader in ways.items()}
    cases, counts = {}, {}
    for reader, way in best.items():
        calls = ways[reader][way]
        counts[reader] = len(calls)
        cases[reader, "graph"] = captured(partial(run_all, calls), bench.device)
        cases[reader, "call"] = partial(run_all, calls)
    medians = {}
    for (reader, timed), taken in bench.milliseconds(cases).items():
        columns = {"reader": reader, "backend": best[reader], "timed": timed}
        medians[reader, timed] = add_times(
            rows, "attention_time", taken / counts[reader], **columns
        )
    for reader, timed in product(("unshared", "shared"), ("graph", "call")):
        ratio = medians[reader, timed] / medians["in_place", timed]
        rows.add(
            "attention_speedup",
            ratio,
            "x",
            reader=reader,
            timed=timed,
            note="of ours over it",
        )
    seconds = medians["in_place", "graph"] / 1e3
    columns = {"reader": "in_place", "backend": "triton", "timed": "graph"}
    rows.add("attention_bandwidth", segments[0].nbytes / GIGA / seconds, "GB/s", **columns)
    work = 4 * q_HQD.numel() * n_tokens
    rows.add(
        "attention_rate",
        work / TERA / seconds,
        "TFLOP/s",
        note="both products of all queries",
        **columns,
    )


def attend(q_HQD: Tensor, segment: Segment) -> object:
    return kernels.attend(q_HQD, segment, q_HQD.shape[2] ** -0.5, "triton")


def segments_of(bench: Bench, model: str, n_tokens: int) -> list[Segment]:
    """One layer's compressed prefix, several times, each different."""
    (_, heads, dim), recipe, device = bench.heads[model], load_recipe("polykv"), bench.device

    def segment() -> Segment:
        key, value = (
            kernels.encode(
                codec, torch.randn((1, heads, n_tokens, dim), device=device).bfloat16(), "triton"
            )
            for codec in (recipe.key, recipe.value)
        )
        return Segment(recipe.key, recipe.value, key, value)

    first = segment()
    return [first, *(segment() for _ in range(copies(device, first.nbytes) - 1))]


def caches_of(device: torch.device, shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values in 16 bits, several times, each different."""

    def side() -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    first = side(), side()
    return [first, *((side(), side()) for _ in range(copies(device, 2 * first[0].nbytes) - 1))]


def queries_of(bench: Bench, model: str, n_agents: int) -> Tensor:
    """(agents, query heads, 1, head_dim): one new token of every agent."""
    n_heads, _, dim = bench.heads[model]
    return torch.randn((n_agents, n_heads, 1, dim), device=bench.device).bfloat16()


def stacked(q_NHQD: Tensor, kv_heads: int) -> Tensor:
    """(kv_heads, agents x group, head_dim): the queries that attend to one kv head."""
    n_agents, _, _, dim = q_NHQD.shape
    return q_NHQD.view(n_agents, kv_heads, -1, dim).transpose(0, 1).reshape(kv_heads, -1, dim)


def run_all(calls: Calls) -> list[object]:
    return [call() for call in calls]


def fastest(bench: Bench, ways: dict[str, Calls]) -> str:
    """Of several ways to compute the same, each a list of calls; what one cannot do here is not counted."""
    cases = {}
    for way, calls in ways.items():
        try:
            run_all(calls)
            cases[way] = captured(partial(run_all, calls), bench.device)
        except RuntimeError as error:
            bench.say(f"  not here: {way} ({str(error).splitlines()[0][:80]})")
    taken = bench.milliseconds(cases, repeats=5)
    return min(taken, key=lambda way: float(np.median(taken[way])))


def sweep(bench: Bench, model: str, n_tokens: int, n_agents: int, rows: Rows) -> None:
    """Ways to launch attention; one that does not fit is a finding, too."""
    heads, dim = bench.heads[model][1:]
    segments = segments_of(bench, model, n_tokens)
    q_HQD = stacked(queries_of(bench, model, n_agents), heads)
    usual = Launch.of(q_HQD.shape[1], dim, q_HQD.dtype)
    choices = product((32, 64, 128), (4, 8), (2, 3, 4), (1, 2, 3, 4))
    for tokens, num_warps, num_stages, programs in (
        choices if bench.device.type == "cuda" else [(32, 4, 2, 1)]
    ):
        changed = {"tokens": tokens, "num_warps": num_warps, "num_stages": num_stages}
        launch = replace(usual, programs_per_sm=programs, **changed)
        columns = {
            "reader": "in_place",
            "backend": "triton",
            "timed": "graph",
            "note": str(launch),
        }
        calls = [
            partial(attend_launched, q_HQD, segment, dim**-0.5, launch) for segment in segments
        ]
        try:
            work = captured(partial(run_all, calls), bench.device)
        except Exception as error:
            columns["note"] += f": {type(error).__name__}"
            rows.add("attention_time", None, "ms", **columns)
            continue
        taken = bench.milliseconds({"launch": work}, repeats=10)["launch"]
        add_times(rows, "attention_time", taken / len(calls), **columns)


def report_sweep(bench: Bench) -> None:
    for model, mine in bench.rows(SWEEP).groupby("model"):
        medians = mine.groupby("note")["value"].median().reset_index()
        best = medians.sort_values("value").head(10)[["value", "note"]]
        bench.show(f"gpu_attention_sweep_{model}", f"{model}: fastest launches, ms", best)


def report(bench: Bench) -> None:
    found = bench.rows(EXPERIMENT)
    keys = ["model", "context_tokens", "n_agents", "timed"]
    times = found[found["metric"] == "attention_time"].pivot_table(
        index=keys, columns="reader", values="value", aggfunc="median"
    )
    for reader in ("unshared", "shared"):
        times[f"x {reader}"] = times[reader] / times["in_place"]
    title = "Attention of one decode step over one layer, ms, and how many times faster"
    bench.show("gpu_attention", title, times.reset_index())
    rates = found[
        found["metric"].isin(("attention_bandwidth", "attention_rate", "attention_error"))
    ]
    table = rates.pivot_table(index=keys[:3], columns="metric", values="value")
    title = "What ours reaches: GB/s of codes, TFLOP/s, and its error"
    bench.show("gpu_attention_rates", title, table.reset_index())
    shown = found[(found["metric"] == "attention_time") & (found["timed"] == "graph")]
    won = shown.groupby(["model", "reader"])["backend"].agg(
        lambda ways: ", ".join(sorted(set(ways)))
    )
    bench.show("gpu_attention_ways", "The fastest way of each reader", won.reset_index())
    error = table["attention_error"].max()
    if not error < TOLERANCE:
        raise SystemExit(f"error: attention is off by {error:.1e}")


if __name__ == "__main__":
    main()
