"""Runs of `run.py` that can be disturbed, faults put into them, and what an undisturbed sweep leaves.

Each run is a process forked from one that has imported everything: it costs 50 ms, not the seconds of importing torch,
and random moments fall into the sweep, not into imports. What a run does and prints is what it does in a shell.
"""

import importlib
import multiprocessing
import os
import pkgutil
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import cycle
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import analysis
import experiments
import hydra_plugins
from polykv.config import REPO
from polykv.results import load_rows

# Reference model, one short document: a cell takes a quarter of a second.
SWEEP = ("experiment=polykv_quality", "document=generated", "model=reference", "context=160",
         "n_documents=1", "max_new_tokens=4", "recipe=full,polykv", "n_agents=2,3")  # fmt: skip
N_CELLS = 4
LAUNCHERS = {"sequential": (), "joblib": ("launcher=joblib", "hydra.launcher.n_jobs=2")}
PATIENCE_S = 240  # after which a run counts as hanging; generous, as machines are shared
TRIES = 10  # to run again, each a second later, while workers that outlived their sweep hold a cell

_PRELOADED = ("run", "joblib", "tests.robustness.warm", "transformers.processing_utils", "pyarrow.pandas_compat",
              *(f"{package.__name__}.{module.name}" for package in (analysis, experiments, hydra_plugins)
                for module in pkgutil.iter_modules(package.__path__)))  # fmt: skip
_STAMPS = ["created_at", "commit"]  # differ between two runs that measured the same

Injection = Callable[[], None]
"""Called in the forked process before run.py starts; must be picklable."""


def first(n: int, cases: Iterable[Any]) -> list[Any]:
    """Cases of which the first `n` run in `make test`, all in `make faults`."""
    faults = pytest.mark.faults
    return [
        case if i < n else pytest.param(*(case if type(case) is tuple else (case,)), marks=faults)
        for i, case in enumerate(cases)
    ]


@dataclass(frozen=True)
class Answer:
    """How a run ended: its exit code (negative: the signal; None: it hung), and what it printed."""

    code: int | None
    err: str


class Run:
    """One `python run.py OVERRIDES` in the background. It leads a process group, as in a shell."""

    def __init__(
        self, overrides: Sequence[str], *injections: Injection, full: bool = False
    ) -> None:
        """`full`: with all tables and figures; else with the study's own table, as most of the time goes to them."""
        self._folder = Path(mkdtemp(prefix="polykv-run-"))
        always = [] if full else [own_table]
        always += [forked_workers] if "launcher=joblib" in overrides else []
        self._process = fork(_child, list(overrides), [*always, *injections], self._folder)
        self.pid = self._process.pid

    def workers(self) -> list[psutil.Process]:
        """The living processes that it has started, without joblib's resource tracker."""
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.pid).children(recursive=True)
            return [p for p in started if "resource_tracker" not in " ".join(p.cmdline())]
        return []

    def wait(self, seconds: float) -> bool:
        """Whether it ended within that time."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    def signal(self, number: signal.Signals, group: bool = False) -> None:
        """Send a signal to the process, or to it and its workers as a terminal does."""
        send = os.killpg if group else os.kill
        with suppress(ProcessLookupError):  # it has ended, or has no group yet
            send(self.pid, number)

    def end(self, spare_workers: bool = False) -> Answer:
        """Wait for the end; its workers end with it, unless spared."""
        ended = self.wait(PATIENCE_S)
        if not (ended and spare_workers):
            self.signal(signal.SIGKILL, group=True)
        self._process.join()
        err = self._folder / "err"
        said = err.read_text(errors="replace") if err.exists() else ""
        code = self._process.exitcode if ended else None
        self._process.close()
        shutil.rmtree(self._folder)
        return Answer(code, said)


def fork(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A started process, forked from the one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def run(overrides: Sequence[str], *injections: Injection, full: bool = False) -> Answer:
    """One run from start to end."""
    return Run(overrides, *injections, full=full).end()


def in_folder(root: Path, launcher: str = "sequential") -> tuple[str, ...]:
    """The overrides of the sweep into `root`."""
    return (*SWEEP, *LAUNCHERS[launcher], f"results_dir={root}")


def finished(root: Path) -> dict[Path, bytes]:
    """The files of the finished cells."""
    return {path: path.read_bytes() for path in sorted(root.glob("cells/*/*.json"))}


def resume(root: Path, launcher: str = "sequential", sweep: Sequence[str] = SWEEP) -> None:
    """Run a disturbed sweep again: finished cells keep their files, and the table is the undisturbed one."""
    before = finished(root)
    for _ in range(TRIES):
        again = run((*sweep, *LAUNCHERS[launcher], f"results_dir={root}"))
        if "another process" not in again.err:
            break
        time.sleep(1)
    assert again.code == 0, again.err
    assert before.items() <= finished(root).items(), "a finished cell was measured again"
    assert_undisturbed(root, sweep)


def assert_undisturbed(root: Path, sweep: Sequence[str] = SWEEP) -> None:
    """The folder's rows and table are those of an undisturbed sweep, to the byte."""
    assert table(root) == undisturbed(tuple(sweep))


