"""Rows that several studies write: bytes of a pool, scores of documents, answers of agents."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from omegaconf import DictConfig

from experiments import settings
from experiments.session import Session
from experiments.settings import answer_dtype
from polykv.errors import PolyKVError
from polykv.evaluation import bertscore, continuation
from polykv.evaluation.answers import contains
from polykv.evaluation.continuation import Comparison
from polykv.evaluation.memory import GB, paper_bytes, resident_bytes
from polykv.evaluation.readings import Reading
from polykv.evaluation.statistics import MIN_DOCUMENTS, blocks
from polykv.geometry import Geometry
from polykv.models import ModelSource, load_config
from polykv.pool import SharedKVPool
from polykv.progress import phase, track
from polykv.recipe import Recipe, load_recipe
from polykv.reference.documents import matches
from polykv.results import Rows

# accounting: nominal, stored, paper or resident. synthetic: the cache is random and of the model's geometry.
BYTES = {"accounting": str, "head_dim": int, "n_tokens": int, "synthetic": bool}
# text: the digest of the document that a sample is (documents of several seeds may be of one text); statistic: of all
# tokens, where a row is no mean of a document; block: a run of tokens within the document; quantization: the format of
# the model's weights, where they are quantized.
SCORES = {"text": str, "statistic": str, "block": int, "quantization": str}
ANSWERS = {"text": str, "agent": int, "scorer": str}
# Metrics whose intervals rest on blocks of tokens where there are few documents: those that compare two runs.
BLOCKED = [metric for metric in continuation.UNITS if metric not in ("nll_full", "nll")]
FLOORS = ("nll_delta", "kl")  # metrics of a reader's floor
# Whether an answer, or what it is compared with, is empty.
EMPTY = ("empty_answer", "empty_reference")
BOTH_EMPTY = "both answers are empty, so nothing can be compared"
RIGHT = {"exact_match": matches, "contains": contains}


def new_rows(cfg: DictConfig, session: Session, columns: Mapping[str, type], **about: Any) -> Rows:
    """Rows about the cell's documents as they were tokenised, read by the cell's reader."""
    document = session.documents(cfg)[0]
    shared = {"context_tokens": document.n_tokens, "bos": document.bos, "reader": cfg.reader}
    return settings.new_rows(cfg, columns, **(shared | about))


def add_ratio(rows: Rows, pool: SharedKVPool, synthetic: bool = False) -> None:
    """compression_ratio: fp16 bits over payload bits (nominal), and fp16 bytes over all bytes kept (stored).

    full_layers_ratio: the same of the layers of full attention alone, where others have sliding windows or states.
    """
    about = {"head_dim": pool.head_dim, "n_tokens": pool.n_tokens, "synthetic": synthetic}
    ratios = {"nominal": pool.nominal_ratio, "stored": pool.stored_ratio}
    for accounting, ratio in ratios.items():
        rows.add("compression_ratio", ratio, "x", accounting=accounting, **about)
    for accounting, ratio in zip(ratios, pool.full_layers_ratios or (), strict=False):
        rows.add("full_layers_ratio", ratio, "x", accounting=accounting, **about)


def add_memory(rows: Rows, cfg: DictConfig, pool: SharedKVPool, synthetic: bool = False) -> None:
    """kv_memory in GB (1e9 bytes): as the paper counts it, as stored, and resident where `cfg.resident` asks for it."""
    shared = not Recipe.from_config(cfg.recipe).is_full
    reader = cfg.reader if shared else "unshared"
    geometry = Geometry.of(load_config(cfg.model))
    ratio = pool.nominal_ratio if shared else None
    about = {"reader": reader, "n_tokens": pool.n_tokens, "synthetic": synthetic}
    found = {
        "paper": paper_bytes(geometry, pool.n_tokens, cfg.n_agents, ratio),
        "stored": pool.stored_bytes * (1 if shared else cfg.n_agents),
    }
    for accounting, n_bytes in found.items():
        rows.add("kv_memory", n_bytes / GB, "GB", accounting=accounting, **about)
    if not cfg.resident:
        return
    sizes = (pool.n_tokens, cfg.n_agents, cfg.device, cfg.backend)
    phase("measuring resident memory")
    peak, why = None, ""
    try:
        source, recipe = ModelSource.of(cfg.model), Recipe.from_config(cfg.recipe)
        peak = resident_bytes(source, recipe, reader, *sizes) / GB
    except PolyKVError as error:
        why = str(error)
    rows.add("kv_memory", peak, "GB", why=why, accounting="resident", **about)


def add_readings(
    rows: Rows, readings: Sequence[Reading], comparisons: Sequence[Comparison] | None = None
) -> None:
    """Scores of a recipe's readings against the uncompressed cache read alike, and the reader's floor.

    `comparisons`: the scores, if not those of `readings` themselves.
    """
    texts = [one.document.digest for one in readings]
    if comparisons is None:
        comparisons = [one.comparison for one in track(readings, "scoring")]
    add_scores(rows, comparisons, texts)
    if readings[0].reader != "dequantize":
        add_reader_floor(rows, [one.reader_floor for one in readings], texts)


def add_reader_floor(
    rows: Rows, floors: Sequence[Comparison], texts: Sequence[str], **about: Any
) -> None:
    """What a reader costs without a recipe: the uncompressed cache read by it, against an unshared copy."""
    add_scores(rows, floors, texts, FLOORS, "reader_floor_", **about)


def add_scores(
    rows: Rows,
    comparisons: Sequence[Comparison],
    texts: Sequence[str],
    metrics: Sequence[str] = tuple(continuation.UNITS),
    prefix: str = "",
    **about: Any,
) -> None:
    """Means over the scored tokens of each document, and statistics of all tokens together.

    With fewer than MIN_DOCUMENTS documents also the means of blocks of tokens, from which intervals are then computed.

    Args:
        texts: the documents' digests.
        metrics: keys of continuation.UNITS.
        prefix: what the metrics' names begin with; with one, statistics of all tokens are left out.
        about: further columns.

    Raises:
        PolyKVError: no token was scored.
    """
    if not sum(len(c.kl) for c in comparisons):
        raise PolyKVError("no token was scored, so nothing can be compared; give more text")
    few = sum(len(c.kl) > 0 for c in comparisons) < MIN_DOCUMENTS
    for sample, (comparison, text) in enumerate(zip(comparisons, texts, strict=True)):
        if not len(comparison.kl):
            continue
        why = continuation.why_not_finite([comparison])
        for metric, tokens in comparison.per_token().items():
            if metric not in metrics:
                continue
            place = {"sample": sample, "text": text, "unit": continuation.UNITS[metric], **about}
            _add_mean(rows, prefix + metric, tokens, why, **place)
            if few and metric in BLOCKED and np.isfinite(tokens).all():
                for block, run in enumerate(blocks(tokens)):
                    _add_mean(rows, prefix + metric, run, why, block=block, **place)
    if prefix:
        return
    why, n = continuation.why_not_finite(comparisons), sum(len(c.kl) for c in comparisons)
    for (metric, statistic), value in continuation.pooled_statistics(comparisons).items():
        if metric in metrics:
            unit = continuation.UNITS[metric]
            rows.add(metric, value, unit, why=why, statistic=statistic, n=n, **about)


def _add_mean(rows: Rows, metric: str, tokens: np.ndarray, why: str, **about: Any) -> None:
    with np.errstate(invalid="ignore"):
        mean = float(tokens.mean())
    rows.add(metric, mean, why=why, n=len(tokens), **about)


def add_answers(rows: Rows, cfg: DictConfig, session: Session) -> None:
    """A row for each answer: BERTScore F1 against the uncompressed cache's answer, its floor, and whether it is right.

    `cfg.n_agents` questions about each of `cfg.answers` documents. The texts go into `rows.answers`.
    """
    if not cfg.answers:
        return
    said = session.answers(cfg, cfg.answers)
    references = session.answers(cfg, cfg.answers, load_recipe("full"))
    documents = session.documents(cfg)[: cfg.answers]
    questions = [document.questions[: cfg.n_agents] for document in documents]
    about = {
        "context_tokens": documents[0].n_tokens,
        "bos": documents[0].asked_bos,
        "dtype": answer_dtype(cfg),
    }
    phase("BERTScore")
    texts = [document.digest for document in documents]
    _add_bertscore(rows, said, references, texts, cfg.scorer.name, about)
    for sample, parts in enumerate(zip(questions, references, said, strict=True)):
        for agent, (question, reference, answer) in enumerate(zip(*parts, strict=True)):
            asked_of = {"document": sample, "agent": agent, "question": question.text}
            told = {"gold": question.answer, "reference": reference, "answer": answer}
            rows.answers.append(asked_of | told)
            if question.answer is not None:
                place = {"sample": sample, "text": texts[sample], "agent": agent, **about}
                for metric, is_right in RIGHT.items():
                    rows.add(metric, float(is_right(answer, question.answer)), "rate", n=1, **place)
    if all(answer["gold"] is None for answer in rows.answers):
        for metric in RIGHT:
            why = f"document={cfg.document.name} has no exact answers"
            rows.add(metric, None, "rate", why=why, **about)


def _add_bertscore(
    rows: Rows,
    answers: list[list[str]],
    references: list[list[str]],
    texts: list[str],
    scorer: str,
    about: dict[str, int | str],
) -> None:
    of_all = {"scorer": scorer, **about}
    for sample, pair in enumerate(zip(answers, references, strict=True)):
        empty = [np.array([bertscore.is_empty(text, scorer) for text in side]) for side in pair]
        for agent, score in enumerate(bertscore.f1(*pair, scorer)):
            place = {"sample": sample, "text": texts[sample], "agent": agent, **of_all}
            rows.add("bertscore_f1", float(score), "f1", why=BOTH_EMPTY, n=1, **place)
            for metric, side in zip(EMPTY, empty, strict=True):
                rows.add(metric, float(side[agent]), "rate", n=1, **place)
    pairs = bertscore.floor_pairs(answers, references)
    if not pairs:
        why = "no two reference answers differ, so no pair is mismatched; use more agents"
        rows.add("bertscore_floor", None, "f1", why=why, **of_all)
        return
    samples, agents, mine, others = zip(*pairs, strict=True)
    for sample, agent, score in zip(
        samples, agents, bertscore.f1(list(mine), list(others), scorer), strict=True
    ):
        place = {"sample": sample, "text": texts[sample], "agent": agent, **of_all}
        rows.add("bertscore_floor", float(score), "f1", why=BOTH_EMPTY, n=1, **place)
