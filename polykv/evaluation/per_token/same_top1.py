"""Whether the most probable token is the same in both runs."""

from torch import Tensor

UNIT = "rate"
VERSION = 1


def of(full_TV: Tensor, other_TV: Tensor, labels_T1: Tensor) -> Tensor:
    """True where both runs rank the same token first."""
    return full_TV.argmax(-1) == other_TV.argmax(-1)
