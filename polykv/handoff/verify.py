"""Checks of a card against the model that seals or opens it: anyone can compute a valid digest of forged content.

Numbers that no encoder writes (NaN, infinities, negative scales) are refused: a single one would spread to all later
tokens.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from polykv.errors import PolyKVError
from polykv.geometry import Geometry
from polykv.handoff.about import CardMetadata
from polykv.handoff.cardfile import MAX_HEADER
from polykv.recurrent import STATES, attending
from polykv.supported import (
    check_cache,
    check_length,
    check_windows,
    max_positions,
    window_of,
)

# At most: an fp32 value; a token's id and its entries in the two maps.
VALUE_BYTES, TOKEN_BYTES = 4, 6
NOT_NEGATIVE = (".scale", ".block_rms", ".largest")


def largest(model: PreTrainedModel) -> float:
    """Upper bound of the size in bytes of the model's cards, under any policy."""
    n_tokens = max_positions(model.config)
    if n_tokens is None:
        return math.inf
    g = Geometry.of(model.config)
    n_values = g.values_per_token
    # Mean and spread each have half as many values as a token, in fp16.
    fixed = 8 + MAX_HEADER + 2 * n_values + g.state_bytes(model.dtype)
    return fixed + n_tokens * (TOKEN_BYTES + VALUE_BYTES * n_values)


def check_metadata(metadata: CardMetadata, model: PreTrainedModel) -> None:
    """Check layers, heads and positions against the model.

    Raises:
        PolyKVError: names what does not match.
    """
    g = Geometry.of(model.config)
    check_windows(model.config, tuple(metadata.windows or (None,) * metadata.n_layers))
    n_left = max(metadata.n_tokens - layer.kept(metadata.n_tokens) for layer in g.layers)
    if metadata.n_left != n_left:
        raise PolyKVError(
            f"it says that {metadata.n_left} tokens have left its windows, not {n_left}"
        )
    if (metadata.n_layers, metadata.n_kv_heads, metadata.head_dim) != (g.n_layers, *g.shape) or (
        tuple(metadata.states or ()) != g.stateful
    ):
        raise PolyKVError("its layers, heads or head_dim are not those of the model")
    check_length(model.config, metadata.position_offset + metadata.n_tokens, "the card")


def check_ids(ids_T: Tensor | None, n_tokens: int, model: PreTrainedModel) -> None:
    """Check dtype, number and range of token ids.

    Raises:
        PolyKVError: another dtype or number of ids, or ids outside the vocabulary.
    """
    if ids_T is None or ids_T.dtype != torch.int32 or ids_T.shape != (n_tokens,):
        raise PolyKVError("the token ids do not match the number of tokens")
    low, high = (int(end) for end in ids_T.aminmax())
    size = model.config.get_text_config(decoder=True).vocab_size
    if low < 0 or high >= size:
        raise PolyKVError(
            f"the token ids range from {low} to {high}, the vocabulary from 0 to {size - 1}"
        )


def checked_ids(
    cache: Cache, token_ids: Tensor | Sequence[int], model: PreTrainedModel, position_offset: int
) -> Tensor:
    """Token ids (tokens,) to seal with a cache, as int32 on the CPU, checked against cache and model.

    Raises:
        PolyKVError: ids that do not match the cache, another model's cache, or more tokens than positions.
    """
    check_cache(cache)
    check_windows(model.config, tuple(window_of(layer) for layer in cache.layers))
    ids_T = torch.as_tensor(token_ids, dtype=torch.int32, device="cpu").reshape(-1)
    keys, g = attending(cache)[0].keys, Geometry.of(model.config)
    n_kv_heads, head_dim = g.shape
    shape = (*keys.shape[:2], cache.get_seq_length(), keys.shape[3])
    stateful = tuple(n for n, layer in enumerate(cache.layers) if type(layer) in STATES)
    expected = (g.n_layers, 1, n_kv_heads, len(ids_T), head_dim)
    if (len(cache.layers), *shape) != expected or stateful != g.stateful:
        raise PolyKVError(
            f"a cache of {len(cache.layers)} layers of {shape} does not fit "
            f"{len(ids_T)} token ids and {model.config.model_type} with {g.n_layers} layers, "
            f"{n_kv_heads} kv heads, head_dim {head_dim}; give one sequence and all its ids"
        )
    check_ids(ids_T, len(ids_T), model)
    check_length(model.config, position_offset + len(ids_T), "the card")
    return ids_T


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse numbers that no encoder writes.

    Raises:
        PolyKVError: names the tensor with a NaN, an infinity, or a negative scale or norm.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        low, high = (float(end) for end in tensor.aminmax())  # a NaN propagates to both
        if not -math.inf < low <= high < math.inf:
            raise PolyKVError(f"tensor {name} holds NaN or infinite numbers")
        if name.endswith(NOT_NEGATIVE) and low < 0:
            raise PolyKVError(f"tensor {name} holds numbers below zero")
