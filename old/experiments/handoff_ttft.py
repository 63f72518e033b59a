"""QKVShare's time to first token: how much sooner does a receiver speak that gets its context by card, and at what
cost in quality?

Answers the published rows `ttft`. All paths of a context are timed in one cell, in turn, on the tokens of its
first document. Beside the times stand the divergence and perplexity of the same cards' receivers on all its
documents, always in float32 (bfloat16 by itself costs as much as a recipe of 4 bits).
"""

from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
from experiments.handoff_accuracy import CARDS, check_budget, key_of, loaded, settle_key
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from experiments import common
from polykv import config, kernels, loading, models
from polykv.documents import Document
from polykv.errors import PolyKVError
from polykv.evaluation import card_quality, continuation, ttft
from polykv.evaluation.continuation import Comparison
from polykv.evaluation.process import KEPT
from polykv.evaluation.statistics import spread_warning
from polykv.evaluation.ttft import TRANSPORTS, Route, Timing, measure, quartiles
from polykv.handoff.policy import Policy
from polykv.models import load_config
from polykv.pool import check_reader
from polykv.progress import track
from polykv.results import Rows
from polykv.supported import check_length, check_rope, max_positions

__all__ = ["MADE_BY", "check", "run", "settle"]
MADE_BY = (*common.SCORES, *CARDS, ttft)
LEAST_REPEATS = 10
REPREFILL = Policy("reprefill", store="text")
# What times depend on.
TIMED = (
    "model", "weights", "device", "document", "n_documents", "n_agents", "prefix_fraction", "context",
    "scored_tokens", "turn_tokens", "policies", "transports", "readers", "budget_bits", "repeats", "seed", "card",
    "backend",
)  # fmt: skip
SCORED_IN = "float32"
Scored = dict[tuple[str | None, str], Comparison]  # as card_quality.score_cards gives it


def settle(cfg: DictConfig) -> DictConfig:
    """Policies are given by name, and become their settings: a YAML that says otherwise makes another cell.

    backend=auto is the fastest one here, whatever the reader: it writes the bits that torch writes.
    document=auto is the document that suits the model; random weights read none.

    Raises:
        PolyKVError: an unknown policy, or a backend that cannot be had.
    """
    settled = settle_key(common.settle(cfg))
    settled.model = common.answering(settled)  # times are those of answers
    settled.backend = kernels.pick_backend(cfg.backend, models.pick_device(settled.device))
    settled.policies = {name: config.load_group("policy", name) for name in cfg.policies}
    return settled


