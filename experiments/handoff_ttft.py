"""QKVShare's time to first token of a receiver that gets its context by card, and what the card costs in quality.

All routes of a context are timed in one cell, in turn, on the tokens of its first document; each repeat gives the
total time and its stages. Divergence and perplexity of the same cards' receivers are measured on all its documents, in
float32 (bfloat16 alone costs as much as a 4-bit recipe).
"""

from itertools import product
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from experiments import rows as write
from experiments import settings
from experiments.handoff_accuracy import check_budget, settle_key
from experiments.relays import CARDS, key_of
from experiments.session import Session
from experiments.study import Study
from polykv import config, loading
from polykv.documents import Document
from polykv.errors import PolyKVError
from polykv.evaluation import card_quality, continuation, ttft
from polykv.evaluation.process import KEPT
from polykv.evaluation.ttft import TRANSPORTS, Route, Timing, measure
from polykv.handoff.packing import check_makes_card
from polykv.handoff.policy import Policy
from polykv.models import load_config
from polykv.pool import check_reader
from polykv.progress import track
from polykv.results import Rows
from polykv.supported import check_length, check_rope, max_positions

# stage: one of ttft.STAGES, or TOTAL; transport: one of ttft.TRANSPORTS, or TEXT if the receiver prefills again.
COLUMNS = {"stage": str, "transport": str, **write.SCORES}
TOTAL, TEXT = "total", "text"
LEAST_REPEATS = 10
REPREFILL = Policy("reprefill", store=TEXT)
SCORED_IN = "float32"
COSTS = ("kl", "nll_delta")  # metrics of a card's receiver, of continuation.UNITS


def settle(cfg: DictConfig) -> DictConfig:
    """The settled config: policies, given by name, become their settings, which are then part of the identity."""
    settled = settle_key(settings.settle(cfg, fastest=True))
    settled.model = settings.answering(settled)  # times are measured in the dtype of answers
    settled.policies = {name: config.load_group("policy", name) for name in cfg.policies}
    return settled


def check(cfg: DictConfig, session: Session) -> None:
    """Check the settings; random weights are allowed, since times do not depend on them."""
    settings.check_common(cfg)
    routes_of(cfg)
    architecture = load_config(cfg.model)
    for policy in policies_of(cfg):
        check_makes_card(policy)
        policy.check_windows(architecture)
    settings.check_context(cfg, 1024)
    if not isinstance(cfg.turn_tokens, int) or not 0 < cfg.turn_tokens < cfg.context:
        raise PolyKVError(
            f"turn_tokens={cfg.turn_tokens!r}; it takes a whole number from 1 up, below context"
        )
    settings.check_whole(cfg, "repeats", least=LEAST_REPEATS)
    settings.check_whole(cfg, "scored_tokens")
    check_budget(cfg.budget_bits, policies_of(cfg))
    key_of(cfg)
    check_length(architecture, cfg.context, f"context={cfg.context}")
    n_known = cfg.context - cfg.turn_tokens
    check_rope(architecture, n_known, cfg.context, f"context={cfg.context}")
    settings.check_hub(cfg, "use weights=random, which times the same, or model=reference")
    if cfg.weights == "random":
        return
    settings.check_generated(cfg)
    documents_of(cfg, session)


def run(cfg: DictConfig, session: Session) -> Rows:
    """Times of every route, repeat and stage; stored bits and quality of each card."""
    random = cfg.weights == "random"
    about = {"recipe": None, "backend": None, "n_agents": 2}  # a sender and a receiver
    about |= {"document": None} if random else {"bos": documents_of(cfg, session)[0].bos}
    rows, routes = settings.new_rows(cfg, COLUMNS, **about), routes_of(cfg)
    ids_T = random_ids(cfg) if random else texts_of(cfg, session)[0][: cfg.context]
    setting = (cfg.turn_tokens, routes, cfg.budget_bits, cfg.repeats, key_of(cfg))
    timings = measure(*session.model(cfg), ids_T, *setting)
    for route, timing in zip(routes, timings, strict=True):
        add_times(rows, cfg, route, timing)
    bits = {
        (route.policy.name, route.reader): timing.mean_bits
        for route, timing in zip(routes, timings, strict=True)
    }
    add_quality(rows, cfg, session, bits)
    return rows


def add_times(rows: Rows, cfg: DictConfig, route: Route, timing: Timing) -> None:
    """A row for each repeat of the total and of each stage, in ms; `context_tokens` includes the receiver's turn."""
    about = {"transport": TEXT, "policy": route.policy.name, "note": KEPT}
    if route.policy.store != TEXT:
        about |= _of_card(cfg, route.policy, route.reader) | {"transport": route.transport}
    for stage, times in {TOTAL: timing.total, **timing.stages}.items():
        for sample, milliseconds in enumerate(times):
            rows.add("time", milliseconds, "ms", sample=sample, n=1, stage=stage, **about)


def _of_card(cfg: DictConfig, policy: Policy, reader: str) -> dict[str, Any]:
    bits = float(cfg.budget_bits) if policy.has_budget else None
    return {"policy": policy.name, "budget_bits": bits, "reader": reader, "backend": cfg.backend}


