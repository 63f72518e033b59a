"""The main job, `make run`: what do ratio, memory and quality look like side by side, per recipe, context and agents?

Answers the published rows `ratio`, `memory` and `quality`, all in one table.
"""

from typing import Any

from omegaconf import DictConfig

from experiments import common, polykv_memory, polykv_quality, polykv_ratio

settle = polykv_quality.settle


def check(cfg: DictConfig) -> None:
    """Refuse what any of the parts refuses."""
    polykv_ratio.check(cfg)
    polykv_quality.check(cfg)


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """All rows of the cell, from the model's real cache."""
    full, readings = common.full_readings(cfg), common.readings(cfg)
    rows = common.new_rows(cfg)
    pool = readings[0].pool
    polykv_ratio.add_rows(rows, pool)
    polykv_memory.add_rows(rows, cfg, pool)
    polykv_quality.add_rows(rows, cfg, full, readings)
    return rows.rows
