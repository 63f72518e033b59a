"""Runs `run.py` hundreds of times: each run is a process forked from one that has imported everything.

A process of its own costs 50 ms so, not the seconds that importing torch takes; moments at which to disturb it
then fall into the sweep, not into imports. What a run does and prints is what it does and prints in a shell.
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import psutil

from polykv.config import REPO
from polykv.results import load_rows
from reliability import injected

# Reference model, one short document: a cell takes a quarter of a second.
CELLS = ("recipe=full,polykv", "n_agents=2,3")
SWEEP = ("experiment=polykv_quality", "document=generated", "model=reference", "context=160",
         "n_documents=1", "max_new_tokens=4", *CELLS)  # fmt: skip
N_CELLS = 4
LAUNCHERS = {"sequential": (), "joblib": ("launcher=joblib", "hydra.launcher.n_jobs=2")}

# A run that hangs is a finding, not a reason to wait for ever; generous, as machines are shared.
PATIENCE_S = 240

_PRELOADED = ("run", "torch", "transformers", "joblib", "experiments.polykv_quality",
              "experiments.polykv_ratio", "hydra_plugins.cell_sweeper", "analysis.__main__")  # fmt: skip
# Not what differs between two runs that measured the same.
_STAMPS = ["created_at", "commit"]
_VALUES = ["value", "ci_low", "ci_high", *_STAMPS]

Injection = Callable[[], None]
"""Called in the forked process before run.py starts; must be picklable."""

FORKS: dict[str, list[Injection]] = {"sequential": [], "joblib": [injected.forked_workers]}


@dataclass(frozen=True)
class Answer:
    """How a run ended: its exit code (negative: the signal; None: it hung), and what it printed."""

    code: int | None
    out: str
    err: str
    seconds: float


class Run:
    """One `python run.py OVERRIDES`, going on. It leads a process group, as in a shell."""

    def __init__(self, overrides: Sequence[str], injections: Sequence[Injection] = ()) -> None:
        self._folder = Path(mkdtemp(prefix="polykv-run-"))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOADED))
        arguments = (list(overrides), list(injections), self._folder)
        self._process = context.Process(target=_child, args=arguments)
        self._start = time.monotonic()
        self._process.start()
        self.pid = self._process.pid

    def workers(self) -> list[psutil.Process]:
        """The processes that it has started and that live."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
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
        out, err = (
            path.read_text(errors="replace") if path.exists() else ""
            for path in (self._folder / "out", self._folder / "err")
        )
        code = self._process.exitcode if ended else None
        self._process.close()
        shutil.rmtree(self._folder)
        return Answer(code, out, err, taken)


def run(overrides: Sequence[str], *injections: Injection) -> Answer:
    """One run from start to end."""
    return Run(overrides, injections).end()


def table(root: Path) -> bytes:
    """Every row below `root` and every table drawn of them, stamps apart.

    Raises:
        AssertionError: a damaged or leftover file, or a row that is there twice.
    """
    frame, damaged = load_rows(root)
    assert not damaged, damaged
    leftovers = [path.name for path in root.glob("cells/*/.*")]
    assert not leftovers, f"left behind: {leftovers}"
    assert not frame.duplicated([c for c in frame.columns if c not in _VALUES]).any(), "twice"
    texts = [frame.drop(columns=_STAMPS).to_csv(index=False)]
    for path in sorted(root.glob("tables/*.csv")):
        lines = path.read_text(encoding="utf-8").split("\n")
        texts += [path.name, *(line for line in lines if not line.startswith("#"))]
    return "\n".join(texts).encode()


def finished(root: Path) -> dict[Path, bytes]:
    """The files of the cells that are done, whole or not."""
    return {path: path.read_bytes() for path in sorted(root.glob("cells/*/*.json"))}


def in_folder(root: Path, *more: str) -> tuple[str, ...]:
    """The overrides of the sweep into `root`."""
    return (*SWEEP, *more, f"results_dir={root}")


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
        # Nothing is left to import, unless somebody else's forkserver was running already.
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
