"""Which recipe is best at the same stored bits? Divergence and perplexity of every known recipe.

Answers no published row. Beside the pooled statistics each document's own mean is kept, so that recipes are
compared pair by pair on the same documents (analysis/frontier_tables.py).
"""

from dataclasses import fields
from typing import Any

from experiments.common import check_quality, document_rows
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from experiments import common
from polykv.evaluation import readings
from polykv.recipe import Recipe
from polykv.results import Rows

MADE_BY = common.SCORES


def settle(cfg: DictConfig) -> DictConfig:
    """The seed also draws the rotations."""
    settled = common.settle(cfg)
    Recipe.from_config(settled.recipe)  # refuses in its own words what could not be seeded
    for part in (settled.recipe.key, settled.recipe.value):
        _seed(part, settled.seed)
    return settled


def _seed(codec: DictConfig, seed: int) -> None:
    """Write the seed into every codec that takes one and does not say its own."""
    for child in (child for child in codec.values() if OmegaConf.is_dict(child)):
        _seed(child, seed)
    if "seed" in {f.name for f in fields(get_class(codec._target_))} and "seed" not in codec:
        codec.seed = seed


def check(cfg: DictConfig) -> None:
    """Refuse bad input, random weights above all."""
    check_quality(cfg)


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Stored bits and quality of the cell's recipe."""
    rows = document_rows(cfg)
    add_rows(rows, common.readings(cfg))
    return rows


def add_rows(rows: Rows, read: tuple[readings.Reading, ...]) -> None:
    """Bits per value in all accountings, then quality pooled and by document."""
    pool = read[0].pool
    rows.add("bits", 16 / pool.nominal_ratio, "bits per value", protocol="nominal")
    rows.add("bits", 16 / pool.stored_ratio, "bits per value", protocol="stored")
    readings.add_rows(rows, read)
