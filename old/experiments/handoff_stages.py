"""QKVShare's stage table: where does the time to first token go, route by route?

Answers the published rows `stages` (create, inject, generate; ours are finer: see analysis).
"""

from typing import Any

from experiments.handoff_ttft import MADE_BY, add_time, check, columns, new_rows, settle, timed
from omegaconf import DictConfig

__all__ = ["MADE_BY", "check", "run", "settle"]


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Median of every stage with quartiles, and of the total, which is timed on its own; shares of the mean total.

    Shares are of means, because medians of parts do not add up to the median of the whole.
    """
    rows, timings = new_rows(cfg), timed(cfg)
    for (_, timing), described in zip(timings, columns(cfg, timings), strict=True):
        about = {"n": len(timing.total), **described}
        for stage, times in {"total": timing.total, **timing.stages}.items():
            add_time(rows, f"stage_{stage}", times, "ms", "median", about)
            share = 100 * float(times.mean() / timing.total.mean())
            rows.add(f"share_{stage}", share, "percent", note="of the mean total", **about)
    return rows
