"""Online softmax over chunks of keys, and the merge of attention over disjoint sets of keys.

M. Milakov & N. Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867); merging by the
log-sum-exp as in J. Juravsky et al., "Hydragen" (arXiv 2402.05099). All in fp32.
"""

from typing import Any

import torch
from torch import Tensor


class OnlineSoftmax:
    """Running attention output (..., Q, D) of queries over chunks of keys and values."""

    def __init__(self, shape: tuple[int, ...], dim: int, device: torch.device) -> None:
        """`shape` is (..., Q); `dim` is D."""
        kind: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self._largest = torch.full(shape, -torch.inf, **kind)
        self._sum = torch.zeros(shape, **kind)
        self._weighted = torch.zeros((*shape, dim), **kind)

    def add(self, scores: Tensor, values: Tensor, start: int, stop: int) -> None:
        """Add a chunk for queries [start, stop): fp32 scores (..., stop - start, T), overwritten; values (..., T, D).

        A score of -inf masks the key.
        """
        before, total, weighted = (
            self._largest[..., start:stop],
            self._sum[..., start:stop],
            self._weighted[..., start:stop, :],
        )
        largest = torch.maximum(before, scores.amax(dim=-1))
        # A query that has seen no key yet keeps -inf, and -inf minus -inf is NaN.
        finite = torch.where(largest == -torch.inf, 0.0, largest)
        shrink = (before - finite).exp_()
        weights = scores.sub_(finite.unsqueeze(-1)).exp_()
        total.mul_(shrink).add_(weights.sum(dim=-1))
        weighted.mul_(shrink.unsqueeze(-1)).add_(weights @ values)
        before.copy_(largest)

    def result(self) -> tuple[Tensor, Tensor]:
        """Output (..., Q, D) and log-sum-exp of the scores (..., Q); 0 and -inf where every key was masked.

        Overwrites the running sums: call it once.
        """
        lse = self._sum.log().add_(torch.where(self._sum > 0, self._largest, 0.0))
        return self._weighted.div_(self._sum.clamp_min(1e-30).unsqueeze(-1)), lse


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scaled scores limited to (-softcap, softcap) by a tanh, in place; as they are if it is None.

    Gemma 2 (arXiv 2408.00118, section 2).
    """
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def with_sinks(out_BHRD: Tensor, lse_BHR: Tensor, sink_HG: Tensor | None) -> Tensor:
    """Attention output with a sink: one more score per query head, `sink_HG` (kv heads, group), that has no value.

    Rows R are (query token, query head of the group). Attention sinks as in gpt-oss (arXiv 2508.10925, section 2.2).
    """
    if sink_HG is None:
        return out_BHRD
    over_BHQG = lse_BHR.unflatten(2, (-1, sink_HG.shape[1])) - sink_HG.float().unsqueeze(1)
    return out_BHRD * torch.sigmoid(over_BHQG).flatten(2).unsqueeze(-1)


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the (output, log-sum-exp) of each.

    A set may be empty (log-sum-exp -inf).
    """
    (one_out, one_lse), (other_out, other_lse) = one, other
    # The difference is NaN where both are empty; both outputs are 0 there.
    less = (one_lse - other_lse).nan_to_num_(0.0, torch.inf, -torch.inf)
    share = torch.sigmoid(less).unsqueeze(-1)
    return torch.lerp(other_out, one_out, share), torch.logaddexp(one_lse, other_lse)
