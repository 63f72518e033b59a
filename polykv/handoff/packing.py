"""Packing of keys and values under a policy and a budget.

A budget is nominal, as the papers count: mean payload bits per cached value, without metadata (Q4 is 4.0). The first
tokens, the attention sinks, stay exact under every policy; the budget applies to the others. Stored bits of all tokens
are reported by `CacheCard.mean_bits`.
"""

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from transformers import Cache

from polykv.codecs.base import not_finite
from polykv.codecs.identity import DTYPES
from polykv.errors import PolyKVError
from polykv.handoff.allocate import allocate
from polykv.handoff.mixed import EXACT_TIER, TIERS, Mixed, MixedCodec
from polykv.handoff.policy import OWN, Policy
from polykv.handoff.signals import SINKS, Sender
from polykv.recurrent import attending

LOW = 4  # bits, below which the sender is warned
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def check_makes_card(policy: Policy) -> None:
    """Check that a sender can seal its cache under this policy; raises PolyKVError."""
    if policy.store == "text":
        raise PolyKVError(f"policy {policy.name!r} hands on text and makes no card; choose another")
    if policy.carries != OWN:
        raise PolyKVError(
            f"policy {policy.name!r} is a control of relays (carries={policy.carries}), and no way to store a cache; "
            "choose another"
        )


def exact_dtype(policy: Policy, cache: Cache) -> str | None:
    """The dtype of the 16-bit tier; None is the model's own.

    Raises:
        PolyKVError: a policy that makes no card.
    """
    check_makes_card(policy)
    if policy.store == "model":
        return None
    own = DTYPE_NAMES[attending(cache)[0].keys.dtype]
    # bf16 has the size of fp16; a cast would only add errors and overflows.
    return own if policy.store == "mixed" and own == "bfloat16" else "float16"


def pack(
    sender: Sender,
    policy: Policy,
    codec: MixedCodec,
    budget_bits: float,
    before: tuple[Mixed, Mixed] | None = None,
    numbers: Sequence[int] | None = None,
    n_left: int = 0,
) -> tuple[Mixed, Mixed]:
    """Pack (keys, values) of all tokens, or of those after the tokens packed `before`, with the same channels.

    `numbers` are the layers to pack (None: all), without the first `n_left` tokens, which have left their window. The
    budget is that of these layers and tokens. Warns if tokens get less than LOW bits.

    Raises:
        PolyKVError: an invalid budget, or one below the policy's lowest tier.
    """
    start = n_left + (0 if before is None else before[0].shape[2])
    numbers = range(len(sender.cache.layers)) if numbers is None else numbers
    layers = [sender.cache.layers[number] for number in numbers]
    # From the end: layers with a window have the last tokens only.
    keys, values = ([getattr(layer, side)[:, :, start - sender.n_tokens :] for layer in layers]
                    for side in ("keys", "values"))  # fmt: skip
    if policy.has_budget:
        key_tiers, value_tiers = _tiers(sender, policy, codec, budget_bits, before, n_left)
        after = max(SINKS - start, 0)
        budgeted = torch.cat([key_tiers[after:], value_tiers[after:]])
        mix = _mix(budgeted, codec, keys[0].shape[3])
        warn_of_low_tiers(policy.name, budget_bits, mix)
    else:
        key_tiers = value_tiers = torch.full(
            (sender.n_tokens - start,), EXACT_TIER, dtype=torch.uint8
        )
    try:
        channels = before[0].channels if before else None
        channels = channels or codec.channels_of(keys, key_tiers)
        return codec.encode(keys, key_tiers, channels), codec.encode(values, value_tiers)
    except (
        PolyKVError
    ) as error:  # the codec sees stacked layers and the tokens of one tier: find the place
        raise PolyKVError(_where([keys, values], numbers, start) or str(error)) from error


