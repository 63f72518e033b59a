"""KV memory: the accountings `paper` and `resident`.

`paper` repeats PolyKV's arithmetic; `resident` is measured in a process of its own while all agents decode at the same
time. The other two, `nominal` and `stored`, are properties of a pool (polykv/pool.py).
"""

import sys
from functools import lru_cache
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from polykv.errors import PolyKVError
from polykv.evaluation.concurrency import QUERY_TOKENS, caches_of, decode, pool_of, synthetic_layers
from polykv.evaluation.process import MeasuringProcess, meter_of
from polykv.geometry import Geometry
from polykv.models import ModelSource, pick_device, pick_dtype
from polykv.pool import SharedKVPool
from polykv.recipe import Recipe
from polykv.supported import check_length

VERSION = 3  # of what is counted and how it is measured
GB = 1e9
DECODE_STEPS = 1  # enough for the peak: every step copies each layer to grow it
WARMUP_TOKENS = 64
# Larger models take minutes per measurement on a CPU and are not measured there.
MAX_CPU_PARAMETERS = 2e9


def paper_bytes(geometry: Geometry, n_tokens: int, n_agents: int, ratio: float | None) -> float:
    """Bytes as in PolyKV's table: fp32 caches of the prefilled tokens, or one such cache over `ratio` for a pool.

    15 agents x 5,035 tokens x 262,144 B = 19.798 GB, and 5,035 x 262,144 B / 2.909 = 0.454 GB for llama-3-8b
    (32 layers, 8 kv heads, head_dim 128). `ratio` None: unshared caches. Layers with a sliding window keep its
    tokens, and states are not compressed.
    """
    one_cache, state = geometry.values(n_tokens) * 4, geometry.state_bytes(torch.float32)
    return (one_cache + state) * n_agents if ratio is None else one_cache / ratio + state


def synthetic_pool(
    geometry: Geometry, n_tokens: int, dtype: torch.dtype, recipe: Recipe, backend: str = "auto"
) -> SharedKVPool:
    """A pool of Gaussian keys and values, whose bytes are those of any content."""
    layers = synthetic_layers(geometry, n_tokens, dtype, torch.device("cpu"))
    about: Any = {"windows": geometry.windows, "n_tokens": n_tokens}
    return SharedKVPool.from_layers(layers, recipe, geometry.n_layers, backend, **about)


def resident_bytes(
    source: ModelSource,
    recipe: Recipe,
    reader: str,
    n_tokens: int,
    n_agents: int,
    device: str,
    backend: str = "auto",
    n_steps: int = DECODE_STEPS,
) -> int:
    """Peak bytes above the loaded model while `n_agents` decode `n_steps` tokens in one batch.

    Measured in a process of its own: peak resident set size on a CPU, peak allocated memory on CUDA. Read mode
    `unshared` holds N full caches, `dequantize` the pool and N full caches, `in_place` the pool alone.

    Raises:
        PolyKVError: it would not fit into memory or the model's positions, or the platform has no resettable peak.
    """
    if pick_device(device).type != "cuda" and not sys.platform.startswith("linux"):
        raise PolyKVError(
            f"peak resident memory cannot be read on {sys.platform}; use Linux or CUDA"
        )
    check_length(source.config(), n_tokens + QUERY_TOKENS + n_steps, "decoding after the prefix")
    check_fits(source, reader, n_tokens, n_agents, device)
    measure = _process(source)
    return measure(source, recipe, reader, n_tokens, n_agents, device, backend, n_steps)


_worker: tuple[ModelSource, MeasuringProcess] | None = None
_warm: set[tuple[str, int]] = set()  # (read mode, agents) that the worker has run before


def _process(source: ModelSource) -> MeasuringProcess:
    """The worker for memory of a model, which it keeps loaded; it ends with this process, or when another is wanted.

    A process that has freed one model's memory shows up to 5 MiB more for the next.
    """
    global _worker
    if _worker is None or _worker[0] != source or not _worker[1].is_alive():
        if _worker is not None:
            _worker[1].end()
        _worker = source, MeasuringProcess(_resident_bytes)
    return _worker[1]


def check_fits(source: ModelSource, reader: str, n_tokens: int, n_agents: int, device: str) -> None:
    """Refuse what does not fit into memory, or takes minutes on a CPU.

    Raises:
        PolyKVError: with the gigabytes needed and available.
    """
    on_cuda = pick_device(device).type == "cuda"
    itemsize, n_weights = pick_dtype(source.dtype).itemsize, source.n_parameters()
    if not on_cuda and n_weights > MAX_CPU_PARAMETERS:
        raise PolyKVError(
            f"not measured: {source.name} has {n_weights / 1e9:.1f} billion parameters, which a CPU decodes "
            "too slowly; measure on a GPU"
        )
    # The pool, the cache it is made from and one copy per agent, plus 20 % for the temporaries of a step. Agents always
    # have states of their own.
    copies, geometry = 2 + (0 if reader == "in_place" else n_agents), Geometry.of(source.config())
    cache = geometry.values(n_tokens) * itemsize * copies
    cache += geometry.state_bytes(pick_dtype(source.dtype)) * (2 + n_agents)
    need = 1.2 * (n_weights * itemsize + cache)
    have = torch.cuda.mem_get_info()[0] if on_cuda else psutil.virtual_memory().available
    if need > have:
        raise PolyKVError(
            f"{source.name} ({n_weights * itemsize / GB:.1f} GB of weights) with {n_agents} agents' caches "
            f"needs about {need / GB:.0f} GB and {have / GB:.0f} GB are free; measure on a larger machine"
        )


@torch.no_grad()
def _resident_bytes(
    source: ModelSource,
    recipe: Recipe,
    reader: str,
    n_tokens: int,
    n_agents: int,
    device: str,
    backend: str,
    n_steps: int,
) -> int:
    model = _model(source, device)
    meter = meter_of(model.device)

    def measure(length: int, n_agents: int) -> int:
        meter.start()
        # Bytes do not depend on the content.
        geometry, device = Geometry.of(model.config), model.device
        layers = list(synthetic_layers(geometry, length, model.dtype, device))
        seen = (geometry.windows, length)
        pool = pool_of((reader,), layers, recipe, backend, (), *seen)
        caches = caches_of(reader, layers, pool, n_agents, True, *seen)
        del layers
        steps = decode(model, caches, length, n_agents, n_steps)
        next(steps)  # reads the queries
        meter.reset_peak()
        for _ in steps:
            pass
        return meter.peak()

    if (reader, n_agents) not in _warm:  # first calls allocate memory that is not KV cache
        measure(WARMUP_TOKENS, n_agents)
        _warm.add((reader, n_agents))
    return measure(n_tokens, n_agents)


@lru_cache(maxsize=1)
def _model(source: ModelSource, device: str) -> PreTrainedModel:
    return source.load(device)[0]
