"""PolyKV's compression ratio (abstract: 2.91x): is it reached, nominally and as stored?

Answers the published rows `ratio`. Bytes do not depend on what a cache says, so the cache is synthetic, of the
model's exact geometry; the ratio is taken from the tensors that the pool keeps.
"""

from functools import lru_cache
from typing import Any

from experiments.common import check_common, new_rows, settle
from omegaconf import DictConfig

from experiments import common
from polykv.documents import prefix_tokens
from polykv.errors import PolyKVError
from polykv.evaluation.memory import synthetic_pool
from polykv.geometry import Geometry
from polykv.models import load_config, pick_dtype
from polykv.pool import SharedKVPool
from polykv.recipe import Recipe
from polykv.results import Rows

__all__ = ["MADE_BY", "check", "run", "settle"]

MADE_BY = ()  # tensors are counted


def check(cfg: DictConfig) -> None:
    """Refuse bad input. Needs neither weights nor a document, but a length."""
    check_common(cfg)
    if cfg.context is None:
        raise PolyKVError(
            "context=null is the length of a text, and none is read here; set context=512"
        )


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Nominal and stored ratio of the cell's recipe on its geometry."""
    rows = new_rows(cfg)
    add_rows(rows, pool_of(cfg), "synthetic cache")
    return rows


def pool_of(cfg: DictConfig) -> SharedKVPool:
    """A synthetic pool of the cell's geometry, dtype, prefix length and recipe."""
    n_tokens = prefix_tokens(cfg.context, cfg.prefix_fraction)
    return _pool(common.as_key(cfg.model), common.as_key(cfg.recipe), n_tokens, cfg.backend)


@lru_cache(maxsize=1)  # cells that differ in n_agents share it
def _pool(model: str, recipe: str, n_tokens: int, backend: str) -> SharedKVPool:
    model_cfg = common.from_key(model)
    return synthetic_pool(
        Geometry.of(load_config(model_cfg)),
        n_tokens,
        pick_dtype(model_cfg.dtype),
        Recipe.from_config(common.from_key(recipe)),
        backend,
    )


def add_rows(rows: Rows, pool: SharedKVPool, note: str | None = None) -> None:
    """fp16 bits over payload bits, and fp16 bytes over the bytes of all tensors kept."""
    head_dim = pool.head_dim
    about = f"head_dim {head_dim}" + (f"; {note}" if note else "")
    for protocol in ("nominal", "stored"):
        ratio = getattr(pool, f"{protocol}_ratio")
        rows.add("compression_ratio", ratio, "x", protocol=protocol, note=about)
