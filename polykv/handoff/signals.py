"""Signals that score tokens: importance I(t) to the sender, and expected demand T(t) downstream.

QKVShare (arXiv 2605.03884) scores tokens by S(t) = alpha I(t) + (1 - alpha) T(t) without publishing the exact signals;
those below are our choice. A signal is a non-negative array (tokens,), scaled to mean 1 before it is combined.

A signal sees the sender's tokens, cache and model, and nothing of what the receiver will read or write. Two signals are
trained controllers (polykv/handoff/controller.py), whose features are signals too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from polykv.handoff import controller
from polykv.handoff.replay import Reading, replay

VERSION = 2  # of the signals, with policy.py and the controllers' weights
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
    def last_window(self) -> Reading:
        return replay(self.model, self.cache, self.ids_T, max(0, self.n_tokens - WINDOW))

    @cached_property
    def whole(self) -> Reading:
        return replay(self.model, self.cache, self.ids_T, 0)


def attention_window(sender: Sender) -> np.ndarray:
    """Attention received from the last WINDOW tokens, over all layers and heads (as SnapKV)."""
    return sender.last_window.received_T.numpy()


def attention_prefill(sender: Sender) -> np.ndarray:
    """Attention received from every later token, over all layers and heads (as H2O)."""
    return sender.whole.received_T.numpy()


def value_norm(sender: Sender) -> np.ndarray:
    """Mean L2 norm of the token's value vectors."""
    norms = [layer.values[0].float().norm(dim=-1).mean(dim=0) for layer in sender.cache.layers]
    return torch.stack(norms).mean(dim=0).double().cpu().numpy()


def surprisal(sender: Sender) -> np.ndarray:
    """-log p of the token in nats; the first token, which is not predicted, gets the mean."""
    return _first_as_mean(sender.whole.surprisal_T.numpy())


def quality(sender: Sender) -> np.ndarray:
    """Probability that the model gave the token; the first token, which is not predicted, gets the mean."""
    return _first_as_mean(np.exp(-sender.whole.surprisal_T.numpy()))


def entropy(sender: Sender) -> np.ndarray:
    """Entropy, in nats, of what the model predicts after reading the token."""
    return sender.whole.entropy_T.numpy()


def rarity(sender: Sender) -> np.ndarray:
    """-log of the token's relative frequency, in nats.

    Frequencies are those of the context itself: they need no corpus, and exist for every tokenizer.
    """
    ids, counts = np.unique(sender.ids_T.cpu().numpy(), return_counts=True)
    return -np.log(counts / sender.n_tokens)[np.searchsorted(ids, sender.ids_T.cpu().numpy())]


def attention_variance(sender: Sender) -> np.ndarray:
    """Variance of the attention probability received, over layers, heads and the queries from the token on."""
    received = sender.whole.received_T.numpy()
    n_heads = round(received.sum() / sender.n_tokens)  # of all layers: each query gives 1 in each
    n_seen = n_heads * np.arange(sender.n_tokens, 0, -1)
    mean = received / n_seen
    return np.maximum(sender.whole.squared_T.numpy() / n_seen - mean**2, 0)


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


def segment(sender: Sender) -> np.ndarray:
    """1 for tokens of the shared segment (the problem), BACKGROUND for those of the agents' turns."""
    inside = np.arange(sender.n_tokens) < sender.topology.n_shared
    return np.where(inside, 1.0, BACKGROUND)


def downstream(sender: Sender) -> np.ndarray:
    """Expected demand as policy `topology` has it: the mean of `shared` and `anchors`, each scaled to mean 1."""
    return combined(("shared", "anchors"), DEMAND, sender)


def dont_waste_bits(sender: Sender) -> np.ndarray:
    """What the trained controller with the features of Don't Waste Bits (arXiv 2604.04722) predicts."""
    return controlled(controller.load("dont_waste_bits"), sender)


def qkvshare(sender: Sender) -> np.ndarray:
    """What the trained controller with the six features of QKVShare predicts."""
    return controlled(controller.load("qkvshare"), sender)


def controlled(trained: controller.Controller, sender: Sender) -> np.ndarray:
    """A controller's output for the sender's tokens, (tokens,)."""
    known = IMPORTANCE | DEMAND
    return trained(np.stack([known[name](sender) for name in trained.features]))


IMPORTANCE: dict[str, Callable[[Sender], np.ndarray]] = {
    signal.__name__: signal
    for signal in (
        attention_window, attention_prefill, attention_variance, value_norm, surprisal, quality, entropy, rarity,
        sinks_recent, random, dont_waste_bits, qkvshare,
    )
}  # fmt: skip
# Signals that see tokens alone: the others read the cache or the tokens again, without regard to sliding windows.
OF_TOKENS = ("rarity", "sinks_recent", "random", "shared", "segment")
DEMAND: dict[str, Callable[[Sender], np.ndarray]] = {
    signal.__name__: signal for signal in (shared, anchors, segment, downstream)
}


def combined(names: tuple[str, ...], known: dict, sender: Sender) -> np.ndarray:
    """The mean of the named signals, each scaled to mean 1; ones if there are no names."""
    if not names:
        return np.ones(sender.n_tokens)
    return np.mean([_mean_one(known[name](sender)) for name in names], axis=0)


def _first_as_mean(signal: np.ndarray) -> np.ndarray:
    """The first token, which nothing predicts (NaN), gets the mean of the others, or 1 if there are none."""
    mean = signal[1:].mean() if len(signal) > 1 else 1.0
    return np.append(mean, signal[1:])


def _mean_one(signal: np.ndarray) -> np.ndarray:
    mean = signal.mean()
    return signal / mean if mean > 0 else np.ones_like(signal)
