"""Growth of step time and memory of `concurrency` with agents and with tokens: the line, and what departs from it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.concurrency import described, measures
from analysis.load import swept
from analysis.points import RUN, parts, run_text
from analysis.render import Column, Row, Table, fixed, keys, settings_columns, significant
from analysis.statistics import Value
from analysis.style import READERS

STUDY = "concurrency"
LEAST = 4  # points of a line
ALONG = {"n_agents": "agents", "context_tokens": "tokens"}  # what grows, while the other is fixed
UNITS = {"step": ("step", "ms"), "resident": ("resident", "MB")}
THOUSAND = 1000  # tokens that a slope along tokens is of


@dataclass(frozen=True)
class Line:
    """The least-squares line through (x, y), with the 95 % interval of its slope.

    `departure` is the largest distance of a point from the line, over the line, in percent.
    """

    slope: Value
    start: float
    departure: float


def line_of(x: Sequence[float], y: Sequence[float]) -> Line:
    """The line through at least LEAST points, weighed by 1 / y² so that small and large ones count alike."""
    x_N, y_N = np.array(x, float), np.array(y, float)
    design = np.stack([np.ones_like(x_N), x_N], 1) / y_N[:, None]
    (start, slope), *_ = np.linalg.lstsq(design, np.ones_like(y_N), rcond=None)
    apart = 1 - design @ (start, slope)
    spread = (apart @ apart) / (len(x_N) - 2) * np.linalg.inv(design.T @ design)[1, 1]
    reach = float(stats.t.ppf(0.975, len(x_N) - 2) * np.sqrt(spread))
    departure = 100 * float(np.abs(y_N / (start + slope * x_N) - 1).max())
    return Line(Value(float(slope), slope - reach, slope + reach), float(start), departure)


def table(rows: pd.DataFrame) -> Table | None:
    """The line of each reader along agents and along tokens, where there are at least four of either."""
    lines = list(_lines(rows))
    if not lines:
        return None
    columns = [
        *keys("recipe", "reader", "along", "at", "what"),
        *settings_columns(rows),
        Column("points", "measured at"),
        Column("slope", "per agent, or per 1,000 tokens [95 %]", significant, interval=True),
        Column("start", "at none", significant),
        Column("departure", "largest departure, %", fixed(1)),
    ]
    explained = (
        "The straight line through medians, weighed so that relative distances count; its slope with a t interval over "
        "the points, where it begins, and the point that is furthest from it, relative to the line. Step: ms; "
        "resident: MB above the loaded model"
    )
    caption = f"Growth with agents and with tokens. {described(rows)}"
    return Table("growth", caption, columns, lines, explained)


def _lines(rows: pd.DataFrame) -> Iterator[Row]:
    rows = rows.assign(n_threads=rows.groupby("cell")["n_threads"].transform("max"))
    about = [*RUN, "n_threads", "recipe", "reader", "backend"]
    for along, fixed_ in (("n_agents", "context_tokens"), ("context_tokens", "n_agents")):
        for line, mine in parts(rows, [*about, fixed_, *swept(rows)], sort=True):
            found = {x: measures(of) for x, of in mine.groupby(along)}
            for what, (name, unit) in UNITS.items():
                at = {x: one[what].value for x, one in found.items() if one[what].value}
                if len(at) < LEAST:
                    continue
                fitted = line_of(list(at), list(at.values()))
                per = THOUSAND if along == "context_tokens" else 1
                yield line | {
                    "section": f"{run_text(line)}; {line['n_threads']:g} CPU threads",
                    "reader": READERS[line["reader"]][0], "along": ALONG[along],
                    "at": f"{line[fixed_]:,} {ALONG[fixed_]}", "what": f"{name}, {unit}",
                    "points": ", ".join(f"{x:,}" for x in at),
                    "slope": fitted.slope.map(lambda slope, per=per: per * slope),
                    "start": Value(fitted.start), "departure": Value(fitted.departure),
                }  # fmt: skip


TABLES = {"growth": table}
