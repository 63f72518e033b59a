"""Measurements in a separate process, and meters of its memory.

Memory and times measured in a process depend on what it did before: memory held by its allocator, threads, settings.
"""

import ctypes
import gc
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

from polykv.errors import PolyKVError

# malloc.h. Blocks of at least MMAP_THRESHOLD bytes, at most MMAP_MAX of them, are mapped, and unmapped when freed. Free
# memory at the end of the heap is returned to the system from TRIM_THRESHOLD bytes up (-1: never).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
MAPPED_BYTES = 16 * 1024
ALL_MAPPED = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: MAPPED_BYTES}  # 65536 is glibc's default
ALL_KEPT = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
IS_MMAPPED = 2  # malloc.c: a bit of a block's size, which is stored before the block
KEPT = "freed memory is kept for reuse (with glibc's malloc)"  # the note of timings


def in_fresh_process(measure: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run `measure(*arguments, **options)` in a new process; function, arguments and result must be picklable.

    Raises:
        PolyKVError: the measurement failed, or its process ended.
    """
    worker = MeasuringProcess(measure)
    try:
        return worker(*arguments, **options)
    finally:
        worker.end()


def start_early(module: str) -> None:
    """Start the fork server, which imports `module` in the background."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    forkserver.ensure_running()


class MeasuringProcess:
    """A worker process that runs `measure` for one set of arguments after another; it may keep a model between them."""

    def __init__(self, measure: Callable[..., Any]) -> None:
        # The fork server imports torch once; its children start with a fresh heap.
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
    """Allocated CUDA memory above that at `start`."""

    def start(self) -> None:
        torch.cuda.empty_cache()
        self._base = torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self._base


class CpuMeter:
    """Resident set size of this Linux process above that at `start`.

    The system reclaims pages of mapped files (libraries, weights) that were not read for a while. How many there were
    at the peak is not known, so the fewer of those at `reset_peak` and at `peak` are taken: what is reclaimed never
    hides growth.
    """

    def start(self) -> None:
        gc.collect()
        _map_all_memory()
        self._base = _status_bytes("VmRSS") - _status_bytes("RssFile")

    def reset_peak(self) -> None:
        _map_all_memory()
        self._files = _status_bytes("RssFile")
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset the peak to the current size

    def peak(self) -> int:
        files = min(self._files, _status_bytes("RssFile"))
        return _status_bytes("VmHWM") + _peak_lag() - files - self._base


def _peak_lag() -> int:
    """Bytes that VmHWM may be low by: Linux adds up a process's pages per CPU in batches (percpu_counter_batch)."""
    cpus = os.cpu_count() or 1
    return max(32, 2 * cpus) * cpus * resource.getpagesize()


def keep_freed_memory() -> None:
    """Make malloc keep freed memory for reuse in this process; called before anything is timed.

    Otherwise glibc maps every block above 32 MiB anew, and a step that copies a cache of such blocks, as a DynamicCache
    does, spends several times longer on page faults than on copying.
    """
    _set_malloc(ALL_KEPT)


def return_freed_memory() -> None:
    """Return what malloc keeps of freed memory to the system, under `keep_freed_memory` too.

    For work in steps whose largest blocks have sizes of their own, such as the log-probabilities of texts of different
    lengths: what one step leaves fits few blocks of the next, and a process would grow with every step.
    """
    if libc := _set_malloc({}):
        libc.malloc_trim(0)


def _map_all_memory() -> None:
    """Make malloc return freed memory to the system, now and from now on, so that only live memory is counted."""
    if libc := _set_malloc(ALL_MAPPED):
        libc.malloc_trim(0)
        _fill_gaps(libc)


def _fill_gaps(libc: ctypes.CDLL) -> None:
    """Occupy, for good, the gaps in the heap that could hold a block of MAPPED_BYTES; they take no memory.

    malloc maps a block only if it fits into no gap, and a block freed in a gap stays resident. A process that has read
    a tokenizer of 262k tokens has 340 MiB of gaps.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size = 2**30
    while size >= MAPPED_BYTES:
        block = libc.malloc(size)
        if not block or _size_field(block) & IS_MMAPPED:
            libc.free(block)
            size //= 2


def _size_field(block: int) -> int:
    return ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value


def _set_malloc(settings: dict[int, int]) -> ctypes.CDLL | None:
    """Apply mallopt settings and return the C library; None if it is not glibc, which alone has them."""
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
