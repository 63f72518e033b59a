"""Capacity on paper: what N agents hold and read when they decode after one document, and what a device allows.

Arithmetic on an architecture, a recipe's bytes and a data sheet; nothing is measured. GB is 1e9 bytes, a
multiply-add is two operations. With W bytes of weights, P shared tokens and S of an agent's own, t bytes of a
token's keys and values in full precision, Q bytes of the pool and L equal layers, a replica of the model holds

    unshared   W + N a (P + S) t        a = 1 + 1 / 2L: transformers' DynamicCache holds one of its 2 L
    dequantize W + Q + N a (P + S) t    tensors twice while it appends
    in_place   W + Q + N a S t

and a step, which gives every agent a token, takes the sum of three parts, each a roofline of its own:
max(bytes / bandwidth, operations / peak), since they run one after the other.

    linear   the weights that a step reads, once; 2 operations a parameter and agent
    prefix   N P t, or Q under in_place; 4 x query heads x head_dim x L operations a token and agent
    suffix   N S t; as the prefix

A pool is read once for all agents, but every agent still multiplies with all of it: under in_place operations
per byte grow with N until the peak binds.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from polykv.evaluation.hardware import Replica
from polykv.geometry import Geometry
from polykv.models import pick_dtype
from polykv.recipe import EXACT, Recipe

VERSION = 1  # of the formulas
# Beside the caches a step holds masks, activations and the allocator's own, which `usable` leaves room for. So what was
# measured may exceed the formulas by this part of it and so many bytes (observed: 1.0 to 5.6 MiB on a CPU).
TOLERANCE = 0.02
WORKSPACE = 4 * 2**20

Count = TypeVar("Count", int, np.ndarray)  # of agents


@dataclass(frozen=True)
class Architecture:
    """What a model asks of a device: bytes, and operations of one token."""

    geometry: Geometry
    dtype: str  # of weights, full-precision caches and the agents' own tokens
    n_parameters: int
    n_multiplied: int  # parameters that a step reads and multiplies with; embeddings are looked up
    attention_flops: int  # of one query token, for each token that it attends to

    @classmethod
    def of(cls, config: PretrainedConfig, dtype: str) -> "Architecture":
        """Built from a transformers config, without weights, on the meta device.

        Raises:
            PolyKVError: its cache does not have a plain geometry (polykv/geometry.py).
        """
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        head = built.get_output_embeddings().weight
        tables = (m.weight for m in built.modules() if isinstance(m, nn.Embedding))
        looked_up = sum(table.numel() for table in tables if table is not head)
        geometry = Geometry.of(config)
        n_heads = config.get_text_config(decoder=True).num_attention_heads
        widths = ((layer.n_heads or n_heads) * layer.head_dim for layer in geometry.layers)
        return cls(
            geometry=geometry,
            dtype=dtype,
            n_parameters=built.num_parameters(),
            n_multiplied=built.num_parameters() - looked_up,
            attention_flops=4 * sum(widths),
        )

    @property
    def itemsize(self) -> int:
        return pick_dtype(self.dtype).itemsize

    @property
    def weights_bytes(self) -> int:
        return self.n_parameters * self.itemsize

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token, full precision."""
        return self.geometry.values_per_token * self.itemsize

    def grown_bytes(self, n_tokens: int) -> int:
        """The peak of a DynamicCache that appends to `n_tokens`: one of its tensors is there twice."""
        largest = max(layer.n_kv_heads * layer.head_dim for layer in self.geometry.layers)
        return n_tokens * (self.token_bytes + largest * self.itemsize)


def pool_bytes(recipe: Recipe, model: Architecture, n_tokens: int) -> int:
    """`SharedKVPool.stored_bytes` of a document, by the codecs' documented formulas: the same to the byte."""
    geometry, dtype = model.geometry, pick_dtype(model.dtype)
    total = 0
    for layer, shape in enumerate(geometry.layers):
        from_end = geometry.n_layers - 1 - layer
        whole = layer < recipe.exempt.first_layers or from_end < recipe.exempt.last_layers
        exact = n_tokens if whole else min(recipe.exempt.sinks + recipe.exempt.recent, n_tokens)
        for codec in recipe.codecs(layer, geometry.n_layers):
            for length, used in ((exact, EXACT), (n_tokens - exact, codec)):
                kept = (1, shape.n_kv_heads, length, shape.head_dim)
                total += used.stored_bytes(kept, dtype) if length else 0
    return total