def add_quality(
    rows: Rows, cfg: DictConfig, session: Session, bits: dict[tuple[str, str], float | None]
) -> None:
    """For each policy and reader: stored bits of the timed card, its KL divergence and perplexity delta.

    Args:
        bits: (policy, reader) -> stored bits per cached value, all metadata counted.
    """
    scored, why = score(cfg, session)
    dtype = loading.dtype_label(scoring_model(cfg))
    texts = [document.digest for document in documents_of(cfg, session)] if scored else []
    for policy, reader in product(policies_of(cfg), cfg.readers):
        about = _of_card(cfg, policy, reader)
        rows.add("mean_bits", bits[policy.name, reader], "bits", **about)
        if why:
            for metric in COSTS:
                unit = continuation.UNITS[metric]
                rows.add(metric, None, unit, why=why, dtype=dtype, **about)
        else:
            found = [of_document[policy.name, reader] for of_document in scored]
            write.add_scores(rows, found, texts, COSTS, dtype=dtype, **about)
    for reader in cfg.readers if scored else ():
        if reader != "dequantize":
            floors = [of_document[None, reader] for of_document in scored]
            about = {"reader": reader, "backend": cfg.backend, "dtype": dtype}
            write.add_reader_floor(rows, floors, texts, **about)


def score(cfg: DictConfig, session: Session) -> tuple[list[card_quality.Scored], str]:
    """For each document, every policy and reader against the uncompressed cache; or why there are no scores."""
    if cfg.weights == "random":
        return [], "quality cannot be measured on random weights"
    n_scored = n_scored_of(cfg)
    if n_scored == 0:
        return [], f"a context of {cfg.context} tokens leaves the model no position to score"
    model, tokenizer = session.model(OmegaConf.merge(cfg, {"model": scoring_model(cfg)}))
    known = cfg.context - cfg.turn_tokens
    setting = (known, n_scored, policies_of(cfg), cfg.readers, cfg.budget_bits, cfg.backend)
    texts = track(texts_of(cfg, session), "scoring cards")
    return [card_quality.score_cards(model, tokenizer, ids_T, *setting) for ids_T in texts], ""


def scoring_model(cfg: DictConfig) -> DictConfig:
    """The model's settings in the dtype of scores."""
    return OmegaConf.merge(cfg.model, {"dtype": SCORED_IN})


def n_scored_of(cfg: DictConfig) -> int:
    """Number of tokens scored after the context: `scored_tokens`, or as many as the model has positions left."""
    limit = max_positions(load_config(cfg.model))
    return cfg.scored_tokens if limit is None else min(cfg.scored_tokens, limit - cfg.context)


def texts_of(cfg: DictConfig, session: Session) -> list[Tensor]:
    """Context and scored tokens of each document, (tokens,)."""
    return [document.ids_BT[0] for document in documents_of(cfg, session)]


def documents_of(cfg: DictConfig, session: Session) -> list[Document]:
    """The cell's documents, cut to context and scored tokens."""
    length = cfg.context + n_scored_of(cfg)
    return session.documents(OmegaConf.merge(cfg, {"context": length}))


def policies_of(cfg: DictConfig) -> list[Policy]:
    """The policies whose cards are timed."""
    return [Policy.from_config(policy) for policy in cfg.policies.values()]


def routes_of(cfg: DictConfig) -> list[Route]:
    """Re-prefill, then every combination of policy, transport and reader."""
    for name in ("policies", "transports", "readers"):
        if not cfg[name]:
            raise PolyKVError(f"{name}=[]; give at least one")
    for transport in cfg.transports:
        if transport not in TRANSPORTS:
            raise PolyKVError(f"no transport {transport!r}; there are: {', '.join(TRANSPORTS)}")
    for reader in cfg.readers:
        check_reader(reader)
    ways = product(policies_of(cfg), cfg.transports, cfg.readers)
    return [Route(REPREFILL), *(Route(*way, cfg.backend) for way in ways)]


def random_ids(cfg: DictConfig) -> Tensor:
    """Random token ids (tokens,), a context for random weights."""
    generator = torch.Generator().manual_seed(cfg.seed)
    size = load_config(cfg.model).get_text_config(decoder=True).vocab_size
    return torch.randint(size, (cfg.context,), generator=generator)


STUDY = Study(
    name="handoff_ttft",
    title="Time to first token",
    question="How much sooner does a receiver answer that gets its context by card, where does the time go, and what "
    "does it cost in quality?",
    run=run,
    check=check,
    settle=settle,
    also_read=("n_agents",),  # questions of a file that has its own
    made_by=(*settings.SCORES, *CARDS, ttft),
    settings=("model", "weights", "device", "document", "n_documents", "prefix_fraction", "context",
              "scored_tokens", "turn_tokens", "policies", "transports", "readers", "budget_bits",
              "repeats", "seed", "signed", "backend"),
    columns=COLUMNS,
    answers=("ttft", "stages"),
)  # fmt: skip
