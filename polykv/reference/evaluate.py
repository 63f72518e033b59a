"""Judge a reference model on the fixed set: `python -m polykv.reference.evaluate [--weights DIR]`.

Exact match is teacher-forced: every token of the right answer and the end-of-turn token after it
must be the model's first choice, which is the same as a right greedy answer. A problem counts by
its whole solution, so a wrong step that ends in the right number is wrong.
"""

import argparse
import copy
import json
import math
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

from polykv import checkpoint, tokens
from polykv.reference import WEIGHTS_DIR
from polykv.reference.documents import Question
from polykv.reference.evaluation_set import (
    CONTEXTS,
    N_DOCUMENTS,
    digest,
    problems_alone,
    relays,
    sheets,
)
from polykv.reference.rows import VALUE, role_of
from polykv.reference.vocabulary import PAD

VERSION = 1  # of exact match and restated values
Counts = dict[str, list[int]]  # name -> [right, asked]
USABLE = 0.90  # share of questions answered up to the declared usable context
SHORT_MEMORY = 32  # tokens of the document that a model without a long memory keeps


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokens.encode(tokenizer, text)[0].tolist()


@torch.no_grad()
def exact_matches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    prefix_ids: list[int] | None = None,
) -> list[bool]:
    """Whether each question is answered exactly, all after the same prefix (None: no document)."""
    cache = prefill(model, prefix_ids) if prefix_ids else None
    return exact_matches_after(model, tokenizer, questions, cache)


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: list[int]) -> DynamicCache:
    """The cache of one text."""
    return model(torch.tensor([ids], device=model.device), use_cache=True).past_key_values


@torch.no_grad()
def exact_matches_after(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    cache: DynamicCache | None,
) -> list[bool]:
    """As `exact_matches`, after a cache of one row, which is used up."""
    asked = [encode(tokenizer, question.prompt) for question in questions]
    answers = [encode(tokenizer, q.answer) + [tokenizer.eos_token_id] for q in questions]
    length = max(len(a) + len(b) for a, b in zip(asked, answers, strict=True))
    pad = tokenizer.convert_tokens_to_ids(PAD)
    rows = [(a + b + [pad] * length)[:length] for a, b in zip(asked, answers, strict=True)]
    ids_NT = torch.tensor(rows, device=model.device)
    if cache is not None:
        cache.batch_repeat_interleave(len(rows))
    right_NT = model(ids_NT, past_key_values=cache).logits[:, :-1].argmax(-1) == ids_NT[:, 1:]
    return [
        bool(right_NT[i, len(a) - 1 : len(a) + len(b) - 1].all())
        for i, (a, b) in enumerate(zip(asked, answers, strict=True))
    ]


@torch.no_grad()
def value_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], cache: DynamicCache
) -> Tensor:
    """Losses (nats) of the restated values in `ids`, which follow the cache; it is used up."""
    ids_1T = torch.tensor([ids], device=model.device)
    logits_TV = model(ids_1T, past_key_values=cache).logits[0, :-1].float()
    losses_T = cross_entropy(logits_TV, ids_1T[0, 1:], reduction="none")
    return losses_T[restated_values(tokenizer, ids)]


def restated_values(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Which of the scored tokens `ids[1:]` are values that the document stated before."""
    words = tokenizer.convert_ids_to_tokens(ids)
    pairs = zip(words[:-1], words[1:], strict=True)
    return [i for i, (last, word) in enumerate(pairs) if role_of(last, word) == VALUE]


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
        kept = exact_matches_after(model, tokenizer, asked, cache)
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
            right = exact_matches(model, tokenizer, [turn], history)[0]
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
