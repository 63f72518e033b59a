"""RoPE of a model's layers at any positions, without reading tokens: what the receiver of a card has to know.

A forward pass of one token shows which modules compute the angles of each layer. Called with other positions, they
compute what a prefill of so many tokens would use.
"""

from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass, field
from inspect import BoundArguments, signature
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from polykv.codecs.context import Rope
from polykv.prefill import PrefilledCache, rope_of, watched

POSITIONS = "position_ids"  # argument of the modules that compute angles


@torch.no_grad()
def ropes(model: PreTrainedModel, n_tokens: int) -> tuple[Rope | None, ...]:
    """The rotation of each layer's keys at positions [0, n_tokens), to the bit as in a prefill.

    None for layers without RoPE, or whose angles no module computes from positions. Layers with the same angles share
    a table. The model's first call takes a forward pass of one token.
    """
    if model not in _angles:
        _angles[model] = _find(model)
    tables = {angles: angles.rope(n_tokens) for angles in set(_angles[model]) if angles}
    return tuple(tables.get(angles) for angles in _angles[model])


@dataclass(frozen=True)
class _Angles:
    """How a model computes the angles of a layer, and the class of the module that applies them.

    `call` is the number of the call in a forward pass, which identifies `module` and `arguments`.
    """

    owner: type
    head_dim: int
    call: int
    module: nn.Module = field(compare=False)
    arguments: BoundArguments = field(compare=False)

    def rope(self, n_tokens: int) -> Rope | None:
        """The rotation at positions [0, n_tokens)."""
        asked = self.arguments.arguments[POSITIONS]
        positions = torch.arange(n_tokens, device=asked.device).expand(*asked.shape[:-1], -1)
        told = {**self.arguments.arguments, POSITIONS: positions}
        given = BoundArguments(self.arguments.signature, OrderedDict(told))
        return rope_of(self.owner, self.module(*given.args, **given.kwargs), self.head_dim)


_angles: WeakKeyDictionary[PreTrainedModel, tuple[_Angles | None, ...]] = WeakKeyDictionary()


def _find(model: PreTrainedModel) -> tuple[_Angles | None, ...]:
    """What a forward pass of one token shows of each layer."""
    thread = get_ident()
    calls: list[tuple[nn.Module, BoundArguments, Any]] = []

    def called(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        if get_ident() == thread:  # hooks run for all threads that use the model
            calls.append((module, signature(module.forward).bind(*args, **kwargs), out))

    with ExitStack() as stack:
        for module in model.modules():
            if POSITIONS in signature(module.forward).parameters:
                stack.callback(module.register_forward_hook(called, with_kwargs=True).remove)
        # transformers warns of a padding token
        padding = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
        one_BT = torch.full((1, 1), int(padding == 0))
        watch = watched(model, one_BT, PrefilledCache(config=model.config))
    found: list[_Angles | None] = []
    for _, (owner, given, head_dim) in sorted(watch.angles.items()):
        made = [n for n, (*_, out) in enumerate(calls) if given is not None and out is given]
        angles = _Angles(owner, head_dim, made[0], *calls[made[0]][:2]) if made else None
        found.append(angles)
    return tuple(found)
