"""Training of the controllers on GSM8K train problems: `python -m polykv.handoff.training --help`.

Neither paper publishes its recipe; all of this one is ours.

Target: what 4 bits of a token cost the receiver, in nats: 1/2 sum of F(x) e(x)^2 over all numbers x of the token's keys
and values (polykv/handoff/examples.py). The errors e are those of a card in which every token has 4 bits. Errors at 2,
3 and 8 bits are those at 4 by a nearly constant factor, which allocation knows, so that one width suffices.

Fit: targets are divided by their mean over the sender's tokens, leaving out the sinks, which are always exact; the
loss is Poisson deviance, whose minimum is the mean of the target given the features (a squared error of logarithms
would fit the median, and few tokens have most of the damage). Adam on all tokens at once, in float64.

Held-out problems of the same file are then allocated by every policy, and held_out.json records what their cards cost.
"""

import argparse
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polykv import digests, models
from polykv.handoff.controller import DATA, FEATURES, HIDDEN, Controller, log_ratios
from polykv.handoff.examples import Example, examples, read_on, relays
from polykv.handoff.mixed import EXACT_TIER, TIERS, MixedCodec
from polykv.handoff.packing import pack
from polykv.handoff.policy import Policy, load_policy
from polykv.handoff.signals import DEMAND, IMPORTANCE, SINKS, Sender, controlled
from polykv.results import commit

REFERENCE_BITS = 4  # of the errors in the target
STEPS, RATE = 600, 1e-2  # of Adam; the rate falls to 0
DECAY = 1e-3  # of the loss, times the sum of squared weights
PUBLISHED_TIERS = (2, 4, 8, 16)
BUDGETS = (4.0, 6.0)  # bits, of the held-out comparison


@dataclass(frozen=True)
class Trained(Policy):
    """A policy whose score is a controller's."""

    controller: Controller | None = None

    def score(self, sender: Sender) -> np.ndarray:
        return controlled(self.controller, sender)


def target(example: Example) -> np.ndarray:
    """The target of every token, (tokens,), in nats."""
    tier = TIERS.index(REFERENCE_BITS)
    tiers_T = torch.full((example.sender.n_tokens,), tier, dtype=torch.uint8)
    tiers_T[:SINKS] = EXACT_TIER
    codec, half = MixedCodec(None), len(example.layers) // 2
    keys, values = example.layers[:half], example.layers[half:]
    packed = (
        codec.encode(keys, tiers_T, codec.channels_of(keys, tiers_T)),
        codec.encode(values, tiers_T),
    )
    return example.cost(example.decoded(codec, packed))


