"""Perplexity (protocol `paper`) and divergence: the rest of the document, scored after a pooled prefix.

PolyKV, arXiv 2604.24971, section 4: the document's tokens are split 70/30, the first part is prefilled and
compressed, the rest is scored in one forward pass with labels = the same tokens, so that its first token is
not scored. Every statistic is paired with the same pass over the uncompressed cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from polykv.evaluation.per_token import METRICS
from polykv.supported import check_length, check_rope

# Metric of `Comparison.per_token` -> unit.
UNITS = {
    "nll_full": "nats",
    "nll": "nats",
    "nll_delta": "nats",
    "kl": "nats",
    **{name: metric.UNIT for name, metric in METRICS.items()},
    "delta_p": "probability",
}
# Metric -> percentiles over the tokens of all documents, as llama.cpp's perplexity tool prints them.
PERCENTILES: Mapping[str, Mapping[str, float]] = {
    "kl": {"median": 50, "p90": 90, "p95": 95, "p99": 99, "p999": 99.9, "max": 100},
    "delta_p": {"p01": 1, "p05": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95, "p99": 99},
}

VERSION = 1  # of perplexity and divergence


@torch.no_grad()
def score_rest(model: PreTrainedModel, cache: Cache | None, rest_BT: Tensor) -> Tensor:
    """Log-probabilities (tokens - 1, vocabulary) in fp32 of every token of `rest_BT` but the first.

    `cache` (None: empty) grows by the tokens of `rest_BT`.

    Raises:
        PolyKVError: more tokens than the model has positions, or the rotary frequencies change along them.
    """
    n_before = cache.get_seq_length() if cache is not None else 0
    n_tokens = n_before + rest_BT.shape[1]
    check_length(model.config, n_tokens, "the whole document")
    check_rope(model.config, n_before, n_tokens, "the whole document")
    logits_BTV = model(input_ids=rest_BT.to(model.device), past_key_values=cache).logits
    return logits_BTV[0, :-1].float().log_softmax(dim=-1)


@dataclass(frozen=True)
class Comparison:
    """A run under a recipe against the uncompressed run, per scored token of one document: arrays (tokens,).

    `others` has the metrics of polykv/evaluation/per_token by name.
    """

    nll_full: np.ndarray
    nll: np.ndarray
    kl: np.ndarray
    others: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def delta_p(self) -> np.ndarray:
        """Change of the true token's probability."""
        return np.exp(-self.nll) - np.exp(-self.nll_full)

    def per_token(self) -> dict[str, np.ndarray]:
        """Metric -> its value at each scored token, (tokens,) in float64; units are in UNITS."""
        with np.errstate(invalid="ignore", over="ignore"):  # infinity less infinity is NaN
            found = {
                "nll_full": self.nll_full,
                "nll": self.nll,
                "nll_delta": self.nll.astype(float) - self.nll_full,
                "kl": self.kl,
                "delta_p": self.delta_p,
            }
            undefined = np.isnan(self.nll + self.nll_full)  # a run that is NaN has no ranking
            for metric, values in self.others.items():
                found[metric] = np.where(undefined, np.nan, values)
        return {metric: values.astype(float) for metric, values in found.items()}


def pooled_statistics(comparisons: Sequence[Comparison]) -> dict[tuple[str, str], float]:
    """(metric, statistic) -> value over the tokens of all documents, for statistics that are not means over documents.

    Statistics are the PERCENTILES, `sd` (of nll_delta, for llama.cpp's error of a perplexity ratio) and `rms`.
    """
    each = [comparison.per_token() for comparison in comparisons]
    tokens = {metric: np.concatenate([of[metric] for of in each]) for metric in UNITS}
    with np.errstate(invalid="ignore", over="ignore"):
        found = {
            (metric, name): float(np.percentile(tokens[metric], at))
            for metric, percentiles in PERCENTILES.items()
            for name, at in percentiles.items()
        }
        if len(tokens["nll_delta"]) > 1:
            found["nll_delta", "sd"] = float(tokens["nll_delta"].std(ddof=1))
        found["delta_p", "rms"] = float(np.sqrt(np.square(tokens["delta_p"]).mean()))
    return found


def compare(full_TV: Tensor, other_TV: Tensor, rest_BT: Tensor) -> Comparison:
    """Compare two runs' log-probabilities (tokens, vocabulary) of the same tokens; KL(full || other) is in nats.

    A vocabulary entry with probability 0 in the full run (as where a model masks part of its vocabulary) adds nothing
    to the divergence; one with probability 0 in the other run only makes it infinite.
    """
    labels_T1 = rest_BT[0, 1:].to(full_TV.device).unsqueeze(1)
    terms_TV = full_TV.exp().mul_(full_TV - other_TV)
    kl_T = terms_TV.masked_fill_(full_TV == -torch.inf, 0).sum(dim=-1)
    return Comparison(
        nll_full=_numpy(-full_TV.gather(1, labels_T1).squeeze(1)),
        nll=_numpy(-other_TV.gather(1, labels_T1).squeeze(1)),
        # Rounding can give a tiny negative sum where the runs agree.
        kl=_numpy(kl_T.clamp_min(0)),
        others={
            name: _numpy(metric.of(full_TV, other_TV, labels_T1))
            for name, metric in METRICS.items()
        },
    )


def why_not_finite(comparisons: Sequence[Comparison]) -> str:
    """Why a statistic of these tokens is not finite; "" if all are."""
    found = {
        "the uncompressed run's log-probability": "nll_full",
        "the recipe's log-probability": "nll",
        "the divergence": "kl",
    }
    for wrong, kind in ((np.isnan, "NaN"), (np.isinf, "infinite")):
        for what, name in found.items():
            values = np.concatenate([getattr(c, name) for c in comparisons])
            if count := int(wrong(values).sum()):
                return f"{what} is {kind} at {count} of {len(values)} scored tokens"
    return ""


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