@cache
def undisturbed(sweep: tuple[str, ...] = SWEEP) -> str:
    """The table of a sequential sweep that nothing disturbs."""
    with TemporaryDirectory(prefix="polykv-undisturbed-") as folder:
        answer = run((*sweep, f"results_dir={folder}"))
        assert answer.code == 0, answer.err
        return table(Path(folder))


def table(root: Path) -> str:
    """Every row below `root` and their study's own table, without stamps.

    Raises:
        AssertionError: a damaged or leftover file, or a row that is there twice.
    """
    frame, damaged = load_rows(root)
    assert not damaged
    assert not list(root.glob("cells/*/.*")), "temporary files left behind"
    assert not frame.drop(columns=["value", *_STAMPS]).duplicated().any(), "twice"
    texts = [frame.drop(columns=_STAMPS).to_csv(index=False)]
    for study in sorted(set(frame["study"])):
        path = root / "tables" / f"{study}.csv"
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        texts += [path.name, *(line for line in lines if not line.startswith("#"))]
    return "\n".join(texts)


def _child(overrides: list[str], injections: Sequence[Injection], folder: Path) -> None:
    os.setsid()
    multiprocessing.current_process().name = "MainProcess"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(REPO)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    sys.argv = ["run.py", *overrides]
    code: object = 1
    try:
        # Nothing is left to import, unless another forkserver was running already.
        for name in _PRELOADED:
            importlib.import_module(name)
        for inject in injections:
            inject()
        runpy.run_path(str(REPO / "run.py"), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()  # as Python does
    finally:
        # multiprocessing would wait for joblib's idle workers; the parent ends them with the group.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


# Injections

# The phases that `traced` keeps, in order, each with its seconds at least; those of a cell come once for each.
OF_A_CELL = {"measuring": 0.3, "writing": 0.05, "fsync": 0.05, "rename": 0.05, "renamed": 0.05}
PHASES = {"starting": 1.0, **OF_A_CELL, "drawing": 2.0}


def traced(place: Path) -> None:
    """Keep the run's phase in the file `place`, and stretch the steps of writing a cell so that kills fall between."""
    from analysis import __main__ as analysis
    from experiments import processes, sweep
    from polykv import cellfile

    descriptor = os.open(place, os.O_RDWR | os.O_CREAT)

    def enter(phase: str, pause: float = 0) -> None:
        os.pwrite(descriptor, phase.encode().ljust(16), 0)
        time.sleep(pause)

    def fsync(handle: int) -> None:
        enter("fsync", OF_A_CELL["fsync"])
        os.fsync(handle)

    def replace(source: Path, target: Path) -> None:
        enter("rename", OF_A_CELL["rename"])
        os.replace(source, target)
        enter("renamed", OF_A_CELL["renamed"])

    cellfile.os = SimpleNamespace(fsync=fsync, replace=replace)
    before(processes, "settle_signals", lambda: enter("starting"))
    before(sweep, "run_cell", lambda: enter("measuring"))
    before(cellfile, "write_atomically", lambda: enter("writing", OF_A_CELL["writing"]))
    before(analysis, "show", lambda: enter("drawing"))


def own_table() -> None:
    """Of tables and figures only the study's own table is drawn."""
    from analysis import __main__ as analysis

    analysis.PICTURES, analysis.names_of = (), tuple


def phase(place: Path) -> str:
    """What `traced` kept last."""
    return place.read_text().strip() if place.exists() else ""


def forked_workers() -> None:
    """joblib's workers start as forks, at once and with what was injected, not as new interpreters."""
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
    before(cellfile, "write_atomically", limit, n_cells)


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


def before(owner: Any, name: str, act: Callable[[], Any], spared: int = 0) -> None:
    """Have `act` called before every call of `owner.name` but the first so many."""
    original, calls = getattr(owner, name), iter(range(spared))

    def called(*arguments: Any, **named: Any) -> Any:
        if next(calls, None) is None:
            act()
        return original(*arguments, **named)

    setattr(owner, name, called)
