"""From a policy and a budget to packed keys and values.

A budget is nominal, as the papers count: mean payload bits per cached value, metadata left out (Q4 is 4.0). The
first tokens, on which attention rests whatever they say, stay exact under every policy; the budget is for the
others, and what is stored of all of them is reported (`CacheCard.mean_bits`).
"""

import math
import warnings
from functools import lru_cache

import numpy as np
import torch
from transformers import Cache

from polykv.codecs.base import not_finite
from polykv.codecs.identity import DTYPES
from polykv.errors import PolyKVError
from polykv.handoff.allocate import allocate
from polykv.handoff.mixed import EXACT, TIERS, Mixed, MixedCodec
from polykv.handoff.policy import Policy
from polykv.handoff.signals import SINKS, Sender

LOW = 4  # bits: what a card loses with tokens below it, its sender is told
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
    before: tuple[Mixed, Mixed] | None = None,
) -> tuple[Mixed, Mixed]:
    """Keys and values of all tokens, or of those that follow the ones packed `before`, whose channels are kept.

    Warns where tokens get less than LOW bits.

    Raises:
        PolyKVError: the budget is no number, or below the policy's lowest tier.
    """
    start = 0 if before is None else before[0].shape[2]
    keys, values = ([getattr(layer, side)[:, :, start:] for layer in sender.cache.layers]
                    for side in ("keys", "values"))  # fmt: skip
    if policy.has_budget:
        key_tiers, value_tiers = _tiers(sender, policy, codec, budget_bits, before)
        after = max(SINKS - start, 0)
        budgeted = torch.cat([key_tiers[after:], value_tiers[after:]])
        told = _mix(budgeted, codec, keys[0].shape[3])
        _warn_of_low_tiers(policy.name, budget_bits, told)
    else:
        key_tiers = value_tiers = torch.full((sender.n_tokens - start,), EXACT, dtype=torch.uint8)
    try:
        channels = before[0].channels if before else None
        channels = channels or codec.channels_of(keys, key_tiers)
        return codec.encode(keys, key_tiers, channels), codec.encode(values, value_tiers)
    except PolyKVError as error:  # the codec sees all layers in one, and the tokens of one tier
        raise PolyKVError(_where([keys, values], start) or str(error)) from error


def nominal_bits(key: Mixed, value: Mixed) -> float:
    """Mean payload bits per cached value of the tokens after the sinks; of these where there are no others."""
    start = min(SINKS, key.shape[2] - 1)
    exact = 8 * next((side.parts[EXACT].tensors["values"].itemsize for side in (key, value)
                      if EXACT in side.parts), 2)  # fmt: skip
    widths = torch.tensor([*TIERS[:EXACT], exact], dtype=torch.float64)
    tiers = torch.cat([side.tiers_T[start:] for side in (key, value)])
    return float(widths[tiers.long()].mean())


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
    before: tuple[Mixed, Mixed] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tier of every new token's key and of its value, each (tokens,) uint8."""
    if not isinstance(budget_bits, int | float) or not 0 < budget_bits < math.inf:
        raise PolyKVError(f"budget_bits={budget_bits!r}; it takes a number of bits such as 4.0")
    start = 0 if before is None else before[0].shape[2]
    first = max(start, min(SINKS, sender.n_tokens))  # of the tokens that the budget is for
    spent = 0
    if before is not None:
        old = torch.cat([side.tiers_T[SINKS:] for side in before])
        spent = int(torch.tensor(TIERS)[old.long()].sum())
    tiers = torch.full((2 * (sender.n_tokens - start),), EXACT, dtype=torch.uint8)
    if first < sender.n_tokens:
        offered = [TIERS.index(tier) for tier in policy.tiers]
        distortion = [codec.relative_error(tier) for tier in offered]
        total = 2 * budget_bits * (sender.n_tokens - min(SINKS, sender.n_tokens))
        # Key and value of a token are two items, side by side.
        weights = np.repeat(policy.score(sender)[first:], 2)
        try:
            found = allocate(weights, policy.tiers, distortion, total - spent)
        except PolyKVError as error:
            raise PolyKVError(
                f"budget_bits={budget_bits:g} is too small for policy {policy.name!r}, whose lowest tier "
                f"has {policy.tiers[0]} bits; raise it"
            ) from error
        picked = torch.tensor(offered, dtype=torch.uint8)[torch.from_numpy(found).long()]
        tiers[2 * (first - start) :] = picked
    return tiers[0::2], tiers[1::2]


def _mix(tiers: torch.Tensor, codec: MixedCodec, dim: int) -> str:
    """How keys and values share the tiers, with the errors to expect; nothing where none is low."""
    shares = {tier: float((tiers == tier).float().mean()) for tier in tiers.unique().tolist()}
    if all(TIERS[tier] >= LOW for tier in shares):
        return ""
    return ", ".join(
        f"about {max(10 * round(10 * share), 1)} % at {TIERS[tier]} bits"
        f" (expected error {100 * codec.expected_error(tier, dim):.2g} %)"
        for tier, share in shares.items()
    )


@lru_cache
def _warn_of_low_tiers(policy: str, budget_bits: float, mix: str) -> None:
    """Once for each mix: a relay seals many cards."""
    if mix:
        warnings.warn(
            f"card under policy {policy!r} at {budget_bits:g} bits: of its keys and values {mix}, of a vector's "
            f"length; answers may suffer: raise budget_bits, or give the policy no tier below {LOW} bits",
            stacklevel=4,
        )
