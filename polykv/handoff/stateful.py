"""StatefulPayload: the card of a model some of whose layers keep a state and no tokens (polykv/recurrent.py).

Its layers of attention are a MixedPayload. States are stored as they are; a tensor has those of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polykv.errors import PolyKVError
from polykv.handoff.mixed import MixedCodec
from polykv.handoff.payload import MixedPayload, Payload
from polykv.handoff.policy import Policy
from polykv.handoff.signals import Sender
from polykv.probe import LayerShape
from polykv.recurrent import STATES, Key, State
from polykv.segment import Segment


@dataclass(frozen=True, eq=False)
class StatefulPayload(Payload):
    """The layers of attention, and the states of the others by the numbers of their layers."""

    kind = "stateful"

    part: MixedPayload
    states: Mapping[int, State]

    @classmethod
    def seal(
        cls, sender: Sender, policy: Policy, budget_bits: float, backend: str
    ) -> StatefulPayload:
        """Quantize the keys and values of a cache, and copy its states."""
        states = _states(sender)
        numbers = tuple(n for n in range(len(sender.cache.layers)) if n not in states)
        return cls(MixedPayload.seal(sender, policy, budget_bits, backend, numbers), states)

    @classmethod
    def rebuild(
        cls,
        tensors: Mapping[str, Tensor],
        codec: MixedCodec,
        layers: Sequence[LayerShape],
        shape: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> StatefulPayload:
        """The payload whose `tensors()` these are; `shape` is (kv_heads, tokens, head_dim), `layers` the model's.

        Raises:
            PolyKVError: a tensor is missing, superfluous, or of another shape or dtype than the others or the model
                require.
        """
        heads, n_tokens, dim = shape
        numbers = tuple(n for n, layer in enumerate(layers) if layer.state is None)
        rest = dict(tensors)
        found: dict[int, dict[Key, Tensor]] = {
            n: {} for n, layer in enumerate(layers) if layer.state is not None
        }
        expected = {
            one.key: (one.shape[1:], one.dtype or dtype)
            for n in found
            for one in layers[n].state or ()
        }
        for key, (of_layer, stored) in expected.items():
            holders = [n for n in found if key in {one.key for one in layers[n].state or ()}]
            tensor = rest.pop(_name(key), None)
            if tensor is None or (tensor.shape, tensor.dtype) != (
                (len(holders), *of_layer),
                stored,
            ):
                raise PolyKVError(
                    f"tensor {_name(key)} does not have the shape of the model's states"
                )
            for n, own in zip(holders, tensor.split(1), strict=True):
                found[n][key] = own
        of_part = (1, len(numbers) * heads, n_tokens, dim)
        part = MixedPayload.rebuild(rest, codec, of_part, dtype, heads)
        return cls(replace(part, numbers=numbers), {n: State(own) for n, own in found.items()})

    @property
    def exact(self) -> str | None:
        return self.part.exact

    @property
    def group_size(self) -> int:
        return self.part.group_size

    @property
    def state_bytes(self) -> int:
        return sum(state.nbytes for state in self.states.values())

    @property
    def nbytes(self) -> int:
        return self.part.nbytes + self.state_bytes

    @property
    def nominal_bits(self) -> float:
        return self.part.nominal_bits

    def append(self, sender: Sender, policy: Policy, budget_bits: float) -> StatefulPayload:
        return replace(
            self, part=self.part.append(sender, policy, budget_bits), states=_states(sender)
        )

    def tensors(self) -> dict[str, Tensor]:
        kept = [pair for state in self.states.values() for pair in state.tensors.items()]
        stacked = {
            _name(key): torch.cat([x for other, x in kept if other == key])
            for key in dict.fromkeys(key for key, _ in kept)
        }
        return self.part.tensors() | stacked

    def decode(self) -> list[tuple[Tensor, Tensor] | State]:
        decoded = iter(self.part.decode())
        return [self.states.get(n) or next(decoded) for n in self._all()]

    def segments(self) -> Sequence[Sequence[Segment] | State]:
        stored = iter(self.part.segments())
        return [self.states.get(n) or next(stored) for n in self._all()]

    def _all(self) -> range:
        return range(len(self.states) + len(self.part.numbers or ()))


def _states(sender: Sender) -> dict[int, State]:
    """Copies of a cache's states, by layer."""
    layers = enumerate(sender.cache.layers)
    return {n: State.of(layer) for n, layer in layers if type(layer) in STATES}


def _name(key: Key) -> str:
    return ".".join(("state", *map(str, key)))
