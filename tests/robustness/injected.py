"""Faults put into a run from inside, where no setting of the machine can make them; see stage.Injection."""

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

WRITING = ("writing", "fsync", "rename", "renamed")
"""The steps of writing a cell; a run is starting, composing or measuring before, drawing in the end."""

PAUSE_S = 0.05  # in each step of writing a cell, so that kills fall between them


def traced(place: Path) -> None:
    """Keep the run's phase in the file `place`, and stretch the steps of writing a cell."""
    from experiments import polykv_quality
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

    cellfile.os = SimpleNamespace(fsync=fsync, replace=replace)
    before(polykv_quality, "run", lambda: enter("measuring", 0))
    before(cellfile, "write_atomically", lambda: enter("writing"))


def phase(place: Path) -> str:
    """What `traced` kept last."""
    return place.read_text().strip() if place.exists() else "starting"


def forked_workers() -> None:
    """joblib's workers start as forks, at once and with what was injected, not as new interpreters."""
    import signal
    import warnings

    from joblib.externals.loky.backend import context

    warnings.filterwarnings("ignore", ".*fork. start method")  # joblib advises against it
    context.set_start_method("fork", force=True)
    # A new interpreter would not write its signals into the pipe of the process that started it.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def small_files(n_cells: int) -> None:
    """From the cell after `n_cells` on, the kernel cuts every write off at 1 KiB (RLIMIT_FSIZE)."""
    from polykv import cellfile

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))  # noqa: E731
    before(cellfile, "write_atomically", _after(n_cells, limit))


def read_only(root: Path, n_cells: int) -> None:
    """After `n_cells` cells the file system under `root` becomes read-only. Needs root and a mount."""
    from polykv.results import Store

    remount = lambda: subprocess.run(["mount", "-o", "remount,ro", root], check=True)  # noqa: E731
    before(Store, "claim", _after(n_cells, remount))


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


def _after(n: int, act: Callable[[], object]) -> Callable[[], None]:
    """Do nothing `n` times, then `act` each time."""
    left = iter(range(n))

    def maybe() -> None:
        if next(left, None) is None:
            act()

    return maybe
