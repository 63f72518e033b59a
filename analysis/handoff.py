"""What tables and figures of handoffs share: order of policies, paired rows, names of runs, budgets and handoffs."""

from collections.abc import Mapping, Sequence

import pandas as pd

from analysis.load import SETTING as SET
from analysis.load import swept
from analysis.points import over_seeds
from analysis.render import Column, Row
from analysis.statistics import Measure, Value
from analysis.style import POLICIES
from polykv.config import load_group

RUN = ["model", "weights", "device", "dtype"]
RELAY = ["document", "n_hops", "budget_bits", "policy", "reseal"]
ORDER = ["model", "weights", "document", "context_tokens", "n_hops", "budget_bits"]
SAME = 1e-9  # bits; budgets nearer than this are the same


def ordered(rows: pd.DataFrame) -> pd.DataFrame:
    """By run, document, context and handoffs, then budget, and policies from exact to control; the newest last."""
    rank = rows["policy"].map({name: i for i, name in enumerate(POLICIES)}).fillna(len(POLICIES))
    by = [*(name for name in ORDER if name in rows), "_rank", "policy", "created_at", "cell"]
    return rows.assign(_rank=rank).sort_values(by, kind="stable", na_position="first")


def counted(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the number of samples (problems) of their cell as `n`, for render.describe."""
    return rows.assign(n=rows.groupby("cell")["sample"].transform("nunique").astype("Int64"))


def less(rows: pd.DataFrame, other: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows as `metric`, their values less those of `other` of the same cell and sample; without such: no row."""
    theirs = other[["cell", "sample", "value"]].rename(columns={"value": "_theirs"})
    found = rows.merge(theirs, on=["cell", "sample"])
    return found.assign(metric=metric, value=found["value"] - found.pop("_theirs"))


def with_budget(rows: pd.DataFrame, bits: float | None) -> pd.Series:
    """Which rows have this budget; None: those without any."""
    return rows["budget_bits"].isna() if bits is None else (rows["budget_bits"] - bits).abs() < SAME


def settings_columns(rows: pd.DataFrame) -> list[Column]:
    """Key columns of the settings in which these rows differ and that no other column tells."""
    return [Column(name, name.removeprefix(SET), key=True) for name in swept(rows)]


def spots_of(mine: pd.DataFrame, axis: str, measure: Measure) -> dict[str, list[tuple[int, Value]]]:
    """The values of each policy along an axis, of those that have any."""
    found = {}
    for policy, line in mine.groupby("policy", sort=False):
        spots = [(int(n), over_seeds(of, measure.of)) for n, of in line.groupby(axis)]
        if spots := [(n, v) for n, v in spots if v.value is not None]:
            found[policy] = spots
    return found


def sides() -> dict[str, str]:
    """The signals of the published controller: importance and demand, as rows name them."""
    policy = load_group("policy", "topology")
    return {side: " + ".join(policy[side]) for side in ("importance", "demand")}


def named(names: Sequence[str], key: Sequence[object]) -> Row:
    """The values of a group's key by their columns; what is missing is None."""
    return dict(zip(names, (None if pd.isna(one) else one for one in key), strict=True))


def run_text(run: Mapping[str, object]) -> str:
    """The model, weights, device and dtype of a run."""
    return f"{run['model']} ({run['weights']} weights), {run['device']}, {run['dtype']}"


def bits_text(bits: float | None) -> str:
    """A budget."""
    return "none" if bits is None or pd.isna(bits) else f"{bits:g} bits"


def hops_text(n: float) -> str:
    """A number of handoffs."""
    return f"{n:g} handoff" + "s" * (n != 1)
