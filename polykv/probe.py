"""Runs one token through an architecture to find the shapes of its KV cache and whether its attention can be replaced.

The model is built without weights on the meta device, which allocates no memory, and given a cache and an attention
function that record what they receive. The shapes of the recorded keys are reliable. A config's attributes are not:
their names differ between model families, and a missing one may mean multi-head or multi-query attention.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PretrainedConfig,
)
from transformers.cache_utils import DummyLayer, DynamicLayer
from transformers.masking_utils import sdpa_mask

from polykv import experts
from polykv.errors import PolyKVError
from polykv.recurrent import STATES, StateShape, shapes

ATTENTION = "polykv_probe"  # name of the recording attention function in transformers' registry
# Families (types of the text's config) with layers of linear attention, convolution or recurrence whose states
# transformers continues exactly, also with several tokens at once (tests/test_families.py). Jamba, say, does not.
CONTINUES = {
    "granitemoehybrid", "lfm2", "lfm2_moe", "lfm3", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_next",
}  # fmt: skip
FAR_POSITION = 1 << 20  # with full attention, a query this far away still sees token 0
# Arguments that attention in place does not support, and the end of an error message "MODEL ...".
UNSUPPORTED = {
    "position_bias": "adds a position bias to its scores",
    "block_indices": "has block-sparse attention",
}


@dataclass(frozen=True)
class LayerShape:
    """Geometry of one layer of a cache.

    `window`: None for full attention; a sliding-window layer's token sees the last `window` tokens, itself included.
    `n_heads` is the number of query heads, or None if the model did not call the recording attention function. It does
    not affect the cache, so equality ignores it. A layer of linear attention, or one that keeps nothing, has no heads
    but a `state`, which is None for all others.
    """

    n_kv_heads: int
    head_dim: int
    n_heads: int | None = field(default=None, compare=False)
    window: int | None = None
    state: tuple[StateShape, ...] | None = None

    def kept(self, n_tokens: int, in_place: bool = False) -> int:
        """How many of `n_tokens` tokens the layer keeps: those that a later token can see.

        `in_place`: of an agent's own tokens, in a CascadeCache. It appends one to those that the last token saw.
        """
        if in_place and self.window is not None:
            return min(n_tokens, self.window + 1)
        return kept_tokens(n_tokens, self.window)


def kept_tokens(n_tokens: int, window: int | None) -> int:
    """How many of `n_tokens` tokens a layer keeps: all, or the `window` - 1 that the next token sees beside itself.

    transformers' DynamicSlidingWindowLayer keeps as many.
    """
    return n_tokens if window is None else min(n_tokens, window - 1)


@dataclass(frozen=True)
class Probe:
    """The shapes of all layers, and why the model's attention cannot be replaced.

    `attention_fault` is the end of an error message "MODEL ...", or None if the attention is causal softmax attention
    over the whole cache or a sliding window of it, for which another implementation can be substituted. It may cap its
    scores (Gemma 2) and have attention sinks (gpt-oss), which the attention function gets as arguments. `experts` are
    those of the layers that are mixtures, where they could be counted.
    """

    layers: tuple[LayerShape, ...]
    attention_fault: str | None
    experts: tuple[experts.Experts, ...]


class _RecordingLayer(DynamicLayer):
    """A cache layer on which `_attend` records what the model did with the keys and values returned by `update`."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.n_heads: int | None = None
        self.is_causal = True
        self.slides = True  # whether the mask hides what the cache drops, and nothing else
        # Remains if the keys returned by `update` never reach `_attend`.
        self.fault: str | None = "does not attend to what its cache returns"

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        # New tensor objects: an attribute on self.keys would make a reference cycle with this layer.
        keys, values = keys.view_as(keys), values.view_as(values)
        keys.cache_layer = values.cache_layer = self
        return keys, values


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function that records its arguments on the cache layer that `key` comes from.

    The output (B, query tokens, heads, D) is uninitialized: on the meta device only shapes matter.
    """
    layer = getattr(key, "cache_layer", None)
    if layer is not None:
        layer.n_heads = query.shape[1]
        sees_next = getattr(attention_mask, "sees_next", False)
        layer.is_causal = getattr(module, "is_causal", True) and not sees_next
        layer.fault = _fault(layer, value, attention_mask, options)
    batch, heads, n_queries, _ = query.shape
    return query.new_empty(batch, n_queries, heads, value.shape[-1]), None


def _fault(layer: _RecordingLayer, value: Tensor, mask: Any, options: dict[str, Any]) -> str | None:
    """Why this call is not plain attention over `layer`, as the end of an error message; None if it is."""
    if getattr(value, "cache_layer", None) is not layer:
        return "attends to values that its cache does not hold"
    for option, what in UNSUPPORTED.items():
        if options.get(option) is not None:
            return what
    if options.get("sliding_window") not in (None, layer.window):
        return "has sliding windows that its cache does not know"
    if not hasattr(mask, "sees"):  # not the tensor that `_mask` made
        return "changes its attention mask"
    if layer.window is None:
        return None if mask.sees(FAR_POSITION, 0) else "hides early tokens from later ones"
    # Two queries in a row, as attention within chunks looks like a window to the last token of a chunk.
    for query in (FAR_POSITION, FAR_POSITION + 1):
        first = query - layer.window + 1
        layer.slides &= mask.sees(query, first) and not mask.sees(query, first - 1)
    return None


def _mask(*args: Any, mask_function: Any = None, **options: Any) -> Tensor:
    """Mask function: sdpa's mask, never None, with two attributes for `_attend`.

    `sees(query, key)`: whether a query at one position sees a key at another. `sees_next`: whether token 0 sees token 1
    (not causal).
    """
    options["allow_is_causal_skip"] = options["allow_is_bidirectional_skip"] = False
    mask = sdpa_mask(*args, mask_function=mask_function, **options)

    def sees(query: int, key: int) -> bool:
        # Arguments: batch index, head index, query position, key position.
        places = (torch.tensor(place, device="cpu") for place in (0, 0, query, key))
        return bool(mask_function(*places))

    mask.sees, mask.sees_next = sees, sees(0, 1)
    return mask


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _mask)

_probes: dict[str, Probe] = {}  # by the config's JSON, since configs are not hashable


def probe(config: PretrainedConfig) -> Probe:
    """The probe of an architecture; results are cached for the life of the process.

    All layers must have full or sliding-window attention, or a state, which `check_model` (polykv/supported.py) checks
    first.

    Raises:
        PolyKVError: the model does not continue its states exactly, cannot read one token with a cache, is not causal,
            or does not cache exactly one key and one value of the same shape for that token in each attention layer.
    """
    key = config.to_json_string()
    if key not in _probes:
        _probes[key] = _probe(config)
    return _probes[key]


@torch.no_grad()
def _probe(config: PretrainedConfig) -> Probe:
    name, config = config.model_type, copy.deepcopy(config)
    # There are no weights to quantize.
    config.quantization_config = None
    # Looping over the experts that the router chose would need its output, which has no data on the meta device.
    config._experts_implementation = "batched_mm"
    layers = [
        one if type(one) in STATES else _RecordingLayer(getattr(one, "sliding_window", None))
        for one in DynamicCache(config=config).layers
    ]
    # Of a state, those tensors that are not in bfloat16 then have one dtype in all models.
    dtype = torch.float32
    if not all(isinstance(layer, _RecordingLayer) for layer in layers):
        _check_continues(config)
        dtype = torch.bfloat16
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, dtype=dtype, attn_implementation="eager"
            ).eval()
            model.set_attn_implementation(ATTENTION)
            mixtures = experts.watch(model)
            ids_BT = torch.zeros(1, 1, dtype=torch.long)
            model(
                input_ids=ids_BT,
                # Without a mask some models look for padding in the ids, which have no data on the meta device.
                attention_mask=torch.ones_like(ids_BT),
                past_key_values=Cache(layers=layers),
                use_cache=True,
            )
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PolyKVError(
            f"{name} cannot be read one token at a time with a cache ({first_line}); use another model"
        ) from error
    found = tuple(
        _shape(name, index, layer)
        if isinstance(layer, _RecordingLayer)
        else _state(name, index, layer)
        for index, layer in enumerate(layers)
    )
    # Models that do not use the registry ignore set_attn_implementation.
    if model.config._attn_implementation != ATTENTION:
        return Probe(found, "has its own attention function", tuple(mixtures))
    faults = (fault for layer in layers if (fault := getattr(layer, "fault", None)))
    return Probe(found, next(faults, None), tuple(mixtures))


def _check_continues(config: PretrainedConfig) -> None:
    """Check that a model with states is one that goes on from them with several tokens at once; raises PolyKVError."""
    if config.get_text_config(decoder=True).model_type not in CONTINUES:
        raise PolyKVError(
            f"{config.model_type} has layers of linear attention, or that share a cache, and transformers does not "
            f"continue them exactly; use a model of {', '.join(sorted(CONTINUES))}, or one all of whose layers have "
            "full or sliding-window attention"
        )


def _state(name: str, index: int, layer: Any) -> LayerShape:
    """The shape of a layer with a state; raises PolyKVError if the model left it empty."""
    found = shapes(layer, torch.bfloat16)
    if not found and not isinstance(layer, DummyLayer):
        raise PolyKVError(
            f"{name} keeps nothing in layer {index} of its cache after reading a token; use another model"
        )
    return LayerShape(0, 0, state=found)


def _shape(name: str, index: int, layer: _RecordingLayer) -> LayerShape:
    """The shape of a layer that has read one token.

    Raises:
        PolyKVError: not causal, a mask that is not that of the layer's window, not exactly one token, or keys and
            values of different shapes.
    """
    if not layer.is_causal:
        raise PolyKVError(
            f"{name} lets a token attend to later ones (layer {index}); use a causal decoder"
        )
    if not layer.slides:
        raise PolyKVError(
            f"{name} does not slide a window of {layer.window} tokens over layer {index}, as its cache does; "
            "use another model"
        )
    if layer.get_seq_length() != 1:
        raise PolyKVError(
            f"{name} keeps {layer.get_seq_length()} tokens in layer {index} of its cache after reading one; "
            "use a model that caches every token's keys and values"
        )
    if layer.keys.shape != layer.values.shape:
        raise PolyKVError(
            f"{name} caches keys {tuple(layer.keys.shape)} and values {tuple(layer.values.shape)} in layer "
            f"{index}; use a model whose keys and values have one shape"
        )
    _, n_kv_heads, _, head_dim = layer.keys.shape
    return LayerShape(n_kv_heads, head_dim, layer.n_heads, layer.window)