def check(cfg: DictConfig) -> None:
    """Refuse bad input; random weights are fine for times, which do not depend on them.

    Raises:
        PolyKVError: one clear line.
    """
    common.check_common(cfg)
    common.check_injects(cfg)
    routes_of(cfg)
    if cfg.context is None:
        raise PolyKVError(
            "context=null is the length of a text, and none is read here; set context=1024"
        )
    if not isinstance(cfg.turn_tokens, int) or not 0 < cfg.turn_tokens < cfg.context:
        raise PolyKVError(
            f"turn_tokens={cfg.turn_tokens!r}; it takes a whole number from 1 up, below context"
        )
    if not isinstance(cfg.repeats, int) or cfg.repeats < LEAST_REPEATS:
        raise PolyKVError(
            f"repeats={cfg.repeats!r}; it takes a whole number from {LEAST_REPEATS} up"
        )
    if not isinstance(cfg.scored_tokens, int) or cfg.scored_tokens < 1:
        raise PolyKVError(f"scored_tokens={cfg.scored_tokens!r}; it takes a whole number from 1 up")
    check_budget(cfg.budget_bits)
    key_of(cfg)
    architecture = load_config(cfg.model)
    check_length(architecture, cfg.context, f"context={cfg.context}")
    n_known = cfg.context - cfg.turn_tokens
    check_rope(architecture, n_known, cfg.context, f"context={cfg.context}")
    common.check_hub(cfg, "use weights=random, which times the same, or model=reference")
    if cfg.weights == "random":
        return
    if cfg.document.name == "generated" and cfg.weights != "reference":
        raise PolyKVError(
            f"document=generated is written for the reference model, not for {cfg.model.name}; "
            "use document=auto, wikitext2, packet_networks or file"
        )
    texts_of(cfg)


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Time to first token of every route, how many times faster than re-prefill it is, and what it costs."""
    rows, timings = new_rows(cfg), timed(cfg)
    text = next(timing for route, timing in timings if route.policy.store == "text")
    for (route, timing), described in zip(timings, columns(cfg, timings), strict=True):
        about = {"n": len(timing.total), **described}
        add_time(rows, "ttft", timing.total, "ms", "median", about)
        if route.policy.store != "text":
            # Each repeat timed both, one after the other.
            ratios = text.total / timing.total
            how = "re-prefill over card, median of pairs"
            add_time(rows, "ttft_speedup", ratios, "x", how, about)
    add_quality(rows, cfg, timings)
    return rows


def add_time(
    rows: Rows, metric: str, values: np.ndarray, unit: str, how: str, about: dict[str, Any]
) -> None:
    """The median over repeats with quartiles, and a warning where these are far apart."""
    low, mid, high = quartiles(values)
    note = "; ".join(filter(None, (how, "interval: quartiles", KEPT, spread_warning(low, high))))
    rows.add(metric, mid, unit, ci=(low, high), note=note, **about)


def add_quality(rows: Rows, cfg: DictConfig, timings: list[tuple[Route, Timing]]) -> None:
    """By policy and reader: the stored bits of the card that was timed, its KL divergence and perplexity delta."""
    bits = {(route.policy.name, route.reader): timing.mean_bits for route, timing in timings}
    scored, why = score(cfg)
    policies = [Policy.from_config(policy) for policy in cfg.policies.values()]
    for policy, reader in product(policies, cfg.readers):
        about = {"policy": policy.name, "reader": reader, "backend": cfg.backend}
        about["budget_bits"] = cfg.budget_bits if policy.has_budget else None
        note = "stored bits per cached value of the card that was timed, all metadata counted"
        rows.add("mean_bits", bits[policy.name, reader], "bits", note=note, **about)
        about["dtype"] = loading.dtype_label(scoring_model(cfg))
        if why:
            for metric, unit in card_quality.METRICS.items():
                rows.add(metric, None, unit, note=why, **about)
        else:
            found = [of_document[policy.name, reader] for of_document in scored]
            card_quality.add_rows(rows, found, **about)
    if scored:
        add_reader_floors(rows, cfg, scored)


def add_reader_floors(rows: Rows, cfg: DictConfig, scored: list[Scored]) -> None:
    """What each reader but `inject` costs without any card: its rows have no policy."""
    about = {"backend": cfg.backend, "dtype": loading.dtype_label(scoring_model(cfg))}
    for reader in (reader for reader in cfg.readers if reader != "inject"):
        floors = [of_document[None, reader] for of_document in scored]
        continuation.add_floor(rows, floors, reader, card_quality.PROTOCOL, **about)


def score(cfg: DictConfig) -> tuple[list[Scored], str]:
    """Of each document, every policy and reader against the uncompressed cache; or why there is none."""
    if cfg.weights == "random":
        return [], "quality cannot be measured on random weights"
    n_scored = n_scored_of(cfg)
    if n_scored == 0:
        return [], f"a context of {cfg.context} tokens leaves the model no position to score"
    model, tokenizer = common.model_of(OmegaConf.merge(cfg, {"model": scoring_model(cfg)}))
    policies = [Policy.from_config(policy) for policy in cfg.policies.values()]
    known = cfg.context - cfg.turn_tokens
    setting = (known, n_scored, policies, cfg.readers, cfg.budget_bits, cfg.backend)
    texts = track(texts_of(cfg), "scoring cards")
    return [card_quality.score_cards(model, tokenizer, ids_T, *setting) for ids_T in texts], ""


def scoring_model(cfg: DictConfig) -> DictConfig:
    """The model's settings in the dtype that quality is scored in."""
    return OmegaConf.merge(cfg.model, {"dtype": SCORED_IN})


