"""Time to encode one layer's keys and values and to decode the values, beside other quantized caches and memcpy.

    python benchmarks/encode.py                         (8 kv heads x 128, 4,096 tokens, fp32, one thread)
    python benchmarks/encode.py --threads 2 --dtype bfloat16

Each contender runs in its own process on the same tensors. They take turns, one repetition each, so that disturbances
affect all. Missing packages are installed with pip, without dependencies, into --packages.
"""

import argparse
import os
import sys
from pathlib import Path

from packages import default_folder, ensure
from report import Report, show
from systems import NEEDS, SYSTEMS
from timing import Worker, interleaved, quartiles

HERE = Path(__file__).resolve().parent
THEIRS, LIMIT = "polykv-llm 0.1.0", "memcpy"
WORK = {"encode": "encode K and V", "decode": "decode V"}
SLOW_S = 1.0  # from here on a quarter of the repetitions has to do


def main() -> None:
    arguments = parse()
    load = os.getloadavg()[0]
    report = Report(
        "encode",
        {name: getattr(arguments, name) for name in ("threads", "heads", "dim")}
        | {"load": load, "timed": "in turn, each in its process"},
        context_tokens=arguments.tokens,
        dtype=arguments.dtype,
    )
    found = {name: start(name, arguments) for name in arguments.systems}
    workers = {name: worker for name, worker in found.items() if isinstance(worker, Worker)}
    reasons = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    times = {work: measure(workers, work, arguments.repeats) for work in WORK}
    for work, title in WORK.items():
        peaks = {name: worker.ask(f"{work} peak") for name, worker in workers.items()}
        record(report, work, times[work], peaks, reasons)
        print_table(f"{title}: {describe(arguments)}", times[work], peaks, reasons, arguments)
    print("\n".join(f"{name}: {worker.note}" for name, worker in workers.items()))
    print(
        f"Load average at the start {load:.1f}, on {os.cpu_count()} cores; cpu ms is processor time."
    )
    print("Peak: resident set above the inputs, results included. Keys and values: N(0, 1).")
    for worker in workers.values():
        worker.close()
    print(f"rows: {report.write(arguments.out)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8, help="kv heads")
    parser.add_argument("--dim", type=int, default=128, help="head_dim")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument(
        "--packages", type=Path, default=default_folder(), help="competitors' folder"
    )
    parser.add_argument(
        "--out", type=Path, help="CSV (default: results/local/benchmarks/encode.csv)"
    )
    return parser.parse_args()


def describe(arguments: argparse.Namespace) -> str:
    plural = "" if arguments.threads == 1 else "s"
    return (
        f"{arguments.heads} kv heads x {arguments.dim}, {arguments.tokens:,} tokens, {arguments.dtype}, "
        f"{arguments.threads} thread{plural}, medians of {arguments.repeats} interleaved runs"
    )


def start(name: str, arguments: argparse.Namespace) -> Worker | str:
    """The running contender, or why there is none."""
    command = [sys.executable, str(HERE / "systems.py"), name]
    for option in ("tokens", "heads", "dim", "threads", "dtype"):
        command += [f"--{option}", str(getattr(arguments, option))]
    if package := NEEDS.get(name):
        if reason := ensure(package, arguments.packages):
            return reason
        command += ["--packages", str(arguments.packages / package)]
    print(f"starting {name}", flush=True)
    worker = Worker(command, os.environ | {"OMP_NUM_THREADS": str(arguments.threads)})
    return worker.reason or worker


def measure(
    workers: dict[str, Worker], work: str, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """(clock, processor) seconds of every repetition; the slow ones take part in fewer."""
    once = {name: lambda worker=worker: worker.ask(work) for name, worker in workers.items()}
    fast = {name: run for name, run in once.items() if run()[0] < SLOW_S}
    few = max(repeats // 4, 3)
    first, further = interleaved(once, few), interleaved(fast, repeats - few)
    return {name: taken + further.get(name, []) for name, taken in first.items()}


def record(report: Report, work: str, times: dict, peaks: dict, reasons: dict) -> None:
    for system, seconds in times.items():
        recipe, _, backend = system.partition(", ")
        columns = {"recipe": recipe, "backend": backend.split()[0]} if backend else {}
        for metric, each in zip(("ms", "processor_ms"), zip(*seconds, strict=True), strict=True):
            low, median, high = (1e3 * s for s in quartiles(each))
            report.add(
                system, f"{work}_{metric}", median, "ms", (low, high), n=len(each), **columns
            )
        why = None if peaks[system] is not None else "peak memory is read on Linux only"
        report.add(system, f"{work}_peak_bytes", peaks[system], "bytes", note=why, **columns)
    for system, reason in reasons.items():
        report.add(system, f"{work}_ms", None, "ms", note=reason)


def print_table(
    title: str, times: dict, peaks: dict, reasons: dict, arguments: argparse.Namespace
) -> None:
    clock, processor = (
        {name: quartiles([s[which] for s in seconds])[1] for name, seconds in times.items()}
        for which in (0, 1)
    )
    fp16_bytes = 2 * 2 * arguments.heads * arguments.tokens * arguments.dim
    columns = ["system", "ms", "quartiles", "cpu ms", f"{THEIRS} takes", "(cpu)"]
    columns += [f"{LIMIT} takes", "peak MiB", "of fp16 K+V"]
    lines = []
    for name, seconds in times.items():
        low, median, high = (1e3 * s for s in quartiles([s[0] for s in seconds]))
        line = [name, f"{median:.2f}", f"{low:.2f}-{high:.2f}", f"{1e3 * processor[name]:.2f}"]
        line.append(f"{clock[THEIRS] / clock[name]:.1f}x" if THEIRS in clock else "-")
        line.append(f"{processor[THEIRS] / processor[name]:.1f}x" if THEIRS in clock else "-")
        line.append(f"{clock[LIMIT] / clock[name]:.2f}x" if LIMIT in clock else "-")
        peak = peaks[name]
        line += ["-", "-"] if peak is None else [f"{peak / 2**20:.1f}", f"{peak / fp16_bytes:.2f}x"]
        lines.append(line)
    lines += [[name, *["-"] * 8] for name in reasons]
    show(title, columns, lines, [f"{name}: not measured: {why}" for name, why in reasons.items()])


if __name__ == "__main__":
    main()
