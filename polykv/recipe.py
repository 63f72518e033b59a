"""Recipe: codecs for keys and values, and exemptions of tokens and layers."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from polykv import config, kernels, targets
from polykv.codecs.base import Codec, not_finite
from polykv.codecs.context import NOTHING, LayerContext
from polykv.codecs.identity import Identity
from polykv.errors import PolyKVError
from polykv.keep import Keep
from polykv.segment import SIDES, Segment

EXACT = Identity(dtype="float16")


@dataclass(frozen=True)
class Exempt:
    """Numbers of tokens and layers that are kept in fp16: at the start, at the end.

    `sliding`: whether all layers of sliding-window attention are.
    """

    sinks: int = 0
    recent: int = 0
    first_layers: int = 0
    last_layers: int = 0
    sliding: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.sliding, bool):
            raise PolyKVError(f"exempt.sliding={self.sliding!r}; give true or false")
        for name, count in vars(self).items():
            if not isinstance(count, int) or count < 0:
                raise PolyKVError(f"exempt.{name}={count!r}; give a whole number from 0 up")


@dataclass(frozen=True)
class Recipe:
    """How a cache is compressed: a codec for keys, one for values, and exemptions.

    `layer_bits`, if not empty, is a table of (key bits, value bits) over the depth, as in KVTuner (arXiv 2502.04420);
    each entry is for an equal share of the layers and replaces the codecs' `bits`. `keep`, if not None, drops tokens
    first; exemptions count the kept ones. `suffix`, if not None, is the codec of keys and values of the tokens that
    agents who read in place add of their own, each quantized as it is written.
    """

    name: str
    key: Codec
    value: Codec
    exempt: Exempt = field(default_factory=Exempt)
    layer_bits: tuple[tuple[int, int], ...] = ()
    keep: Keep | None = None
    suffix: Codec | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.suffix, Codec | None):
            raise PolyKVError(
                f"suffix of recipe {self.name!r} is {self.suffix!r}; give a codec, such as polykv.codecs.q8_0.Q8_0()"
            )
        if self.suffix and not quantizes_by_token(self.suffix):
            raise PolyKVError(
                f"suffix of recipe {self.name!r}: tokens of {type(self.suffix).__name__} share metadata, and agents "
                "add theirs one by one; use a codec with its metadata per token, such as polykv.codecs.q8_0.Q8_0"
            )
        asked = frozenset(self.key.needs) | frozenset(self.value.needs)
        if self.keep and asked:
            raise PolyKVError(
                f"recipe {self.name!r} drops tokens, and its codecs need the {' and '.join(sorted(asked))} of all; "
                "take other codecs, or leave keep out"
            )
        for bits in self.layer_bits:
            if len(bits) != 2:
                raise PolyKVError(
                    f"layer_bits of recipe {self.name!r} has an entry {bits}; give [key bits, value bits]"
                )
            with_bits(self.key, bits[0]), with_bits(self.value, bits[1])

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "Recipe":
        """Built from the settings of a YAML of conf/recipe (a DictConfig).

        Raises:
            PolyKVError: a missing or unknown setting, or options that a codec does not accept.
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
                key=codec_of(given.get("key")),
                value=codec_of(given.get("value")),
                exempt=Exempt(**given.get("exempt", {})),
                layer_bits=tuple(tuple(bits) for bits in given.get("layer_bits") or ()),
                keep=None if given.get("keep") is None else made_of(given["keep"], Keep, "keep"),
                suffix=None if given.get("suffix") is None else codec_of(given["suffix"], "suffix"),
            )
        except PolyKVError:
            raise
        except Exception as error:  # a user's codec may raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise PolyKVError(
                f"recipe {cfg.get('name')!r} cannot be built: {reason}; "
                f"correct conf/recipe/{cfg.get('name')}.yaml or the override"
            ) from error

    @property
    def is_full(self) -> bool:
        """Whether it is the baseline: no compression, and no change of dtype."""
        codecs = (self.key, self.value)
        return not (self.keep or self.suffix) and all(
            isinstance(c, Identity) and c.dtype is None for c in codecs
        )

    def nominal_ratio(self, dtype: torch.dtype) -> float:
        """fp16 bits over payload bits, without metadata and exemptions: K 8 + V 3 gives 32/11."""
        n_layers = len(self.layer_bits) or 1
        codecs = [codec for layer in range(n_layers) for codec in self.codecs(layer, n_layers)]
        share = self.keep.share if self.keep else 1
        return 16 * len(codecs) / share / sum(codec.payload_bits(dtype) for codec in codecs)

    def codecs(self, layer: int, n_layers: int) -> tuple[Codec, Codec]:
        """The key and value codec of one layer.

        Raises:
            PolyKVError: `layer_bits` has more entries than the model layers.
        """
        if not self.layer_bits:
            return self.key, self.value
        if len(self.layer_bits) > n_layers:
            raise PolyKVError(
                f"layer_bits of recipe {self.name!r} has {len(self.layer_bits)} entries and the model "
                f"{n_layers} layers; give at most one entry per layer"
            )
        key_bits, value_bits = self.layer_bits[layer * len(self.layer_bits) // n_layers]
        return with_bits(self.key, key_bits), with_bits(self.value, value_bits)

    @property
    def needs(self) -> frozenset[str]:
        """What codecs and `keep` ask to know of a layer: fields of polykv.codecs.context.LayerContext."""
        keep = self.keep.needs if self.keep else ()
        return frozenset(self.key.needs) | frozenset(self.value.needs) | frozenset(keep)

    def n_kept(self, n_tokens: int) -> int:
        """How many of `n_tokens` tokens a layer keeps."""
        return self.keep.n_kept(n_tokens) if self.keep else n_tokens

    def check_keeps_all(self, what: str) -> None:
        """Check that no token is dropped.

        Raises:
            PolyKVError: tokens are; `what` needs them.
        """
        if self.keep:
            raise PolyKVError(
                f"recipe {self.name!r} drops tokens, and {what} needs all of them; use another recipe"
            )

    def check_exact_suffix(self, what: str) -> None:
        """Check that agents' own tokens are not quantized.

        Raises:
            PolyKVError: they are; `what` leaves them as they are.
        """
        if self.suffix:
            raise PolyKVError(
                f"recipe {self.name!r} quantizes the agents' own tokens (suffix), which {what} leaves as they are; use "
                "a recipe without suffix, or in studies that read in place reader=in_place or readers=[in_place]"
            )

    def encode_layer(
        self,
        k_BHTD: Tensor,
        v_BHTD: Tensor,
        layer: int,
        n_layers: int,
        backend: str = "torch",
        context: LayerContext = NOTHING,
        n_left: int | None = None,
    ) -> list[Segment]:
        """Compress one layer's keys and values, each (batch, kv_heads, tokens, head_dim).

        `backend` comes from `kernels.pick_backend`; `context` is what codecs may know of the layer and these tokens;
        `n_left` see `runs`.

        Raises:
            PolyKVError: NaN, infinity, or an overflow of fp16 (polykv/codecs/base.py); names keys or values. Tokens
                dropped from a layer with a sliding window.
        """
        if self.keep:
            if n_left is not None:
                self.check_keeps_all("a layer with a sliding window")
            # Values that are dropped as well: a choice by attention would be of nothing.
            for side, x_BHTD in zip(SIDES, (k_BHTD, v_BHTD), strict=True):
                if message := not_finite(x_BHTD):
                    raise PolyKVError(f"{side}: {message}")
            k_BHTD, v_BHTD = self.keep.taken(k_BHTD, v_BHTD, context)
        n_tokens = k_BHTD.shape[2]
        codecs = self.codecs(layer, n_layers)
        segments = []
        for start, stop, exact in self.runs(n_tokens, layer, n_layers, n_left):
            pair = (EXACT, EXACT) if exact else codecs
            packed = []
            for side, codec, x_BHTD in zip(SIDES, pair, (k_BHTD, v_BHTD), strict=True):
                try:
                    known = context.narrow(start, stop)
                    packed.append(kernels.encode(codec, x_BHTD[:, :, start:stop], backend, known))
                except PolyKVError as error:
                    # Name tokens of the whole layer: the codec counts within its run.
                    kept = "kept tokens" if self.keep else "tokens"
                    message = not_finite(x_BHTD) or f"{kept} {start} to {stop - 1}: {error}"
                    raise PolyKVError(f"{side}: {message}") from error
            keys, values = packed
            segments.append(Segment(*pair, keys, values))
        return segments

    def runs(
        self, n_tokens: int, layer: int, n_layers: int, n_left: int | None = None
    ) -> list[tuple[int, int, bool]]:
        """(start, stop, exact) of the runs that cover the `n_tokens` tokens that a layer keeps; exact ones are exempt.

        `n_left`: None for full attention, else how many tokens before them have left the layer's sliding window.
        """
        exempt, before = self.exempt, n_left or 0
        sliding = exempt.sliding and n_left is not None
        if sliding or layer < exempt.first_layers or layer >= n_layers - exempt.last_layers:
            return [(0, n_tokens, True)]
        sinks = min(max(exempt.sinks - before, 0), n_tokens)
        recent = max(sinks, n_tokens - exempt.recent)
        runs = [(0, sinks, True), (sinks, recent, False), (recent, n_tokens, True)]
        return [run for run in runs if run[0] < run[1]]


def codec_of(given: Any, part: str = "key and value") -> Codec:
    """The codec of a mapping: the class named by `_target_`, with the other keys as options.

    A nested mapping is an inner codec (Rotated has one). `part`: of the recipe, for the message.
    """
    return made_of(given, Codec, part)


def quantizes_by_token(codec: Codec) -> bool:
    """Whether a codec quantizes each token for itself and without knowing the model."""
    if codec.needs or codec.group != 1:
        return False
    two = codec.encode(torch.zeros(1, 1, 2, 64))
    return all(tensor.shape[2] == 2 for tensor in two.tensors.values())


def made_of(given: Any, kind: type, part: str) -> Any:
    """What a mapping describes: an instance of a class of this kind. `part`: of the recipe, for the message."""
    what = f"{kind.__module__}.{kind.__name__}"
    if not isinstance(given, dict) or "_target_" not in given:
        raise PolyKVError(f"a recipe's {part} must name a _target_ that is a {what}, not {given!r}")
    found = targets.find(given["_target_"])
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise PolyKVError(f"_target_: {given['_target_']} is not a {what}")
    options = {name: option for name, option in given.items() if name != "_target_"}
    return found(**{k: codec_of(v) if isinstance(v, dict) else v for k, v in options.items()})


def with_bits(codec: Any, bits: int) -> Codec:
    """A codec with other `bits`, which may be those of its inner codec.

    Raises:
        PolyKVError: it has no `bits`, or does not support these.
    """
    if hasattr(codec, "codec"):
        return replace(codec, codec=with_bits(codec.codec, bits))
    if not hasattr(codec, "bits"):
        raise PolyKVError(
            f"{type(codec).__name__} has no bits to set; use a codec that has, such as Uniform"
        )
    return replace(codec, bits=bits)


def available_recipes() -> list[str]:
    """The names in conf/recipe."""
    return config.available("recipe")


def load_recipe(name: str) -> Recipe:
    """A recipe by its name in conf/recipe.

    Raises:
        PolyKVError: an unknown name, or an invalid YAML.
    """
    return Recipe.from_config(config.load_group("recipe", name))