def n_scored_of(cfg: DictConfig) -> int:
    """Tokens that are scored after the context: those asked for, or as many as the model has positions left."""
    limit = max_positions(load_config(cfg.model))
    return cfg.scored_tokens if limit is None else min(cfg.scored_tokens, limit - cfg.context)


def texts_of(cfg: DictConfig) -> list[Tensor]:
    """Of each document the context and the scored tokens after it, (tokens,) each.

    Raises:
        PolyKVError: too short a text, or one that cannot be had.
    """
    return [document.ids_BT[0] for document in documents_of(cfg)]


def documents_of(cfg: DictConfig) -> list[Document]:
    """The cell's documents, cut to the context and the scored tokens after it.

    Raises:
        PolyKVError: as `texts_of`.
    """
    length = cfg.context + n_scored_of(cfg)
    return common.documents_of(OmegaConf.merge(cfg, {"context": length}))


def routes_of(cfg: DictConfig) -> list[Route]:
    """Re-prefill, then every policy by every transport, read in every way.

    Raises:
        PolyKVError: unknown transport or reader, or a policy that is none.
    """
    for transport in cfg.transports:
        if transport not in TRANSPORTS:
            raise PolyKVError(f"no transport {transport!r}; there are: {', '.join(TRANSPORTS)}")
    for reader in cfg.readers:
        check_reader(reader)
    policies = [Policy.from_config(policy) for policy in cfg.policies.values()]
    ways = product(policies, cfg.transports, cfg.readers)
    return [Route(REPREFILL), *(Route(*way, cfg.backend) for way in ways)]


def timed(cfg: DictConfig) -> list[tuple[Route, Timing]]:
    """Every route and its times; the experiments that show them share one measurement."""
    return _timed(common.as_key({name: cfg[name] for name in TIMED}))


@lru_cache(maxsize=1)
def _timed(key: str) -> list[tuple[Route, Timing]]:
    cfg = common.from_key(key)
    model, tokenizer = loaded(cfg)
    routes = routes_of(cfg)
    ids_T = random_ids(cfg) if cfg.weights == "random" else texts_of(cfg)[0][: cfg.context]
    setting = (cfg.turn_tokens, routes, cfg.budget_bits, cfg.repeats, key_of(cfg))
    timings = measure(model, tokenizer, ids_T, *setting)
    return list(zip(routes, timings, strict=True))


def random_ids(cfg: DictConfig) -> Tensor:
    """A context (tokens,) for random weights, to which no text means anything."""
    generator = torch.Generator().manual_seed(cfg.seed)
    size = load_config(cfg.model).get_text_config(decoder=True).vocab_size
    return torch.randint(size, (cfg.context,), generator=generator)


def new_rows(cfg: DictConfig) -> Rows:
    """Rows of one receiver; `context_tokens` counts its own turn too."""
    return Rows(
        model=common.label(cfg, "model"),
        weights=models.weights_label(cfg.model),
        document=None if cfg.weights == "random" else common.label(cfg, "document"),
        bos=None if cfg.weights == "random" else documents_of(cfg)[0].bos,
        context_tokens=cfg.context,
        n_agents=2,
        n_hops=1,
        seed=cfg.seed,
        device=cfg.device,
        dtype=loading.dtype_label(cfg.model),
    )


def columns(cfg: DictConfig, timings: list[tuple[Route, Timing]]) -> list[dict[str, Any]]:
    """The policy, budget, reader and transport columns of each route."""
    found = []
    for route, _ in timings:
        policy = route.policy
        about = {"policy": policy.name, "protocol": "text"}
        about["budget_bits"] = cfg.budget_bits if policy.has_budget else None
        if policy.store != "text":
            how = ", in place" if route.reader == "cascade" else ""
            # Not the fastest one here: another route, which was asked for by name.
            if route.backend != kernels.pick_backend("auto", models.pick_device(cfg.device)):
                how += f", {route.backend}"
            about |= {"protocol": route.transport + how, "reader": route.reader}
            about["backend"] = route.backend
        found.append(about)
    return found
