"""The cache of agents that read a pool in place: its layers refer to the pool and grow the agents' suffixes."""

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
        """Append (agents, kv_heads, new tokens, head_dim); the agents' own keys and values, all of them.

        The keys carry this layer to the attention function, as an attribute of the tensor object: most models
        keep the cache to themselves and hand over these two tensors and nothing else. So it holds for every
        model that attends to what `update` returned, with any number of caches and threads, and nothing
        global has to be kept in step. Where a model does not, `awaits_attention` stays set and the next
        update refuses (CascadeCache.update).
        """
        super().update(key_states, value_states)
        self.awaits_attention = True
        # An alias, which dies with the call: on the tensor kept, the attribute would be a reference cycle.
        keys: Any = self.keys.view_as(self.keys)
        keys.cascade_layer = self
        return keys, self.values

    def get_seq_length(self) -> int:
        return self.n_prefix + self.n_suffix

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask is for the suffix only: every query sees the whole prefix."""
        return self.n_suffix + query_length, self.n_prefix

    def reset(self) -> None:
        # DynamicLayer's own keeps the tokens, as zeros, in some of the versions of transformers that we allow.
        self.keys = self.values = None
        self.is_initialized = self.awaits_attention = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens (a negative number of them) of every agent.

        Raises:
            PolyKVError: more than the agents have; the prefix is not theirs to cut.
        """
        if not -self.n_suffix <= tokens_to_remove <= 0:
            raise PolyKVError(
                f"crop({tokens_to_remove}) of agents that have {self.n_suffix} tokens of their own; give minus "
                "the number to remove, no more than these: the pool is shared and stays whole"
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
    """N agents over one compressed prefix: `SharedKVPool.reader` makes one, `attend_in_place` lets it be read.

    Only the suffixes grow, in the model's own dtype. Beams, cropping, and repeating or selecting agents act on
    the suffixes; `reset` drops them.
    """

    def __init__(
        self, layers: Sequence[Sequence[Segment]], n_agents: int, backend: str = "torch"
    ) -> None:
        """`layers` are the segments of each layer, of batch 1.

        Raises:
            PolyKVError: no agents, or a pool of several documents.
        """
        batch = layers[0][0].key.shape[0]
        if batch != 1:
            raise PolyKVError(f"this pool is a batch of {batch}; agents share a pool of batch 1")
        if n_agents < 1:
            raise PolyKVError(f"n_agents={n_agents}; a reader is for one agent or more")
        super().__init__(layers=[CascadeLayer(segments, backend) for segments in layers])
        self.n_agents = n_agents
        self._last: CascadeLayer | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens to a layer, as models do.

        Raises:
            PolyKVError: another model's pool, another number of agents, or a model that does not attend in place.
        """
        if self._last is not None and self._last.awaits_attention:
            raise PolyKVError(
                "the model does not attend to the pool in place; run it inside "
                "`with attend_in_place(model):`, or use reader=dequantize where it still does not"
            )
        self._check(key_states, layer_idx)
        self._last = self.layers[layer_idx]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check(self, k_BHTD: Tensor, index: int) -> None:
        if index >= len(self.layers):
            raise PolyKVError(
                f"the pool has {len(self.layers)} layers and the model more; read it with its own model"
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
                f"layer {index} of the pool is on {device} and the model's on {k_BHTD.device}; "
                "write the pool with the model where it is now"
            )
        # Beams and several answers a query are several rows an agent.
        if not layer.is_initialized and batch % self.n_agents:
            raise PolyKVError(
                f"{batch} queries for a reader of {self.n_agents} agents; give one query an agent"
            )
