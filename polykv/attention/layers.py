"""Layers of a CascadeCache: a compressed prefix that agents share, and each agent's own tokens (the suffix)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from polykv import kernels
from polykv.codecs.base import Codec, Packed
from polykv.errors import PolyKVError
from polykv.segment import SIDES, Segment


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
        """Append keys and values (agents, kv_heads, new tokens, head_dim); returns `keys` and `values`.

        The returned keys have this layer as an attribute `cascade_layer`, from which the attention function takes the
        prefix: most models pass only these two tensors to it, not the cache. This needs no global state, so any number
        of caches and threads may be in use.

        A model whose attention function does not receive these keys leaves `awaits_attention` set, and the next
        `CascadeCache.update` raises.
        """
        if n := self.n_unseen:
            self._change(lambda x_BHTD: x_BHTD[:, :, n:])
            self.n_dropped, self.n_unseen = self.n_dropped + n, 0
        self._append(key_states, value_states)
        self.awaits_attention = True
        # On a view, which is dropped after the call: the attribute on self.keys itself would make a reference cycle.
        keys: Any = self.keys.view_as(self.keys)
        keys.cascade_layer = self
        return keys, self.values

    def own(self, k_BHTD: Tensor, v_BHTD: Tensor) -> Segment:
        """The agents' own tokens, for attention; the arguments are what `update` returned."""
        return Segment.uncompressed(k_BHTD, v_BHTD)

    def scale_queries(self, q_BHRD: Tensor) -> Tensor:
        """Queries for attention to `own`."""
        return q_BHRD

    @property
    def suffix_bytes(self) -> int:
        """Bytes of what is stored of the suffixes."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def _append(self, k_BHTD: Tensor, v_BHTD: Tensor) -> None:
        super().update(k_BHTD, v_BHTD)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace each stored tensor of the suffixes, all (agents, kv_heads, tokens, any size)."""
        self.keys, self.values = change(self.keys), change(self.values)

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
        if tokens_to_remove:
            self._change(lambda x_BHTD: x_BHTD[:, :, :tokens_to_remove])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._change(lambda x_BHTD: x_BHTD[indices.to(x_BHTD.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._change(lambda x_BHTD: x_BHTD.repeat_interleave(repeats, dim=0))


class QuantizedSuffixLayer(CascadeLayer):
    """A CascadeLayer that keeps suffixes under a codec, which quantizes each token for itself as it is written.

    Keys are divided by `scale` first, and attention multiplies queries by it: where a model adds large biases to some
    channels of its keys, these would otherwise take the resolution of the others. (Qwen2.5-Coder-0.5B, own tokens in
    q8_0: KL .0046 instead of .013 under trellis_3.)

    Attributes:
        keys, values: a single NaN, expanded to the shape of the suffixes; attention reads `own`.
        scale: of the channels of keys, powers of two, (1, kv_heads, 1, head_dim).
    """

    def __init__(self, codec: Codec, scale: Tensor, *args: Any) -> None:
        """`args`: those of CascadeLayer."""
        super().__init__(*args)
        self._codec = codec
        self.scale = scale
        self._packed: list[Packed] = []  # keys and values

    def own(self, k_BHTD: Tensor, v_BHTD: Tensor) -> Segment:
        key, value = self._packed
        return Segment(self._codec, self._codec, key, value)

    def scale_queries(self, q_BHRD: Tensor) -> Tensor:
        return q_BHRD.float() * self.scale  # fp16 would overflow

    @property
    def suffix_bytes(self) -> int:
        return sum(packed.nbytes for packed in self._packed)

    def _append(self, k_BHTD: Tensor, v_BHTD: Tensor) -> None:
        new = []
        for side, x_BHTD in zip(SIDES, (k_BHTD.float() / self.scale, v_BHTD), strict=True):
            try:
                new.append(kernels.encode(self._codec, x_BHTD, self.backend))
            except PolyKVError as error:
                raise PolyKVError(f"{side} of the agents' own tokens: {error}") from error
        if self.is_initialized:
            for place, added in enumerate(new):  # one at a time, as each exists twice meanwhile
                self._packed[place] = self._packed[place].join(added)
        else:
            self.lazy_initialization(k_BHTD, v_BHTD)
            self._packed = new
        self._set_shapes()

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for place, packed in enumerate(self._packed):
            tensors = {name: change(tensor) for name, tensor in packed.tensors.items()}
            batch, heads, n_tokens, _ = next(iter(tensors.values())).shape
            shape = (batch, heads, n_tokens, packed.shape[3])
            self._packed[place] = replace(packed, tensors=tensors, shape=shape)
        self._set_shapes()

    def _set_shapes(self) -> None:
        """Give `keys` and `values` the shape of the suffixes."""
        nan = torch.full((), torch.nan, dtype=self.dtype, device=self.device)
        self.keys, self.values = (nan.expand(packed.shape) for packed in self._packed)

    def reset(self) -> None:
        super().reset()
        self._packed = []
