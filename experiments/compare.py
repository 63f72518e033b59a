"""Recipes side by side on one model and one text: stored bits, perplexity delta, KL divergence, memory, answers.

Memory while all agents decode is measured with `resident`, answers are asked with `answers`. `protocol` says how a
document is read: `paper` (an exact prefill, compressed once), or `online` (every token quantized as it is written, in
chunks of `chunk` tokens: polykv/evaluation/online.py). Two settings are used by presets in conf/experiment: `together`
scores all agents in one batch, and `outside` reads a cache that transformers itself quantizes instead of a recipe's.
"""

from collections.abc import Sequence
from dataclasses import fields

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from experiments import rows as write
from experiments import settings
from experiments.session import Session
from experiments.study import Study
from polykv import loading
from polykv.config import did_you_mean
from polykv.errors import PolyKVError
from polykv.evaluation import (
    answers,
    bertscore,
    concurrency,
    continuation,
    memory,
    online,
    outside,
    process,
)
from polykv.evaluation.continuation import Comparison, score_rest
from polykv.models import load_config
from polykv.progress import track
from polykv.recipe import Recipe
from polykv.results import Rows

# key_bits, value_bits: of recipes composed by the preset kv_asymmetry.
COLUMNS = {**write.BYTES, **write.SCORES, **write.ANSWERS,
           "protocol": str, "key_bits": int, "value_bits": int}  # fmt: skip
PROTOCOLS = ("paper", "online")
ONLINE = ("protocol", "chunk")  # settings of protocol `online`


def settle(cfg: DictConfig) -> DictConfig:
    """The settled config: `scorer=auto` is an available scorer, `outside` the options of that reference.

    Cells of protocol `paper` have no `protocol` and `chunk`, which came later: their identity is what it was.
    """
    settled = seeded(cfg)
    protocol = cfg.get("protocol", PROTOCOLS[0])
    if protocol not in PROTOCOLS:
        guess = did_you_mean(protocol, PROTOCOLS)
        raise PolyKVError(f"no protocol named {protocol!r}{guess}")
    if protocol == PROTOCOLS[0]:
        for name in ONLINE:
            settled.pop(name, None)
    settled.scorer.name = bertscore.resolve(cfg.scorer.name)
    settled.together = bool(cfg.get("together"))
    if cfg.get("outside"):
        references = settled.pop("references")
        if cfg.outside not in references:
            guess = did_you_mean(cfg.outside, list(references))
            raise PolyKVError(f"no outside reference named {cfg.outside!r}{guess}")
        settled.outside = references[cfg.outside]
    return settled


def seeded(cfg: DictConfig) -> DictConfig:
    """The settled config, with the seed of the random rotations in every codec."""
    settled = settings.settle(cfg)
    Recipe.from_config(settled.recipe)  # raises for a recipe without codecs
    for part in ("key", "value", "suffix"):
        if codec := settled.recipe.get(part):
            _seed(codec, settled.seed)
    return settled


def _seed(codec: DictConfig, seed: int) -> None:
    """Set the seed of every codec that has one and is not given it."""
    for child in (child for child in codec.values() if OmegaConf.is_dict(child)):
        _seed(child, seed)
    if "seed" in {f.name for f in fields(get_class(codec._target_))} and "seed" not in codec:
        codec.seed = seed


def check(cfg: DictConfig, session: Session) -> None:
    """Check the settings and the documents."""
    if cfg.resident:  # the process that measures memory starts in the meantime
        process.start_early(memory.__name__)
    settings.check_whole(cfg, "answers", least=0, instead=": the documents whose agents are asked")
    settings.check_quality(cfg, session)
    if cfg.together:
        settings.check_padded(cfg)
    if cfg.get("outside"):
        _check_scores_alone(cfg, "outside references")
        outside.new_cache(load_config(cfg.model), settings.plain(cfg.outside))
    if "protocol" in cfg:
        if cfg.get("outside"):
            raise PolyKVError(
                f"protocol={cfg.protocol} is not available for outside references; use protocol=paper"
            )
        settings.check_whole(cfg, "chunk")
        settings.check_keeps_all(cfg, f"protocol={cfg.protocol}")
        _check_scores_alone(cfg, f"protocol={cfg.protocol}")
        if cfg.backend != "torch":
            raise PolyKVError(
                f"protocol={cfg.protocol} encodes with torch, not backend={cfg.backend}; leave backend out"
            )


