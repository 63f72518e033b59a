"""QKVShare's stage table: where does the time to first token go, route by route?

Answers the published rows `stages` (create, inject, generate; ours are finer: see analysis).
"""

from typing import Any

from omegaconf import DictConfig

from experiments.handoff_ttft import check, columns, new_rows, settle, timed
from polykv.evaluation.process import KEPT
from polykv.evaluation.statistics import spread_warning
from polykv.evaluation.ttft import quartiles

__all__ = ["check", "run", "settle"]


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Mean of every stage, its share of the total, and the total, which is timed on its own.

    Means, because medians of parts do not add up to the median of the whole.
    """
    rows, timings = new_rows(cfg), timed(cfg)
    for (_, timing), described in zip(timings, columns(cfg, timings), strict=True):
        about = {"n": len(timing.total), **described}
        for stage, times in {"total": timing.total, **timing.stages}.items():
            low, _, high = quartiles(times)
            mean = float(times.mean())
            told = ("mean", "interval: quartiles", KEPT, spread_warning(low, high))
            note = "; ".join(filter(None, told))
            rows.add(f"stage_{stage}", mean, "ms", ci=(low, high), note=note, **about)
            share = 100 * mean / float(timing.total.mean())
            rows.add(f"share_{stage}", share, "percent", note="of the mean total", **about)
    return rows.rows
