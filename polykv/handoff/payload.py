"""What a card holds of a cache: each token at bits of its own (MixedPayload), or all alike (coded.py).

The cache of a model with sliding windows is two MixedPayloads (windowed.py), that of one with states a MixedPayload and
the states (stateful.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polykv.codecs.base import Shape
from polykv.errors import PolyKVError
from polykv.handoff.in_place import order_of_tokens, segments_by_layer
from polykv.handoff.mixed import Mixed, MixedCodec
from polykv.handoff.packing import exact_dtype, nominal_bits, pack
from polykv.handoff.policy import Policy
from polykv.handoff.signals import SINKS, Sender
from polykv.probe import kept_tokens
from polykv.recurrent import State, attending
from polykv.segment import Segment

SIDES = ("key", "value")


class Payload(ABC):
    """The packed keys and values of all layers, immutable."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """Its name in a card's metadata."""

    @property
    @abstractmethod
    def exact(self) -> str | None:
        """Dtype of the tokens that are not quantized; None: the model's own."""

    @property
    @abstractmethod
    def group_size(self) -> int:
        """Channels that share a scale."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all tensors, and of what else is stored."""

    @property
    def state_bytes(self) -> int:
        """Bytes of states, which are not compressed."""
        return 0

    @property
    @abstractmethod
    def nominal_bits(self) -> float:
        """Mean payload bits per cached value of the tokens after the sinks, which a budget bounds."""

    @abstractmethod
    def append(self, sender: Sender, policy: Policy, budget_bits: float) -> Payload:
        """The payload of the sender's longer cache; what is packed already stays as it is.

        Raises:
            PolyKVError: another policy or budget than this payload can be continued under.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All stored tensors by name: `key.NAME` and `value.NAME`."""

    @abstractmethod
    def decode(self) -> Sequence[tuple[Tensor, Tensor] | State]:
        """Keys and values of every layer, each (1, kv_heads, tokens, head_dim), in the model's dtype; or its state."""

    @abstractmethod
    def segments(self) -> Sequence[Sequence[Segment] | State]:
        """By layer, what attention in place reads, or its state; views of the payload where possible."""

    def orders(self) -> Sequence[Tensor | None]:
        """By layer, `CascadeLayer.order`; empty if no layer has a window."""
        return ()


@dataclass(frozen=True, eq=False)
class MixedPayload(Payload):
    """Keys and values at mixed precision by token: of all layers, or of those that attend alike.

    `numbers` are the layers (None: all), `n_left` the tokens that have left their `window` and are not there.
    """

    kind = "mixed"

    key: Mixed
    value: Mixed
    codec: MixedCodec
    n_kv_heads: int
    numbers: tuple[int, ...] | None = None
    window: int | None = None
    n_left: int = 0

    @classmethod
    def seal(
        cls,
        sender: Sender,
        policy: Policy,
        budget_bits: float,
        backend: str,
        numbers: tuple[int, ...] | None = None,
        window: int | None = None,
    ) -> MixedPayload:
        """Quantize a cache, or what layers `numbers` of it keep with a window."""
        codec = MixedCodec(exact_dtype(policy, sender.cache), backend=backend)
        n_left = sender.n_tokens - kept_tokens(sender.n_tokens, window)
        key, value = pack(sender, policy, codec, budget_bits, None, numbers, n_left)
        n_kv_heads = attending(sender.cache)[0].keys.shape[1]
        return cls(key, value, codec, n_kv_heads, numbers, window, n_left)

    @classmethod
    def rebuild(
        cls,
        tensors: Mapping[str, Tensor],
        codec: MixedCodec,
        shape: Shape,
        dtype: torch.dtype,
        n_kv_heads: int,
    ) -> MixedPayload:
        """The payload whose `tensors()` these are; `shape` is (1, layers * heads, tokens, head_dim).

        Raises:
            PolyKVError: a tensor is missing, superfluous, or of another shape or dtype than the others require.
        """
        sides: dict[str, dict[str, Tensor]] = {side: {} for side in SIDES}
        for name, tensor in tensors.items():
            side, _, rest = name.partition(".")
            if side not in sides:
                raise PolyKVError(f"tensor {name} belongs to neither keys nor values")
            sides[side][rest] = tensor
        key, value = (
            codec.rebuild(part, shape, dtype, side == "key") for side, part in sides.items()
        )
        return cls(key, value, codec, n_kv_heads)

    @property
    def exact(self) -> str | None:
        return self.codec.exact

    @property
    def group_size(self) -> int:
        return self.codec.group_size

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes

    @property
    def n_budgeted(self) -> int:
        """Values of which `nominal_bits` is the mean."""
        n_sinks = min(max(SINKS - self.n_left, 0), self.key.shape[2] - 1)
        return 2 * self.key.shape[1] * (self.key.shape[2] - n_sinks) * self.key.shape[3]

    @property
    def nominal_bits(self) -> float:
        return nominal_bits(self.key, self.value, self.n_left)

    def append(self, sender: Sender, policy: Policy, budget_bits: float) -> MixedPayload:
        if policy.store == "codecs" or exact_dtype(policy, sender.cache) != self.exact:
            raise PolyKVError(
                f"policy {policy.name!r} keeps exact tokens in another dtype than the card, or has other codecs; "
                "append under the same policy, or use CacheCard.seal"
            )
        if policy.has_budget and self.nominal_bits > budget_bits:
            raise PolyKVError(
                f"the card to append to takes {self.nominal_bits:.3f} bits and budget_bits={budget_bits}; "
                "raise it, or use CacheCard.seal"
            )
        n_before = self.n_left + self.key.shape[2]
        if sender.n_tokens == n_before:
            return self
        n_left = sender.n_tokens - kept_tokens(sender.n_tokens, self.window)
        if n_left >= n_before:
            backend = self.codec.backend
            return self.seal(sender, policy, budget_bits, backend, self.numbers, self.window)
        n_gone = n_left - self.n_left
        key, value = (
            self.codec.without_first(side, n_gone) if n_gone else side
            for side in (self.key, self.value)
        )
        kept = (key, value)
        new_key, new_value = pack(
            sender, policy, self.codec, budget_bits, kept, self.numbers, n_left
        )
        extend = self.codec.extend
        key, value = extend(key, new_key), extend(value, new_value)
        return replace(self, key=key, value=value, n_left=n_left)

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for side, mixed in zip(SIDES, (self.key, self.value), strict=True):
            found |= {f"{side}.{name}": tensor for name, tensor in mixed.tensors().items()}
        return found

    def decode(self) -> list[tuple[Tensor, Tensor]]:
        sides = [
            self.codec.decode(side).split(self.n_kv_heads, 1) for side in (self.key, self.value)
        ]
        return list(zip(*sides, strict=True))

    def segments(self) -> Sequence[Sequence[Segment]]:
        return segments_by_layer(self.key, self.value, self.codec, self.n_kv_heads)

    def orders(self) -> Sequence[Tensor | None]:
        if self.window is None:
            return ()
        order_T = order_of_tokens(self.key, self.value)
        return (order_T,) * (self.key.shape[1] // self.n_kv_heads)
