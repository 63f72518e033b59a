"""Geometry: the shapes on which the size of a KV cache depends, layer by layer."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from polykv.errors import PolyKVError
from polykv.probe import LayerShape, probe


@dataclass(frozen=True)
class Geometry:
    """The layers of a KV cache, found by running one token (polykv/probe.py)."""

    layers: tuple[LayerShape, ...]

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Geometry":
        """The geometry of an architecture whose layers have full or sliding-window attention, or a state.

        Raises:
            PolyKVError: its cache holds something else, or disagrees with its config.
        """
        geometry = cls(probe(config).layers)
        geometry._check(config.get_text_config(decoder=True))
        return geometry

    @classmethod
    def even(cls, n_layers: int, n_kv_heads: int, head_dim: int) -> "Geometry":
        """A geometry of equal layers."""
        return cls((LayerShape(n_kv_heads, head_dim),) * n_layers)

    def _check(self, config: PretrainedConfig) -> None:
        """Compare with the attributes of the config, where it has them."""
        found = {
            "num_hidden_layers": {self.n_layers},
            "num_key_value_heads": {layer.n_kv_heads for layer in self.attending},
            "head_dim": {layer.head_dim for layer in self.attending},
        }
        for name, values in found.items():
            try:
                stated = getattr(config, name, None)
            except Exception:  # transformers raises its own where layers differ (Gemma 4)
                continue
            if stated is not None and values != {stated}:
                raise PolyKVError(
                    f"the config of {config.model_type} has {name}={stated}, but its cache {sorted(values)}; "
                    "correct the config, or use another model"
                )

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def attending(self) -> tuple[LayerShape, ...]:
        """The layers that keep keys and values."""
        return tuple(layer for layer in self.layers if layer.state is None)

    @property
    def stateful(self) -> tuple[int, ...]:
        """The numbers of the layers that keep a state, or nothing."""
        return tuple(n for n, layer in enumerate(self.layers) if layer.state is not None)

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the states of the other layers, whatever the number of tokens, in a model of this dtype."""
        return sum(one.nbytes(dtype) for layer in self.layers for one in layer.state or ())

    @property
    def values_per_token(self) -> int:
        """Number of values per token: keys and values of all layers and heads."""
        return 2 * sum(layer.n_kv_heads * layer.head_dim for layer in self.layers)

    def values(self, n_tokens: int, in_place: bool = False) -> int:
        """Number of values kept of `n_tokens`: sliding-window layers keep the last ones only (`LayerShape.kept`)."""
        return 2 * sum(
            one.n_kv_heads * one.head_dim * one.kept(n_tokens, in_place) for one in self.layers
        )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer; None for full attention and for a layer with a state."""
        return tuple(layer.window for layer in self.layers)

    @property
    def shape(self) -> tuple[int, int]:
        """(kv heads, head_dim), the same in all layers that have any.

        Raises:
            PolyKVError: the layers differ.
        """
        shapes = {(layer.n_kv_heads, layer.head_dim) for layer in self.attending}
        if len(shapes) > 1:
            raise PolyKVError(
                f"layers differ in (kv heads, head_dim): {sorted(shapes)}; use a model with equal layers"
            )
        return shapes.pop()
