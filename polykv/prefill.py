"""A document's full cache, and what a codec may ask to know of each layer (polykv/codecs/context.py).

The model itself is asked, while it prefills: the angles are those that it hands to its attention layers, and how they
pair channels (halves, neighbours, a part of the head) is what its module's `apply_rotary_pos_emb` does to unit vectors.
Queries are those that scaled_dot_product_attention gets, after biases, norms and RoPE; the mean square of a pair of
channels is the same before and after RoPE. A model that has another way leaves these unknown.
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
from transformers import DynamicCache, PreTrainedModel

from polykv.codecs.context import LayerContext, Rope
from polykv.errors import PolyKVError
from polykv.supported import check_length, check_model

APPLY = "apply_rotary_pos_emb"  # (q, k, cos, sin), as the models of transformers call it


class PrefilledCache(DynamicCache):
    """A DynamicCache as `prefill` makes it; `contexts` is what is known of each layer."""

    contexts: tuple[LayerContext, ...] = ()
    watch: "_Watch | None" = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.watch is not None:
            self.watch.keys_of(layer_idx, key_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.no_grad()
def prefill(model: PreTrainedModel, ids_BT: Tensor) -> PrefilledCache:
    """The full cache of the tokens (1, tokens), in the model's own dtype.

    Raises:
        PolyKVError: no tokens, more tokens than positions, or an unsupported architecture.
    """
    check_model(model.config)
    if ids_BT.shape[1] == 0:
        raise PolyKVError("the document is empty; give at least one token of text")
    check_length(model.config, ids_BT.shape[1], "the document")
    cache = PrefilledCache(config=model.config)
    with _Watch() as cache.watch, cache.watch.hooked(model):
        model(input_ids=ids_BT.to(model.device), past_key_values=cache, logits_to_keep=1)
    cache.contexts, cache.watch = cache.watch.contexts(), None
    return cache


class _Watch(TorchFunctionMode):
    """Notes each layer's angles and queries while this thread prefills, whatever others do with the model."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = get_ident()
        self._given: tuple[type, Any] | None = None  # the last module that got angles, and these
        self._used = False  # by that module: SmolLM3 gives them to layers without RoPE, too
        self._ropes: dict[tuple[type, int], tuple[Any, Rope | None]] = {}
        self._found: dict[int, LayerContext] = {}
        self._waits: tuple[int, int] | None = None  # the layer whose queries come next, its heads

    @contextmanager
    def hooked(self, model: PreTrainedModel) -> Iterator[None]:
        """Within it the watch sees the angles that modules get."""

        def angles(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if get_ident() == self._thread:
                self._given, self._used = (type(module), kwargs.get("position_embeddings")), False

        with ExitStack() as stack:
            for module in model.modules():
                if "position_embeddings" in signature(module.forward).parameters:
                    handle = module.register_forward_pre_hook(angles, with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    def keys_of(self, layer: int, k_BHTD: Tensor) -> None:
        """A layer writes to the cache: its angles were given before, its queries come next."""
        self._found[layer] = LayerContext(self._rope(k_BHTD.shape[-1]) if self._used else None)
        self._waits = (layer, k_BHTD.shape[1])

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._waits:
            (layer, heads), self._waits = self._waits, None
            query = args[0] if args else kwargs["query"]
            square = query.unflatten(1, (heads, -1)).float().square().mean((2, 3)).unsqueeze(2)
            self._found[layer] = replace(self._found[layer], query_rms=square.sqrt())
        elif self._given and isinstance(self._given[1], tuple):
            self._used |= any(arg is self._given[1][0] for arg in args)
        return func(*args, **kwargs)

    def contexts(self) -> tuple[LayerContext, ...]:
        """What was found, by layer."""
        return tuple(self._found[layer] for layer in sorted(self._found))

    def _rope(self, head_dim: int) -> Rope | None:
        """Of the angles that were given last; layers that were given the same share it."""
        owner, given = self._given
        key = (owner, id(given))
        if key not in self._ropes:  # the angles are kept with it, so that no others get their id
            self._ropes[key] = (given, _rope_of(owner, given, head_dim))
        return self._ropes[key][1]


def _rope_of(owner: type, given: Any, head_dim: int) -> Rope | None:
    """What a module's own function does with the angles that it was given; None where it is no such rotation."""
    apply = getattr(sys.modules[owner.__module__], APPLY, None)
    if apply is None or not isinstance(given, tuple) or len(given) != 2:
        return None
    cos_BTW, sin_BTW = given
    # Angles have the width of the channels that turn, or half of it.
    for width in (cos_BTW.shape[-1], 2 * cos_BTW.shape[-1]):
        if width <= head_dim:
            try:
                return _measured(apply, cos_BTW[:1], sin_BTW[:1], width)
            except (RuntimeError, _NoRotation):
                continue
    return None


class _NoRotation(Exception):
    """A function does something else than to turn pairs of channels."""


def _measured(apply: Callable, cos_1TW: Tensor, sin_1TW: Tensor, width: int) -> Rope:
    """The pairs from unit vectors under angles whose cosines and sines are 2 and 1, and then cos and sin themselves."""
    device = cos_1TW.device

    def turned(x_HTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_BHTD = x_HTD.unsqueeze(0)
        return apply(x_BHTD, x_BHTD, cos, sin)[0][0]

    units = torch.eye(width, device=device).unsqueeze(1)
    two, one = (torch.full_like(cos_1TW[:, :1], value) for value in (2, 1))
    # [from, to]: 2 on the diagonal, 1 from the first of a pair to the second, -1 back.
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
