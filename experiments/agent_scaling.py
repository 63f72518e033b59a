"""Does quality depend on how many agents read the pool? PolyKV: one delta for 3, 5 and 10 agents.

Answers the published rows `quality` as far as they differ in agents alone. Agents read the pool one after the
other, and each scores the rest of the document; an agent that changed what the next one reads would show.
"""

from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from experiments import common
from experiments.common import new_rows
from experiments.recipe_frontier import check, settle
from polykv.evaluation import continuation
from polykv.evaluation.continuation import compare

__all__ = ["check", "run", "settle"]


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Quality of the last agent's reading, and the largest difference between any two agents'."""
    rows = new_rows(cfg, reader=cfg.reader)
    comparisons, spread = [], 0.0
    pairs = zip(common.readings(cfg), common.full_readings(cfg), strict=True)
    for reading, full in tqdm(list(pairs), desc="agents", leave=False, disable=None):
        for _ in range(cfg.n_agents):
            log_probs_TV = reading.score()
            gap = (log_probs_TV - reading.log_probs_TV).abs().max()
            spread = max(spread, float(gap))
        comparisons.append(compare(full.log_probs_TV, log_probs_TV, reading.document.rest_BT))
    continuation.add_rows(rows, comparisons)
    note = "largest difference of a log-probability between any agent and a single reader"
    rows.add("agent_spread", spread, "nats", note=note)
    return rows.rows