def nominal_bits(key: Mixed, value: Mixed, n_left: int = 0) -> float:
    """Mean payload bits per cached value of the tokens after the sinks, or of the last token if there are none.

    `n_left`: tokens of the text before those packed.
    """
    start = min(max(SINKS - n_left, 0), key.shape[2] - 1)
    exact = 8 * next((side.parts[EXACT_TIER].tensors["values"].itemsize for side in (key, value)
                      if EXACT_TIER in side.parts), 2)  # fmt: skip
    widths = torch.tensor([*TIERS[:EXACT_TIER], exact], dtype=torch.float64)
    tiers = torch.cat([side.tiers_T[start:] for side in (key, value)])
    return float(widths[tiers.long()].mean())


def _where(sides: list[list[torch.Tensor]], numbers: Sequence[int], start: int) -> str | None:
    """An error message that names the first layer with values that are not finite; None if all are finite."""
    for name, layers in zip(("keys", "values"), sides, strict=True):
        for number, x_BHTD in zip(numbers, layers, strict=True):
            if message := not_finite(x_BHTD, start):
                return f"layer {number}: {name}: {message}"
    return None


def _tiers(
    sender: Sender,
    policy: Policy,
    codec: MixedCodec,
    budget_bits: float,
    before: tuple[Mixed, Mixed] | None,
    n_left: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tiers of the new tokens' keys and of their values, each (tokens,) uint8."""
    if not isinstance(budget_bits, int | float) or not 0 < budget_bits < math.inf:
        raise PolyKVError(f"budget_bits={budget_bits!r}; give a number of bits such as 4.0")
    start = n_left + (0 if before is None else before[0].shape[2])
    n_sinks = min(SINKS, sender.n_tokens)
    first = max(start, n_sinks)  # first token under the budget
    spent = 0
    if before is not None:
        old = torch.cat([side.tiers_T[max(SINKS - n_left, 0) :] for side in before])
        spent = int(torch.tensor(TIERS)[old.long()].sum())
    tiers = torch.full((2 * (sender.n_tokens - start),), EXACT_TIER, dtype=torch.uint8)
    if first < sender.n_tokens:
        offered = [TIERS.index(tier) for tier in policy.tiers]
        distortion = [codec.relative_error(tier) for tier in offered]
        total = 2 * budget_bits * (sender.n_tokens - max(n_left, n_sinks))
        # Key and value of a token are two consecutive items.
        weights = np.repeat(policy.score(sender)[first:], 2)
        try:
            found = allocate(weights, policy.tiers, distortion, total - spent)
        except PolyKVError as error:
            after = (
                " after the tokens of the card that a window still sees" if n_left and spent else ""
            )
            raise PolyKVError(
                f"budget_bits={budget_bits:g} is too small for policy {policy.name!r}, whose lowest tier "
                f"has {policy.tiers[0]} bits{after}; raise it"
            ) from error
        picked = torch.tensor(offered, dtype=torch.uint8)[torch.from_numpy(found).long()]
        tiers[2 * (first - start) :] = picked
    return tiers[0::2], tiers[1::2]


def _mix(tiers: torch.Tensor, codec: MixedCodec, dim: int) -> str:
    """The shares of the tiers with their expected errors, in words; empty if no tier is below LOW."""
    shares = {tier: float((tiers == tier).float().mean()) for tier in tiers.unique().tolist()}
    if all(TIERS[tier] >= LOW for tier in shares):
        return ""
    return ", ".join(
        f"about {max(10 * round(10 * share), 1)} % at {TIERS[tier]} bits"
        f" (expected error {100 * codec.expected_error(tier, dim):.2g} %)"
        for tier, share in shares.items()
    )


@lru_cache
def warn_of_low_tiers(policy: str, budget_bits: float, mix: str) -> None:
    """Warn once for each mix, since a relay seals many cards."""
    if mix:
        warnings.warn(
            f"card under policy {policy!r} at {budget_bits:g} bits: of its keys and values {mix}, relative to the "
            f"length of a vector; answers may suffer: raise budget_bits, or remove the tiers below {LOW} bits",
            stacklevel=4,
        )
