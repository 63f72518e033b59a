"""CascadeCache: a transformers cache of agents that read one pool in place.

Its layers reference the pool's compressed segments (the prefix) and store only each agent's own tokens (the suffix).
Layers with a state copy it for each agent when the model first asks for it (polykv/recurrent.py).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Cache

from polykv.attention.layers import CascadeLayer, QuantizedSuffixLayer
from polykv.codecs.base import Codec
from polykv.errors import PolyKVError
from polykv.recurrent import State, StateLayer
from polykv.segment import Segment


class CascadeCache(Cache):
    """Cache of N agents that share one compressed prefix, to be used within `attend_in_place(model)`.

    `SharedKVPool.reader` and `CacheCard.reader` make it. Only the suffixes grow. Beam search, cropping, and repeating
    or selecting agents act on the suffixes and states; `reset` drops them. With states there is no cropping, and beam
    search needs `batch_repeat_interleave(num_beams)` first.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Segment] | State],
        n_agents: int,
        backend: str = "torch",
        n_prefix: int | None = None,
        windows: Sequence[int | None] = (),
        orders: Sequence[Tensor | None] = (),
        suffix: Codec | None = None,
        scales: Sequence[Tensor | None] = (),
    ) -> None:
        """A cache without suffixes.

        Args:
            layers: the segments of each layer, or its state, with batch size 1.
            backend: the code that attends to them (polykv/kernels).
            n_prefix: tokens of the prefix; None: those of the segments.
            windows: of each layer; empty: all have full attention.
            orders: of each layer (`CascadeLayer.order`); empty: all have the order of the text.
            suffix: the codec of the suffixes (`Recipe.suffix`); None: they are kept in the model's own dtype.
            scales: of each layer, what its own keys are divided by before that (`QuantizedSuffixLayer`).

        Raises:
            PolyKVError: n_agents < 1, or a pool of several documents.
        """
        batch = next(one[0].key.shape[0] for one in layers if not isinstance(one, State))
        if batch != 1:
            raise PolyKVError(
                f"this pool has batch size {batch}; agents share a pool of batch size 1"
            )
        if n_agents < 1:
            raise PolyKVError(f"n_agents={n_agents}; a reader needs at least one agent")
        nothing = [None] * len(layers)
        each = zip(layers, windows or nothing, orders or nothing, scales or nothing, strict=True)
        super().__init__(
            layers=[
                one.layer(n_agents)
                if isinstance(one, State)
                else QuantizedSuffixLayer(suffix, scale, one, backend, n_prefix, window, order)
                if suffix and scale is not None  # a pool has both or neither
                else CascadeLayer(one, backend, n_prefix, window, order)
                for one, window, order, scale in each
            ]
        )
        beside_states = any(isinstance(layer, StateLayer) for layer in self.layers)
        for layer in self.layers:
            layer.beside_states = beside_states
        self.n_agents = n_agents
        self._last_updated: CascadeLayer | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens to a layer (`CascadeLayer.update`); called by the model.

        Raises:
            PolyKVError: the pool of another model, another number of agents, or a model that does not attend in place.
        """
        if self._last_updated is not None and self._last_updated.awaits_attention:
            raise PolyKVError(
                "the model does not attend to the pool in place; run it inside "
                "`with attend_in_place(model):`, or use reader=dequantize if it already runs there"
            )
        self._check(key_states, layer_idx)
        self._last_updated = self.layers[layer_idx]
        try:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except PolyKVError as error:
            raise PolyKVError(f"layer {layer_idx}: {error}") from error

    def reset(self) -> None:
        """Drop the suffixes, and return to the pool's states."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, StateLayer):
                self.layers[index] = layer.state.layer(self.n_agents)
            else:
                layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens of every suffix (`CascadeLayer.crop`); raises PolyKVError, also if there are states."""
        for layer in self.layers:  # before any layer is cropped
            if isinstance(layer, StateLayer):
                layer.crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def _check(self, k_BHTD: Tensor, index: int) -> None:
        """Check that new keys fit layer `index` of the pool and the number of agents; raises PolyKVError."""
        if index >= len(self.layers):
            raise PolyKVError(
                f"the pool has {len(self.layers)} layers, fewer than the model; read it with the model that wrote it"
            )
        layer = self.layers[index]
        if not isinstance(layer, CascadeLayer):
            raise PolyKVError(
                f"layer {index} of the pool keeps a state, and the model's has attention; read a pool with the model "
                "that wrote it"
            )
        pooled = layer.segments[0].key
        batch, heads, _, dim = k_BHTD.shape
        _, pool_heads, _, pool_dim = pooled.shape
        if (heads, dim) != (pool_heads, pool_dim):
            raise PolyKVError(
                f"layer {index} of the pool has {pool_heads} kv heads of {pool_dim} and the "
                f"model {heads} of {dim}; read a pool with the model that wrote it"
            )
        device = next(iter(pooled.tensors.values())).device
        if device != k_BHTD.device:
            raise PolyKVError(
                f"layer {index} of the pool is on {device} and the model's is on {k_BHTD.device}; "
                "make the pool again with the model on this device"
            )
        # A multiple is allowed: beam search and num_return_sequences give each agent several rows.
        if not layer.is_initialized and batch % self.n_agents:
            raise PolyKVError(
                f"{batch} queries for a reader of {self.n_agents} agents; give one query per agent"
            )
