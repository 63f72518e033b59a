"""Errors of keys, values, attention logits and attention output by layer and kv head.

Errors are relative squared errors, comparable with a codec's error on Gaussian data; the diagnostics explain why a real
cache differs from that.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from polykv.attention.observe import observe
from polykv.codecs.base import Codec
from polykv.codecs.context import NOTHING
from polykv.pool import SharedKVPool
from polykv.recipe import Recipe
from polykv.supported import check_attention, check_every_token
from polykv.tokens import last_places

VERSION = 1  # of the errors by layer and head
KINDS = ("key", "value", "logits", "output")
GAUSSIAN_SHAPE = (1, 2, 512)  # (batch, heads, tokens) of the Gaussian data


@torch.no_grad()
def queries_of(model: PreTrainedModel, pool: SharedKVPool, rest_BT: Tensor) -> list[Tensor]:
    """The queries of the tokens `rest_BT` that follow the pool, per layer (1, heads, tokens, head_dim).

    They are rescaled so that the model's scores are q.k / sqrt(head_dim).

    Raises:
        PolyKVError: the model's attention cannot be replaced.
    """
    check_attention(model.config, "its layers cannot be inspected; use another model")
    check_every_token(model.config, "inspection of layers")
    found: dict[int, Tensor] = {}

    def see(module: Any, query: Tensor, key: Tensor, scaling: float) -> None:
        found[module.layer_idx] = query * (scaling / query.shape[-1] ** -0.5)

    past = pool.dequantize()
    with observe(model, see):
        ids_BT = rest_BT.to(model.device)
        model(input_ids=ids_BT, past_key_values=past, logits_to_keep=last_places(ids_BT))
    return [found[layer] for layer in sorted(found)]


def head_errors(
    queries: Tensor, full: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Kind of KINDS -> relative squared error over one layer's prefix, (kv_heads,).

    `full` and `other` are keys and values (1, kv_heads, tokens, head_dim); queries are (1, heads, queries, head_dim),
    where consecutive heads share a kv head. Logits are compared up to a constant per query, which softmax ignores; the
    output is attention over the prefix alone. NaN where the true values are all zero (the logits of a single token).
    """
    grouped = queries[0].unflatten(0, (full[0].shape[1], -1)).flatten(1, 2).float()
    (k, v), (k_other, v_other) = (tuple(x[0].float() for x in pair) for pair in (full, other))

    def logits(keys: Tensor) -> Tensor:
        scores = grouped @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5
        return scores - scores.mean(dim=-1, keepdim=True)

    scores, scores_other = logits(k), logits(k_other)
    output, output_other = scores.softmax(-1) @ v, scores_other.softmax(-1) @ v_other
    pairs = ((k, k_other), (v, v_other), (scores, scores_other), (output, output_other))
    return {kind: _relative(*pair) for kind, pair in zip(KINDS, pairs, strict=True)}


def _relative(true: Tensor, other: Tensor) -> Tensor:
    return (other - true).square().sum(dim=(1, 2)) / true.square().sum(dim=(1, 2))


def gaussian_error(codec: Codec, head_dim: int) -> float:
    """The codec's relative squared error on samples of N(0, 1)."""
    generator = torch.Generator().manual_seed(0)
    x_BHTD = torch.randn((*GAUSSIAN_SHAPE, head_dim), generator=generator)
    error = codec.decode(codec.encode(x_BHTD)) - x_BHTD
    return float(error.square().sum() / x_BHTD.square().sum())


def diagnostics(x_BHTD: Tensor) -> Mapping[str, float]:
    """Deviations from white noise of one layer's keys or values (batch, kv_heads, tokens, head_dim).

    dc_share: fraction of the energy in the vectors' means, which an unsigned Hadamard transform puts into the first
    coordinate (1 / head_dim for white noise). peak_to_rms: largest ratio of a channel's RMS to that of its head
    (1 for white noise), which shows outlier channels. Both are NaN for zeros.
    """
    x = x_BHTD.float()
    dim = x.shape[-1]
    energy = x.square().sum()
    channel_rms = x.square().mean(dim=2).sqrt()  # (batch, kv_heads, head_dim)
    head_rms = channel_rms.square().mean(dim=-1, keepdim=True).sqrt()
    return {
        "dc_share": float(dim * x.mean(dim=-1).square().sum() / energy),
        "peak_to_rms": float((channel_rms / head_rms).amax()),
    }


def bias_norms(model: PreTrainedModel) -> list[Mapping[str, float | None]]:
    """Of each layer, the norm of its key and value projection's bias over all kv heads; 0 without a bias.

    None where the layer has no `k_proj` and `v_proj` (fused projections).
    """
    found: dict[int, Mapping[str, float | None]] = {}
    for module in model.modules():
        if (layer := getattr(module, "layer_idx", None)) is not None:
            sides = {"key": "k_proj", "value": "v_proj"}
            norms = {part: _bias_norm(getattr(module, name, None)) for part, name in sides.items()}
            if layer not in found or None not in norms.values():
                found[layer] = norms
    return [found[layer] for layer in sorted(found)]


def _bias_norm(projection: Any) -> float | None:
    if projection is None:
        return None
    bias = getattr(projection, "bias", None)
    return 0.0 if bias is None else float(bias.detach().float().norm())


def token_norm(x_BHTD: Tensor) -> float:
    """Root mean square over the tokens of the norm of a token's keys or values, all kv heads together."""
    return float(x_BHTD.float().square().sum(dim=(1, 3)).mean().sqrt())


def only_layer(full: SharedKVPool, recipe: Recipe, exact: Recipe, layer: int) -> SharedKVPool:
    """The pool `full` with one layer under `recipe` and the others under `exact`."""
    recipe.check_keeps_all("a layer by itself")
    contexts = full.contexts or (NOTHING,) * full.n_layers
    segments = [
        (recipe if index == layer else exact).encode_layer(
            *full.decode_layer(index), index, full.n_layers, context=context
        )
        for index, context in enumerate(contexts)
    ]
    return SharedKVPool(segments, recipe)
