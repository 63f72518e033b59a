"""From a policy and a budget to packed keys and values."""

import math

import numpy as np
import torch
from transformers import Cache

from polykv.codecs.base import not_finite
from polykv.codecs.identity import DTYPES
from polykv.errors import PolyKVError
from polykv.handoff.allocate import allocate
from polykv.handoff.mixed import EXACT, TIERS, Mixed, MixedCodec
from polykv.handoff.policy import Policy
from polykv.handoff.signals import Sender
from polykv.models import Geometry

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def exact_dtype(policy: Policy, cache: Cache) -> str | None:
    """The dtype of the 16-bit tier; None is the model's own.

    Raises:
        PolyKVError: the policy makes no card.
    """
    if policy.store == "text":
        raise PolyKVError(f"policy {policy.name!r} hands on text and makes no card; choose another")
    if policy.store == "model":
        return None
    own = DTYPE_NAMES[cache.layers[0].keys.dtype]
    # bf16 has fp16's size; a cast would only add an error and an overflow.
    return own if policy.store == "mixed" and own == "bfloat16" else "float16"


def pack(
    sender: Sender,
    policy: Policy,
    codec: MixedCodec,
    budget_bits: float,
    start: int = 0,
    spent: int = 0,
) -> tuple[Mixed, Mixed]:
    """Keys and values of tokens [start, T), of which those before have taken `spent` bits.

    Raises:
        PolyKVError: the budget is no number, or below the policy's lowest tier.
    """
    sides = [[getattr(layer, side)[:, :, start:] for layer in sender.cache.layers]
             for side in ("keys", "values")]  # fmt: skip
    if policy.has_budget:
        tiers = _tiers(sender, policy, codec, budget_bits, start, spent)
    else:
        tiers = [torch.full((sender.n_tokens - start,), EXACT, dtype=torch.uint8)] * 2
    try:
        key, value = (codec.encode(*pair) for pair in zip(sides, tiers, strict=True))
    except PolyKVError as error:  # the codec sees all layers in one, and the tokens of one tier
        raise PolyKVError(_where(sides, start) or str(error)) from error
    return key, value


def _where(sides: list[list[torch.Tensor]], start: int) -> str | None:
    """The first layer whose values no codec takes, in words; None where all are finite."""
    for name, layers in zip(("keys", "values"), sides, strict=True):
        for index, x_BHTD in enumerate(layers):
            if said := not_finite(x_BHTD, start):
                return f"layer {index}: {name}: {said}"
    return None


def _tiers(
    sender: Sender,
    policy: Policy,
    codec: MixedCodec,
    budget_bits: float,
    start: int,
    spent: int,
) -> list[torch.Tensor]:
    """The tier of every new token's key and of its value, each (tokens,) uint8."""
    if not isinstance(budget_bits, int | float) or not 0 < budget_bits < math.inf:
        raise PolyKVError(f"budget_bits={budget_bits!r}; it takes a number of bits such as 4.0")
    g, dtype = Geometry.of(sender.model.config), sender.cache.layers[0].keys.dtype
    offered = [TIERS.index(tier) for tier in policy.tiers]
    width = g.n_layers * g.n_kv_heads
    cost = [codec.token_bits(tier, width, g.head_dim, dtype) for tier in offered]
    distortion = [0.0 if tier == EXACT else codec.codec(tier).relative_error for tier in offered]
    total = budget_bits * g.values_per_token * sender.n_tokens
    # Key and value of a token are two items, side by side.
    weights = np.repeat(policy.score(sender)[start:], 2)
    try:
        left = total - _fixed_bits(sender.n_tokens) - spent
        found = allocate(weights, cost, distortion, left)
    except PolyKVError as error:
        n_new = sender.n_tokens - start
        least = 2 * cost[0] / g.values_per_token + _fixed_bits(n_new) / g.values_per_token / n_new
        raise PolyKVError(
            f"budget_bits is too small for policy {policy.name!r}: its lowest tier of "
            f"{policy.tiers[0]} bits takes about {least:.3f} with scales, maps and ids; raise it"
        ) from error
    picked = torch.tensor(offered, dtype=torch.uint8)[torch.from_numpy(found).long()]
    return [picked[0::2], picked[1::2]]


def _fixed_bits(n_tokens: int) -> int:
    """Token ids, and the two maps, padded to whole bytes."""
    return 32 * n_tokens + 2 * 8 * -(-n_tokens // 4)
