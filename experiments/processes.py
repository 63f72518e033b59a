"""The processes of a sweep: how they stop, and what a worker leaves to the process that planned the sweep."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from threading import Event, Thread
from typing import Any

import psutil
from joblib.externals.loky import reusable_executor

INTERRUPTED = 130  # the shells' exit code of a process that Ctrl-C ended
PATIENCE = 3.0  # seconds in which interrupted processes may end by themselves
STUCK = 5.0  # seconds after which a dead worker must have been noticed


def second_interrupt_quits() -> None:
    """The first Ctrl-C stays Python's KeyboardInterrupt; the second ends all processes at once.

    Python sees an interrupt between two of its instructions only; so that native code which runs for minutes
    cannot put the second one off, a thread reads the signals from a pipe.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    Thread(target=_quit_on_second, args=(read,), daemon=True).start()


def _quit_on_second(pipe: int) -> None:
    n_interrupts = 0
    while n_interrupts < 2:
        n_interrupts += os.read(pipe, 1) == bytes([signal.SIGINT])
    stop_workers(patience=0)
    os._exit(INTERRUPTED)


def stop_after_interrupt() -> None:
    """What Ctrl-C does: the workers end. A second one does not disturb it, but quits (`second_interrupt_quits`)."""
    signal.signal(signal.SIGINT, lambda *_: None)
    stop_workers()


def stop_workers(patience: float = PATIENCE) -> None:
    """Interrupt the processes that this one started here, then kill them: a cell is written whole or not at all."""
    workers = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "resource_tracker" not in " ".join(
                child.cmdline()
            ):  # it ends, and tidies up, after us
                workers.append(child)
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(workers, timeout=patience)
    for worker in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


@contextlib.contextmanager
def workers_watched() -> Iterator[None]:
    """Within it, a pool whose manager is stuck loses its workers, which frees it.

    A worker that is killed while it sends its result leaves half a message, and joblib's manager, which alone
    would notice the death, waits for the other half as long as anybody holds the pipe open: the other workers,
    and this process, which never writes to it.
    """
    over = Event()
    watch = Thread(target=_stop_when_stuck, args=(over, set(_zombies())), daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()


def _stop_when_stuck(over: Event, others: set[int]) -> None:
    dead = set(_zombies()) - others
    while not over.wait(STUCK):
        still = set(_zombies()) & dead
        if still:  # a manager at work would have noticed long ago
            stop_workers(patience=0)
            reusable_executor._executor._result_queue._writer.close()
            return
        dead = set(_zombies()) - others


def _zombies() -> Iterator[int]:
    """Children that ended and that nobody has asked after."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE:
                yield child.pid


def settle_into_worker() -> None:
    """In a worker of this machine's pool: draw no bars, and end when the sweep's process does. Elsewhere nothing."""
    if multiprocessing.current_process().name == "MainProcess" or isinstance(sys.stderr, _Plain):
        return
    sys.stderr = _Plain(sys.stderr)
    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class _Plain:
    """A stream that is no terminal, so that tqdm leaves it alone."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return False
