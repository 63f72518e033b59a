"""Allocation of bits to tokens by greatest marginal gain per bit until the budget is spent.

If distortion is convex in cost, taking steps in order of decreasing gain per bit is optimal: no allocation of the same
cost has less weighted distortion (Shoham & Gersho 1988; Fox 1966). Steps differ in size, so the next one may not fit
into the remaining budget, which then goes to the best steps that do.
"""

from collections.abc import Sequence

import numpy as np

from polykv.errors import PolyKVError

VERSION = 1  # of the allocation
GOLDEN = (5**0.5 - 1) / 2  # multiples modulo 1 are a low-discrepancy sequence


def allocate(
    weights_N: np.ndarray, cost: Sequence[float], distortion: Sequence[float], budget: float
) -> np.ndarray:
    """The tier of every item: (N,) uint8, an index into `cost` and `distortion`.

    An item of weight w at tier k costs cost[k] bits and adds w * distortion[k]; `budget` is the total for all items.
    Costs increase, and distortion is strictly convex in them. Ties are broken by a low-discrepancy order, which spreads
    the higher tiers evenly over the sequence.

    Raises:
        PolyKVError: the budget is too small for the lowest tier of all items.
        ValueError: costs that do not increase, or distortion that is not convex.
    """
    cost_K, n = np.asarray(cost, float), len(weights_N)
    steps = np.diff(cost_K)
    gain = -np.diff(np.asarray(distortion, float)) / steps  # per bit, falling
    if (steps <= 0).any() or (np.diff(gain) >= 0).any() or (gain <= 0).any():
        raise ValueError("tiers must rise in cost, and distortion must be convex in it")
    left = budget - n * cost_K[0]
    if left < 0:
        raise PolyKVError(
            f"a budget of {budget / n:.3f} bits per item is below the lowest tier's {cost_K[0]:.3f}; "
            "raise budget_bits or give the policy a lower tier"
        )
    spread_N = np.arange(n) * GOLDEN % 1
    # Flattened (tier, item). An item's own steps stay in order, since its gains decrease.
    gain_S = (gain[:, None] * weights_N[None, :]).ravel()
    step_S, item_S = np.repeat(steps, n), np.tile(np.arange(n), len(steps))
    order_S = np.lexsort((spread_N[item_S], np.repeat(np.arange(len(steps)), n), -gain_S))
    spent_S = np.cumsum(step_S[order_S])
    n_taken = int(np.searchsorted(spent_S, left, side="right"))
    tiers_N = np.bincount(item_S[order_S[:n_taken]], minlength=n)
    left -= spent_S[n_taken - 1] if n_taken else 0
    return _spend_rest(tiers_N, left, weights_N, steps, gain, spread_N).astype(np.uint8)


def _spend_rest(
    tiers_N: np.ndarray,
    left: float,
    weights_N: np.ndarray,
    steps: np.ndarray,
    gain: np.ndarray,
    spread_N: np.ndarray,
) -> np.ndarray:
    """Take the best single steps that still fit; few, since less than the largest step is left."""
    padded_steps, padded_gain = np.append(steps, np.inf), np.append(gain, 0)
    while True:
        fits = np.flatnonzero(padded_steps[tiers_N] <= left)
        if not len(fits):
            return tiers_N
        value = padded_gain[tiers_N[fits]] * weights_N[fits]
        best = fits[np.lexsort((spread_N[fits], -value))[0]]
        left -= steps[tiers_N[best]]
        tiers_N[best] += 1
