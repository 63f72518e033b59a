"""An analytical model of capacity: memory and decode time of N agents that share a document, on given hardware.

Computed from an architecture, a recipe's stored bytes and a data sheet; nothing is measured. GB is 1e9 bytes, a
multiply-add is two operations. With W bytes of weights, P shared tokens, S tokens of an agent's own, t bytes of keys
and values per token in full precision, Q bytes of the pool and L equal layers, a replica of the model holds

    unshared   W + N a (P + S) t        a = 1 + 1 / 2L: while transformers' DynamicCache appends, one of its
    dequantize W + Q + N a (P + S) t    2 L tensors exists twice
    in_place   W + Q + N a S t

or, if that is more, one copy of everything and N rows of logits, which exist when no tensor grows. A layer with a
sliding window keeps its last tokens only: of unshared caches, t counts those, and the prefix is what the suffix leaves
of the window. Under in_place it reads the stored part of the prefix and the last tokens of the suffix. A layer with a
state (linear attention, convolution, recurrence) has no t: the pool keeps its state once, and every agent one of its
own, which a step reads and writes. Of a recipe that drops tokens, P counts all tokens under unshared, and the kept ones
under dequantize and in_place. With a codec of the suffixes, t under in_place is what that stores.

A decode step (one token for every agent) is the sum of three consecutive parts, each modelled by a roofline,
max(bytes / bandwidth, operations / peak):

    linear   the weights, read once per step; 2 operations per parameter and agent
    prefix   N P t, or Q under in_place; 4 x query heads x head_dim x L operations per token and agent
    suffix   N S t (t again of what a layer keeps); operations as for the prefix

Of a mixture of experts all are in memory. A step reads those that its tokens choose (`Experts.n_used`), and an agent's
operations are those of the experts that its token chooses.

Operations of a recurrence, a few per value of a state, are not counted.

The pool is read once for all agents, but every agent attends to all of it: under in_place the operations per byte grow
with N until compute becomes the limit.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from polykv.codecs.base import Codec
from polykv.codecs.identity import Identity
from polykv.errors import PolyKVError
from polykv.evaluation.hardware import Replica
from polykv.experts import Experts
from polykv.geometry import Geometry
from polykv.models import pick_dtype
from polykv.probe import probe
from polykv.recipe import EXACT, Recipe

VERSION = 2  # of the formulas
# Measured memory may exceed the formulas by this fraction and this many bytes, for masks, activations and allocator
# overhead (observed: 0.9 to 4.0 MiB on a CPU). On a device, `usable` leaves room for them.
TOLERANCE = 0.02
WORKSPACE = 4 * 2**20

Count = TypeVar("Count", int, np.ndarray)  # of agents


@dataclass(frozen=True)
class Architecture:
    """A model's demands on a device: bytes, and operations per token."""

    geometry: Geometry
    dtype: str  # of weights, full-precision caches and states
    n_parameters: int
    n_multiplied: int  # read and multiplied in every step: all but the input embeddings and experts
    attention_flops: int  # per query token and token attended to
    n_logits: int  # per query token: the size of the vocabulary
    experts: tuple[Experts, ...] = ()

    @classmethod
    def of(cls, config: PretrainedConfig, dtype: str) -> "Architecture":
        """Built from a transformers config, without weights (on the meta device).

        Raises:
            PolyKVError: its cache does not have a plain geometry (polykv/geometry.py), or it is a mixture whose experts
                cannot be counted.
        """
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        head = built.get_output_embeddings().weight
        tables = (m.weight for m in built.modules() if isinstance(m, nn.Embedding))
        looked_up = sum(table.numel() for table in tables if table is not head)
        geometry, experts = Geometry.of(config), probe(config).experts
        _check_counted(config, experts)
        routed = sum(one.n_parameters for one in experts)
        n_heads = config.get_text_config(decoder=True).num_attention_heads
        widths = ((layer.n_heads or n_heads) * layer.head_dim for layer in geometry.layers)
        return cls(
            geometry=geometry,
            dtype=dtype,
            n_parameters=built.num_parameters(),
            n_multiplied=built.num_parameters() - looked_up - routed,
            attention_flops=4 * sum(widths),
            n_logits=head.shape[0],
            experts=experts,
        )

    @property
    def itemsize(self) -> int:
        return pick_dtype(self.dtype).itemsize

    @property
    def weights_bytes(self) -> int:
        return self.n_parameters * self.itemsize

    def n_used(self, n_tokens: Any) -> Any:
        """Parameters read and multiplied in a step of `n_tokens`, on average (`Experts.n_used`)."""
        return self.n_multiplied + sum(one.n_used(n_tokens) for one in self.experts)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in full precision."""
        return self.geometry.values_per_token * self.itemsize

    def kept_bytes(self, n_tokens: int, in_place: bool = False, suffix: Codec | None = None) -> int:
        """Bytes of a DynamicCache of `n_tokens`, or of what an agent `in_place` keeps of so many of its own.

        `suffix`: `Recipe.suffix`.
        """
        return 2 * sum(self._sides(n_tokens, in_place, suffix)) + self.state_bytes

    def _sides(self, n_tokens: int, in_place: bool, suffix: Codec | None) -> list[int]:
        """Bytes of the keys, or of the values, of each layer with attention."""
        shapes = [
            (1, one.n_kv_heads, one.kept(n_tokens, in_place), one.head_dim)
            for one in self.geometry.attending
        ]
        codec = suffix or Identity()
        return [codec.stored_bytes(shape, pick_dtype(self.dtype)) for shape in shapes]

    @property
    def state_bytes(self) -> int:
        """Bytes of the layers' states."""
        return self.geometry.state_bytes(pick_dtype(self.dtype))

    def grown_bytes(
        self, n_tokens: int, in_place: bool = False, suffix: Codec | None = None
    ) -> int:
        """`kept_bytes` at the peak of a step: a tensor exists twice while it changes, and later there are logits."""
        grows = max(self._sides(n_tokens, in_place, suffix), default=0)
        written = (one.state or () for one in self.geometry.layers)
        state = max((x.nbytes(pick_dtype(self.dtype)) for one in written for x in one), default=0)
        largest = max(grows, self.n_logits * self.itemsize, state)
        return self.kept_bytes(n_tokens, in_place, suffix) + largest

    def flops(self, n_tokens: int, in_place: bool = False) -> float:
        """Operations of attention per query token to the tokens that the layers keep of `n_tokens`."""
        layers = self.geometry.layers
        kept = sum(one.head_dim * one.kept(n_tokens, in_place) for one in layers)
        return self.attention_flops * kept / sum(one.head_dim for one in layers)