def _check_scores_alone(cfg: DictConfig, of: str) -> None:
    """Check that a cache that is not a pool is only scored, by a single reader of its own; raises PolyKVError."""
    settings.check_dequantizes(cfg)
    settings.check_full_attention(cfg, of)
    for name in ("answers", "resident", "together"):
        if cfg.get(name):
            instead = 0 if name == "answers" else "false"
            raise PolyKVError(f"{name}={cfg[name]} is not available for {of}; use {name}={instead}")


def run(cfg: DictConfig, session: Session) -> Rows:
    """Ratios, memory, scores and answers of the cell's recipe."""
    about = {name: cfg[name] for name in ("key_bits", "value_bits") if name in cfg}
    about |= {"quantization": loading.quantized(cfg.model)}
    about |= {"protocol": cfg.get("protocol", PROTOCOLS[0])}
    rows = write.new_rows(cfg, session, COLUMNS, **about)
    if cfg.get("outside"):
        texts = [full.document.digest for full in session.full_readings(cfg)]
        write.add_scores(rows, _outside(rows, cfg, session), texts)
        return rows
    if "protocol" in cfg:
        texts = [document.digest for document, _ in session.full_online(cfg)]
        write.add_scores(rows, _online(rows, cfg, session), texts)
        return rows
    readings = session.readings(cfg)
    write.add_ratio(rows, readings[0].pool)
    write.add_memory(rows, cfg, readings[0].pool)
    write.add_readings(rows, readings, _together(rows, cfg, session) if cfg.together else None)
    write.add_answers(rows, cfg, session)
    return rows


def _together(rows: Rows, cfg: DictConfig, session: Session) -> Sequence[Comparison]:
    """Comparisons of the last of `n_agents` agents that score a document in one batch, each padded differently.

    `agent_spread` is the largest difference of any agent's log-probability to that of a reader on its own: it would
    show a sum, a mask or a position that depends on the batch.
    """
    comparisons = []
    pairs = zip(session.readings(cfg), session.full_readings(cfg), strict=True)
    for sample, (reading, full) in enumerate(track(list(pairs), "scoring in one batch")):
        alone_TV, together_NTV = reading.log_probs_TV, reading.score_together(cfg.n_agents)
        apart_NTV = (together_NTV - alone_TV).abs()
        # Masked vocabulary is -inf for all.
        apart = float(apart_NTV.masked_fill_(together_NTV == alone_TV, 0).max())
        rest_BT = reading.document.rest_BT
        comparisons.append(continuation.compare(full.log_probs_TV, together_NTV[-1], rest_BT))
        why = continuation.why_not_finite(comparisons[-1:])
        about = {"sample": sample, "text": reading.document.digest}
        rows.add("agent_spread", apart, "nats", why=why, **about)
    return comparisons


def _outside(rows: Rows, cfg: DictConfig, session: Session) -> Sequence[Comparison]:
    """Comparisons of documents read from transformers' own QuantizedCache; adds the ratio that it stores."""
    options, comparisons = settings.plain(cfg.outside), []
    for full in track(session.full_readings(cfg), "scoring"):
        cache, rest_BT = outside.quantized(full.model, full.pool, options), full.document.rest_BT
        if not comparisons:
            stored = 2 * full.pool.n_values / outside.stored_bytes(cache)
            ratios = {"nominal": 16 / options.get("nbits", 8), "stored": stored}
            for accounting, ratio in ratios.items():
                rows.add("compression_ratio", ratio, "x", accounting=accounting)
        log_probs_TV = score_rest(full.model, cache, rest_BT)
        comparisons.append(continuation.compare(full.log_probs_TV, log_probs_TV, rest_BT))
    return comparisons


def _online(rows: Rows, cfg: DictConfig, session: Session) -> Sequence[Comparison]:
    """Comparisons of documents written and read online; adds the stored ratio of the first document's whole cache."""
    (model, _), recipe, comparisons = session.model(cfg), Recipe.from_config(cfg.recipe), []
    for document, full_TV in track(session.full_online(cfg), f"scoring {recipe.name}"):
        log_probs_TV, pool = online.score(model, document, recipe, cfg.chunk)
        if not comparisons:
            write.add_ratio(rows, pool)
        comparisons.append(continuation.compare(full_TV, log_probs_TV, document.rest_BT))
    return comparisons


STUDY = Study(
    name="compare",
    title="Recipes side by side",
    question="What does each recipe keep, and what does it cost on this model and this text?",
    run=run,
    check=check,
    settle=settle,
    made_by=(*settings.SCORES, answers, bertscore, memory, concurrency),
    settings=(*settings.POOL, "n_agents", "max_new_tokens", "answers", "scorer", "resident", "together",
              "outside"),
    options=dict.fromkeys(ONLINE, online),
    columns=COLUMNS,
    answers=("ratio", "memory", "quality"),
)  # fmt: skip
