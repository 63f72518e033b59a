"""Time to first token of a receiver that gets its context as text or as a card, with the time of each stage.

All paths use the same model, dtype and runtime, and take turns within each repeat, so that load on the machine affects
all of them. A card's path starts with the sender's full cache in memory and includes everything after that, as in the
published stages (create + inject + generate = total).
"""

import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from polykv.attention.cascade import attend_in_place
from polykv.errors import PolyKVError
from polykv.evaluation.process import keep_freed_memory
from polykv.handoff import stores
from polykv.handoff.card import CacheCard
from polykv.handoff.policy import Policy
from polykv.handoff.signals import Topology
from polykv.handoff.signing import SigningKey
from polykv.pool import prefill
from polykv.progress import track
from polykv.supported import check_length, check_rope
from polykv.tokens import last_places
from polykv.unshared import unshared_cache

VERSION = 1  # of the timing protocol
STAGES = ("create", "serialize", "transfer", "verify", "dequantize", "inject", "first_forward")
TRANSPORTS = ("memory", "file")
WARMUP = 2


@dataclass(frozen=True)
class Route:
    """How the context reaches the receiver: as text (a policy with store `text`), or as a card in memory or in a file.

    The receiver decodes the card into an unshared cache (reader `dequantize`) or attends to it in place (`in_place`).
    `backend` (polykv/kernels) encodes, decodes and attends.
    """

    policy: Policy
    transport: str = "memory"
    reader: str = "dequantize"
    backend: str = "auto"


@dataclass(frozen=True)
class Timing:
    """Milliseconds per repeat, in total and for each stage of the path: arrays (repeats,).

    `mean_bits`: stored bits per cached value of the card, including metadata; None for text.
    """

    total: np.ndarray
    stages: dict[str, np.ndarray]
    mean_bits: float | None = None


class Clock:
    """A stopwatch with named laps in milliseconds; synchronizes with a CUDA device at the end of each."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.laps: dict[str, float] = {}
        self._start = self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return 1e3 * time.perf_counter()

    def lap(self, stage: str) -> None:
        now = self._now()
        self.laps[stage] = now - self._last
        self._last = now

    def total(self) -> float:
        return self._last - self._start


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    ids_T: Tensor,
    n_turn: int,
    paths: Sequence[Route],
    budget_bits: float,
    repeats: int,
    key: SigningKey | None = None,
) -> list[Timing]:
    """One Timing per path, for the context `ids_T` (tokens,) whose last `n_turn` tokens are the receiver's own turn.

    With a `key`, cards in files are signed (in stage `serialize`) and their signatures verified (`verify`). From here
    on the process keeps freed memory (`keep_freed_memory`), like a server that has run for a while.

    Raises:
        PolyKVError: more tokens than the model has positions, or fewer than two repeats.
    """
    if repeats < 2:
        raise PolyKVError(f"repeats={repeats}, and quartiles need at least two; raise it")
    check_length(model.config, len(ids_T), f"context={len(ids_T)}")
    check_rope(model.config, len(ids_T) - n_turn, len(ids_T), f"context={len(ids_T)}")
    keep_freed_memory()
    known_T, turn_T = ids_T[:-n_turn], ids_T[-n_turn:]
    cache = prefill(model, known_T[None])
    runs: list[list[tuple[Clock, float | None]]] = [[] for _ in paths]
    with tempfile.TemporaryDirectory(prefix="polykv-ttft-") as folder:
        for _ in track(range(WARMUP + repeats), "timing the first token"):
            for path, of_path in zip(paths, runs, strict=True):
                args = (model, tokenizer, cache, known_T, turn_T, path, budget_bits, key)
                of_path.append(_run(*args, Path(folder) / "card.safetensors"))
    return [_timing(of_path[WARMUP:]) for of_path in runs]


def seal(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: Cache,
    known_T: Tensor,
    policy: Policy,
    budget_bits: float,
    backend: str,
) -> CacheCard:
    """A card as timed and scored here: the first half of its tokens counts as the shared segment."""
    topology = Topology(n_shared=len(known_T) // 2)
    settings = (policy, budget_bits, topology)
    return CacheCard.seal(cache, known_T, model, tokenizer, *settings, backend=backend)


def _run(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: Cache,
    known_T: Tensor,
    turn_T: Tensor,
    path: Route,
    budget_bits: float,
    key: SigningKey | None,
    file: Path,
) -> tuple[Clock, float | None]:
    """Run a path once; returns its laps, and the card's mean bits."""
    clock = Clock(model.device)
    if path.policy.store == "text":
        received = DynamicCache(config=model.config)
        feed = torch.cat([known_T, turn_T])
    else:
        card = seal(model, tokenizer, cache, known_T, path.policy, budget_bits, path.backend)
        clock.lap("create")
        if path.transport == "file":
            content = card.to_bytes(key)
            clock.lap("serialize")
            stores.write(str(file), content)
            content = stores.read(str(file))
            clock.lap("transfer")
            card = CacheCard.from_bytes(content, model, tokenizer, key, path.backend)
            clock.lap("verify")
        if path.reader == "in_place":
            received = card.reader()
        else:
            layers = card.decode()
            clock.lap("dequantize")
            received = unshared_cache(layers, card.metadata.windows or (), card.n_tokens)
        clock.lap("inject")
        feed = turn_T
    with attend_in_place(model) if path.reader == "in_place" else nullcontext():
        ids_BT = feed[None].to(model.device)
        out = model(input_ids=ids_BT, past_key_values=received, logits_to_keep=last_places(ids_BT))
        int(out.logits[0, -1].argmax())
    clock.lap("first_forward")
    return clock, None if path.policy.store == "text" else card.mean_bits


def _timing(runs: Sequence[tuple[Clock, float | None]]) -> Timing:
    clocks = [clock for clock, _ in runs]
    stages = {name: np.array([clock.laps[name] for clock in clocks]) for name in clocks[0].laps}
    return Timing(np.array([clock.total() for clock in clocks]), stages, runs[0][1])
