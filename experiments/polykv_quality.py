"""PolyKV's quality table: what does a compressed pool cost (perplexity +0.57 %, BERTScore 0.928)? And what it left out.

Answers the published rows `quality`. Beside each delta stand its paired interval, the KL divergence to the
uncompressed run, same-top-1, the BERTScore floor, and exact match where the right answers are known.
"""

from typing import Any

from omegaconf import DictConfig

from experiments import common
from experiments.common import check_quality, document_rows
from polykv.errors import PolyKVError
from polykv.evaluation import answers, bertscore, readings
from polykv.evaluation.answers import contains
from polykv.evaluation.statistics import wilson
from polykv.progress import phase
from polykv.recipe import load_recipe
from polykv.reference.documents import matches
from polykv.results import Rows

MADE_BY = (*common.SCORES, answers, bertscore)


def settle(cfg: DictConfig) -> DictConfig:
    """`scorer=auto` becomes the scorer that is there, so that the row and the cell's identity say it."""
    settled = common.settle(cfg)
    settled.scorer.name = bertscore.resolve(cfg.scorer.name)
    return settled


def check(cfg: DictConfig) -> None:
    """Refuse bad input, random weights above all.

    Raises:
        PolyKVError: one clear line.
    """
    if not isinstance(cfg.answers, int) or cfg.answers < 0:
        raise PolyKVError(
            f"answers={cfg.answers!r}; it takes the number of documents whose agents are asked, or 0"
        )
    check_quality(cfg)


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Quality rows of the cell."""
    rows = document_rows(cfg)
    readings.add_rows(rows, common.readings(cfg))
    add_answers(rows, cfg)
    return rows


def add_answers(rows: Rows, cfg: DictConfig) -> None:
    """BERTScore against the uncompressed cache's answers, right answers, and the answers themselves."""
    if not cfg.answers:
        return
    said = common.answers(cfg, cfg.answers)
    references = common.answers(cfg, cfg.answers, load_recipe("full"))
    asked = common.documents_of(cfg)[: cfg.answers]
    questions = [document.questions[: cfg.n_agents] for document in asked]
    about = document_rows(cfg, bos=asked[0].asked_bos, dtype=common.answer_dtype(cfg))
    phase("BERTScore")
    bertscore.add_rows(about, said, references, cfg.scorer.name)
    _add_right(about, cfg, questions, said)
    rows += about
    for index, parts in enumerate(zip(questions, references, said, strict=True)):
        for agent, (question, reference, answer) in enumerate(zip(*parts, strict=True)):
            asked_of = {"document": index, "agent": agent, "question": question.text}
            told = {"gold": question.answer, "reference": reference, "answer": answer}
            rows.answers.append(asked_of | told)


def _add_right(
    rows: Rows, cfg: DictConfig, questions: list[tuple], answers: list[list[str]]
) -> None:
    pairs = [
        (answer, question.answer)
        for asked, given in zip(questions, answers, strict=True)
        for answer, question in zip(given, asked, strict=True)
        if question.answer is not None
    ]
    for metric, is_right in (("exact_match", matches), ("contains", contains)):
        if not pairs:
            note = f"document={cfg.document.name} has no exact answers"
            rows.add(metric, None, "rate", note=note)
            continue
        right, n = sum(is_right(*pair) for pair in pairs), len(pairs)
        rows.add(metric, right / n, "rate", ci=wilson(right, n), n=n, protocol="greedy")
