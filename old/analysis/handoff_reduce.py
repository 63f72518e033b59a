"""What the handoff's tables and figures share: published rows, relay rows, one value out of many. Pure."""

from dataclasses import replace

import pandas as pd
from analysis.reduce import Value

from analysis.render import Row
from polykv.config import load_group
from polykv.evaluation.gsm8k import of_note
from polykv.evaluation.statistics import spread_warning

POLICIES = ["full", "reprefill", "fp16", "uniform", "local", "topology", "random", "sinks_recent"]
POLICIES += ["inverse"]
SETTING = ["model", "weights", "device", "dtype"]
RELAY = ["document", "n_hops", "budget_bits", "policy", "reseal"]
SAME = 1e-9  # bits; budgets nearer than this are the same
EXPERIMENTS = ("handoff_accuracy", "handoff_ttft", "handoff_stages", "controller_ablation")


def relays(rows: pd.DataFrame, *metrics: str) -> pd.DataFrame:
    """The rows of these metrics with `reseal` and `how` (strict, flexible, teacher-forced) apart."""
    found = rows[rows["metric"].isin(metrics)]
    parts = [protocol.partition("; ") for protocol in found["protocol"]]
    how, reseal = [part[0] for part in parts], [part[2] for part in parts]
    return ordered(found.assign(how=how, reseal=reseal))


def verdicts(rows: pd.DataFrame) -> pd.DataFrame:
    """The accuracy rows that keep which problems were right, the newest of each, as list `verdicts`."""
    found = relays(rows, "accuracy")
    found = found.assign(verdicts=found["note"].map(of_note))
    found = found[found["verdicts"].notna()].sort_values("created_at", kind="stable")
    return ordered(found.drop_duplicates([*SETTING, *RELAY, "how", "seed", "n"], keep="last"))


def value(rows: pd.DataFrame, why: str = "no such row in these results") -> Value:
    """The newest row of each seed; over several seeds their mean and the hull of their intervals."""
    rows = rows.sort_values(["created_at", "cell"], kind="stable").drop_duplicates(
        "seed", keep="last"
    )
    present = rows[rows["value"].notna()]
    if present.empty:
        return Value(None, note=why if rows.empty else rows["note"].iloc[-1])
    low, high = present["ci_low"].min(), present["ci_high"].max()
    ends = (None if pd.isna(end) else float(end) for end in (low, high))
    several = f"mean over {len(present)} seeds, interval: hull of theirs"
    return Value(float(present["value"].mean()), *ends, several if len(present) > 1 else "")


def warned(timing: Value) -> Value:
    """A timing with a footnote where its quartiles are too far apart to be believed."""
    notes = (timing.note, spread_warning(timing.low, timing.high))
    return replace(timing, note="; ".join(filter(None, notes)))


def with_budget(rows: pd.DataFrame, bits: float | None) -> pd.Series:
    """Which rows have this budget; None: those without any."""
    return rows["budget_bits"].isna() if bits is None else (rows["budget_bits"] - bits).abs() < SAME


def ordered(rows: pd.DataFrame) -> pd.DataFrame:
    """By setting, then hops, budget, and policies from exact to control."""
    rank = rows["policy"].map({name: i for i, name in enumerate(POLICIES)}).fillna(len(POLICIES))
    order = ["model", "weights", "document", "context_tokens", "n_hops", "budget_bits", "_rank"]
    return rows.assign(_rank=rank).sort_values(
        [*order, "policy", "protocol", "created_at"], kind="stable", na_position="first"
    )


def bits_text(bits: float | None) -> str:
    return "none" if bits is None or pd.isna(bits) else f"{bits:g} bits"


def sides() -> dict[str, str]:
    """The signals of the published controller, as the ablation names them: importance and demand."""
    policy = load_group("policy", "topology")
    return {side: " + ".join(policy[side]) for side in ("importance", "demand")}


def hops_text(n: float) -> str:
    return f"{n:g} handoff" + "s" * (n != 1)


def run_text(named: Row) -> str:
    return f"{named['model']} ({named['weights']} weights), {named['device']}, {named['dtype']}"


def spots_of(mine: pd.DataFrame, axis: str) -> dict[str, list[tuple[float, Value]]]:
    """The values of each policy along an axis, of those that have any."""
    found = {}
    for policy, line in mine.groupby("policy", sort=False):
        spots = [(n, value(of)) for n, of in line.groupby(axis)]
        if spots := [(n, v) for n, v in spots if v.value is not None]:
            found[policy] = spots
    return found


def average(rows: pd.DataFrame) -> str:
    """Which average the rows of stages give: medians, or in older cells means."""
    return "means" if rows["note"].str.startswith("mean;").any() else "medians"
