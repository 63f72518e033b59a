"""Does quality depend on how many agents read the pool? PolyKV: one delta for 3, 5 and 10 agents.

Answers the published rows `quality` as far as they differ in agents alone. All agents score the rest of the
document in one batch, each of them padded differently: reader `cascade` from the one pool, `inject` from copies
of their own. A sum, a mask or a position that went by the batch would show against a reader that is alone.
"""

from typing import Any

from experiments.common import document_rows
from experiments.recipe_frontier import MADE_BY, check, settle
from omegaconf import DictConfig

from experiments import common
from polykv.evaluation import continuation, missing, readings
from polykv.evaluation.continuation import compare, why_not_finite
from polykv.progress import track

__all__ = ["MADE_BY", "check", "run", "settle"]


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Quality of the last agent's reading, and the largest difference of any agent's to a single reader's."""
    rows = document_rows(cfg)
    comparisons, gaps = [], []
    fulls = common.full_readings(cfg)
    pairs = list(zip(common.readings(cfg), fulls, strict=True))
    for reading, full in track(pairs, "scoring in one batch"):
        alone_TV, together_NTV = reading.log_probs_TV, reading.score_together(cfg.n_agents)
        apart_NTV = (together_NTV - alone_TV).abs()
        # What a model masks is infinite for all.
        gaps.append(float(apart_NTV.masked_fill_(together_NTV == alone_TV, 0).max()))
        comparisons.append(compare(full.log_probs_TV, together_NTV[-1], reading.document.rest_BT))
    continuation.add_rows(rows, comparisons)
    readings.add_reader_floor(rows, fulls)
    note = f"largest difference of a log-probability between any of {cfg.n_agents} in a batch and a single reader"
    why = why_not_finite(comparisons)
    missing.add(rows, "agent_spread", max(gaps), "nats", why, note=note)
    return rows
