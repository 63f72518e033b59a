"""PolyKV's ratio (2.91x) and memory (15 agents: 19.8 GB to 0.45 GB) in every accounting.

Bytes do not depend on a cache's values, so the pool is synthetic, of the model's exact geometry. `paper` repeats the
publication's arithmetic, `stored` sums the tensors that a pool keeps, `resident` is measured while all agents decode.
Cells with recipe=full are the baseline: every agent has an uncompressed cache of its own.
"""

from omegaconf import DictConfig

from experiments import rows as write
from experiments import settings
from experiments.session import Session
from experiments.study import Study
from polykv.documents import prefix_tokens
from polykv.evaluation import concurrency, memory, process
from polykv.geometry import Geometry
from polykv.models import load_config, pick_dtype
from polykv.pool import SharedKVPool
from polykv.recipe import Recipe
from polykv.results import Rows

POOL = "the synthetic pool"


def check(cfg: DictConfig, session: Session) -> None:
    """Check the settings. Takes a context length, but neither weights nor a document."""
    if cfg.memory and cfg.resident:
        process.start_early(memory.__name__)
    settings.check_common(cfg)
    settings.check_context(cfg, 512)


def run(cfg: DictConfig, session: Session) -> Rows:
    """Ratios and memory of the cell's recipe on its geometry."""
    rows = settings.new_rows(cfg, write.BYTES, document="")
    pool = _pool(cfg, session)
    write.add_ratio(rows, pool, synthetic=True)
    if cfg.memory:
        write.add_memory(rows, cfg, pool, synthetic=True)
    return rows


def _pool(cfg: DictConfig, session: Session) -> SharedKVPool:
    """A synthetic pool of the cell's geometry, dtype, prefix length and recipe, shared by cells of other n_agents."""
    n_tokens = prefix_tokens(cfg.context, cfg.prefix_fraction)
    geometry, dtype = Geometry.of(load_config(cfg.model)), pick_dtype(cfg.model.dtype)

    def make() -> SharedKVPool:
        recipe = Recipe.from_config(cfg.recipe)
        return memory.synthetic_pool(geometry, n_tokens, dtype, recipe, cfg.backend)

    needs = [geometry, n_tokens, dtype, settings.plain(cfg.recipe), cfg.backend]
    return session.kept(POOL, needs, make)


STUDY = Study(
    name="polykv_memory",
    title="PolyKV: ratio and memory",
    question="Are the published ratio and memory reached: nominally, as stored, and while all agents decode?",
    run=run,
    check=check,
    made_by=(memory, concurrency),
    settings=("model", "weights", "context", "prefix_fraction", "recipe", "reader", "backend",
              "device", "n_agents", "memory", "resident"),
    columns=write.BYTES,
    answers=("ratio", "memory"),
)  # fmt: skip
