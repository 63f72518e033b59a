"""A measurement in a process of its own, and the meters of what such a process holds.

A process that has worked before holds memory by chance, and its threads and allocator have been set by others.
"""

import ctypes
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

from polykv.errors import PolyKVError

# malloc.h. Blocks from MMAP_THRESHOLD up, MMAP_MAX of them at most, are mapped, and unmapped when freed; free
# memory at the end of the heap is given back from TRIM_THRESHOLD bytes up, never where that is -1.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
ALL_MAPPED = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 16 * 1024}  # 65536 is glibc's own
ALL_KEPT = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
KEPT = "freed memory is kept for reuse (where malloc is glibc's)"  # for the notes of times


def in_fresh_process(measure: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run `measure(*arguments, **options)` in a new process; function, arguments and result must be picklable.

    Raises:
        PolyKVError: it failed, or its process was ended.
    """
    worker = MeasuringProcess(measure)
    try:
        return worker(*arguments, **options)
    finally:
        worker.end()


def start_early(module: str) -> None:
    """Let the server of measuring processes import `module` beside what this process does meanwhile."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    forkserver.ensure_running()


class MeasuringProcess:
    """A worker process that runs `measure` for one set of arguments after another; it may keep a model between them."""

    def __init__(self, measure: Callable[..., Any]) -> None:
        # A forkserver imports torch once; each of its children starts with a heap that nothing has touched.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([measure.__module__])
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, measure), daemon=True)
        self._process.start()
        child.close()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Run `measure(*arguments, **options)` in the worker and return its result.

        Raises:
            PolyKVError: the measurement failed, or its process ended (the worker is then of no more use).
        """
        try:
            self._pipe.send((arguments, options))
            found, error = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise PolyKVError(
                f"the measuring process ended with code {self._process.exitcode} (out of memory?); lower "
                "n_agents or context"
            ) from None
        if error is not None:
            raise PolyKVError(error)
        return found

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def end(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, measure: Callable[..., Any]) -> None:
    """The worker's loop: run `measure` for each request, until the pipe is closed."""
    while True:
        try:
            arguments, options = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((measure(*arguments, **options), None))
        except PolyKVError as error:
            pipe.send((None, str(error)))
        except Exception as error:  # the parent reports it
            pipe.send((None, f"not measured: {type(error).__name__}: {error}"))


def meter_of(device: torch.device) -> "CpuMeter | CudaMeter":
    return CudaMeter() if device.type == "cuda" else CpuMeter()


class CudaMeter:
    """Allocated CUDA memory above what `start` found."""

    def start(self) -> None:
        torch.cuda.empty_cache()
        self._base = torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self._base


class CpuMeter:
    """Resident set of this Linux process above what `start` found."""

    def start(self) -> None:
        _trim_heap()
        self._base = _status_bytes("VmRSS")

    def reset_peak(self) -> None:
        _trim_heap()
        Path("/proc/self/clear_refs").write_text("5")  # 5: the peak falls to the present size

    def peak(self) -> int:
        return _status_bytes("VmHWM") - self._base


def keep_freed_memory() -> None:
    """Let this process use again what it frees, from now on: whatever is timed calls this first.

    Else glibc maps each block above 32 MiB afresh, and a step that copies a cache of such blocks, as a
    DynamicCache does, spends several times longer on the pages of its copies than on copying.
    """
    _set_malloc(ALL_KEPT)


def _trim_heap() -> None:
    """Give freed memory back now and from now on, so that what is counted is what is alive.

    glibc keeps freed blocks for reuse, more or fewer by chance.
    """
    if libc := _set_malloc(ALL_MAPPED):
        libc.malloc_trim(0)


def _set_malloc(settings: dict[int, int]) -> ctypes.CDLL | None:
    """The C library, set; None where it is not glibc, which alone has these settings."""
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if not hasattr(libc, "malloc_trim"):
        return None
    for name, value in settings.items():
        libc.mallopt(name, value)
    return libc


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise PolyKVError(f"/proc/self/status has no {field}; this kernel does not report it")
