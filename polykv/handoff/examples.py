"""Examples to train controllers on: a sender's cache, and what an error in it does to the receiver.

Relay: a problem of GSM8K's train split becomes a relay that the model reads and does not write. The question is the
shared segment, and each line of the gold answer (without its calculator annotations) is an agent's turn. At a cut drawn
by the seed, the sender holds everything before it, and the receiver reads the lines after it, one handoff each.

Effect of a number x of the sender's keys and values on the receiver's predictions:

    F(x) = mean over draws of (d/dx sum over j of log p(y_j))^2,

where j runs over the receiver's tokens, p is the model's prediction after each of them, and the labels y_j are drawn
from p itself, not from the text. F is then an unbiased estimate of the diagonal of the Fisher information: errors e
cost the receiver about 1/2 sum over x of F(x) e(x)^2 nats of KL divergence, summed over its predictions, if terms
between different numbers are left out.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from polykv import textfile
from polykv.errors import PolyKVError
from polykv.handoff.mixed import Mixed, MixedCodec
from polykv.handoff.signals import Sender, Topology
from polykv.pool import prefill
from polykv.tokens import encode

ANNOTATION = re.compile(r"<<[^>]*>>")  # of GSM8K's calculator


@dataclass(frozen=True)
class Relay:
    """What the sender has read, what the receiver reads next, both (tokens,), and the sender's topology."""

    ids_T: Tensor
    rest_T: Tensor
    topology: Topology


@dataclass(frozen=True)
class Example:
    """A relay read by the model.

    Attributes:
        layers: exact keys of each layer, then exact values, each (1, kv_heads, tokens, head_dim).
        fisher: F of the same numbers.
        log_probs_RV: of the receiver's predictions.
    """

    sender: Sender
    layers: tuple[Tensor, ...]
    fisher: tuple[Tensor, ...]
    rest_T: Tensor
    log_probs_RV: Tensor

    def decoded(self, codec: MixedCodec, packed: tuple[Mixed, Mixed]) -> list[Tensor]:
        """What keys and values were packed to, as `layers`."""
        heads = self.layers[0].shape[1]
        return [layer for side in packed for layer in codec.decode(side).split(heads, 1)]

    def cost(self, decoded: Sequence[Tensor]) -> np.ndarray:
        """The second-order estimate of what these keys and values cost the receiver, by token, in nats: (tokens,)."""
        parts = zip(self.layers, decoded, self.fisher, strict=True)
        costs = [(f * (y - x).square()).sum((0, 1, 3)) / 2 for x, y, f in parts]
        return torch.stack(costs).sum(0).double().numpy()


def relays(path: str, tokenizer: Any, n_problems: int, seed: int) -> list[Relay]:
    """Relays of problems drawn from a JSONL with `question` and `answer` (GSM8K's format).

    Raises:
        PolyKVError: an unreadable file, an invalid line, or too few problems.
    """

    def parse(row: Mapping[str, Any]) -> tuple[str, list[str]]:
        lines = ANNOTATION.sub("", str(row.get("answer", ""))).split("\n")
        if not isinstance(row.get("question"), str) or len(lines) < 2:
            raise PolyKVError("a problem needs a question, and an answer of two lines or more")
        return row["question"], lines

    problems = textfile.read_jsonl(Path(path).expanduser(), "--problems", parse)
    if n_problems > len(problems):
        raise PolyKVError(
            f"{path} has {len(problems)} problems and {n_problems} are wanted; lower it"
        )
    draw, found = random.Random(seed), []
    for question, lines in draw.sample(problems, n_problems):
        cut = draw.randrange(1, len(lines))
        asked_T = encode(tokenizer, question + "\n", begins=True)[0]
        told, rest = ("".join(f"{line}\n" for line in part) for part in (lines[:cut], lines[cut:]))
        ids_T = torch.cat([asked_T, encode(tokenizer, told)[0]])
        topology = Topology(len(asked_T), hops_left=len(lines) - cut)
        found.append(Relay(ids_T, encode(tokenizer, rest)[0], topology))
    return found


def examples(model: Any, of: Sequence[Relay], n_draws: int, seed: int) -> Iterator[Example]:
    """The relays as examples, one after the other."""
    draw = torch.Generator().manual_seed(seed)
    for relay in of:
        cache = prefill(model, relay.ids_T[None])
        layers = [getattr(layer, side) for side in ("keys", "values") for layer in cache.layers]
        layers = [layer.detach().clone().requires_grad_() for layer in layers]
        with torch.enable_grad():
            log_probs_RV = read_on(model, layers, relay.rest_T)
            fisher = [torch.zeros_like(layer) for layer in layers]
            for _ in range(n_draws):
                labels = torch.multinomial(log_probs_RV.detach().exp(), 1, generator=draw)
                total = log_probs_RV.gather(1, labels).sum()
                for f, slope in zip(
                    fisher, torch.autograd.grad(total, layers, retain_graph=True), strict=True
                ):
                    f += slope.square() / n_draws
        sender = Sender(model, cache, relay.ids_T, relay.topology, seed)
        exact = tuple(layer.detach() for layer in layers)
        yield Example(sender, exact, tuple(fisher), relay.rest_T, log_probs_RV.detach())


def read_on(model: Any, layers: Sequence[Tensor], rest_T: Tensor) -> Tensor:
    """Log-probabilities (tokens, vocabulary) of the predictions after each of the receiver's tokens."""
    keys, values = layers[: len(layers) // 2], layers[len(layers) // 2 :]
    past = DynamicCache(zip(keys, values, strict=True))
    return model(input_ids=rest_T[None], past_key_values=past).logits[0].float().log_softmax(-1)
