"""What a card must be for the model that opens it, beyond a right digest: a digest can be forged with the rest.

Numbers that no encoder writes (NaN, infinities, negative scales) are refused: one of them would spread over
every later token.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from polykv.errors import PolyKVError
from polykv.geometry import Geometry
from polykv.handoff.about import About
from polykv.handoff.cardfile import MAX_HEADER
from polykv.supported import check_length, max_positions

VALUE_BYTES, TOKEN_BYTES = (
    4,
    6,
)  # at most: a value in fp32; a token's id and its places in the two maps


def largest(model: PreTrainedModel) -> float:
    """Bytes that no card of the model exceeds, whatever its policy."""
    n_tokens = max_positions(model.config)
    if n_tokens is None:
        return math.inf
    n_values = Geometry.of(model.config).values_per_token
    # Mean and spread have half as many values each as a token, in fp16.
    return 8 + MAX_HEADER + 2 * n_values + n_tokens * (TOKEN_BYTES + VALUE_BYTES * n_values)


def check_about(about: About, model: PreTrainedModel) -> None:
    """Refuse layers, heads or positions that the model does not have.

    Raises:
        PolyKVError: names what does not fit.
    """
    g = Geometry.of(model.config)
    if (about.n_layers, about.n_kv_heads, about.head_dim) != (g.n_layers, *g.shape):
        raise PolyKVError("its layers, heads or head_dim are not those of the model")
    check_length(model.config, about.position_offset + about.n_tokens, "the card")


def check_ids(ids_T: Tensor | None, n_tokens: int, model: PreTrainedModel) -> None:
    """Refuse token ids that the model cannot read.

    Raises:
        PolyKVError: another dtype or number of ids, or ids outside the vocabulary.
    """
    if ids_T is None or ids_T.dtype != torch.int32 or ids_T.shape != (n_tokens,):
        raise PolyKVError("the token ids do not fit the number of tokens")
    low, high = (int(end) for end in ids_T.aminmax())
    size = model.config.get_text_config(decoder=True).vocab_size
    if low < 0 or high >= size:
        raise PolyKVError(
            f"the token ids reach from {low} to {high}, the vocabulary from 0 to {size - 1}"
        )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse what no encoder writes.

    Raises:
        PolyKVError: names the tensor that holds a NaN, an infinity, or a scale below zero.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        low, high = (float(end) for end in tensor.aminmax())  # a NaN wins both
        if not -math.inf < low <= high < math.inf:
            raise PolyKVError(f"tensor {name} holds NaN or infinite numbers")
        if name.endswith(".scale") and low < 0:
            raise PolyKVError(f"tensor {name} holds scales below zero")
