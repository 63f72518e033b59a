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


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the (output, log-sum-exp) of each.

    One of the sets may be empty (log-sum-exp -inf).
    """
    (one_out, one_lse), (other_out, other_lse) = one, other
    share = torch.sigmoid(one_lse - other_lse).unsqueeze(-1)
    return torch.lerp(other_out, one_out, share), torch.logaddexp(one_lse, other_lse)
