"""PolyKV's memory table: what do 15 agents need (19.8 GB -> 0.45 GB), in every accounting?

Answers the published rows `memory`. `paper` repeats the publication's arithmetic, `stored` sums the tensors
kept by a pool that is really built, `resident` is measured while all agents decode. Cells with recipe=full are
the unshared baseline: every agent holds a full cache of its own (reader `private`).
"""

from typing import Any

from experiments.common import new_rows, settle
from experiments.polykv_ratio import add_rows as add_ratio_rows
from experiments.polykv_ratio import check, pool_of
from omegaconf import DictConfig

from polykv.errors import PolyKVError
from polykv.evaluation import concurrency, memory
from polykv.evaluation.memory import GB, paper_bytes, resident_bytes
from polykv.geometry import Geometry
from polykv.models import load_config
from polykv.pool import SharedKVPool
from polykv.progress import phase
from polykv.recipe import Recipe
from polykv.results import Rows

__all__ = ["MADE_BY", "check", "run", "settle"]

MADE_BY = (memory, concurrency)


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Ratios and kv_memory rows of the cell."""
    rows = new_rows(cfg)
    pool = pool_of(cfg)
    add_ratio_rows(rows, pool, "synthetic cache")
    add_rows(rows, cfg, pool)
    return rows


def add_rows(rows: Rows, cfg: DictConfig, pool: SharedKVPool) -> None:
    """kv_memory in GB (1e9 bytes) under `paper`, `stored` and `resident`."""
    shared = not Recipe.from_config(cfg.recipe).is_full
    reader = cfg.reader if shared else "private"
    config = load_config(cfg.model)
    geometry = Geometry.of(config)

    def add(protocol: str, n_bytes: float | None, note: str | None = None) -> None:
        value = None if n_bytes is None else n_bytes / GB
        rows.add("kv_memory", value, "GB", protocol=protocol, reader=reader, note=note)

    ratio = pool.nominal_ratio if shared else None
    formula = f"computed: {pool.n_tokens} tokens x {4 * geometry.values_per_token} B (fp32) " + (
        f"/ {ratio:.3f}" if shared else f"x {cfg.n_agents} agents"
    )
    add("paper", paper_bytes(geometry, pool.n_tokens, cfg.n_agents, ratio), formula)
    copies = 1 if shared else cfg.n_agents
    kept = "sum of the pool's tensors" if shared else f"{copies} x the tensors of one full cache"
    add("stored", pool.stored_bytes * copies, kept)
    crowd = (pool.n_tokens, cfg.n_agents, cfg.device, cfg.backend)
    phase("measuring resident memory")
    try:
        add("resident", resident_bytes(cfg.model, cfg.recipe, reader, *crowd))
    except PolyKVError as error:
        add("resident", None, str(error))
