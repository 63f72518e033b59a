"""The processes of a sweep: interrupts, and workers that die or lose their parent."""

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

ENDING = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130  # exit code of a process that one of these ended
PATIENCE = 3.0  # seconds that interrupted processes get to end by themselves
STUCK = 5.0  # seconds within which joblib's manager notices a dead worker, if it is not stuck


def settle_signals() -> None:
    """Make SIGTERM raise KeyboardInterrupt, as Ctrl-C does, and the second of either end all processes at once.

    Python handles a signal only between two of its instructions, which native code can delay by minutes. So a thread
    reads the signals from a pipe.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    Thread(target=_quit_on_second, args=(read,), daemon=True).start()


def _quit_on_second(pipe: int) -> None:
    n_interrupts = 0
    while n_interrupts < 2:
        n_interrupts += os.read(pipe, 1)[0] in ENDING
    stop_workers(patience=0)
    os._exit(INTERRUPTED)


def stop_after_interrupt() -> None:
    """End the workers after Ctrl-C or SIGTERM. From here on another only quits (`settle_signals`)."""
    for number in ENDING:
        signal.signal(number, lambda *_: None)
    stop_workers()


def stop_workers(patience: float = PATIENCE) -> None:
    """Interrupt this process's children on this machine, then kill those left. No cell is half written by it."""
    workers = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            # The resource tracker ends after this process, and cleans up.
            if "resource_tracker" not in " ".join(child.cmdline()):
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
    """Within the context, kill the workers of a joblib pool whose manager is stuck, so that the sweep ends.

    A worker killed while it sends its result leaves half a message. joblib's manager, which would notice the death,
    waits for the rest as long as any process holds the pipe open: the other workers and this process.
    """
    over = Event()
    watch = Thread(target=_stop_when_stuck, args=(over,), daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()


def _stop_when_stuck(over: Event) -> None:
    dead = set(_dead_workers())
    while not over.wait(STUCK):
        still = set(_dead_workers()) & dead
        if still:  # the manager would have noticed them by now
            stop_workers(patience=0)
            reusable_executor._executor._result_queue._writer.close()
            return
        dead = set(_dead_workers())


def _dead_workers() -> Iterator[int]:
    """Pids of joblib's workers that ended. Other children of this process may end without anybody waiting for them."""
    executor = reusable_executor._executor
    for pid in list(executor._processes) if executor else []:
        try:
            ended = psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            ended = True
        if ended:
            yield pid


def settle_into_worker() -> None:
    """In a pool's worker: no progress bars, and end when the sweep's process ends. Elsewhere a no-op."""
    if multiprocessing.current_process().name == "MainProcess" or isinstance(sys.stderr, _Plain):
        return
    sys.stderr = _Plain(sys.stderr)
    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class _Plain:
    """A stream that does not look like a terminal, so that tqdm draws no bars."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return False