def fit(features: tuple[str, ...], signals: Sequence[Mapping[str, np.ndarray]],
        targets: Sequence[np.ndarray], seed: int, provenance: Mapping[str, Any]) -> Controller:  # fmt: skip
    """A controller with these features, trained on each sender's signals (name -> (tokens,)) and targets."""
    inputs = [log_ratios(np.stack([of[name] for name in features])).T[SINKS:] for of in signals]
    mean, spread = np.concatenate(inputs).mean(0), np.concatenate(inputs).std(0) + 1e-9
    x_TF = torch.from_numpy((np.concatenate(inputs) - mean) / spread)
    y_T = torch.from_numpy(np.concatenate([one[SINKS:] / one[SINKS:].mean() for one in targets]))
    draw = torch.Generator().manual_seed(seed)

    def start(*shape: int) -> Tensor:
        first = torch.randn(shape, generator=draw, dtype=torch.float64) / shape[0] ** 0.5
        return first.requires_grad_()

    hidden, output = start(len(features), HIDDEN), start(HIDDEN)
    hidden_bias, offset = (
        torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (HIDDEN, 1)
    )
    optimizer = torch.optim.Adam([hidden, hidden_bias, output, offset], RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        log_mean_T = torch.tanh(x_TF @ hidden + hidden_bias) @ output + offset
        loss = (log_mean_T.exp() - y_T * log_mean_T).mean()
        loss = loss + DECAY * (hidden.square().sum() + output.square().sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = (hidden.detach().numpy(), hidden_bias.detach().numpy(), output.detach().numpy())
    return Controller(features, mean, spread, *weights, provenance)


def held_out(of: Iterator[Example], controllers: Mapping[str, Controller]) -> list[dict[str, Any]]:
    """For each policy and budget: mean over relays of the second-order cost and of the KL itself, in nats per token.

    The 16-bit tier keeps the cache's own dtype.
    """
    random_too = Policy("random", importance=("random",), tiers=PUBLISHED_TIERS)
    policies = [load_policy(name) for name in ("uniform", "topology")] + [random_too]
    for name, one in controllers.items():
        for tiers in (PUBLISHED_TIERS, load_policy("uniform").tiers):
            policies.append(Trained(name, tiers=tiers, controller=one))
    found: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    codec = MixedCodec(None)
    for example in of:
        n = len(example.rest_T)
        for policy in policies:
            for budget in BUDGETS:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of tiers below 4 bits
                    decoded = example.decoded(codec, pack(example.sender, policy, codec, budget))
                with torch.no_grad():
                    other_RV = read_on(example.sender.model, decoded, example.rest_T)
                log_RV = example.log_probs_RV
                kl = float((log_RV.exp() * (log_RV - other_RV)).sum() / n)
                cell = (policy.name, policy.tiers, budget)
                found.setdefault(cell, []).append((float(example.cost(decoded).sum()) / n, kl))
    return [
        {"policy": name, "tiers": list(tiers), "budget_bits": budget,
         "cost": float(f"{np.mean([c for c, _ in pairs]):.6g}"), "kl": float(f"{np.mean([k for _, k in pairs]):.6g}"),
         "kl_by_relay": [float(f"{k:.6g}") for _, k in pairs]}
        for (name, tiers, budget), pairs in found.items()
    ]  # fmt: skip


def main(given: Sequence[str] | None = None) -> None:
    """Train every controller, compare it on held-out problems, and write its file."""
    parser = argparse.ArgumentParser(description="Train the controllers of conf/policy.")
    parser.add_argument(
        "--model", required=True, help="a name in conf/model, a folder or a GGUF file"
    )
    parser.add_argument("--label", help="the model's name in the files, if --model is a path")
    parser.add_argument("--problems", required=True, help="JSONL of GSM8K's train split")
    parser.add_argument("--n-train", type=int, default=32)
    parser.add_argument("--n-held-out", type=int, default=8)
    parser.add_argument("--n-draws", type=int, default=2, help="draws of labels for each problem")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the weights")
    options = parser.parse_args(given)
    cfg = models.config_of(options.model)
    model, tokenizer = models.load_weights(cfg, "cpu")
    drawn = relays(options.problems, tokenizer, options.n_train + options.n_held_out, options.seed)
    known, signals, targets = IMPORTANCE | DEMAND, [], []
    names = {name for features in FEATURES.values() for name in features}
    for number, example in enumerate(
        examples(model, drawn[: options.n_train], options.n_draws, options.seed), start=1
    ):
        signals.append({name: known[name](example.sender) for name in sorted(names)})
        targets.append(target(example))
        print(f"problem {number} of {options.n_train}", flush=True)
    provenance = {
        "model": options.label or cfg.name,
        "weights": models.weights_label(cfg),
        "weights_sha256": cfg.get("digest"),
        "problems_sha256": digests.sha256(Path(options.problems).expanduser(), "--problems"),
        **{name: vars(options)[name] for name in ("n_train", "n_held_out", "n_draws", "seed")},
        "commit": commit(),
    }
    made = {
        name: fit(features, signals, targets, options.seed, provenance)
        for name, features in FEATURES.items()
    }
    rest = examples(model, drawn[options.n_train :], options.n_draws, options.seed + 1)
    compared = held_out(rest, made)
    for line in compared:
        print(json.dumps(line), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, one in made.items():
        one.save(options.out / f"{name}.json")
    (options.out / "held_out.json").write_text(
        json.dumps({**provenance, "rows": compared}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