def _check_counted(config: PretrainedConfig, experts: tuple[Experts, ...]) -> None:
    about = config.get_text_config(decoder=True).to_dict().items()
    named = {k: v for k, v in about if "experts" in k and type(v) is int and v > 1}
    if named and not experts:
        raise PolyKVError(
            f"the config of {config.model_type} has {', '.join(f'{k}={v}' for k, v in named.items())}, but how many of "
            "its experts a token uses could not be counted, which the formulas of capacity need; measure it with "
            "experiment=concurrency"
        )


def pool_bytes(recipe: Recipe, model: Architecture, n_tokens: int) -> int:
    """`SharedKVPool.stored_bytes` of a document of `n_tokens`, by the codecs' formulas, exact to the byte.

    Raises:
        PolyKVError: the recipe drops tokens and the model has sliding windows or states, which pools refuse as well.
    """
    geometry, dtype = model.geometry, pick_dtype(model.dtype)
    total = model.state_bytes
    for layer, shape in enumerate(geometry.layers):
        if shape.state is not None:
            recipe.check_keeps_all("a model whose states have read them")
            continue
        n_kept, n_left = recipe.n_kept(n_tokens), None
        if shape.window is not None:
            recipe.check_keeps_all("a layer with a sliding window")
            n_kept = shape.kept(n_tokens)
            n_left = n_tokens - n_kept
        if recipe.suffix:
            total += 2 * shape.n_kv_heads * shape.head_dim  # suffix_scale, in fp16
        for start, stop, exact in recipe.runs(n_kept, layer, geometry.n_layers, n_left):
            run = (1, shape.n_kv_heads, stop - start, shape.head_dim)
            for codec in recipe.codecs(layer, geometry.n_layers):
                total += (EXACT if exact else codec).stored_bytes(run, dtype)
    return total


@dataclass(frozen=True)
class Step:
    """Seconds of a decode step, by part."""

    linear: float | np.ndarray
    prefix: float | np.ndarray
    suffix: float | np.ndarray

    @property
    def seconds(self) -> float | np.ndarray:
        return self.linear + self.prefix + self.suffix


