"""Perplexity (protocol `paper`) and divergence: the rest of the document, scored after a pooled prefix.

PolyKV, arXiv 2604.24971, section 4: the document's tokens are split 70/30, the first part is prefilled and
compressed, the rest is scored in one forward pass with labels = the same tokens, so that its first token is
not scored. Every statistic is paired with the same pass over the uncompressed cache.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from polykv.errors import PolyKVError
from polykv.evaluation import missing
from polykv.evaluation.statistics import document_interval, interval_name, mean_interval
from polykv.results import Rows
from polykv.supported import check_length, check_rope

VERSION = 1  # of perplexity, divergence and same-top-1
# As llama.cpp's perplexity tool prints them.
KL_PERCENTILES = {"median": 50, "p90": 90, "p95": 95, "p99": 99, "p999": 99.9, "max": 100}
DELTA_P_PERCENTILES = {"p01": 1, "p05": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95, "p99": 99}
LARGEST_EXPONENT = 700  # e**700 is 1e304, a hundredfold of which still is a float


@torch.no_grad()
def score_rest(model: PreTrainedModel, cache: Cache | None, rest_BT: Tensor) -> Tensor:
    """Log-probabilities (scored tokens, vocabulary) in fp32 of each next token. The cache grows; None is an empty
    one.

    Raises:
        PolyKVError: cache and rest are beyond the model's positions, or its rotary frequencies change between them.
    """
    n_before = cache.get_seq_length() if cache is not None else 0
    n_tokens = n_before + rest_BT.shape[1]
    check_length(model.config, n_tokens, "the whole document")
    check_rope(model.config, n_before, n_tokens, "the whole document")
    logits_BTV = model(input_ids=rest_BT.to(model.device), past_key_values=cache).logits
    return logits_BTV[0, :-1].float().log_softmax(dim=-1)


@dataclass(frozen=True)
class Comparison:
    """Per scored token of one document, a recipe's run against the uncompressed run."""

    nll_full: np.ndarray
    nll: np.ndarray
    kl: np.ndarray
    same_top1: np.ndarray

    @property
    def top1(self) -> np.ndarray:
        """`same_top1` as 0 and 1; NaN where a run is NaN and has no top."""
        return np.where(np.isnan(self.nll + self.nll_full), np.nan, self.same_top1)

    @property
    def delta_p(self) -> np.ndarray:
        """Change in the probability of the true token."""
        return np.exp(-self.nll) - np.exp(-self.nll_full)


def compare(full_TV: Tensor, other_TV: Tensor, rest_BT: Tensor) -> Comparison:
    """Pair two sets of log-probabilities of the same tokens. KL(full || other) is in nats.

    A token that the full run gives probability 0 adds nothing to the divergence (0 log 0 = 0), as where a
    model masks a part of its vocabulary; one that only the other run gives probability 0 makes it infinite.
    """
    labels_T1 = rest_BT[0, 1:].to(full_TV.device).unsqueeze(1)
    terms_TV = full_TV.exp() * (full_TV - other_TV)
    kl_T = terms_TV.masked_fill_(full_TV == -torch.inf, 0).sum(dim=-1)
    return Comparison(
        nll_full=_numpy(-full_TV.gather(1, labels_T1).squeeze(1)),
        nll=_numpy(-other_TV.gather(1, labels_T1).squeeze(1)),
        # Rounding can leave a tiny negative sum where the two runs agree.
        kl=_numpy(kl_T.clamp_min(0)),
        same_top1=_numpy(full_TV.argmax(-1) == other_TV.argmax(-1)),
    )


# Infinity less infinity, and what overflows, is found by `missing.add` and said in the row.
quietly = np.errstate(invalid="ignore", over="ignore")


@quietly
def add_rows(rows: Rows, comparisons: list[Comparison]) -> None:
    """Perplexity, its delta and ratio, KL, same-top-1 and the true token's probability, all documents.

    What is not finite is missing, with its reason: NaN or infinite log-probabilities, or an overflow.

    Raises:
        PolyKVError: not one token was scored.
    """
    differences = [c.nll - c.nll_full for c in comparisons]
    n = _n_scored(differences)
    protocol = f"paper; {interval_name(differences)}"
    common = {"why": why_not_finite(comparisons), "n": n, "protocol": protocol}
    for name in ("nll_full", "nll"):
        mean = np.concatenate([getattr(c, name) for c in comparisons]).mean()
        missing.add(rows, name.replace("nll", "perplexity"), _exp(mean), "ppl", **common)
    _add_delta(rows, "perplexity_delta", differences, common)
    _add_ratio(rows, np.concatenate(differences), common)
    kl = [c.kl for c in comparisons]
    _add_mean(rows, "kl_mean", "nats", kl, (0, math.inf), common)
    _add_percentiles(rows, "kl", "nats", kl, KL_PERCENTILES, common)
    _add_delta_p(rows, comparisons, common)
    _add_mean(rows, "same_top1", "rate", [c.top1 for c in comparisons], (0, 1), common)


