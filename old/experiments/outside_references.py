"""How do transformers' own quantized caches (quanto, HQQ, fp8) do beside our recipes, in the same tables?

Answers no published row.
"""

from typing import Any

from experiments.common import document_rows
from experiments.recipe_frontier import MADE_BY, settle
from omegaconf import DictConfig, OmegaConf

from experiments import common, recipe_frontier
from polykv.errors import PolyKVError
from polykv.evaluation import continuation, outside
from polykv.evaluation.continuation import compare, score_rest
from polykv.models import load_config

__all__ = ["MADE_BY", "check", "run", "settle"]


def check(cfg: DictConfig) -> None:
    """Refuse bad input, an unknown reference, and a backend whose package is missing."""
    recipe_frontier.check(cfg)
    common.check_injects(cfg)
    if cfg.outside not in cfg.references:
        known = ", ".join(cfg.references)
        raise PolyKVError(f"no outside reference named {cfg.outside!r}; there are: {known}")
    outside.new_cache(load_config(cfg.model), _options(cfg))


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Stored bits and quality of the reference, rows as recipe_frontier's."""
    rows = document_rows(cfg)
    comparisons = []
    for index, full in enumerate(common.full_readings(cfg)):
        cache = outside.quantized(full.model, full.pool, _options(cfg))
        if index == 0:
            stored = 8 * outside.stored_bytes(cache) / full.pool.n_values
            rows.add("bits", _options(cfg).get("nbits", 8), "bits per value", protocol="nominal")
            rows.add("bits", stored, "bits per value", protocol="stored")
        log_probs_TV = score_rest(full.model, cache, full.document.rest_BT)
        comparisons.append(compare(full.log_probs_TV, log_probs_TV, full.document.rest_BT))
    continuation.add_rows(rows, comparisons)
    continuation.add_document_rows(rows, comparisons)
    return rows


def _options(cfg: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(cfg.references[cfg.outside])
