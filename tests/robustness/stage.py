"""Runs of `run.py` that can be disturbed, and the comparison of what they leave with an undisturbed sweep.

Each run is a process forked from one that has imported everything: it costs 50 ms, not the seconds of importing torch,
and random moments fall into the sweep, not into imports. What a run does and prints is what it does in a shell.
"""

import importlib
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import psutil
import pytest

from polykv.config import REPO
from polykv.results import load_rows
from robustness import injected

# Reference model, one short document: a cell takes a quarter of a second.
SWEEP = ("experiment=polykv_quality", "document=generated", "model=reference", "context=160",
         "n_documents=1", "max_new_tokens=4", "recipe=full,polykv", "n_agents=2,3")  # fmt: skip
N_CELLS = 4
LAUNCHERS = {"sequential": (), "joblib": ("launcher=joblib", "hydra.launcher.n_jobs=2")}
PATIENCE_S = 240  # after which a run counts as hanging; generous, as machines are shared
TRIES = 10  # to run again, each a second later, while workers that outlived their sweep hold a cell

_PRELOADED = ("run", "torch", "transformers", "joblib", "experiments.polykv_quality",
              "experiments.polykv_ratio", "hydra_plugins.cell_sweeper", "analysis.__main__")  # fmt: skip
_STAMPS = ["created_at", "commit"]  # differ between two runs that measured the same
_VALUES = ["value", "ci_low", "ci_high", *_STAMPS]

Injection = Callable[[], None]
"""Called in the forked process before run.py starts; must be picklable."""

FORKS: dict[str, list[Injection]] = {"sequential": [], "joblib": [injected.forked_workers]}


def first(n: int, cases: Iterable[Any]) -> list[Any]:
    """Cases of which the first `n` run in `make test`, all in `make faults`."""
    return [
        case if i < n else pytest.param(*_tuple(case), marks=pytest.mark.faults)
        for i, case in enumerate(cases)
    ]


def _tuple(case: Any) -> tuple:
    return case if type(case) is tuple else (case,)


@dataclass(frozen=True)
class Answer:
    """How a run ended: its exit code (negative: the signal; None: it hung), and what it printed."""

    code: int | None
    err: str
    seconds: float


class Run:
    """One `python run.py OVERRIDES` in the background. It leads a process group, as in a shell."""

    def __init__(self, overrides: Sequence[str], injections: Sequence[Injection] = ()) -> None:
        self._folder = Path(mkdtemp(prefix="polykv-run-"))
        self._start = time.monotonic()
        self._process = fork(_child, list(overrides), list(injections), self._folder)
        self.pid = self._process.pid

    def workers(self) -> list[psutil.Process]:
        """The living processes that it has started."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children(recursive=True)
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
        taken = time.monotonic() - self._start
        if not (ended and spare_workers):
            self.signal(signal.SIGKILL, group=True)
        self._process.join()
        err = self._folder / "err"
        said = err.read_text(errors="replace") if err.exists() else ""
        code = self._process.exitcode if ended else None
        self._process.close()
        shutil.rmtree(self._folder)
        return Answer(code, said, taken)


def fork(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A started process, forked from the one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def run(overrides: Sequence[str], *injections: Injection) -> Answer:
    """One run from start to end."""
    return Run(overrides, injections).end()


def in_folder(root: Path, *more: str) -> tuple[str, ...]:
    """The overrides of the sweep into `root`."""
    return (*SWEEP, *more, f"results_dir={root}")


def finished(root: Path) -> dict[Path, bytes]:
    """The files of the finished cells."""
    return {path: path.read_bytes() for path in sorted(root.glob("cells/*/*.json"))}


def resume(root: Path, launcher: str = "sequential", sweep: Sequence[str] = SWEEP) -> None:
    """Run a disturbed sweep again: finished cells keep their files, and the table is the undisturbed one."""
    before = finished(root)
    wanted = (*sweep, *LAUNCHERS[launcher], f"results_dir={root}")
    for _ in range(TRIES):
        again = run(wanted, *FORKS[launcher])
        if "another process" not in again.err:
            break
        time.sleep(1)
    assert again.code == 0, again.err
    assert before.items() <= finished(root).items(), "a finished cell was measured again"
    assert_undisturbed(root, sweep)


def assert_undisturbed(root: Path, sweep: Sequence[str] = SWEEP) -> None:
    """The folder's rows and tables are those of an undisturbed sweep, to the byte."""
    assert table(root) == undisturbed(tuple(sweep))


@cache
def undisturbed(sweep: tuple[str, ...] = SWEEP) -> str:
    """The table of a sequential sweep that nothing disturbs."""
    with TemporaryDirectory(prefix="polykv-undisturbed-") as folder:
        answer = run((*sweep, f"results_dir={folder}"))
        assert answer.code == 0, answer.err
        return table(Path(folder))


def table(root: Path) -> str:
    """Every row below `root` and every table drawn of them, without stamps.

    Raises:
        AssertionError: a damaged or leftover file, or a row that is there twice.
    """
    frame, damaged = load_rows(root)
    assert not damaged
    assert not list(root.glob("cells/*/.*")), "temporary files left behind"
    assert not frame.duplicated([c for c in frame.columns if c not in _VALUES]).any(), "twice"
    texts = [frame.drop(columns=_STAMPS).to_csv(index=False)]
    for path in sorted(root.glob("tables/*.csv")):
        lines = path.read_text(encoding="utf-8").split("\n")
        texts += [path.name, *(line for line in lines if not line.startswith("#"))]
    return "\n".join(texts)


def _child(overrides: list[str], injections: list[Injection], folder: Path) -> None:
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