@dataclass(frozen=True)
class Step:
    """Seconds of the parts of a decode step."""

    linear: float | np.ndarray
    prefix: float | np.ndarray
    suffix: float | np.ndarray

    @property
    def seconds(self) -> float | np.ndarray:
        return self.linear + self.prefix + self.suffix


@dataclass(frozen=True)
class DecodeWorkload:
    """Agents with `n_suffix` tokens of their own (padding among them) after a document of `n_prefix`."""

    model: Architecture
    replica: Replica
    pool_bytes: int
    n_prefix: int
    n_suffix: int

    @classmethod
    def of(
        cls,
        model: Architecture,
        replica: Replica,
        recipe: Recipe,
        n_prefix: int,
        n_suffix: int,
    ) -> "DecodeWorkload":
        """Agents whose document is under `recipe`."""
        return cls(model, replica, pool_bytes(recipe, model, n_prefix), n_prefix, n_suffix)

    def cache_bytes(self, reader: str, n_agents: Count) -> Count:
        """Peak bytes of one document and its agents on one replica, without the weights."""
        return self._shared(reader) + n_agents * self._own(reader)

    def prefix_bytes(self, reader: str, n_agents: Count) -> Count:
        """Bytes kept of the document: the pool, and the agents' full-precision copies."""
        copies: Any = (
            0 if reader == "in_place" else n_agents * self.n_prefix * self.model.token_bytes
        )
        return self._shared(reader) + copies

    def _shared(self, reader: str) -> int:
        return 0 if reader == "unshared" else self.pool_bytes

    def _own(self, reader: str) -> int:
        shared = self.n_prefix if reader == "in_place" else 0
        return self.model.grown_bytes(self.n_prefix + self.n_suffix - shared)

    @property
    def room(self) -> int:
        """Bytes of a replica that its weights leave; negative where they alone do not fit."""
        return self.replica.usable_bytes - self.model.weights_bytes

    def max_agents(self, reader: str) -> int:
        """How many agents of one document fit on all replicas, each replica with its own copy of the pool."""
        return max(0, (self.room - self._shared(reader)) // self._own(reader)) * self.replica.count

    def max_documents(self, reader: str, n_agents: int) -> int:
        """How many documents fit, each with `n_agents` agents of one replica."""
        return max(0, self.room // self.cache_bytes(reader, n_agents)) * self.replica.count

    def on_replica(self, n_agents: Count) -> Count:
        """The most agents that any replica gets."""
        return -(-n_agents // self.replica.count)

    def read_bytes(self, reader: str, n_agents: Count) -> tuple[int, Any, Any]:
        """Bytes that a step of `n_agents` on one replica reads: weights, prefix, suffixes."""
        prefix = self.n_prefix * self.model.token_bytes * n_agents
        return (
            self.model.n_multiplied * self.model.itemsize,
            self.pool_bytes if reader == "in_place" else prefix,
            self.n_suffix * self.model.token_bytes * n_agents,
        )

    def step(self, reader: str, n_agents: Count) -> Step:
        """A decode step of `n_agents` on all replicas, the slowest of them."""
        here = self.on_replica(n_agents)
        flops = (
            2 * self.model.n_multiplied,
            self.model.attention_flops * self.n_prefix,
            self.model.attention_flops * self.n_suffix,
        )
        parts = zip(self.read_bytes(reader, here), flops, strict=True)
        return Step(*(self._roofline(n_bytes, here * per_agent) for n_bytes, per_agent in parts))

    def _roofline(self, n_bytes: Any, n_flops: Any) -> float | np.ndarray:
        return np.maximum(n_bytes / self.replica.bandwidth, n_flops / self.replica.flops)


def gain_range(
    gain: float, unshared: np.ndarray, shared: np.ndarray
) -> tuple[int | None, int | None]:
    """The first and last number of agents at which sharing divides the cost by `gain` or more.

    Costs (seconds or bytes) are of 1, 2, ... agents. None: never; a last of None: still at the last one given.
    """
    (found,) = np.nonzero(unshared >= gain * shared)
    if not len(found):
        return None, None
    last = int(found[-1]) + 1
    return int(found[0]) + 1, None if last == len(unshared) else last