@dataclass(frozen=True)
class DecodeWorkload:
    """Agents that decode after a shared prefix of `n_prefix` tokens with `n_suffix` of their own (padding included)."""

    model: Architecture
    replica: Replica
    pool_bytes: int
    n_prefix: int
    n_suffix: int
    n_pooled: int | None = None  # tokens of the prefix that the pool keeps; None: all
    suffix: Codec | None = None  # of the agents' own tokens under in_place; None: full precision

    @classmethod
    def of(
        cls, model: Architecture, replica: Replica, recipe: Recipe, n_prefix: int, n_suffix: int
    ) -> "DecodeWorkload":
        """The workload of a document compressed under `recipe`."""
        n_bytes, n_pooled = pool_bytes(recipe, model, n_prefix), recipe.n_kept(n_prefix)
        return cls(model, replica, n_bytes, n_prefix, n_suffix, n_pooled, recipe.suffix)

    def cache_bytes(self, reader: str, n_agents: Count) -> Count:
        """Peak bytes of a document and its agents on one replica, without the weights."""
        return self._shared(reader) + n_agents * self._own(reader)

    def prefix_bytes(self, reader: str, n_agents: Count) -> Count:
        """Bytes of the prefix: the pool, and the agents' full-precision copies."""
        one: Any = 0 if reader == "in_place" else self.model.kept_bytes(self._n_read(reader))
        return self._shared(reader) + n_agents * one

    def _n_read(self, reader: str) -> int:
        """Tokens of the prefix that agents read: unshared caches drop none."""
        dropped = reader != "unshared" and self.n_pooled is not None
        return self.n_pooled if dropped else self.n_prefix

    def _shared(self, reader: str) -> int:
        return 0 if reader == "unshared" else self.pool_bytes

    def _own(self, reader: str) -> int:
        if reader == "in_place":
            return self.model.grown_bytes(self.n_suffix, True, self.suffix)
        return self.model.grown_bytes(self._n_read(reader) + self.n_suffix)

    @property
    def room(self) -> int:
        """Usable bytes of a replica beside the weights; negative if the weights alone do not fit."""
        return self.replica.usable_bytes - self.model.weights_bytes

    def max_agents(self, reader: str) -> int:
        """How many agents of one document fit on all replicas, with a copy of the pool on each."""
        return max(0, (self.room - self._shared(reader)) // self._own(reader)) * self.replica.count

    def max_documents(self, reader: str, n_agents: int) -> int:
        """How many documents fit on all replicas, each with its `n_agents` agents on one of them."""
        return max(0, self.room // self.cache_bytes(reader, n_agents)) * self.replica.count

    def on_replica(self, n_agents: Count) -> Count:
        """The largest number of agents on any replica."""
        return -(-n_agents // self.replica.count)

    def read_bytes(self, reader: str, n_agents: Count) -> tuple[Any, Any, Any]:
        """Bytes read in a step of `n_agents` on one replica: (weights, prefix, suffixes and states, both ways)."""
        weights, state = self.model.n_used(n_agents) * self.model.itemsize, self.model.state_bytes
        in_place = reader == "in_place"
        suffix = self.model.kept_bytes(self.n_suffix, in_place, self.suffix if in_place else None)
        if in_place:
            prefix: Any = self.pool_bytes - state
        else:
            prefix = self.model.kept_bytes(self._n_read(reader) + self.n_suffix) - suffix
            prefix = prefix * n_agents
        return weights, prefix, (suffix + state) * n_agents

    def step(self, reader: str, n_agents: Count) -> Step:
        """A decode step of `n_agents` spread over all replicas: that of the fullest one."""
        here, n_prefix = self.on_replica(n_agents), self._n_read(reader)
        if reader == "in_place":
            prefix = self.model.flops(n_prefix)
            suffix = self.model.flops(self.n_suffix, in_place=True)
        else:
            suffix = self.model.flops(self.n_suffix)
            prefix = self.model.flops(n_prefix + self.n_suffix) - suffix
        flops = (2 * self.model.n_used(1), prefix, suffix)
        parts = zip(self.read_bytes(reader, here), flops, strict=True)
        return Step(*(self._roofline(n_bytes, here * per_agent) for n_bytes, per_agent in parts))

    def _roofline(self, n_bytes: Any, n_flops: Any) -> float | np.ndarray:
        return np.maximum(n_bytes / self.replica.bandwidth, n_flops / self.replica.flops)


def gain_range(
    gain: float, unshared: np.ndarray, shared: np.ndarray
) -> tuple[int | None, int | None]:
    """The first and last number of agents for which sharing divides the cost by `gain` or more.

    `unshared` and `shared` are costs (seconds or bytes) for 1, 2, ... agents. First is None if there is no such number;
    last is None if the gain still holds at the end of the arrays.
    """
    (found,) = np.nonzero(unshared >= gain * shared)
    if not len(found):
        return None, None
    last = int(found[-1]) + 1
    return int(found[0]) + 1, None if last == len(unshared) else last
