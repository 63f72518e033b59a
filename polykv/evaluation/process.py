"""A measurement in a process of its own, and the meters of what such a process holds.

A process that has worked before holds memory by chance, and its threads and allocator have been set by others.
"""

import ctypes
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from polykv.errors import PolyKVError

MALLOPT_MMAP_THRESHOLD = -3  # malloc.h: blocks from this size are mapped, and unmapped when freed


def in_fresh_process(measure: Callable[..., Any], *configs: DictConfig, **settings: Any) -> Any:
    """What `measure(*configs, **settings)` returns there; all three must be picklable.

    Raises:
        PolyKVError: it failed, or its process was ended.
    """
    # A forkserver imports torch once; each of its children starts with a heap that nothing has touched.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([measure.__module__])
    receiver, sender = context.Pipe(duplex=False)
    plain = [OmegaConf.to_container(config, resolve=True) for config in configs]
    process = context.Process(target=_child, args=(sender, measure, plain, settings))
    process.start()
    sender.close()
    try:
        found, error = receiver.recv()
    except EOFError:
        process.join()
        raise PolyKVError(
            f"the measuring process ended with code {process.exitcode} (out of memory?); lower n_agents or "
            "context"
        ) from None
    process.join()
    if error is not None:
        raise PolyKVError(error)
    return found


def _child(sender: Any, measure: Callable[..., Any], configs: list[dict], settings: dict) -> None:
    try:
        sender.send((measure(*map(OmegaConf.create, configs), **settings), None))
    except PolyKVError as error:
        sender.send((None, str(error)))
    except Exception as error:  # the parent reports it
        sender.send((None, f"not measured: {type(error).__name__}: {error}"))


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


def _trim_heap() -> None:
    """Give freed memory back now and from now on, so that what is counted is what is alive.

    glibc keeps freed blocks for reuse, more or fewer by chance; musl has neither call.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.mallopt(MALLOPT_MMAP_THRESHOLD, 16 * 1024)
        libc.malloc_trim(0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise PolyKVError(f"/proc/self/status has no {field}; this kernel does not report it")
