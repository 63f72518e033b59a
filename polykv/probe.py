"""Probing of an architecture with one token: shapes of its KV cache, and whether its attention can be replaced.

The architecture is built on the meta device, which takes no memory, and reads one token. The tensors that it passes to
its cache show kv heads and head_dim reliably; attributes of configs have different names in different families, and
their absence may mean multi-head or multi-query attention.
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
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

from polykv.errors import PolyKVError

NAME = "polykv_probe"
FAR = 1 << 20  # position of a query that still has to see the first token
# Arguments of attention functions that plain attention does not support.
UNSUPPORTED = {
    "softcap": "caps its attention scores",
    "s_aux": "has attention sinks",
    "position_bias": "adds a position bias to its scores",
    "sliding_window": "has sliding-window attention",
    "block_indices": "has block-sparse attention",
}


@dataclass(frozen=True)
class LayerShape:
    """Shape of one layer of a cache. `n_heads`: query heads; None if the model's attention cannot be replaced."""

    n_kv_heads: int
    head_dim: int
    n_heads: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Probe:
    """All layers, and the reason why attention cannot be replaced by an equivalent function (None if it can)."""

    layers: tuple[LayerShape, ...]
    not_plain: str | None


class _Layer(DynamicLayer):
    """A cache layer that records what the attention function was given."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads: int | None = None
        self.is_causal = True
        self.fault: str | None = "does not attend to what its cache returns"

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        keys, values = keys.view_as(keys), values.view_as(values)
        keys.probed = values.probed = self
        return keys, values


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    layer = getattr(key, "probed", None)
    if layer is not None:
        layer.n_heads = query.shape[1]
        layer.is_causal = getattr(module, "is_causal", True) and not getattr(
            attention_mask, "sees_next", False
        )
        layer.fault = _fault(layer, value, attention_mask, options)
    batch, heads, n_queries, _ = query.shape
    return query.new_empty(batch, n_queries, heads, value.shape[-1]), None


def _fault(layer: _Layer, value: Tensor, mask: Any, options: dict[str, Any]) -> str | None:
    if getattr(value, "probed", None) is not layer:
        return "attends to values that its cache does not hold"
    for option, what in UNSUPPORTED.items():
        if options.get(option) is not None:
            return what
    if not hasattr(mask, "sees_first"):
        return "changes its attention mask"
    return None if mask.sees_first else "hides early tokens from later ones"


def _mask(*args: Any, mask_function: Any = None, **options: Any) -> Tensor:
    """sdpa's mask, never None, with two attributes: whether a query sees the next token, and a far one the first."""
    options["allow_is_causal_skip"] = options["allow_is_bidirectional_skip"] = False
    mask = sdpa_mask(*args, mask_function=mask_function, **options)
    zero, one, far = (torch.tensor(place, device="cpu") for place in (0, 1, FAR))
    mask.sees_next = bool(mask_function(zero, zero, zero, one))
    mask.sees_first = bool(mask_function(zero, zero, far, zero))
    return mask


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)

_known: dict[str, Probe] = {}


def probe(config: PretrainedConfig) -> Probe:
    """Probe an architecture with full-attention layers (polykv/supported.py); cached per process.

    Raises:
        PolyKVError: an architecture that does not store a token's keys and values in each layer.
    """
    key = config.to_json_string()
    if key not in _known:
        _known[key] = _probe(config)
    return _known[key]


@torch.no_grad()
def _probe(config: PretrainedConfig) -> Probe:
    name, config = config.model_type, copy.deepcopy(config)
    # There are no weights to quantize, and looping over experts would need their data.
    config.quantization_config, config._experts_implementation = None, "batched_mm"
    layers = [_Layer() for _ in DynamicCache(config=config).layers]
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            model.set_attn_implementation(NAME)
            ids_BT = torch.zeros(1, 1, dtype=torch.long)
            # Without a mask some models look for padding in the ids, which have no data.
            given = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
            model(**given, past_key_values=Cache(layers=layers), use_cache=True)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PolyKVError(
            f"{name} cannot be read one token at a time with a cache ({first}); use another model"
        ) from error
    chosen = model.config._attn_implementation == NAME
    faults = [layer.fault for layer in layers] if chosen else ["has its own attention function"]
    shapes = tuple(_shape(name, index, layer) for index, layer in enumerate(layers))
    return Probe(shapes, next(filter(None, faults), None))


def _shape(name: str, index: int, layer: _Layer) -> LayerShape:
    if not layer.is_causal:
        raise PolyKVError(
            f"{name} lets a token attend to later ones (layer {index}); use a causal decoder"
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
    return LayerShape(n_kv_heads, head_dim, layer.n_heads)
