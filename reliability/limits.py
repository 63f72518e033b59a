"""A machine that gives out inside a sweep: too little memory for one cell, a killed worker, a clock that jumps."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from reliability import injected, stage
from reliability.again import differs, outcome, resumed
from reliability.finding import Finding

MIB = 1 << 20
# Two cells of a few MB; between them, in the order of a sweep, one whose cache alone takes 260 MB.
GEOMETRIES = ("experiment=polykv_ratio", "model=smollm2-135m", "recipe=full", "context=100,8000,90")
HEADROOM = 160 * MIB
YEARS = (1971, 2100)


def run(quick: bool) -> list[Finding]:
    """All findings of this file."""
    findings = [out_of_memory(), clock()]
    return findings if quick else [*findings, killed_worker(5)]


def out_of_memory() -> Finding:
    """One cell asks for more than RLIMIT_AS leaves."""
    start = time.monotonic()
    with TemporaryDirectory(prefix="polykv-memory-") as folder:
        root = Path(folder) / "results"
        limit = partial(injected.little_memory, HEADROOM)
        answer = stage.run((*GEOMETRIES, f"results_dir={root}"), limit)
        failures = []
        n_cells = len(stage.finished(root))
        if answer.code != 1 or "failed: " not in answer.err or n_cells != 2:
            failures.append(f"exit {answer.code}, {n_cells} cells: {answer.err.strip()[-300:]}")
        failures += resumed(root, "more memory", sweep=GEOMETRIES)
    said = next((line for line in answer.err.splitlines() if "failed: " in line), "")
    return Finding(
        area="out of memory",
        tried=f"{HEADROOM // MIB} MiB left (RLIMIT_AS) for three cells, the second needs more; then run "
        "again without the limit",
        times=1,
        answered=outcome(f"the other two are done, exit 1, `{said[:160]}`; same table", failures),
        survived=not failures,
        seconds=time.monotonic() - start,
    )


def killed_worker(times: int) -> Finding:
    """A worker dies with SIGKILL in the middle of a cell: what the kernel does where memory runs out."""
    start = time.monotonic()
    failures = []
    for number in range(times):
        with TemporaryDirectory(prefix="polykv-worker-") as folder:
            root, place = Path(folder) / "results", Path(folder) / "phase"
            overrides = stage.in_folder(root, *stage.LAUNCHERS["joblib"])
            watched = [partial(injected.traced, place), *stage.FORKS["joblib"]]
            sweep = stage.Run(overrides, watched)
            while injected.phase(place) != "measuring" and not sweep.wait(0.01):
                pass
            sweep.wait(0.2 * number)
            os.kill(_a_worker(sweep.pid), signal.SIGKILL)
            answer = sweep.end()
            what = f"worker {number}"
            if answer.code != 1 or "error: " not in answer.err or "Traceback" in answer.err:
                failures.append(f"{what}: exit {answer.code}: {answer.err.strip()[-300:]}")
            failures += resumed(root, what, "joblib")
    return Finding(
        area="out of memory",
        tried="joblib: one worker killed in a cell, as the kernel does; then run again",
        times=times,
        answered=outcome("exit 1, one line says what is to go; finished cells kept", failures),
        survived=not failures,
        seconds=time.monotonic() - start,
    )


def clock() -> Finding:
    """The system's clock jumps, and files carry dates of the past and the future."""
    start = time.monotonic()
    with TemporaryDirectory(prefix="polykv-clock-") as folder:
        root = Path(folder) / "results"
        answer = stage.run(stage.in_folder(root), injected.jumping_clock)
        failures = [] if answer.code == 0 else [f"exit {answer.code}: {answer.err[-300:]}"]
        failures += differs(root, "clock that jumps")
        lost, *kept = stage.finished(root)
        lost.unlink()
        for number, path in enumerate(kept):
            date = time.mktime((YEARS[number % len(YEARS)], 1, 1, 0, 0, 0, 0, 0, 0))
            os.utime(path, (date, date))
        failures += resumed(root, "files of other years")
    return Finding(
        area="clock jumps",
        tried="a year ahead, to 1970 and an hour back at each look; files dated 1971 and 2100, one cell "
        "missing; then run again",
        times=2,
        answered=outcome("no cell lost or measured twice; same table to the byte", failures),
        survived=not failures,
        seconds=time.monotonic() - start,
    )


def _a_worker(pid: int) -> int:
    for process in psutil.Process(pid).children():
        if not any("resource_tracker" in word for word in process.cmdline()):
            return process.pid
    raise RuntimeError(f"process {pid} has no worker")
