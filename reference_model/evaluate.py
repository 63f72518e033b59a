"""Judge a reference model on the fixed set: `python -m reference_model.evaluate [--weights DIR]`.

The set has four parts: questions and problems whose facts stand only in a document's prefix (by context length),
problems that state their facts themselves (by template), and relays. `digest()` pins all of it.
"""

import argparse
import copy
import hashlib
import json
import math
import random
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from polykv import checkpoint
from polykv.reference import WEIGHTS_DIR
from polykv.reference.documents import Question
from polykv.reference.evaluation_set import N_DOCUMENTS, sheets
from polykv.reference.exact_match import encode, exact_matches, restated_value_indices
from polykv.reference.problems import TEMPLATES, Operands, Relay, draw_problem, draw_relay
from polykv.reference.world import sample_world

Counts = dict[str, list[int]]  # name -> [right, asked]
USABLE = 0.90  # share of questions answered up to the declared usable context
CONTEXTS = (256, 512, 1024, 2048, 4096)
PROBLEMS_PER_TEMPLATE = 60
N_RELAYS = 200
SHORT_MEMORY = 32  # tokens of the document that a model without a long memory keeps


def problems_alone(per_template: int = PROBLEMS_PER_TEMPLATE) -> list[Question]:
    """Problems that state their facts themselves: `per_template` of each template."""
    rng, found = random.Random("problems/heldout"), []
    for template in TEMPLATES:
        n = 0
        while n < per_template:
            problem = draw_problem(rng, Operands(sample_world(rng, 24, "heldout")), template)
            if problem:
                found.append(problem.alone(rng))
                n += 1
    return found


def relays(n: int = N_RELAYS, n_turns: int = 4) -> list[Relay]:
    """Relays of `n_turns` turns."""
    rng, found = random.Random("relays/heldout"), []
    while len(found) < n:
        relay = draw_relay(rng, Operands(sample_world(rng, 24, "heldout")), n_turns)
        if relay:
            found.append(relay)
    return found


def digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of every text, prompt and answer of the set."""
    sha = hashlib.sha256()
    for n_tokens in CONTEXTS:
        for sheet in sheets(tokenizer, n_tokens):
            sha.update(sheet.document.text.encode())
            for question in (*sheet.questions, *sheet.problems):
                sha.update(f"{question.prompt}|{question.answer}".encode())
    for question in (*problems_alone(), *(turn for relay in relays() for turn in relay.turns)):
        sha.update(f"{question.prompt}|{question.answer}".encode())
    return sha.hexdigest()


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: list[int]) -> DynamicCache:
    """The cache of one text."""
    return model(torch.tensor([ids], device=model.device), use_cache=True).past_key_values


@torch.no_grad()
def value_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], cache: DynamicCache
) -> Tensor:
    """Losses (nats) of the restated values in `ids`, which follow the cache; it is used up."""
    ids_1T = torch.tensor([ids], device=model.device)
    logits_TV = model(ids_1T, past_key_values=cache).logits[0, :-1].float()
    losses_T = cross_entropy(logits_TV, ids_1T[0, 1:], reduction="none")
    return losses_T[restated_value_indices(tokenizer, ids)]


def judge_context(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n_tokens: int, n_documents: int
) -> dict:
    """Exact match with the document and without, and restated-value perplexity, at one length."""
    counts: Counts = defaultdict(lambda: [0, 0])
    losses: dict[str, list[Tensor]] = {"document": [], "last_tokens": []}
    for sheet in sheets(tokenizer, n_tokens, n_documents):
        ids, n = encode(tokenizer, sheet.document.text), sheet.document.n_prefix
        asked = [*sheet.questions, *sheet.problems]
        cache, short = prefill(model, ids[:n]), prefill(model, ids[n - SHORT_MEMORY : n])
        losses["document"].append(value_losses(model, tokenizer, ids[n:], copy.deepcopy(cache)))
        losses["last_tokens"].append(value_losses(model, tokenizer, ids[n:], short))
        kept = exact_matches(model, tokenizer, asked, cache)
        dropped = exact_matches(model, tokenizer, asked)
        for question, with_document, without in zip(asked, kept, dropped, strict=True):
            group = "problems" if "####" in question.answer else "questions"
            _add(counts, group, with_document)
            _add(counts, f"{group}/{question.kind}", with_document)
            _add(counts, f"{group}_dropped", without)
    perplexity = {name: math.exp(torch.cat(all_).mean().item()) for name, all_ in losses.items()}
    return {"counts": dict(counts), "restated_value_perplexity": perplexity}


def judge_alone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Counts:
    """Exact match of problems alone by template, and of relays by turn (earlier turns given)."""
    counts: Counts = defaultdict(lambda: [0, 0])
    for question in problems_alone():
        right = exact_matches(model, tokenizer, [question])[0]
        _add(counts, "problems", right)
        _add(counts, f"problems/{question.kind}", right)
    for relay in relays():
        told = " ".join(" ".join(fact.statement()) for fact in relay.problem.facts)
        history = encode(tokenizer, told)
        for number, turn in enumerate(relay.turns, start=1):
            right = exact_matches(model, tokenizer, [turn], prefill(model, history))[0]
            _add(counts, f"relays/turn {number}", right)
            history += encode(tokenizer, turn.prompt + turn.answer) + [tokenizer.eos_token_id]
    return dict(counts)


def judge(weights: Path, contexts: tuple[int, ...], n_documents: int) -> dict:
    """All of it, with the digest of the set and the usable context."""
    tokenizer = AutoTokenizer.from_pretrained(weights, trust_remote_code=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, report = AutoModelForCausalLM.from_pretrained(
        weights,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        **checkpoint.REPORTED,
    )
    checkpoint.check_whole(report, weights, checkpoint.BARE)
    model = model.to(device).eval()
    found = {
        "digest": digest(tokenizer),
        "n_documents": n_documents,
        "alone": judge_alone(model, tokenizer),
        "contexts": {},
    }
    usable = 0
    for n_tokens in contexts:
        found["contexts"][str(n_tokens)] = judge_context(model, tokenizer, n_tokens, n_documents)
        right, asked = found["contexts"][str(n_tokens)]["counts"]["questions"]
        print(f"{n_tokens} tokens: {right} of {asked} questions", flush=True)
        if right >= USABLE * asked and usable == max([0, *(c for c in contexts if c < n_tokens)]):
            usable = n_tokens
    return found | {"usable_context": usable}


def _add(counts: Counts, name: str, right: bool) -> None:
    counts[name][0] += right
    counts[name][1] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS_DIR)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--documents", type=int, default=N_DOCUMENTS, help="per context length")
    parser.add_argument("--output", type=Path, help="default: evaluation.json beside the weights")
    args = parser.parse_args()
    found = judge(args.weights, tuple(args.contexts), args.documents)
    output = args.output or args.weights / "evaluation.json"
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, (right, asked) in sorted(found["alone"].items()):
        print(f"alone {name}: {right / asked:.3f} of {asked}")
    for n_tokens, at in found["contexts"].items():
        for name, (right, asked) in sorted(at["counts"].items()):
            print(f"{n_tokens} {name}: {right / asked:.3f} of {asked}")
        print(f"{n_tokens} restated-value perplexity: {at['restated_value_perplexity']}")
    print(f"usable context: {found['usable_context']} tokens; digest {found['digest']}")


if __name__ == "__main__":
    main()
