"""A metric that cannot be computed is missing and says why: never 0, NaN or infinite in a table. Torch-free."""

import math
from typing import Any

from polykv.results import Rows


def add(
    rows: Rows,
    metric: str,
    value: float,
    unit: str,
    why: str,
    ci: tuple[float, float] | None = None,
    **columns: Any,
) -> None:
    """The row of `value`; where it is not finite, a missing one whose note is `why`.

    An interval with an end that is not finite is left out.
    """
    if not math.isfinite(value):
        rows.add(metric, None, unit, **(columns | {"note": why}))
        return
    known = ci is not None and all(map(math.isfinite, ci))
    rows.add(metric, float(value), unit, ci=ci if known else None, **columns)
