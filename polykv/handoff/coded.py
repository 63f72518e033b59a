"""CodedPayload: a card's cache under one pair of codecs for all tokens, as in the recipes waterfill_* and trellis_*.

The pairs are CODECS of policy.py; the first tokens stay in fp16. Statistics are those of the tokens that are sealed,
and appended tokens use them as they are. RoPE is not stored: sender and receiver have it from their model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from polykv.codecs import bitpack
from polykv.codecs.base import Codec, Packed, Shape
from polykv.codecs.context import NOTHING, LayerContext, Rope
from polykv.codecs.waterfill import BLOCK, WaterfillKey
from polykv.errors import PolyKVError
from polykv.handoff.mixed import check_tensor
from polykv.handoff.packing import check_makes_card
from polykv.handoff.payload import SIDES, Payload
from polykv.handoff.policy import CODECS, Policy
from polykv.handoff.signals import SINKS, WINDOW, Sender
from polykv.prefill import reread
from polykv.recipe import EXACT, Exempt, Recipe
from polykv.ropes import ropes
from polykv.segment import Segment, decode_segments

EXACT_NAME = "exact"  # of the first tokens' tensor
Pair = tuple[Packed, Packed]  # keys and values


def recipe_of(kind: str, bits: float | None) -> Recipe:
    """The pair `kind` at a budget: values at its whole bits, keys at the rest, so that their mean is the budget.

    4 is recipe waterfill_4 or trellis_4, 3.5 waterfill_k4v3.

    Raises:
        PolyKVError: fewer than 1 bit or more than the keys have, or not in steps of a half.
    """
    key, value = CODECS[kind]
    most = key.most_bits
    if not isinstance(bits, int | float) or not 1 <= bits <= most or 2 * bits != int(2 * bits):
        raise PolyKVError(
            f"budget_bits={bits!r}; a {kind} card takes 1 to {most} bits, in steps of a half"
        )
    whole = int(bits)
    pair = (replace(key, bits=int(2 * bits) - whole), replace(value, bits=whole))
    return Recipe(kind, *pair, Exempt(sinks=SINKS))


@dataclass(frozen=True, eq=False)
class CodedPayload(Payload):
    """Keys and values of all layers under `recipe_of` a budget.

    Attributes:
        sinks: the first tokens, packed from (layers, kv_heads, tokens, head_dim).
        coded: the others, encoded layer by layer and stacked; None if there are none.
        ropes: by layer, of the tokens in `coded`.
    """

    exact = EXACT.dtype
    group_size = BLOCK

    recipe: Recipe
    sinks: Pair
    coded: Pair | None
    ropes: tuple[Rope | None, ...]
    position_offset: int
    backend: str

    @classmethod
    def seal(
        cls,
        sender: Sender,
        policy: Policy,
        budget_bits: float,
        backend: str,
        position_offset: int = 0,
    ) -> CodedPayload:
        """Quantize a whole cache. Queries are those of the prefill, or of the last WINDOW tokens, read once more."""
        check_makes_card(policy)
        recipe, n_tokens = recipe_of(policy.kind, budget_bits), sender.n_tokens
        rotations = _ropes(sender.model, position_offset, 0, n_tokens)
        known: Sequence[LayerContext] = getattr(sender.cache, "contexts", ()) or reread(
            sender.model, sender.cache, sender.ids_T, max(0, n_tokens - WINDOW)
        )
        layers = []
        for index, layer in enumerate(sender.cache.layers):
            context = LayerContext(rotations[index], known[index].query_rms)
            place = (index, len(rotations), backend, context)
            try:
                layers.append(recipe.encode_layer(layer.keys, layer.values, *place))
            except PolyKVError as error:
                raise PolyKVError(f"layer {index}: {error}") from error
        # Segments by layer, to segments stacked over layers: the sinks, and the other tokens if there are any.
        sinks, *others = (
            (_stack([s.key for s in segments]), _stack([s.value for s in segments]))
            for segments in zip(*layers, strict=True)
        )
        kept = _ropes(sender.model, position_offset, min(SINKS, n_tokens), n_tokens)
        return cls(recipe, sinks, others[0] if others else None, kept, position_offset, backend)

    @classmethod
    def rebuild(
        cls,
        tensors: Mapping[str, Tensor],
        kind: str,
        bits: float | None,
        shape: Shape,
        dtype: torch.dtype,
        model: PreTrainedModel,
        position_offset: int,
        backend: str,
    ) -> CodedPayload:
        """The payload whose `tensors()` these are; `shape` is (layers, kv_heads, tokens, head_dim).

        Raises:
            PolyKVError: unknown bits, a tensor that is missing, superfluous or of another shape or dtype, statistics
                that no encoder writes.
        """
        recipe, unread = recipe_of(kind, bits), dict(tensors)
        n_layers, heads, n_tokens, dim = shape
        first = min(SINKS, n_tokens)
        sinks, coded = [], []
        for side, codec in zip(SIDES, (recipe.key, recipe.value), strict=True):
            values = unread.pop(f"{side}.{EXACT_NAME}", None)
            of_sinks = (n_layers, heads, first, dim)
            check_tensor(values, f"{side}.{EXACT_NAME}", of_sinks, EXACT.kept(dtype))
            sinks.append(Packed({"values": values}, of_sinks, dtype))
            if n_tokens == first:
                continue
            packed = {}
            # Two tokens show which tensors are per token, and their sizes.
            for name, like in codec.encode(torch.zeros(1, heads, 2, dim)).tensors.items():
                length = n_tokens - first if like.shape[2] == 2 else 1
                wanted = (n_layers, like.shape[1], length, like.shape[3])
                packed[name] = unread.pop(f"{side}.{name}", None)
                check_tensor(packed[name], f"{side}.{name}", wanted, like.dtype)
            coded.append(Packed(packed, (n_layers, heads, n_tokens - first, dim), dtype))
        if unread:
            raise PolyKVError(f"tensors that no token needs: {', '.join(sorted(unread))}")
        if coded:
            _check_plan(recipe.key, coded[0])
        rotations = _ropes(model, position_offset, first, n_tokens)
        pair = (coded[0], coded[1]) if coded else None
        return cls(recipe, (sinks[0], sinks[1]), pair, rotations, position_offset, backend)

    @property
    def kind(self) -> str:
        return self.recipe.name

    @property
    def nbytes(self) -> int:
        return sum(packed.nbytes for packed in (*self.sinks, *(self.coded or ())))

    @property
    def nominal_bits(self) -> float:
        pair = (self.recipe.key, self.recipe.value) if self.coded else (EXACT, EXACT)
        return sum(codec.payload_bits(self.sinks[0].dtype) for codec in pair) / 2

    def append(self, sender: Sender, policy: Policy, budget_bits: float) -> CodedPayload:
        if policy.store != "codecs" or recipe_of(policy.kind, budget_bits) != self.recipe:
            raise PolyKVError(
                f"policy {policy.name!r} at budget_bits={budget_bits} has other codecs than the card to append to; "
                "append under the card's own policy and budget, or use CacheCard.seal"
            )
        if self.coded is None:  # exact tokens alone: they stay the same
            return self.seal(sender, policy, budget_bits, self.backend, self.position_offset)
        start = self.sinks[0].shape[2] + self.coded[0].shape[2]
        if start == sender.n_tokens:
            return self
        rotations = _ropes(sender.model, self.position_offset, SINKS, sender.n_tokens)
        keys, values = [], []
        for index, (layer, rope) in enumerate(zip(sender.cache.layers, rotations, strict=True)):
            *_, coded = self._segments(index)
            context = LayerContext(rope and rope.narrow(start - SINKS, rope.n_tokens))
            k_BHTD, v_BHTD = layer.keys[:, :, start:], layer.values[:, :, start:]
            try:
                keys.append(coded.key_codec.extend(coded.key, k_BHTD, context))
                values.append(coded.value_codec.extend(coded.value, v_BHTD))
            except PolyKVError as error:
                raise PolyKVError(f"layer {index}: {error}") from error
        return replace(self, coded=(_stack(keys), _stack(values)), ropes=rotations)

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for index, side in enumerate(SIDES):
            found[f"{side}.{EXACT_NAME}"] = self.sinks[index].tensors["values"]
            if self.coded:
                kept = self.coded[index].tensors
                found |= {f"{side}.{name}": tensor for name, tensor in kept.items()}
        return found

    def decode(self) -> list[tuple[Tensor, Tensor]]:
        return [decode_segments(segments) for segments in self.segments()]

    def segments(self) -> Sequence[Sequence[Segment]]:
        return [self._segments(index) for index in range(len(self.ropes))]

    def _segments(self, index: int) -> list[Segment]:
        """Those of a layer: the sinks, and the other tokens if there are any."""
        key, value = (_layer(packed, index) for packed in self.sinks)
        segments = [Segment(EXACT, EXACT, key, value)]
        if self.coded:
            key = _layer(self.coded[0], index, LayerContext(self.ropes[index]))
            value = _layer(self.coded[1], index)
            segments.append(Segment(self.recipe.key, self.recipe.value, key, value))
        return segments


def _ropes(
    model: PreTrainedModel, position_offset: int, start: int, stop: int
) -> tuple[Rope | None, ...]:
    """By layer, the rotation of the card's tokens [start, stop); None in a layer without RoPE."""
    start, stop = position_offset + start, position_offset + stop
    return tuple(rope and rope.narrow(start, stop) for rope in ropes(model, stop))


