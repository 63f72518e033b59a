"""Interleaved timing, peak memory, and contenders in their own processes. Torch-free."""

import ctypes
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any, TypeVar

T = TypeVar("T")

WARMUPS = 2
SAY_SECONDS = 4.0
MALLOPT_MMAP_THRESHOLD = -3  # malloc.h: blocks from this size are mapped, and unmapped when freed


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock seconds and processor seconds of `work()`.

    With one thread on an idle machine they are equal; on a busy one the processor time is the meaningful one.
    """
    start, processor_start = time.perf_counter(), time.process_time()
    result = work()
    seconds = time.perf_counter() - start, time.process_time() - processor_start
    del result
    return seconds


def interleaved(cases: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Results of `repeats` calls of each case, which take turns so that disturbances affect all."""
    given: dict[str, list[T]] = {name: [] for name in cases}
    for turn in range(WARMUPS + repeats):
        for name, once in cases.items():
            one = once()
            if turn >= WARMUPS:
                given[name].append(one)
    return given


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The 25th, 50th and 75th percentile."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


def peak_bytes(work: Callable[[], object]) -> int | None:
    """Peak resident set during `work()` above that before it, with its result; None if not on Linux.

    Afterwards this process returns freed memory to the system at once, which is slow: measure times first.
    """
    if not sys.platform.startswith("linux"):
        return None
    work()  # excludes what is loaded or cached on first use
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc keeps freed blocks, more or fewer by chance
        libc.mallopt(MALLOPT_MMAP_THRESHOLD, 16 * 1024)
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak falls to the present size
    before = _status_bytes("VmRSS")
    result = work()
    peak = _status_bytes("VmHWM") - before
    del result
    return peak


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Context that prints what is being done, and again every few seconds."""
    done, start = threading.Event(), time.perf_counter()

    def say() -> None:
        print(what, flush=True)
        while not done.wait(SAY_SECONDS):
            print(f"{what}: {time.perf_counter() - start:.0f} s", flush=True)

    thread = threading.Thread(target=say)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Worker:
    """A process that answers each request, one line, with one line of JSON; it waits while others work."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        """Start it and wait until it is ready. `note` says what it does, `reason` why it could not start."""
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        answer = self._answer()
        self.reason: str | None = answer.get("reason")
        self.note: str = answer.get("note", "")

    def ask(self, request: str) -> Any:
        """The value that the action returned in the worker.

        Raises:
            RuntimeError: the action raised an error.
        """
        print(request, file=self._process.stdin, flush=True)
        answer = self._answer()
        if "reason" in answer:
            raise RuntimeError(answer["reason"])
        return answer["value"]

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        return {"reason": f"its process ended with {self._process.wait()}"}

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def answer_requests(start: Callable[[], tuple[str, Mapping[str, Callable[[], object]]]]) -> None:
    """The worker's side: `start()` gives a note and what each request does; then answer until there are no more.

    What libraries print is dropped, and whatever is raised is an answer: the row says it.
    """
    replies, sys.stdout = sys.stdout, sys.stderr  # which Worker does not read

    def reply(work: Callable[[], dict]) -> None:
        try:
            answer = work()
        except (Exception, SystemExit) as error:
            answer = {"reason": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=replies, flush=True)

    actions: dict[str, Callable[[], object]] = {}

    def begin() -> dict:
        note, found = start()
        actions.update(found)
        return {"note": note}

    reply(begin)
    for line in sys.stdin:
        action = actions[line.strip()]
        reply(lambda action=action: {"value": action()})
