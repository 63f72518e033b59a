"""Golden numbers of every recipe and policy on SmolLM2-135M-Instruct: `python -m tests.golden.make` writes them.

KL divergence, perplexity delta and stored bytes of two documents of 512 tokens, 16 greedy tokens after the first
one's prefix, and the digest of what a 4-bit card decodes to. tests/test_golden.py computes them again.
"""

import hashlib
import json
import math
import sys
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import torch

import polykv
from polykv.config import available
from polykv.evaluation.continuation import compare, score_rest
from polykv.handoff.policy import OWN, load_policy
from polykv.pool import prefill

FILE = Path(__file__).with_name("smollm2-135m.json")
PREFIX, GREEDY = 358, 16
CARD_TOKENS, BUDGET_BITS = 256, 4.0


def greedy(model: Any, cache: Any, first: int) -> list[int]:
    """The `GREEDY` most probable tokens after the cache's tokens and `first`."""
    ids, token = [], torch.tensor([[first]])
    for _ in range(GREEDY):
        token = model(input_ids=token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        ids.append(int(token))
    return ids


def digest(layers: list[tuple[torch.Tensor, torch.Tensor]]) -> str:
    """SHA-256 of the decoded keys and values of every layer."""
    made = hashlib.sha256()
    for x_BHTD in chain.from_iterable(layers):
        made.update(x_BHTD.contiguous().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def of_recipe(model: Any, recipe: Any, documents: list[torch.Tensor], full: list) -> dict[str, Any]:
    """KL, perplexity delta in percent and stored bytes per document, and the first one's greedy tokens."""
    found: dict[str, Any] = {"kl": [], "delta": [], "stored_bytes": []}
    for ids_BT, (layers, full_TV) in zip(documents, full, strict=True):
        pool = polykv.SharedKVPool.from_layers(
            iter(layers), recipe, n_layers=len(layers), backend="torch"
        )
        rest_BT = ids_BT[:, PREFIX:]
        one = compare(full_TV, score_rest(model, pool.dequantize(), rest_BT), rest_BT)
        found["kl"].append(float(one.kl.mean()))
        found["delta"].append(100 * math.expm1(float((one.nll - one.nll_full).mean())))
        found["stored_bytes"].append(pool.stored_bytes)
        if "greedy" not in found:
            found["greedy"] = greedy(model, pool.dequantize(), int(rest_BT[0, 0]))
    return found


@torch.no_grad()
def measure(documents: list[list[int]], recipes: list[str], policies: list[str]) -> dict[str, Any]:
    """The golden numbers of these recipes and policies."""
    model, tokenizer = polykv.load_model("smollm2-135m", device="cpu")
    ids = [torch.tensor([document]) for document in documents]
    full = []
    for ids_BT in ids:
        cache = prefill(model, ids_BT[:, :PREFIX])
        layers = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        full.append((layers, score_rest(model, cache, ids_BT[:, PREFIX:])))
    found: dict[str, Any] = {"recipes": {}, "cards": {}}
    for name in recipes:
        print(name, file=sys.stderr)
        found["recipes"][name] = of_recipe(model, polykv.load_recipe(name), ids, full)
    card_BT = ids[0][:, :CARD_TOKENS]
    for name in policies:
        policy = load_policy(name)
        if policy.store == "text" or policy.carries != OWN:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tiers below 4 bits
            card = polykv.CacheCard.seal(
                prefill(model, card_BT), card_BT[0], model, tokenizer, policy, BUDGET_BITS
            )
        found["cards"][name] = {"digest": digest(card.decode()), "bytes": card.nbytes}
    return found


def main() -> None:
    """Write the golden numbers anew; the documents stay those of the file."""
    documents = json.loads(FILE.read_text())["documents"]
    found = measure(documents, available("recipe"), available("policy"))
    FILE.write_text(json.dumps({"documents": documents, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
