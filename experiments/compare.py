"""What does each of these recipes keep, and what does it cost, on this model and this text?

The question that users have, in one table: stored bits, perplexity delta and KL divergence with intervals over
documents, memory while all agents decode (`resident`) and, on request (`answers`), what the agents say.
"""

from omegaconf import DictConfig

from experiments import rows as write
from experiments import settings
from experiments.session import Session
from experiments.study import Study
from polykv.errors import PolyKVError
from polykv.evaluation import bertscore, memory, process
from polykv.progress import track
from polykv.results import Rows

COLUMNS = {**write.BYTES, **write.SCORES, **write.ANSWERS}


def settle(cfg: DictConfig) -> DictConfig:
    """`scorer=auto` becomes the scorer that is there, so that the rows and the cell's identity say it."""
    settled = settings.settle(cfg)
    settled.scorer.name = bertscore.resolve(cfg.scorer.name)
    return settled


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
    own = {"context_tokens": document.n_tokens, "reader": cfg.reader}
    rows = settings.new_rows(cfg, COLUMNS, **own)
    write.add_ratio(rows, pool)
    write.add_memory(rows, cfg, pool)
    write.add_scores(rows, [one.comparison for one in track(readings, "scoring")])
    write.add_answers(rows, cfg, session)
    return rows


STUDY = Study(
    name="compare",
    title="Recipes side by side",
    question="What does each recipe keep, and what does it cost on this model and this text?",
    run=run,
    check=check,
    settle=settle,
    settings=(*settings.POOL, "n_agents", "max_new_tokens", "answers", "scorer", "resident"),
    columns=COLUMNS,
    answers=("ratio", "memory", "quality"),
)
