"""Where is the damage? Errors of each layer and head, and the divergence when one layer alone is compressed.

Answers no published row.
"""

import math
from typing import Any

from experiments.common import document_rows
from experiments.recipe_frontier import settle
from omegaconf import DictConfig

from experiments import common, recipe_frontier
from polykv.evaluation import layers, missing
from polykv.evaluation.continuation import compare, score_rest, why_not_finite
from polykv.evaluation.readings import Reading
from polykv.evaluation.statistics import document_interval, interval_name
from polykv.recipe import Recipe, load_recipe
from polykv.results import Rows

__all__ = ["MADE_BY", "check", "run", "settle"]

MADE_BY = (*common.SCORES, layers)

ZEROS = "the exact values are all zero, which nothing is relative to"


def check(cfg: DictConfig) -> None:
    """Refuse bad input."""
    recipe_frontier.check(cfg)
    common.check_injects(cfg)


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Rows whose protocol names the layer, or the layer and its kv head."""
    rows = document_rows(cfg)
    full, readings = common.full_readings(cfg), common.readings(cfg)
    _add_errors(rows, full, readings)
    _add_theory(rows, Recipe.from_config(cfg.recipe), full[0])
    _add_damage(rows, cfg, full)
    return rows


def _add_errors(rows: Rows, full: tuple[Reading, ...], readings: tuple[Reading, ...]) -> None:
    queries = [layers.queries_of(r.model, r.pool, r.document.rest_BT) for r in full]
    for layer in range(full[0].pool.n_layers):
        found = [
            layers.head_errors(q[layer], a.pool.decode_layer(layer), b.pool.decode_layer(layer))
            for q, a, b in zip(queries, full, readings, strict=True)
        ]
        for kind, by_head in layers.mean_by_head(found).items():
            name = f"error_{kind}"
            where = f"layer {layer}"
            missing.add(rows, name, float(by_head.mean()), "relative", ZEROS, protocol=where)
            for head, value in enumerate(by_head.tolist()):
                place = f"{where} head {head}"
                missing.add(rows, name, value, "relative", ZEROS, protocol=place)


def _add_theory(rows: Rows, recipe: Recipe, full: Reading) -> None:
    pool = full.pool
    for layer in range(pool.n_layers):
        for kind, x_BHTD, codec in zip(
            ("key", "value"),
            pool.decode_layer(layer),
            recipe.codecs(layer, pool.n_layers),
            strict=True,
        ):
            where = f"layer {layer}"
            expected = layers.gaussian_error(codec, pool.head_dim)
            rows.add(f"gaussian_error_{kind}", expected, "relative", protocol=where)
            for name, value in layers.diagnostics(x_BHTD).items():
                missing.add(rows, f"{name}_{kind}", value, "ratio", ZEROS, protocol=where)


def _add_damage(rows: Rows, cfg: DictConfig, full: tuple[Reading, ...]) -> None:
    recipe, exact = Recipe.from_config(cfg.recipe), load_recipe("full")
    for layer in range(full[0].pool.n_layers):
        found = []
        for reading in full:
            pool = layers.only_layer(reading.pool, recipe, exact, layer)
            rest = reading.document.rest_BT
            log_probs_TV = score_rest(reading.model, pool.inject(), rest)
            found.append(compare(reading.log_probs_TV, log_probs_TV, rest))
        samples = [comparison.kl for comparison in found]
        missing.add(
            rows,
            "layer_kl_mean",
            float(sum(s.mean() for s in samples) / len(samples)),
            "nats",
            why_not_finite(found),
            ci=document_interval(samples, (0, math.inf)),
            n=sum(map(len, samples)),
            protocol=f"layer {layer}",
            note=f"this layer alone is compressed; {interval_name(samples)}",
        )
