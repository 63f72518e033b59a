"""The state of layers of linear attention, convolution or recurrence (Qwen3-Next, LFM2, Mamba hybrids), copied exactly.

Such a layer keeps no tokens but a few tensors whose size does not depend on the length: the last inputs of its
convolution, and the matrices of its recurrence. They are not compressed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DummyLayer, LinearAttentionLayer

from polykv.errors import PolyKVError

KINDS = ("conv", "recurrent")
Key = tuple[str, int]  # one of KINDS, and the tensor's number within the layer


@dataclass(frozen=True)
class StateShape:
    """Shape (1, ...) of a tensor of a state; `dtype` is None where it is the model's own."""

    key: Key
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes in a model of this dtype."""
        return torch.Size(self.shape).numel() * (self.dtype or dtype).itemsize


@dataclass(frozen=True, eq=False)
class State:
    """What one layer keeps of all tokens: tensors (1, ...), which are never changed; none if it keeps nothing."""

    tensors: Mapping[Key, Tensor]

    @classmethod
    def of(cls, layer: LinearAttentionLayer | DummyLayer) -> "State":
        """A copy of a cache layer's state."""
        return cls({key: x.clone() for key, x in _tensors(layer)})

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors.values())

    def layer(self, n_agents: int, copied: bool = False) -> "StateLayer | DummyLayer":
        """A cache layer of `n_agents` that continue it; `copied`: whether they have copies from the start."""
        if not self.tensors:
            return DummyLayer()
        layer = StateLayer(self, n_agents)
        if copied:
            layer.copy()
        return layer


class StateLayer(LinearAttentionLayer):
    """A layer of linear attention of N agents that continue one state and share it until the model asks for it.

    Then each agent gets a copy of its own: models write into what they asked for (`causal_conv1d_update` does).
    """

    is_croppable = False  # what a state has read cannot be taken out again

    def __init__(self, state: State, n_agents: int) -> None:
        super().__init__(number_of_states=1 + max(number for _, number in state.tensors))
        self.state, self.n_agents = state, n_agents
        for (kind, number), x in state.tensors.items():
            getattr(self, f"is_{kind}_states_initialized")[number] = True
            self.has_previous_state[number] = True
            if kind == "conv":
                self.conv_kernel_size[number] = x.shape[-1]
            self.dtype, self.device = x.dtype, x.device
        del self.conv_states, self.recurrent_states  # so that the properties below make them

    @cached_property
    def conv_states(self) -> dict[int, Tensor | None]:
        """The agents' own inputs of the convolutions, (agents, ...) by number."""
        return self._copies("conv")

    @cached_property
    def recurrent_states(self) -> dict[int, Tensor | None]:
        """The agents' own recurrent matrices, (agents, ...) by number."""
        return self._copies("recurrent")

    def _copies(self, kind: str) -> dict[int, Tensor | None]:
        found: dict[int, Tensor | None] = dict.fromkeys(range(self.number_of_states))
        for (of, number), x in self.state.tensors.items():
            if of == kind:
                found[number] = x.repeat(self.n_agents, *(1,) * (x.ndim - 1))
        return found

    def copy(self) -> None:
        """Give each agent its copy now."""
        for kind in KINDS:
            getattr(self, f"{kind}_states")

    @property
    def nbytes(self) -> int:
        """Bytes of the agents' own copies."""
        return sum(x.nbytes for _, x in _tensors(self))

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Continue with new inputs (agents, ..., tokens); returns them after those that are kept.

        Raises:
            PolyKVError: another number of rows than agents.
        """
        if len(conv_states) != self.n_agents:
            raise PolyKVError(
                f"{len(conv_states)} queries for the states of {self.n_agents} agents; give one query per agent, and "
                "call batch_repeat_interleave on the cache before beam search"
            )
        return super().update_conv_state(conv_states, state_idx, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a state holds no tokens that could be dropped; raises PolyKVError."""
        raise PolyKVError(
            f"crop({tokens_to_remove}): tokens cannot be taken out of the state of a linear or recurrent layer; "
            "begin again with a new cache of the pool"
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows."""
        self.n_agents = len(indices)
        self._replace(lambda x: x[indices.to(x.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.n_agents *= repeats
        self._replace(lambda x: x.repeat_interleave(repeats, dim=0))

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        for (kind, number), x in list(_tensors(self)):
            getattr(self, f"{kind}_states")[number] = change(x)


# Cache layers that keep a state, or nothing.
STATES = (LinearAttentionLayer, StateLayer, DummyLayer)


def attending(cache: Cache) -> list[Any]:
    """The layers of a cache that keep keys and values."""
    return [layer for layer in cache.layers if type(layer) not in STATES]


def _tensors(layer: Any) -> list[tuple[Key, Tensor]]:
    """The tensors that a cache layer has; of a StateLayer the copies only."""
    return [
        ((kind, number), x)
        for kind in KINDS
        for number, x in vars(layer).get(f"{kind}_states", {}).items()
        if x is not None
    ]


def shapes(layer: Any, own_dtype: torch.dtype) -> tuple[StateShape, ...]:
    """The shapes of a cache layer's state in a model of `own_dtype`."""
    return tuple(
        StateShape(key, (1, *x.shape[1:]), None if x.dtype == own_dtype else x.dtype)
        for key, x in _tensors(layer)
    )


def layer_bytes(layer: Any) -> int:
    """Bytes of the tensors that a cache layer has: keys and values, or the agents' own states."""
    if (of_suffixes := getattr(layer, "suffix_bytes", None)) is not None:
        return of_suffixes
    kept = [
        x for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None
    ]
    return sum(x.nbytes for x in kept) + sum(x.nbytes for _, x in _tensors(layer))