def _layer(packed: Packed, index: int, context: LayerContext = NOTHING) -> Packed:
    """A layer of stacked tensors, as views."""
    tensors = {name: tensor[index : index + 1] for name, tensor in packed.tensors.items()}
    return replace(packed, tensors=tensors, shape=(1, *packed.shape[1:]), context=context)


def _stack(layers: Sequence[Packed]) -> Packed:
    """Tensors of all layers, stacked along the first dimension."""
    tensors = {name: torch.cat([one.tensors[name] for one in layers]) for name in layers[0].tensors}
    shape = (len(layers), *layers[0].shape[1:])
    return replace(layers[0], tensors=tensors, shape=shape, context=NOTHING)


def _check_plan(codec: Codec, keys: Packed) -> None:
    """Check the tensors of keys that decoding uses as indices or divides by.

    Raises:
        PolyKVError: an order that is not one of all channels, widths that do not fill the codes, or a scale of zero.
    """
    assert isinstance(codec, WaterfillKey)
    _, heads, _, dim = keys.shape
    order, scale = keys.tensors["order"].long(), keys.tensors["scale"]
    n_blocks = keys.tensors["block_rms"].shape[3]
    widths = bitpack.unpack(keys.tensors["widths"], 4, n_blocks).long()
    if (order.sort(-1).values != torch.arange(dim, device=order.device)).any():
        raise PolyKVError("tensor key.order does not hold every channel once")
    if not ((widths >= 1) & (widths <= codec.widest)).all():
        raise PolyKVError("tensor key.widths holds widths that no encoder writes")
    if (BLOCK // 8 * widths.sum((1, 2, 3)) != codec.code_bytes(heads, dim)).any():
        raise PolyKVError("tensor key.widths does not fill the codes")
    if not (scale > 0).all():
        raise PolyKVError("tensor key.scale holds a zero")
