"""PolyKV's quality table: what does a compressed pool cost (perplexity +0.57 %, BERTScore 0.928)? And what it left out.

Answers the published rows `quality`. Beside each delta stand its paired interval, the KL divergence to the
uncompressed run, same-top-1, the BERTScore floor, and exact match where the right answers are known.
"""

from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from experiments import common
from experiments.common import check_quality, new_rows
from polykv.evaluation import bertscore, continuation
from polykv.evaluation.answers import contains
from polykv.evaluation.readings import Reading
from polykv.evaluation.statistics import wilson
from polykv.reference.documents import matches
from polykv.results import Rows


def settle(cfg: DictConfig) -> DictConfig:
    """`scorer=auto` becomes the scorer that is there, so that the row and the cell's identity say it."""
    settled = common.settle(cfg)
    settled.scorer.name = bertscore.resolve(cfg.scorer.name)
    return settled


def check(cfg: DictConfig) -> None:
    """Refuse bad input, random weights above all."""
    check_quality(cfg)


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Quality rows of the cell."""
    full, readings = common.full_readings(cfg), common.readings(cfg)
    rows = new_rows(cfg, reader=cfg.reader, context_tokens=full[0].document.n_tokens)
    add_rows(rows, cfg, full, readings)
    return rows.rows


def add_rows(
    rows: Rows, cfg: DictConfig, full: tuple[Reading, ...], readings: tuple[Reading, ...]
) -> None:
    """Perplexity, KL, BERTScore and right answers of `readings` against the uncompressed `full`."""
    pairs = list(zip(readings, full, strict=True))
    comparisons = [reading.compare_to(baseline) for reading, baseline in pairs]
    continuation.add_rows(rows, comparisons)

    answers, references = [], []
    for reading, baseline in tqdm(pairs, desc="answers", leave=False, disable=None):
        answers.append(reading.answers(cfg.n_agents))
        references.append(baseline.answers(cfg.n_agents))
    bertscore.add_rows(rows, answers, references, cfg.scorer.name)
    _add_right(rows, cfg, readings, answers)


def _add_right(
    rows: Rows, cfg: DictConfig, readings: tuple[Reading, ...], answers: list[list[str]]
) -> None:
    pairs = [
        (answer, question.answer)
        for reading, given in zip(readings, answers, strict=True)
        for answer, question in zip(given, reading.document.questions, strict=False)
        if question.answer is not None
    ]
    for metric, is_right in (("exact_match", matches), ("contains", contains)):
        if not pairs:
            note = f"document={cfg.document.name} has no exact answers"
            rows.add(metric, None, "rate", note=note)
            continue
        right, n = sum(is_right(*pair) for pair in pairs), len(pairs)
        rows.add(metric, right / n, "rate", ci=wilson(right, n), n=n, protocol="greedy")
