"""Dropping tokens of a prefilled cache: which of them a pool keeps, by layer and kv head (`keep` of a recipe).

The choice knows the document and not the questions, as a shared pool's has to. Kept keys keep the rotary position of
their token, and what follows the document continues at its full length, so positions are those of the whole document.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from polykv.codecs.context import LAST_QUERIES, LayerContext
from polykv.errors import PolyKVError


@dataclass(frozen=True)
class Keep(ABC):
    """A choice of tokens.

    Attributes:
        share: of the tokens, above 0 and at most 1.
        version: raised when other tokens are kept.
        needs: fields of LayerContext that the choice depends on.
    """

    share: float
    version: ClassVar[int]
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise PolyKVError(f"keep.share={self.share!r}; give a number above 0, at most 1")

    def n_kept(self, n_tokens: int) -> int:
        """How many of `n_tokens` tokens are kept: the share, rounded down, and at least one."""
        return max(1, int(round(self.share * n_tokens, 6)))

    def taken(self, k_BHTD: Tensor, v_BHTD: Tensor, context: LayerContext) -> tuple[Tensor, Tensor]:
        """The kept tokens of a layer's keys and values, each (batch, kv_heads, tokens, head_dim), in their order."""
        places_BHT1 = self.places(k_BHTD, context).unsqueeze(3)
        keys, values = (
            x_BHTD.gather(2, places_BHT1.expand(-1, -1, -1, x_BHTD.shape[3]))
            for x_BHTD in (k_BHTD, v_BHTD)
        )
        return keys, values

    @abstractmethod
    def places(self, k_BHTD: Tensor, context: LayerContext) -> Tensor:
        """Ascending places of the `n_kept` tokens to keep, (batch, kv_heads, kept)."""


@dataclass(frozen=True)
class SinksRecent(Keep):
    """The first `sinks` tokens and the most recent ones (StreamingLLM, arXiv 2309.17453).

    StreamingLLM numbers positions within its cache; here all keep their position in the document.
    """

    sinks: int = 4
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sinks, int) or self.sinks < 0:
            raise PolyKVError(f"keep.sinks={self.sinks!r}; give a whole number from 0 up")

    def places(self, k_BHTD: Tensor, context: LayerContext) -> Tensor:
        """The same for all heads."""
        batch, heads, n_tokens, _ = k_BHTD.shape
        n_kept = self.n_kept(n_tokens)
        every_T = torch.arange(n_tokens, device=k_BHTD.device)
        sinks = min(self.sinks, n_kept)
        places_T = torch.cat([every_T[:sinks], every_T[n_tokens - (n_kept - sinks) :]])
        return places_T.expand(batch, heads, -1)


@dataclass(frozen=True)
class SnapKV(Keep):
    """The last `window` tokens, and those to which these attend most (SnapKV, arXiv 2404.14469, section 4).

    Attention weights of the window's queries are averaged over these queries and over the query heads of a kv head, and
    smoothed over `kernel` tokens. The paper's window holds the question; a shared pool has none, so here it is the end
    of the document.
    """

    window: int = 32
    kernel: int = 5
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("queries",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.window, int) or not 1 <= self.window <= LAST_QUERIES:
            raise PolyKVError(
                f"keep.window={self.window!r}; give a whole number from 1 to {LAST_QUERIES}, as many queries as "
                "a prefill keeps"
            )
        if not isinstance(self.kernel, int) or self.kernel < 1 or self.kernel % 2 == 0:
            raise PolyKVError(
                f"keep.kernel={self.kernel!r}; give an odd number of tokens, 1 or more"
            )

    def places(self, k_BHTD: Tensor, context: LayerContext) -> Tensor:
        """By kv head. Without queries, which is enough to count bytes, the most recent tokens."""
        batch, heads, n_tokens, _ = k_BHTD.shape
        n_kept, window = self.n_kept(n_tokens), min(self.window, n_tokens)
        every_T = torch.arange(n_tokens, device=k_BHTD.device)
        if context.queries is None or n_kept <= window:
            return every_T[-n_kept:].expand(batch, heads, -1)
        scores_BHT = attention_received(context.queries[:, :, -window:], k_BHTD)[..., :-window]
        smooth_BHT = F.avg_pool1d(scores_BHT, self.kernel, 1, self.kernel // 2)
        chosen_BHT = smooth_BHT.topk(n_kept - window).indices.sort().values
        return torch.cat([chosen_BHT, every_T[-window:].expand(batch, heads, -1)], dim=2)


def attention_received(q_BHWD: Tensor, k_BHTD: Tensor) -> Tensor:
    """Mean attention weight that each token gets from the last W tokens, (batch, kv_heads, tokens) in fp32.

    `q_BHWD` (batch, heads, W, head_dim) are their scaled queries; the mean is over them and a kv head's query heads.
    """
    n_tokens, window = k_BHTD.shape[2], q_BHWD.shape[2]
    q_BHGWD = q_BHWD.float().unflatten(1, (k_BHTD.shape[1], -1))
    scores_BHGWT = q_BHGWD @ k_BHTD.float().mT.unsqueeze(2)
    later_WT = torch.ones(window, n_tokens, dtype=torch.bool, device=k_BHTD.device)
    later_WT = later_WT.triu(n_tokens - window + 1)
    return scores_BHGWT.masked_fill(later_WT, -torch.inf).softmax(-1).mean(dim=(2, 3))
