"""What the GPU scripts share: options, cells that are done once, device times, and the state of the device."""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))  # a checkout that is not installed will do

from polykv.results import Rows, Store, cell_id, load_rows  # noqa: E402

# Query heads, kv heads and head_dim of the models of PolyKV's tables (conf/model).
HEADS = {"llama-3-8b": (32, 8, 128), "smollm2-1.7b": (32, 32, 64)}
TINY_HEADS = {"llama-3-8b": (4, 1, 128), "smollm2-1.7b": (2, 2, 64)}

OUT = REPO / "results" / "gpu"
REPEATS, WARMUP = 25, 5
TINY_REPEATS, TINY_WARMUP = 2, 0
# What rows have beside cellfile.COLUMNS. accounting: paper, stored, resident; timed: graph (a CUDA graph: device time
# alone), call (with Python around it) or step (a decode step in one process, queries of one length).
COLUMNS = {"accounting": str, "n_tokens": int, "synthetic": bool, "n_threads": int, "timed": str}
STATE = "pstate,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,memory.used"


def parser(doc: str) -> argparse.ArgumentParser:
    """With the options of every script."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, default=OUT, help="results folder (results/gpu)")
    made.add_argument(
        "--tiny", action="store_true", help="tiny shapes on the CPU, to try the script"
    )
    return made


def pick_device(tiny: bool) -> torch.device:
    """The GPU, or the CPU for a try.

    Raises:
        SystemExit: there is no GPU.
    """
    if tiny:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device here; run this on a GPU, or try it with --tiny")
    return torch.device("cuda", torch.cuda.current_device())


def device_state(device: torch.device) -> dict[str, Any]:
    """What the device is and how it runs just now; fields that cannot be read are left out."""
    state = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "torch": torch.__version__}
    if device.type != "cuda":
        return state | {"device": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    state |= {
        "device": properties.name,
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
    }
    query = ["nvidia-smi", f"--query-gpu=driver_version,{STATE}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, check=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return state
    values = [value.strip() for value in answer.splitlines()[0].split(",")]
    return state | dict(zip(["driver", *STATE.split(",")], values, strict=True))


def _version(package: str) -> str | None:
    try:
        return __import__(package).__version__
    except ImportError:
        return None


class Bench:
    """Cells under `out`: one that is done is not measured again; each keeps the device's state around it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """`arguments` are those of `parser`."""
        self.tiny: bool = arguments.tiny
        self.device = pick_device(self.tiny)
        self.heads = TINY_HEADS if self.tiny else HEADS
        self.store = Store(arguments.out)
        self.store.check_writable()
        self._name = device_state(self.device)["device"]
        self._start = time.perf_counter()

    def cell(
        self,
        experiment: str,
        identity: dict[str, Any],
        measure: Callable[[Rows], None],
        **shared: Any,
    ) -> None:
        """Let `measure` add its rows, which share `shared`; `identity` is what its numbers depend on."""
        identity = {"experiment": experiment, "device": self._name, **identity}
        cell = cell_id(identity)
        what = " ".join(f"{key}={value}" for key, value in identity.items() if key != "device")
        with self.store.claim(experiment, cell) as mine:
            if not mine or self.store.done(experiment, cell):
                self.say(f"{what}: {'done before' if mine else 'another process is at it'}")
                return
            rows = Rows(COLUMNS, device=self._name, **shared)
            before = device_state(self.device)
            measure(rows)
            state = {"before": before, "after": device_state(self.device)}
            study = {"name": experiment, "title": experiment, "question": "", "answers": []}
            study |= {
                "settings": [],
                "columns": {name: of.__name__ for name, of in COLUMNS.items()},
            }
            self.store.write(study, cell, identity | {"state": state}, rows)
        self.say(f"{what}: {len(rows)} rows")

    def milliseconds(
        self, cases: Mapping[Any, Callable[[], object]], repeats: int = REPEATS
    ) -> dict[Any, np.ndarray]:
        """Times of `repeats` calls of each case after a warm-up, taken in turn; device time on a GPU."""
        warmup = WARMUP
        if self.tiny:
            repeats, warmup = TINY_REPEATS, TINY_WARMUP
        times: dict[Any, list[float]] = {name: [] for name in cases}
        for turn in range(warmup + repeats):
            for name, work in cases.items():
                taken = _device_time(work) if self.device.type == "cuda" else _clock_time(work)
                if turn >= warmup:
                    times[name].append(taken)
        return {name: np.array(taken) for name, taken in times.items()}

    def show(self, name: str, title: str, table: pd.DataFrame) -> None:
        """Print a table, and keep it as tables/NAME.md."""
        text = f"{title}\n\n{table.to_markdown(index=False, floatfmt='.4g')}\n"
        path = self.store.root / "tables" / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"\n{text}", flush=True)

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._start:6.1f} s] {text}", flush=True)

    def rows(self, *experiments: str, device: str | None = None) -> pd.DataFrame:
        """Everything measured so far by these experiments on this device, or on what they call it."""
        rows, damaged = load_rows(self.store.root)
        for cell in damaged:
            self.say(f"warning: cell {cell} cannot be read and is left out; run this again")
        return rows[rows["study"].isin(experiments) & (rows["device"] == (device or self._name))]


def _device_time(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _clock_time(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def captured(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same work as a CUDA graph, so that its time is the device's and not Python's; as it is on a CPU."""
    if device.type != "cuda":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # compiles, and picks what libraries pick on first use
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def copies(device: torch.device, n_bytes: int) -> int:
    """How many different inputs of `n_bytes` are no longer in the L2 cache when their turn comes again."""
    if device.type != "cuda":
        return 1
    return max(2, ceil(4 * torch.cuda.get_device_properties(device).L2_cache_size / n_bytes))


def add_times(rows: Rows, metric: str, taken: Sequence[float], **columns: Any) -> float:
    """A row for each repeat, in milliseconds; the median."""
    for sample, milliseconds in enumerate(taken):
        rows.add(metric, float(milliseconds), "ms", sample=sample, n=1, **columns)
    return float(np.median(taken))