@quietly
def add_costs(
    rows: Rows, comparisons: list[Comparison], protocol: str, prefix: str = "", **columns: Any
) -> None:
    """`kl_mean` and `perplexity_delta` alone, all documents, each with its interval; `prefix` opens their names.

    Raises:
        PolyKVError: not one token was scored.
    """
    differences, kl = [c.nll - c.nll_full for c in comparisons], [c.kl for c in comparisons]
    n = _n_scored(differences)
    told = {"n": n, "protocol": f"{protocol}; {interval_name(kl)}", **columns}
    common = {"why": why_not_finite(comparisons), **told}
    _add_mean(rows, f"{prefix}kl_mean", "nats", kl, (0, math.inf), common)
    _add_delta(rows, f"{prefix}perplexity_delta", differences, common)


def add_floor(
    rows: Rows, floors: list[Comparison], reader: str, protocol: str, **columns: Any
) -> None:
    """What `reader` costs by itself: the uncompressed cache read by it, against an unshared copy of the same."""
    note = f"no recipe: the uncompressed cache, reader {reader} against reader inject"
    add_costs(rows, floors, protocol, "reader_floor_", reader=reader, note=note, **columns)


def _n_scored(samples: list[np.ndarray]) -> int:
    """How many tokens were scored.

    Raises:
        PolyKVError: none.
    """
    n = sum(map(len, samples))
    if n == 0:
        raise PolyKVError("no token was scored, so nothing can be compared; give more text")
    return n


def _add_delta(
    rows: Rows, metric: str, differences: list[np.ndarray], common: dict[str, Any]
) -> None:
    interval = document_interval(differences)
    ends = interval and (_percent(interval[0]), _percent(interval[1]))
    delta = _percent(float(np.concatenate(differences).mean()))
    missing.add(rows, metric, delta, "percent", ci=ends, **common)


def _add_ratio(rows: Rows, differences: np.ndarray, common: dict[str, Any]) -> None:
    """exp of the mean difference, with the interval that pairing gives when tokens are independent."""
    interval = mean_interval(differences)
    ends = interval and (_exp(interval[0]), _exp(interval[1]))
    about = common | {"protocol": "paired standard error over tokens (llama.cpp)"}
    missing.add(rows, "perplexity_ratio", _exp(differences.mean()), "ratio", ci=ends, **about)


def _add_mean(
    rows: Rows,
    metric: str,
    unit: str,
    samples: list[np.ndarray],
    bounds: tuple[float, float],
    common: dict[str, Any],
) -> None:
    mean = float(np.concatenate(samples).mean())
    missing.add(rows, metric, mean, unit, ci=document_interval(samples, bounds), **common)


def _add_percentiles(
    rows: Rows,
    metric: str,
    unit: str,
    samples: list[np.ndarray],
    percentiles: dict[str, float],
    common: dict[str, Any],
) -> None:
    every = np.concatenate(samples)
    for name, percentile in percentiles.items():
        value = float(np.percentile(every, percentile))
        missing.add(rows, f"{metric}_{name}", value, unit, **common)


def _add_delta_p(rows: Rows, comparisons: list[Comparison], common: dict[str, Any]) -> None:
    samples, unit = [c.delta_p for c in comparisons], "probability"
    _add_mean(rows, "delta_p_mean", unit, samples, (-1, 1), common)
    rms = float(np.sqrt(np.square(np.concatenate(samples)).mean()))
    missing.add(rows, "delta_p_rms", rms, unit, **common)
    _add_percentiles(rows, "delta_p", unit, samples, DELTA_P_PERCENTILES, common)


@quietly
def add_document_rows(rows: Rows, comparisons: list[Comparison]) -> None:
    """Each document's mean KL and perplexity delta, for paired tests between recipes."""
    for index, c in enumerate(comparisons):
        common = {"why": why_not_finite([c]), "n": len(c.kl), "sample": index}
        common["protocol"] = f"document {index}"
        delta = _percent((c.nll - c.nll_full).mean())
        missing.add(rows, "document_kl_mean", float(c.kl.mean()), "nats", **common)
        missing.add(rows, "document_perplexity_delta", delta, "percent", **common)


def _exp(x: float) -> float:
    """e**x, NaN where that leaves the range of a float."""
    return math.exp(x) if abs(x) < LARGEST_EXPONENT else math.nan


def _percent(mean_difference: float) -> float:
    """The ratio of two perplexities is the exponential of the mean difference; less 1, in percent."""
    if not abs(mean_difference) < LARGEST_EXPONENT:
        return math.nan
    return 100 * math.expm1(mean_difference)


def why_not_finite(comparisons: list[Comparison]) -> str:
    """Why a statistic of these tokens is not finite, if it is not."""
    found = {
        "the uncompressed run's log-probability": "nll_full",
        "the recipe's log-probability": "nll",
        "the divergence": "kl",
    }
    for wrong, told in ((np.isnan, "NaN"), (np.isinf, "infinite")):
        for what, name in found.items():
            values = np.concatenate([getattr(c, name) for c in comparisons])
            if count := int(wrong(values).sum()):
                return f"{what} is {told} at {count} of {len(values)} scored tokens"
    return "the exponential of a mean log-probability leaves the range of a float"


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
