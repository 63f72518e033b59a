"""CascadeCache: a transformers cache of agents that read one pool in place.

Its layers reference the pool's compressed segments (the prefix) and store only each agent's own tokens (the suffix).
Layers with a state copy it for each agent when the model first asks for it (polykv/recurrent.py).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from polykv.errors import PolyKVError
from polykv.recurrent import State, StateLayer
from polykv.segment import Segment


class PrefixOffset(int):
    """The offset of a CascadeLayer's mask, by which the mask function knows it (polykv/attention/cascade.py).

    An ordinary int to transformers. `n_prefix` is the number of tokens of the prefix, and `n_dropped` that of the first
    tokens of the suffixes that the layer no longer has. `beside_states`: other layers of the cache keep a state.
    """

    n_prefix: int
    n_dropped: int
    beside_states: bool

    def __new__(
        cls, offset: int, n_prefix: int, n_dropped: int = 0, beside_states: bool = False
    ) -> "PrefixOffset":
        self = super().__new__(cls, offset)
        self.n_prefix, self.n_dropped, self.beside_states = n_prefix, n_dropped, beside_states
        return self


class CascadeLayer(DynamicLayer):
    """One layer of a CascadeCache: the shared compressed prefix and the agents' suffixes.

    With a window, `update` drops the first tokens of the suffixes once no agent can see them.

    Attributes:
        keys, values: of the suffixes, (agents, kv_heads, suffix tokens that are left, head_dim).
        segments: the parts of the prefix; with a window, of its last tokens only.
        backend: the code that attends to the segments (polykv/kernels).
        n_prefix: tokens of the prefix.
        window: None for full attention; else a token sees the last `window` tokens, itself included.
        order: places of the stored tokens in the order of the segments; None: the order of the text. Matters with a
            window only.
        n_dropped: tokens of each suffix that were dropped.
        n_unseen: how many of the first tokens left no agent will see again; set by the attention function.
        beside_states: whether other layers of the cache keep a state.
        awaits_attention: set by `update` and cleared by the attention function (polykv/attention/cascade.py).
    """

    keys: Tensor
    values: Tensor

    def __init__(
        self,
        segments: Sequence[Segment],
        backend: str,
        n_prefix: int | None = None,
        window: int | None = None,
        order: Tensor | None = None,
    ) -> None:
        """`n_prefix` None: the tokens of the segments."""
        super().__init__()
        self.segments = segments
        self.backend = backend
        self.n_stored = sum(segment.n_tokens for segment in segments)
        self.n_prefix = self.n_stored if n_prefix is None else n_prefix
        self.window = window
        self.is_sliding = window is not None
        self.order = order
        self.n_dropped = self.n_unseen = 0
        self.awaits_attention = self.beside_states = False

    @property
    def n_suffix(self) -> int:
        """Tokens of each suffix, padding and dropped ones included."""
        return self.n_dropped + (self.keys.shape[2] if self.is_initialized else 0)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (agents, kv_heads, new tokens, head_dim) and return those of the suffixes.

        The returned keys have this layer as an attribute `cascade_layer`, from which the attention function takes the
        prefix: most models pass only these two tensors to it, not the cache. This needs no global state, so any number
        of caches and threads may be in use.

        A model whose attention function does not receive these keys leaves `awaits_attention` set, and the next
        `CascadeCache.update` raises.
        """
        if self.n_unseen:
            self.keys, self.values = (x[:, :, self.n_unseen :] for x in (self.keys, self.values))
            self.n_dropped, self.n_unseen = self.n_dropped + self.n_unseen, 0
        super().update(key_states, value_states)
        self.awaits_attention = True
        # On a view, which is dropped after the call: the attribute on self.keys itself would make a reference cycle.
        keys: Any = self.keys.view_as(self.keys)
        keys.cascade_layer = self
        return keys, self.values

    def get_seq_length(self) -> int:
        """Tokens of the prefix and of a suffix."""
        return self.n_prefix + self.n_suffix

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(mask length, offset) of the mask for `query_length` new tokens.

        The mask covers the whole suffix, and with a window also the stored tokens of the prefix; without a window every
        query sees the whole prefix.
        """
        n_masked = self.n_masked
        # `update` comes later, and drops what is not seen any more.
        n_dropped = self.n_dropped + self.n_unseen
        about = (self.n_prefix, n_dropped, self.beside_states)
        offset = PrefixOffset(self.n_prefix - n_masked, *about)
        return n_masked + self.n_suffix + query_length, offset

    @property
    def n_masked(self) -> int:
        """Tokens of the prefix that the mask covers."""
        return self.n_stored if self.is_sliding else 0

    def reset(self) -> None:
        """Drop the suffixes."""
        # Not super().reset(): in some supported versions of transformers it zeroes the tokens but keeps their number.
        self.keys = self.values = None
        self.is_initialized = self.awaits_attention = False
        self.n_dropped = self.n_unseen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens of every suffix; `tokens_to_remove` is their number, negated, as in transformers.

        Raises:
            PolyKVError: a positive number, or more tokens than a suffix has left.
        """
        n_left = self.n_suffix - self.n_dropped
        if not -n_left <= tokens_to_remove <= 0:
            raise PolyKVError(
                f"crop({tokens_to_remove}) of agents with {n_left} tokens of their own; pass the number of "
                f"tokens to remove as a negative number, {-n_left} to 0: the shared pool cannot be cropped"
            )
        self.n_unseen = 0  # windows move back
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
    """Cache of N agents that share one compressed prefix, to be used within `attend_in_place(model)`.

    `SharedKVPool.reader` and `CacheCard.reader` make it. Only the suffixes grow, in the model's own dtype. Beam search,
    cropping, and repeating or selecting agents act on the suffixes and states; `reset` drops them. With states there is
    no cropping, and beam search needs `batch_repeat_interleave(num_beams)` first.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Segment] | State],
        n_agents: int,
        backend: str = "torch",
        n_prefix: int | None = None,
        windows: Sequence[int | None] = (),
        orders: Sequence[Tensor | None] = (),
    ) -> None:
        """A cache without suffixes.

        Args:
            layers: the segments of each layer, or its state, with batch size 1.
            backend: the code that attends to them (polykv/kernels).
            n_prefix: tokens of the prefix; None: those of the segments.
            windows: of each layer; empty: all have full attention.
            orders: of each layer (`CascadeLayer.order`); empty: all have the order of the text.

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
        each = zip(layers, windows or nothing, orders or nothing, strict=True)
        super().__init__(
            layers=[
                one.layer(n_agents)
                if isinstance(one, State)
                else CascadeLayer(one, backend, n_prefix, window, order)
                for one, window, order in each
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
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

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
