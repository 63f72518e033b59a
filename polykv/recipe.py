"""Recipe: the codec pair for keys and values, and which tokens and layers stay exact."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from polykv import config, kernels, targets
from polykv.codecs.base import Codec, not_finite
from polykv.codecs.identity import Identity
from polykv.errors import PolyKVError
from polykv.segment import Segment

EXACT = Identity(dtype="float16")
SIDES = ("keys", "values")


@dataclass(frozen=True)
class Exempt:
    """What is kept in fp16 whatever the codecs are: counts of tokens and of layers."""

    sinks: int = 0
    recent: int = 0
    first_layers: int = 0
    last_layers: int = 0

    def __post_init__(self) -> None:
        for name, count in vars(self).items():
            if not isinstance(count, int) or count < 0:
                raise PolyKVError(f"exempt.{name}={count!r}; it takes a whole number from 0 up")


@dataclass(frozen=True)
class Recipe:
    """How a cache is compressed: a codec for keys, one for values, and the exemptions.

    `layer_bits`, if any, tabulates (key bits, value bits) over the depth, as KVTuner does
    (arXiv 2502.04420); each entry is for an equal share of the layers and replaces the codecs' `bits`.
    """

    name: str
    key: Codec
    value: Codec
    exempt: Exempt = field(default_factory=Exempt)
    layer_bits: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for bits in self.layer_bits:
            if len(bits) != 2:
                raise PolyKVError(
                    f"layer_bits of recipe {self.name!r} has an entry {bits}; give [key bits, value bits]"
                )
            with_bits(self.key, bits[0]), with_bits(self.value, bits[1])

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "Recipe":
        """A recipe from its YAML (conf/recipe).

        Raises:
            PolyKVError: a key is missing or unknown, or a codec does not take the options that the YAML gives it.
        """
        known = [field.name for field in fields(cls)]
        for name in map(str, cfg):
            if name not in known:
                hint = config.did_you_mean(name, known)
                raise PolyKVError(f"a recipe has no setting {name!r}{hint}")
        try:
            given: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
            return cls(
                name=given["name"],
                key=_codec(given.get("key")),
                value=_codec(given.get("value")),
                exempt=Exempt(**given.get("exempt", {})),
                layer_bits=tuple(tuple(bits) for bits in given.get("layer_bits") or ()),
            )
        except PolyKVError:
            raise
        except Exception as error:  # a user's codec may raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise PolyKVError(
                f"recipe {cfg.get('name')!r} cannot be built: {reason}; "
                f"mend conf/recipe/{cfg.get('name')}.yaml or the override"
            ) from error

    @property
    def is_full(self) -> bool:
        """True for the baseline: nothing is compressed, nothing changes its dtype."""
        return all(isinstance(c, Identity) and c.dtype is None for c in (self.key, self.value))

    def nominal_ratio(self, dtype: torch.dtype) -> float:
        """fp16 bits over payload bits, metadata and exemptions left out: K 8 + V 3 gives 32/11."""
        n_layers = len(self.layer_bits) or 1
        codecs = [codec for layer in range(n_layers) for codec in self.codecs(layer, n_layers)]
        return 16 * len(codecs) / sum(codec.payload_bits(dtype) for codec in codecs)

    def codecs(self, layer: int, n_layers: int) -> tuple[Codec, Codec]:
        """The key and value codec of one layer.

        Raises:
            PolyKVError: a table of bits for more layers than the model has.
        """
        if not self.layer_bits:
            return self.key, self.value
        if len(self.layer_bits) > n_layers:
            raise PolyKVError(
                f"layer_bits of recipe {self.name!r} has {len(self.layer_bits)} entries and the model "
                f"{n_layers} layers; give at most one entry a layer"
            )
        key_bits, value_bits = self.layer_bits[layer * len(self.layer_bits) // n_layers]
        return with_bits(self.key, key_bits), with_bits(self.value, value_bits)

    def encode_layer(
        self, k_BHTD: Tensor, v_BHTD: Tensor, layer: int, n_layers: int, backend: str = "torch"
    ) -> list[Segment]:
        """Compress one layer's keys and values, each (batch, kv_heads, tokens, head_dim).

        `backend` is one that `kernels.pick_backend` gave.

        Raises:
            PolyKVError: NaN, infinity, or what overflows fp16 (polykv/codecs/base.py); names keys or values.
        """
        n_tokens = k_BHTD.shape[2]
        codecs = self.codecs(layer, n_layers)
        segments = []
        for start, stop, exact in self._runs(n_tokens, layer, n_layers):
            pair = (EXACT, EXACT) if exact else codecs
            packed = []
            for side, codec, x_BHTD in zip(SIDES, pair, (k_BHTD, v_BHTD), strict=True):
                try:
                    packed.append(kernels.encode(codec, x_BHTD[:, :, start:stop], backend))
                except PolyKVError as error:
                    # Of all tokens: the codec counts those of its run.
                    said = not_finite(x_BHTD) or f"tokens {start} to {stop - 1}: {error}"
                    raise PolyKVError(f"{side}: {said}") from error
            keys, values = packed
            segments.append(Segment(*pair, keys, values))
        return segments

    def _runs(self, n_tokens: int, layer: int, n_layers: int) -> list[tuple[int, int, bool]]:
        """(start, stop, exact) runs that cover the tokens of a layer."""
        if layer < self.exempt.first_layers or layer >= n_layers - self.exempt.last_layers:
            return [(0, n_tokens, True)]
        sinks = min(self.exempt.sinks, n_tokens)
        recent = max(sinks, n_tokens - self.exempt.recent)
        runs = [(0, sinks, True), (sinks, recent, False), (recent, n_tokens, True)]
        return [run for run in runs if run[0] < run[1]]


def _codec(given: Any) -> Codec:
    """The codec of a YAML's mapping: the class that `_target_` names, built from the other keys.

    A mapping among these is the codec inside it (Rotated has one).
    """
    if not isinstance(given, dict) or "_target_" not in given:
        raise PolyKVError(f"a recipe's key and value take a codec with a _target_, not {given!r}")
    found = targets.find(given["_target_"])
    if not (isinstance(found, type) and issubclass(found, Codec)):
        raise PolyKVError(f"_target_: {given['_target_']} is no codec (polykv.codecs.base.Codec)")
    options = {name: option for name, option in given.items() if name != "_target_"}
    return found(**{k: _codec(v) if isinstance(v, dict) else v for k, v in options.items()})


def with_bits(codec: Any, bits: int) -> Codec:
    """The same codec, or the one inside it, at another width.

    Raises:
        PolyKVError: it has no `bits`, or not these.
    """
    if hasattr(codec, "codec"):
        return replace(codec, codec=with_bits(codec.codec, bits))
    if not hasattr(codec, "bits"):
        raise PolyKVError(
            f"{type(codec).__name__} has no bits to set; take a codec that has, such as Uniform"
        )
    return replace(codec, bits=bits)


def available_recipes() -> list[str]:
    """The names in conf/recipe."""
    return config.available("recipe")


def load_recipe(name: str) -> Recipe:
    """A recipe by its name in conf/recipe.

    Raises:
        PolyKVError: unknown name, or a YAML that its codec does not take.
    """
    return Recipe.from_config(config.load_group("recipe", name))
