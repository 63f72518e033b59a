"""What does each of these recipes keep, and what does it cost, on this model and this text?

The question that users have, in one table: stored bits, perplexity delta and KL divergence with intervals over
documents, memory while all agents decode and, on request (`answers`), what the agents say. Answers the published rows
`ratio`, `memory` and `quality`.
"""

from typing import Any

from omegaconf import DictConfig

from experiments import common, polykv_memory, polykv_quality, polykv_ratio
from experiments.polykv_quality import settle
from polykv.evaluation import concurrency, memory, process, readings

__all__ = ["MADE_BY", "check", "run", "settle"]

MADE_BY = (*polykv_quality.MADE_BY, memory, concurrency)


def check(cfg: DictConfig) -> None:
    """Refuse bad input, random weights above all; what measures memory starts meanwhile."""
    process.start_early(memory.__name__)
    polykv_quality.check(cfg)


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """All rows of the cell, from the model's real cache."""
    read = common.readings(cfg)
    pool, rows = read[0].pool, common.document_rows(cfg)
    polykv_ratio.add_rows(rows, pool)
    polykv_memory.add_rows(rows, cfg, pool)
    readings.add_rows(rows, read)
    polykv_quality.add_answers(rows, cfg)
    return rows
