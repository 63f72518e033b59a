"""Signals that score tokens: importance I(t) to the sender, and expected demand T(t) downstream.

QKVShare (arXiv 2605.03884) scores tokens by S(t) = alpha I(t) + (1 - alpha) T(t) without publishing the exact signals;
those below are our choice. A signal is a non-negative array (tokens,), scaled to mean 1 before it is combined.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from polykv.handoff.replay import replay

VERSION = 1  # of the signals, with policy.py
WINDOW = 64  # last tokens whose attention counts
SINKS, RECENT = 4, 64  # tokens at either end
ANCHORS = 0.05  # fraction of tokens that are attention anchors
BACKGROUND = 0.25  # demand for a token outside the shared segment


@dataclass(frozen=True)
class Topology:
    """What the sender knows of the relay: length of the shared segment (the first tokens), and remaining handoffs."""

    n_shared: int = 0
    hops_left: int = 1


@dataclass(frozen=True)
class Sender:
    """The inputs of signals. Tokens are read again at most once, and only if a signal needs it."""

    model: Any
    cache: Cache
    ids_T: Tensor
    topology: Topology
    seed: int

    @property
    def n_tokens(self) -> int:
        return len(self.ids_T)

    @cached_property
    def last_window(self) -> tuple[Tensor, Tensor]:
        return replay(self.model, self.cache, self.ids_T, max(0, self.n_tokens - WINDOW))

    @cached_property
    def whole(self) -> tuple[Tensor, Tensor]:
        return replay(self.model, self.cache, self.ids_T, 0)


def attention_window(sender: Sender) -> np.ndarray:
    """Attention received from the last WINDOW tokens, over all layers and heads (as SnapKV)."""
    return sender.last_window[0].numpy()


def attention_prefill(sender: Sender) -> np.ndarray:
    """Attention received from every later token, over all layers and heads (as H2O)."""
    return sender.whole[0].numpy()


def value_norm(sender: Sender) -> np.ndarray:
    """Mean L2 norm of the token's value vectors."""
    norms = [layer.values[0].float().norm(dim=-1).mean(dim=0) for layer in sender.cache.layers]
    return torch.stack(norms).mean(dim=0).double().cpu().numpy()


def surprisal(sender: Sender) -> np.ndarray:
    """-log p of the token in nats; the first token, which is not predicted, gets the mean."""
    nats = sender.whole[1].numpy()
    mean = np.nanmean(nats) if len(nats) > 1 else 1.0
    return np.where(np.isnan(nats), mean, nats)


def sinks_recent(sender: Sender) -> np.ndarray:
    """1 for the first SINKS and the last RECENT tokens, a tenth for the others."""
    place = np.arange(sender.n_tokens)
    return np.where((place < SINKS) | (place >= sender.n_tokens - RECENT), 1.0, 0.1)


def random(sender: Sender) -> np.ndarray:
    """Random scores, a control. A token gets the same score at every hop."""
    return np.random.default_rng(sender.seed).exponential(size=sender.n_tokens)


def shared(sender: Sender) -> np.ndarray:
    """Remaining hops for tokens of the shared segment, which is read at each of them; BACKGROUND for others."""
    inside = np.arange(sender.n_tokens) < sender.topology.n_shared
    return np.where(inside, float(max(sender.topology.hops_left, 1)), BACKGROUND)


def anchors(sender: Sender) -> np.ndarray:
    """1 for the fraction ANCHORS of tokens with the most attention from the last window; BACKGROUND for others."""
    received = attention_window(sender)
    is_anchor = received >= np.quantile(received, 1 - ANCHORS)
    return np.where(is_anchor, 1.0, BACKGROUND)


IMPORTANCE: dict[str, Callable[[Sender], np.ndarray]] = {
    signal.__name__: signal
    for signal in (attention_window, attention_prefill, value_norm, surprisal, sinks_recent, random)
}
DEMAND: dict[str, Callable[[Sender], np.ndarray]] = {
    signal.__name__: signal for signal in (shared, anchors)
}


def combined(names: tuple[str, ...], known: dict, sender: Sender) -> np.ndarray:
    """The mean of the named signals, each scaled to mean 1; ones if there are no names."""
    if not names:
        return np.ones(sender.n_tokens)
    return np.mean([_mean_one(known[name](sender)) for name in names], axis=0)


def _mean_one(signal: np.ndarray) -> np.ndarray:
    mean = signal.mean()
    return signal / mean if mean > 0 else np.ones_like(signal)
