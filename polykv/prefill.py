"""Prefill: a document's full KV cache, and what codecs may know of each layer (polykv/codecs/context.py).

`reread` finds out the same for a cache that was made otherwise.

Both come from the model while it runs. RoPE: the cosines and sines that the model passes to its attention layers; which
channels they pair (halves, neighbours, part of the head) shows when the module's `apply_rotary_pos_emb` is applied to
unit vectors. Queries: the input of scaled_dot_product_attention, after biases, norms and RoPE, which does not change
the mean square of a pair of channels. What a model does in another way is unknown (None): GPT-J's and CodeGen's RoPE,
the queries of models that do not use sdpa.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from inspect import signature
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Cache, DynamicCache, PreTrainedModel

from polykv.codecs.context import LAST_QUERIES, LayerContext, Rope
from polykv.errors import PolyKVError
from polykv.probe import kept_tokens
from polykv.supported import check_every_token, check_length, check_model, check_rope, window_of
from polykv.tokens import last_places

APPLY = "apply_rotary_pos_emb"  # (q, k, cos, sin), the name in all models of transformers


class PrefilledCache(DynamicCache):
    """The DynamicCache that `prefill` returns, with what it found out about the layers."""

    watch: "Watch | None" = None  # while the model runs
    found: tuple[LayerContext | None, ...] = ()
    n_prefilled = 0

    @property
    def contexts(self) -> tuple[LayerContext | None, ...]:
        """What codecs may know of each layer and the tokens that it keeps; None for a layer with a state.

        Empty once the cache has grown, as later angles are not known.
        """
        n_tokens = self.n_prefilled
        if self.get_seq_length() != n_tokens:
            return ()
        return tuple(
            context.narrow(n_tokens - kept, n_tokens) if context and kept < n_tokens else context
            for context, layer in zip(self.found, self.layers, strict=False)
            if (kept := kept_tokens(n_tokens, window_of(layer)))
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.watch is not None:
            self.watch.keys_of(layer_idx, key_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.no_grad()
def prefill(model: PreTrainedModel, ids_BT: Tensor) -> PrefilledCache:
    """The KV cache of tokens (1, tokens), in the model's dtype.

    Raises:
        PolyKVError: no tokens, more tokens than positions, or an unsupported architecture.
    """
    check_model(model.config)
    if ids_BT.shape[1] == 0:
        raise PolyKVError("the document is empty; give at least one token of text")
    check_length(model.config, ids_BT.shape[1], "the document")
    cache = PrefilledCache(config=model.config)
    seen = watched(model, ids_BT, cache)
    cache.found, cache.n_prefilled = seen.contexts(len(cache.layers)), ids_BT.shape[1]
    return cache


@torch.no_grad()
def reread(
    model: PreTrainedModel, cache: Cache, ids_T: Tensor, start: int
) -> tuple[LayerContext, ...]:
    """What codecs may know of tokens [start, T), read once more after the cached tokens before; `cache` stays as it is.

    Raises:
        PolyKVError: the rotary frequencies change along the tokens.
    """
    check_every_token(model.config, "reading tokens again")
    check_rope(model.config, start or len(ids_T), len(ids_T), "reading the tokens again")
    past = PrefilledCache(config=model.config)
    if start:
        past = PrefilledCache(
            [(layer.keys[:, :, :start], layer.values[:, :, :start]) for layer in cache.layers]
        )
    seen = watched(model, ids_T[None, start:].long(), past)
    return tuple(context for context in seen.contexts(len(past.layers)) if context)


def watched(model: PreTrainedModel, ids_BT: Tensor, cache: PrefilledCache) -> "Watch":
    """What a forward pass showed of the layers; the cache grows by its tokens."""
    with Watch() as watch, watch.hooked(model):
        cache.watch = watch
        ids_BT = ids_BT.to(model.device)
        model(input_ids=ids_BT, past_key_values=cache, logits_to_keep=last_places(ids_BT))
    cache.watch = None
    return watch


class Watch(TorchFunctionMode):
    """Records angles and queries of each layer in this thread's forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = get_ident()
        # The last module that got angles, and the angles.
        self._given: tuple[type, Any] | None = None
        self._used = False  # whether that module used them: SmolLM3 passes them to layers without RoPE as well
        self._ropes: dict[tuple[type, int], tuple[Any, Rope | None]] = {}
        # By layer: the module that got angles, the angles if it used them, head_dim.
        self.angles: dict[int, tuple[type | None, Any, int]] = {}
        self._found: dict[int, LayerContext] = {}
        self._waits: tuple[int, int] | None = (
            None  # the layer whose queries come next, and its kv heads
        )

    @contextmanager
    def hooked(self, model: PreTrainedModel) -> Iterator[None]:
        """Record the angles that modules of the model get within the context."""

        def angles(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            # Hooks run for all threads that use the model.
            if get_ident() == self._thread:
                self._given, self._used = (type(module), kwargs.get("position_embeddings")), False

        with ExitStack() as stack:
            for module in model.modules():
                if "position_embeddings" in signature(module.forward).parameters:
                    handle = module.register_forward_pre_hook(angles, with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    def keys_of(self, layer: int, k_BHTD: Tensor) -> None:
        """Called when a layer writes to the cache: after it got its angles, before attention gets its queries."""
        owner, given = self._given if self._given and self._used else (None, None)
        self.angles[layer] = (owner, given, k_BHTD.shape[-1])
        self._found[layer] = LayerContext(self._rope(k_BHTD.shape[-1]) if self._used else None)
        self._waits = (layer, k_BHTD.shape[1])

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._waits:
            (layer, heads), self._waits = self._waits, None
            query = args[0] if args else kwargs["query"]
            # (B, query heads, D), without fp32 copies of the queries.
            norm = torch.linalg.vector_norm(query, dim=2, dtype=torch.float32)
            square = norm.square().unflatten(1, (heads, -1)).mean(2, keepdim=True) / query.shape[2]
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            known = {"query_rms": square.sqrt(), "queries": query[:, :, -LAST_QUERIES:] * scale}
            self._found[layer] = replace(self._found[layer], **known)
        elif self._given and isinstance(self._given[1], tuple):
            self._used |= any(arg is self._given[1][0] for arg in args)
        return func(*args, **kwargs)

    def contexts(self, n_layers: int) -> tuple[LayerContext | None, ...]:
        """What was recorded of each layer; None of those that wrote no keys."""
        return tuple(map(self._found.get, range(n_layers)))

    def _rope(self, head_dim: int) -> Rope | None:
        """The rotation by the last angles; layers that get the same angles share it."""
        owner, given = self._given
        key = (owner, id(given))
        if key not in self._ropes:  # a reference to the angles keeps their id from being reused
            self._ropes[key] = (given, rope_of(owner, given, head_dim))
        return self._ropes[key][1]


def rope_of(owner: type, given: Any, head_dim: int) -> Rope | None:
    """The rotation that a module's own function applies with these angles; None if it is not of the known form."""
    apply = getattr(sys.modules[owner.__module__], APPLY, None)
    if apply is None or not isinstance(given, tuple) or len(given) != 2:
        return None
    cos_BTW, sin_BTW = given
    # The angles are as wide as the channels that rotate, or half as wide.
    for width in (cos_BTW.shape[-1], 2 * cos_BTW.shape[-1]):
        if width <= head_dim:
            try:
                return _measured(apply, cos_BTW[:1], sin_BTW[:1], width)
            except (RuntimeError, TypeError, _NoRotation):
                continue
    return None


class _NoRotation(Exception):
    """The function does not rotate pairs of channels."""


def _measured(apply: Callable, cos_1TW: Tensor, sin_1TW: Tensor, width: int) -> Rope:
    """The pairs of channels from unit vectors with cos = 2 and sin = 1, then the cos and sin that are applied."""
    device = cos_1TW.device

    def turned(x_HTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_BHTD = x_HTD.unsqueeze(0)
        return apply(x_BHTD, x_BHTD, cos, sin)[0][0]

    units = torch.eye(width, device=device).unsqueeze(1)
    two, one = (torch.full_like(cos_1TW[:, :1], value) for value in (2, 1))
    # [from, to]: 2 on the diagonal, 1 from the first channel of a pair to the second, -1 from the second to the first.
    matrix = turned(units, two, one)[:, 0]
    first_P, second_P = (matrix == 1).nonzero(as_tuple=True)
    expected = 2 * torch.eye(width, device=device)
    expected[first_P, second_P], expected[second_P, first_P] = 1.0, -1.0
    if len(first_P) * 2 != width or not torch.equal(matrix, expected):
        raise _NoRotation
    ones = torch.zeros(1, cos_1TW.shape[1], width, device=device)
    ones[..., first_P] = 1
    (out_TD,) = turned(ones, cos_1TW, sin_1TW).float()
    return Rope(out_TD[:, first_P], out_TD[:, second_P], first_P, second_P)
