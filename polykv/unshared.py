"""Unshared caches: transformers' own, of keys and values or states that came from a pool or a card."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer

from polykv.recurrent import State, StateLayer


def unshared_cache(
    layers: Iterable[tuple[Tensor, ...] | State | StateLayer | DummyLayer],
    windows: Sequence[int | None] = (),
    n_tokens: int | None = None,
) -> DynamicCache:
    """A DynamicCache of (keys, values), and of states or layers that continue one.

    For `windows` and `n_tokens` see `SharedKVPool.from_layers`. Layers may have fewer tokens: the others were dropped.
    """
    # transformers takes a third tensor, the window.
    pairs = zip(layers, windows or repeat(None), strict=bool(windows))
    states: dict[int, StateLayer | DummyLayer] = {}

    def given() -> Iterator[Any]:
        for number, (layer, window) in enumerate(pairs):
            if not isinstance(layer, tuple):
                states[number] = layer.layer(1) if isinstance(layer, State) else layer
                yield None, None
            else:
                yield (*layer, torch.tensor(window)) if window else layer

    cache = DynamicCache(given())
    for number, layer in enumerate(cache.layers):
        if number in states:
            cache.layers[number] = states[number]
        elif layer.is_sliding:
            layer.cumulative_length = n_tokens
        elif n_tokens and (n_dropped := n_tokens - layer.get_seq_length()):
            cache.layers[number] = ThinnedLayer(n_dropped)
            cache.layers[number].update(layer.keys, layer.values)
    return cache


class ThinnedLayer(DynamicLayer):
    """A layer some of whose tokens were dropped; those to come have the positions that they would have without."""

    def __init__(self, n_dropped: int) -> None:
        super().__init__()
        self._n_dropped = n_dropped

    def get_seq_length(self) -> int:
        """Tokens, the dropped ones included: the position of the next."""
        return super().get_seq_length() + self._n_dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(mask length, offset): the kept tokens stand directly before those to come, so that all are seen."""
        return super().get_seq_length() + query_length, self._n_dropped
