"""Faults put into a run from inside, where no machine setting can make them; see stage.Injection."""

import os
import resource
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PHASES = ("starting", "composing", "measuring", "writing", "fsync", "rename", "renamed", "drawing")
"""In the order of a sweep's way; from `composing` to `renamed` it goes round once a cell."""

WRITING = PHASES[3:7]
PAUSE_S = 0.05  # in each step of writing a cell, so that kills fall between them


def traced(place: Path) -> None:
    """Keep the run's phase in the file `place`, and stretch the steps of writing a cell."""
    import analysis.__main__ as analysis
    from experiments import polykv_quality, sweep
    from polykv import cellfile

    descriptor = os.open(place, os.O_RDWR | os.O_CREAT)

    def enter(phase: str, pause: float = PAUSE_S) -> None:
        os.pwrite(descriptor, phase.encode().ljust(16), 0)
        time.sleep(pause)

    def fsync(handle: int) -> None:
        enter("fsync")
        os.fsync(handle)

    def replace(source: Path, target: Path) -> None:
        enter("rename")
        os.replace(source, target)
        enter("renamed")

    enter("starting", 0)
    cellfile.os = SimpleNamespace(fsync=fsync, replace=replace)
    before(sweep, "prepare", lambda: enter("composing", 0))
    before(polykv_quality, "run", lambda: enter("measuring", 0))
    before(cellfile, "write_atomically", lambda: enter("writing"))
    before(analysis, "main", lambda: enter("drawing", 0))


def phase(place: Path) -> str:
    """What `traced` kept last."""
    return place.read_text().strip() if place.exists() else "starting"


def forked_workers() -> None:
    """joblib's workers start as forks, at once and with what was injected, not as new interpreters."""
    import signal
    import warnings

    from joblib.externals.loky.backend import context

    warnings.filterwarnings(
        "ignore", ".*fork. start method"
    )  # what it advises against is wanted here
    context.set_start_method("fork", force=True)
    # A new interpreter would not write its signals into the pipe of the process that started it.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def small_files(n_cells: int) -> None:
    """From the cell after `n_cells` on, the kernel cuts every write off at 1 KiB (RLIMIT_FSIZE)."""
    from polykv import cellfile

    left = iter(range(n_cells))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit() -> None:
        if next(left, None) is None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))

    before(cellfile, "write_atomically", limit)


def read_only(root: Path, n_cells: int) -> None:
    """After `n_cells` cells the file system under `root` becomes read-only. Needs root and a mount."""
    from polykv.results import Store

    left = iter(range(n_cells))

    def remount() -> None:
        if next(left, None) is None:
            subprocess.run(["mount", "-o", "remount,ro", root], check=True)

    before(Store, "claim", remount)


def little_memory(headroom_bytes: int) -> None:
    """No more address space than there is now and so much beside (RLIMIT_AS)."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + headroom_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def jumping_clock() -> None:
    """Each look at the clock finds it a year ahead, in 1970, an hour back, or right."""
    from polykv import results

    jumps = cycle([timedelta(days=365), timedelta(days=-19_000), timedelta(hours=-1), timedelta()])
    right = time.time

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromtimestamp(time.time(), tz or UTC)

    results.datetime = Clock
    time.time = lambda: right() + next(jumps).total_seconds()


def before(owner: Any, name: str, act: Callable[[], None]) -> None:
    """Have `act` called before every call of `owner.name`."""
    original = getattr(owner, name)

    def called(*arguments: Any, **named: Any) -> Any:
        act()
        return original(*arguments, **named)

    setattr(owner, name, called)
