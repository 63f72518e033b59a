"""WindowedPayload: the card of a model some or all of whose layers have a sliding window.

Layers of full attention keep all tokens, and layers with a window the last ones (`kept_tokens`). Each of the two is a
MixedPayload with tier maps of its own tokens, both under the card's budget: a map for all tokens, cut to the last ones,
might exceed it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polykv.errors import PolyKVError
from polykv.handoff.mixed import MixedCodec
from polykv.handoff.payload import MixedPayload, Payload
from polykv.handoff.policy import Policy
from polykv.handoff.signals import Sender
from polykv.probe import kept_tokens
from polykv.segment import Segment

FULL, WINDOW = "full", "window"  # what the names of their tensors begin with


@dataclass(frozen=True, eq=False)
class WindowedPayload(Payload):
    """The layers of full attention, if there are any, and those with a window; `windows` are those of all layers."""

    kind = "windowed"

    windows: tuple[int | None, ...]
    parts: tuple[MixedPayload, ...]

    @classmethod
    def seal(
        cls,
        sender: Sender,
        policy: Policy,
        budget_bits: float,
        backend: str,
        windows: tuple[int | None, ...],
    ) -> WindowedPayload:
        """Quantize what all layers keep."""
        options = (sender, policy, budget_bits, backend)
        parts = (MixedPayload.seal(*options, *group) for group in _groups(windows))
        return cls(windows, tuple(parts))

    @classmethod
    def rebuild(
        cls,
        tensors: Mapping[str, Tensor],
        codec: MixedCodec,
        windows: tuple[int | None, ...],
        shape: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> WindowedPayload:
        """The payload whose `tensors()` these are; `shape` is (kv_heads, tokens of the text, head_dim).

        Raises:
            PolyKVError: a tensor is missing, superfluous, or of another shape or dtype than the others require.
        """
        heads, n_tokens, dim = shape
        names = [_name(window) for _, window in _groups(windows)]
        own: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for name, tensor in tensors.items():
            group, _, rest = name.partition(".")
            if group not in own:
                raise PolyKVError(f"tensor {name} belongs to no layer")
            own[group][rest] = tensor
        parts = []
        for numbers, window in _groups(windows):
            n_kept = kept_tokens(n_tokens, window)
            of_part = (1, len(numbers) * heads, n_kept, dim)
            part = MixedPayload.rebuild(own[_name(window)], codec, of_part, dtype, heads)
            parts.append(replace(part, numbers=numbers, window=window, n_left=n_tokens - n_kept))
        return cls(windows, tuple(parts))

    @property
    def exact(self) -> str | None:
        return self.parts[0].exact

    @property
    def group_size(self) -> int:
        return self.parts[0].group_size

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def nominal_bits(self) -> float:
        values = [part.n_budgeted for part in self.parts]
        bits = (part.nominal_bits * n for part, n in zip(self.parts, values, strict=True))
        return sum(bits) / sum(values)

    def append(self, sender: Sender, policy: Policy, budget_bits: float) -> WindowedPayload:
        parts = (part.append(sender, policy, budget_bits) for part in self.parts)
        return replace(self, parts=tuple(parts))

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{_name(part.window)}.{name}": tensor
            for part in self.parts
            for name, tensor in part.tensors().items()
        }

    def decode(self) -> list[tuple[Tensor, Tensor]]:
        return list(self._by_layer(part.decode() for part in self.parts))

    def segments(self) -> Sequence[Sequence[Segment]]:
        return list(self._by_layer(part.segments() for part in self.parts))

    def orders(self) -> Sequence[Tensor | None]:
        each = (part.orders() or (None,) * len(part.numbers or ()) for part in self.parts)
        return list(self._by_layer(each))

    def _by_layer(self, of_parts: Any) -> Iterator[Any]:
        """What each part has for its layers, in the order of all layers."""
        found = {
            number: one
            for part, ones in zip(self.parts, of_parts, strict=True)
            for number, one in zip(part.numbers or (), ones, strict=True)
        }
        return (found[number] for number in range(len(self.windows)))


def _groups(windows: Sequence[int | None]) -> list[tuple[tuple[int, ...], int | None]]:
    """(numbers of the layers, window) of the full layers and of the others; models have one window."""
    found: dict[int | None, list[int]] = {}
    for number, window in enumerate(windows):
        found.setdefault(window, []).append(number)
    kinds = sorted(found, key=lambda window: window is not None)
    return [(tuple(found[window]), window) for window in kinds]


def _name(window: int | None) -> str:
    return FULL if window is None else WINDOW
