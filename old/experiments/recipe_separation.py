"""Does damage to a cache show on the reference model? Its fixed evaluation set under each recipe.

Answers no published row: it shows that the offline numbers, which rest on this model, can tell recipes apart.
Exact match is teacher-forced over the whole answer, and a recipe's answers are paired with the full cache's.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from experiments.common import new_rows, settle
from omegaconf import DictConfig
from torch import Tensor

from experiments import common
from polykv.errors import PolyKVError
from polykv.evaluation import continuation, missing
from polykv.evaluation.continuation import Comparison, compare, score_rest
from polykv.evaluation.statistics import document_interval, interval_name, mcnemar, wilson
from polykv.pool import SharedKVPool, prefill
from polykv.progress import track
from polykv.recipe import Recipe, load_recipe
from polykv.reference import exact_match
from polykv.reference.documents import Question
from polykv.reference.evaluation_set import N_DOCUMENTS, sheets
from polykv.reference.exact_match import exact_matches, restated_values
from polykv.results import Rows
from polykv.tokens import encode, opening

__all__ = ["MADE_BY", "check", "run", "settle"]

MADE_BY = (*common.SCORES, exact_match)

GROUPS = ("questions", "problems")


@dataclass(frozen=True, eq=False)
class Read:
    """One document of the set, read from one pool."""

    pool: SharedKVPool
    rest_BT: Tensor
    asked: dict[str, tuple[Question, ...]]  # by group
    log_probs_TV: Tensor
    right: dict[str, np.ndarray]  # by group: whether each answer is exactly right, as 0 or 1


def check(cfg: DictConfig) -> None:
    """Refuse bad input.

    Raises:
        PolyKVError: another model than the one that the set is written for, or more documents than it has.
    """
    common.check_common(cfg)
    common.check_injects(cfg)
    if cfg.weights != "reference":
        raise PolyKVError(
            f"the evaluation set is written for the reference model, not for {cfg.model.name}; "
            "use model=reference, or experiment=recipe_frontier"
        )
    if cfg.context is None:
        raise PolyKVError("the evaluation set has no length of its own; set context=512 or so")
    if cfg.n_documents > N_DOCUMENTS:
        raise PolyKVError(
            f"n_documents={cfg.n_documents}, and the evaluation set has {N_DOCUMENTS} of a length; lower it"
        )


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Divergence and exact match of the recipe, paired with the full cache."""
    model, tokenizer = common.model_of(cfg)
    recipe = Recipe.from_config(cfg.recipe)
    shared = ("model", "weights", "device", "context", "n_documents")
    full = _full(common.as_key({name: cfg[name] for name in shared}))
    read = []
    for one in track(full, f"answers under {recipe.name}"):
        layers = (one.pool.decode_layer(index) for index in range(one.pool.n_layers))
        pool = SharedKVPool.from_layers(
            layers, recipe, n_layers=one.pool.n_layers, backend=cfg.backend
        )
        read.append(_read(model, tokenizer, pool, one.rest_BT, one.asked))
    comparisons = [
        compare(a.log_probs_TV, b.log_probs_TV, a.rest_BT) for a, b in zip(full, read, strict=True)
    ]
    about = {"document": "evaluation_set", "bos": bool(opening(tokenizer))}
    rows = new_rows(cfg, reader=cfg.reader, **about)
    rows.add("bits", 16 / read[0].pool.stored_ratio, "bits per value", protocol="stored")
    continuation.add_rows(rows, comparisons)
    _add_restated(rows, tokenizer, full, comparisons)
    for group in GROUPS:
        before, after = ([one.right[group] for one in reads] for reads in (full, read))
        _add_exact_match(rows, group, before, after)
    return rows


@lru_cache(maxsize=1)
def _full(key: str) -> list[Read]:
    """Every document of the cell read from its uncompressed cache."""
    cfg = common.from_key(key)
    model, tokenizer = common.model_of(cfg)
    full, found = load_recipe("full"), []
    documents = sheets(tokenizer, cfg.context, cfg.n_documents)
    for sheet in track(list(documents), "prefilling the documents"):
        ids_BT = encode(tokenizer, sheet.document.text, begins=True)
        prefix_BT, rest_BT = ids_BT.tensor_split([sheet.document.n_prefix], dim=1)
        pool = SharedKVPool.from_cache(prefill(model, prefix_BT), full, backend="torch")
        asked = {"questions": sheet.questions, "problems": sheet.problems}
        found.append(_read(model, tokenizer, pool, rest_BT, asked))
    return found


def _read(model: Any, tokenizer: Any, pool: SharedKVPool, rest_BT: Tensor, asked: dict) -> Read:
    log_probs_TV = score_rest(model, pool.inject(), rest_BT)
    together = [question for group in GROUPS for question in asked[group]]
    right = np.array(exact_matches(model, tokenizer, together, pool.inject()), dtype=float)
    by_group = dict(zip(GROUPS, np.split(right, [len(asked[GROUPS[0]])]), strict=True))
    return Read(pool, rest_BT, asked, log_probs_TV, by_group)


def _add_restated(
    rows: Rows, tokenizer: Any, full: list[Read], comparisons: list[Comparison]
) -> None:
    """Perplexity of the values that the prefix stated and the rest states again: what a lost fact costs."""
    of_values = [
        comparison.nll[restated_values(tokenizer, one.rest_BT[0].tolist())]
        for one, comparison in zip(full, comparisons, strict=True)
    ]
    every, metric = np.concatenate(of_values), "restated_value_perplexity"
    if not len(every):
        rows.add(metric, None, "ppl", note="no document states a value again")
        return
    why = continuation.why_not_finite(comparisons)
    missing.add(rows, metric, float(np.exp(every.mean())), "ppl", why, n=len(every))


def _add_exact_match(
    rows: Rows, group: str, before: list[np.ndarray], after: list[np.ndarray]
) -> None:
    """Answers right, lost and won against the full cache, and McNemar's exact test of the two."""
    asked = [(a, b) for a, b in zip(before, after, strict=True) if len(a)]
    if not asked:
        note = f"the documents have no {group}"
        rows.add("exact_match", None, "rate", n=0, protocol=f"{group}; teacher-forced", note=note)
        return
    first, second = (
        np.concatenate(side).astype(bool).tolist() for side in zip(*asked, strict=True)
    )
    n_right = sum(second)
    common_ = {"n": len(first), "protocol": f"{group}; teacher-forced"}
    rows.add(
        "exact_match", n_right / len(second), "rate", ci=wilson(n_right, len(second)), **common_
    )
    changes = [100 * (b - a) for a, b in asked]
    note = f"recipe less full cache; {interval_name(changes)}"
    mean = float(np.concatenate(changes).mean())
    interval = document_interval(changes, (-100, 100))
    rows.add("exact_match_change", mean, "points", ci=interval, note=note, **common_)
    lost, won, p = mcnemar(first, second)
    rows.add("answers_lost", lost, "answers", **common_)
    rows.add("answers_won", won, "answers", **common_)
    rows.add("mcnemar_p", p, "p", note="exact, two-sided, against the full cache", **common_)
