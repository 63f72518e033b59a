"""What does each of these recipes keep, and what does it cost, on this model and this text?

The question that users have, in one table: stored bits, perplexity delta and KL divergence with intervals over
documents, memory while all agents decode (`resident`) and, on request (`answers`), what the agents say.
"""

from dataclasses import fields

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from experiments import rows as write
from experiments import settings
from experiments.session import Session
from experiments.study import Study
from polykv import loading
from polykv.errors import PolyKVError
from polykv.evaluation import answers, bertscore, concurrency, memory, process
from polykv.recipe import Recipe
from polykv.results import Rows

COLUMNS = {**write.BYTES, **write.SCORES, **write.ANSWERS}


def settle(cfg: DictConfig) -> DictConfig:
    """`scorer=auto` becomes the scorer that is there, and the seed also draws the rotations."""
    settled = settings.settle(cfg)
    settled.scorer.name = bertscore.resolve(cfg.scorer.name)
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


def check(cfg: DictConfig, session: Session) -> None:
    """Refuse bad input, random weights above all; what measures memory starts meanwhile."""
    if cfg.resident:
        process.start_early(memory.__name__)
    if not isinstance(cfg.answers, int) or cfg.answers < 0:
        raise PolyKVError(
            f"answers={cfg.answers!r}; it takes the number of documents whose agents are asked, or 0"
        )
    settings.check_quality(cfg, session)


def run(cfg: DictConfig, session: Session) -> Rows:
    """All rows of the cell, from the model's real cache."""
    readings = session.readings(cfg)
    document, pool = readings[0].document, readings[0].pool
    own = {"context_tokens": document.n_tokens, "bos": document.bos, "reader": cfg.reader}
    own |= {"quantization": loading.quantized(cfg.model)}
    rows = settings.new_rows(cfg, COLUMNS, **own)
    write.add_ratio(rows, pool)
    write.add_memory(rows, cfg, pool)
    write.add_readings(rows, readings)
    write.add_answers(rows, cfg, session)
    return rows


STUDY = Study(
    name="compare",
    title="Recipes side by side",
    question="What does each recipe keep, and what does it cost on this model and this text?",
    run=run,
    check=check,
    settle=settle,
    made_by=(*settings.SCORES, answers, bertscore, memory, concurrency),
    settings=(*settings.POOL, "n_agents", "max_new_tokens", "answers", "scorer", "resident"),
    columns=COLUMNS,
    answers=("ratio", "memory", "quality"),
)
