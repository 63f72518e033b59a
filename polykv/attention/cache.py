"""CascadeCache, for agents that read a pool in place: layers reference the pool and store only the agents' suffixes."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from polykv.errors import PolyKVError
from polykv.segment import Segment


class CascadeLayer(DynamicLayer):
    """One layer: the pool's compressed segments, shared, and each agent's own keys and values after them."""

    keys: Tensor
    values: Tensor

    def __init__(self, segments: Sequence[Segment], backend: str) -> None:
        super().__init__()
        self.segments = segments
        self.backend = backend
        self.n_prefix = sum(segment.n_tokens for segment in segments)
        self.awaits_attention = False

    @property
    def n_suffix(self) -> int:
        """Tokens after the prefix, padding among them."""
        return self.keys.shape[2] if self.is_initialized else 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (agents, kv_heads, new tokens, head_dim); returns those of the whole suffix.

        The returned keys carry this layer to the attention function as an attribute of the tensor, because most
        models pass only these two tensors to it, not the cache. No global state is needed, so any number of caches
        and threads may be in use. A model that does not attend to the tensors that `update` returns leaves
        `awaits_attention` set, and the next update raises (CascadeCache.update).
        """
        super().update(key_states, value_states)
        self.awaits_attention = True
        # Set on a view that is dropped after the call: on self.keys it would be a reference cycle.
        keys: Any = self.keys.view_as(self.keys)
        keys.cascade_layer = self
        return keys, self.values

    def get_seq_length(self) -> int:
        return self.n_prefix + self.n_suffix

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(mask length, offset): the mask covers the suffix only, since every query sees the whole prefix."""
        return self.n_suffix + query_length, self.n_prefix

    def reset(self) -> None:
        # DynamicLayer.reset zeroes the tokens but keeps them in some of the supported versions of transformers.
        self.keys = self.values = None
        self.is_initialized = self.awaits_attention = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens of every agent.

        Raises:
            PolyKVError: a positive number, or more tokens than the suffix has; the prefix is shared.
        """
        if not -self.n_suffix <= tokens_to_remove <= 0:
            raise PolyKVError(
                f"crop({tokens_to_remove}) of agents with {self.n_suffix} tokens of their own; pass the negative "
                "number of tokens to remove, at most these: the shared pool cannot be cropped"
            )
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            indices = indices.to(self.keys.device)
            self.keys, self.values = self.keys[indices], self.values[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)


class CascadeCache(Cache):
    """Cache of N agents over one compressed prefix, made by `SharedKVPool.reader` and read within `attend_in_place`.

    Only the suffixes grow, in the model's own dtype. Beam search, cropping, and repeating or selecting agents
    act on the suffixes; `reset` drops them.
    """

    def __init__(
        self, layers: Sequence[Sequence[Segment]], n_agents: int, backend: str = "torch"
    ) -> None:
        """`layers`: the segments of each layer, with batch size 1.

        Raises:
            PolyKVError: n_agents < 1, or a pool of several documents.
        """
        batch = layers[0][0].key.shape[0]
        if batch != 1:
            raise PolyKVError(
                f"this pool has batch size {batch}; agents share a pool of batch size 1"
            )
        if n_agents < 1:
            raise PolyKVError(f"n_agents={n_agents}; a reader needs at least one agent")
        super().__init__(layers=[CascadeLayer(segments, backend) for segments in layers])
        self.n_agents = n_agents
        self._last: CascadeLayer | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens to a layer; called by the model.

        Raises:
            PolyKVError: the pool of another model, another number of agents, or a model that does not attend in place.
        """
        if self._last is not None and self._last.awaits_attention:
            raise PolyKVError(
                "the model does not attend to the pool in place; run it inside "
                "`with attend_in_place(model):`, or use reader=dequantize if it already runs there"
            )
        self._check(key_states, layer_idx)
        self._last = self.layers[layer_idx]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check(self, k_BHTD: Tensor, index: int) -> None:
        if index >= len(self.layers):
            raise PolyKVError(
                f"the pool has {len(self.layers)} layers, fewer than the model; read it with the model that wrote it"
            )
        layer = self.layers[index]
        pooled = layer.segments[0].key
        batch, heads, _, dim = k_BHTD.shape
        if (heads, dim) != pooled.shape[1::2]:
            raise PolyKVError(
                f"layer {index} of the pool has {pooled.shape[1]} kv heads of {pooled.shape[3]} and the "
                f"model {heads} of {dim}; read a pool with the model that wrote it"
            )
        device = next(iter(pooled.tensors.values())).device
        if device != k_BHTD.device:
            raise PolyKVError(
                f"layer {index} of the pool is on {device}, that of the model on {k_BHTD.device}; "
                "write the pool again with the model on its present device"
            )
        # Beam search and num_return_sequences give an agent several rows.
        if not layer.is_initialized and batch % self.n_agents:
            raise PolyKVError(
                f"{batch} queries for a reader of {self.n_agents} agents; give one query per agent"
            )
