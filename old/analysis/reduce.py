"""Rows -> points, one per (model, ..., context, recipe, agents) with all its measures. Pure."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pandas as pd
from analysis.apart import joined

# Measure -> (metric, protocol). None: any; for BERTScore the protocol names the scorer, a key of its own.
MEASURES: dict[str, tuple[str, str | None]] = {
    "nominal_ratio": ("compression_ratio", "nominal"),
    "stored_ratio": ("compression_ratio", "stored"),
    "paper": ("kv_memory", "paper"),
    "stored": ("kv_memory", "stored"),
    "resident": ("kv_memory", "resident"),
    "perplexity": ("perplexity", None),
    "perplexity_delta": ("perplexity_delta", None),
    "kl_mean": ("kl_mean", None),
    "same_top1": ("same_top1", None),
    "bertscore_f1": ("bertscore_f1", None),
    "bertscore_floor": ("bertscore_floor", None),
    "bertscore_rescaled": ("bertscore_rescaled", None),
    "exact_match": ("exact_match", None),
}
# Measures of a difference from the baseline, and those that need trained weights.
RELATIVE = ["perplexity_delta", "kl_mean", "same_top1"]
RELATIVE += ["bertscore_f1", "bertscore_floor", "bertscore_rescaled"]
QUALITY = ["perplexity", *RELATIVE, "exact_match"]
EMPTY = ("empty_answers", "empty_references", "empty_pairs")
ANSWERS = (
    "bertscore_f1",
    "bertscore_floor",
    "bertscore_rescaled",
    "exact_match",
    "contains",
    *EMPTY,
)
SETTING = ["model", "weights", "dtype", "device", "document", "context_tokens", "recipe"]
# What a row may leave open because its value does not depend on it (a ratio has no reader).
OPEN = ["n_agents", "reader", "scorer"]
RECIPES = ["full", "fp16", "polykv", "polykv_q8_0"]  # this order first, then by name
BASELINE = "full"


@dataclass(frozen=True)
class Value:
    """A number with its interval, or None with the reason in `note` (else `note` is a remark).

    `n`: observations of a row, over seeds the fewest; `protocol`: how it was measured. Of points only.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""
    n: int | None = None
    protocol: str = ""


@dataclass(frozen=True)
class Point:
    """All that was measured in one setting. `n_agents` None: not tied to a number of agents."""

    model: str
    weights: str
    dtype: str
    device: str
    document: str
    context_tokens: int | None
    recipe: str
    n_agents: int | None
    reader: str
    scorer: str
    head_dim: int | None = None
    values: Mapping[str, Value] = field(default_factory=dict)

    def __getitem__(self, measure: str) -> Value:
        return self.values.get(measure) or Value(None, note=self._why_absent(measure))

    def _why_absent(self, measure: str) -> str:
        if self.weights == "random" and measure in QUALITY:
            return "random weights: memory and timing only"
        if self.recipe == BASELINE and measure in RELATIVE:
            return f"recipe {BASELINE} is the baseline that the others are compared with"
        return "no such row in these results"


def cell_dtype(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, each under the dtype in which its cell scores; answers may come from another, which is added."""
    scored = rows["dtype"].where(~rows["metric"].isin(ANSWERS))
    own = scored.groupby(rows["cell"]).transform("first")
    answered = rows["dtype"].where(rows["metric"].isin(ANSWERS))
    answered = answered.groupby(rows["cell"]).transform("first")
    apart = own.notna() & answered.notna() & (own != answered)
    told = own.fillna(rows["dtype"]).where(~apart, own + " (answers " + answered + ")")
    return rows.assign(dtype=told)


def points(rows: pd.DataFrame) -> list[Point]:
    """Reduce tidy rows (analysis.load) to points, sorted. Re-measured values: the newest counts."""
    rows = _backends(_readers(_measures(cell_dtype(rows))))
    rows = _spread(_latest(rows))
    keys = [*SETTING, *OPEN]
    found = []
    for key, group in rows.groupby(keys, dropna=False, sort=False):
        named = {name: _plain(part) for name, part in zip(keys, key, strict=True)}
        head_dim = _plain(group["head_dim"].max())
        values = {m: _over_seeds(part) for m, part in group.groupby("measure", sort=True)}
        found.append(Point(**named, head_dim=head_dim, values=values))
    return sorted(found, key=order)


def order(point: Point) -> tuple:
    """Models by name, then document, context, agents; recipes from exact to small."""
    rank = RECIPES.index(point.recipe) if point.recipe in RECIPES else len(RECIPES)
    where = (point.model, point.weights, point.dtype, point.device, point.document)
    size = (point.context_tokens or 0, point.n_agents or 0)
    return (*where, *size, rank, point.recipe, point.reader, point.scorer)


def having(found: Iterable[Point], *measures: str) -> list[Point]:
    """The points in which at least one of `measures` has a value."""
    return [p for p in found if any(p[m].value is not None for m in measures)]


def _measures(rows: pd.DataFrame) -> pd.DataFrame:
    """Add `measure`, and `scorer` (BERTScore's protocol); rows of other metrics are left out."""
    named = pd.Series(pd.NA, index=rows.index, dtype=object)
    for measure, (metric, protocol) in MEASURES.items():
        fits = rows["metric"] == metric
        named[fits if protocol is None else fits & (rows["protocol"] == protocol)] = measure
    bertscore = rows["metric"].str.startswith("bertscore")
    scorer = rows["protocol"].str.removeprefix("bertscore ").where(bertscore, "")
    rows = rows.assign(measure=named, scorer=scorer)
    return rows[rows["measure"].notna()]


def _readers(rows: pd.DataFrame) -> pd.DataFrame:
    """An uncompressed cache is private however it got there."""
    full = (rows["recipe"] == BASELINE) & rows["reader"].isin(["", "inject"])
    return rows.assign(reader=rows["reader"].mask(full, "private"))


def _backends(rows: pd.DataFrame) -> pd.DataFrame:
    """A reader that several backends ran is several readers: `cascade (backend=cpu)`."""
    backend = rows["backend"].where((rows["reader"] != "") & rows["backend"].notna(), "")
    stated = rows.assign(backend=backend)[backend != ""]
    each = stated.groupby([*SETTING, *OPEN, "measure", "seed"], dropna=False)["backend"].nunique()
    several = each[each > 1].index.get_level_values("reader")
    told = rows["reader"].isin(several) & (backend != "")
    return joined(rows, "reader", ("backend=" + backend).where(told, ""))


def _latest(rows: pd.DataFrame) -> pd.DataFrame:
    identity = [*SETTING, *OPEN, "measure", "seed"]
    rows = rows.sort_values(["created_at", "cell"], kind="stable")
    return rows.drop_duplicates(identity, keep="last")


def _spread(rows: pd.DataFrame) -> pd.DataFrame:
    """Repeat a row that leaves an OPEN axis open for every value of that axis in its setting."""
    for axis in OPEN:
        is_open = rows[axis].isna() | (rows[axis] == "")
        seen = rows.loc[~is_open, [*SETTING, axis]].drop_duplicates()
        filled = rows[is_open].drop(columns=axis).merge(seen, on=SETTING, how="left")
        filled[axis] = filled[axis].fillna("") if axis != "n_agents" else filled[axis]
        rows = pd.concat([rows[~is_open], filled], ignore_index=True)
        # a value that was measured for this very agent or reader outweighs the general one
        rows = rows.drop_duplicates([*SETTING, *OPEN, "measure", "seed"], keep="first")
    return rows


def _over_seeds(rows: pd.DataFrame) -> Value:
    """The mean over seeds; its interval is the hull of the seeds', which never claims too much."""
    present = rows[rows["value"].notna()]
    if present.empty:
        return Value(None, note=rows["note"].iloc[0] or "the row gives no reason")
    several = f"mean over {len(present)} seeds, interval: hull of theirs"
    low, high = present["ci_low"].min(), present["ci_high"].max()
    return Value(
        float(present["value"].mean()),
        None if math.isnan(low) else float(low),
        None if math.isnan(high) else float(high),
        several if len(present) > 1 else "",
        _plain(present["n"].astype(float).min()),
        " or ".join(sorted(set(present["protocol"]))),
    )


def _plain(part: object) -> object:
    if isinstance(part, float):
        return None if math.isnan(part) else int(part)
    return part


def describe(rows: pd.DataFrame, how: str = "Measured on") -> str:
    """What the rows are, for a caption: model (weights), n, device, dtype, commit, dates."""
    if rows.empty:
        return "Nothing of this was run here."
    models = sorted(set(zip(rows["model"], rows["weights"], strict=True)))
    low, high = rows["n"].min(), rows["n"].max()
    n = "n not stated" if math.isnan(low) else f"n = {low:,.0f}"
    n += f" to {high:,.0f}" * bool(high > low)
    dates = sorted({text[:10] for text in rows["created_at"] if text})
    return (
        f"{how} {', '.join(f'{model} ({weights} weights)' for model, weights in models)}; "
        f"{n}; {_listed(rows['device'])}, {_listed(rows['dtype'])}; commit {_listed(rows['commit'])}; "
        f"{' to '.join(dict.fromkeys([dates[0], dates[-1]])) if dates else 'undated'}."
    )


def _listed(column: pd.Series) -> str:
    return " and ".join(sorted(set(column) - {""})) or "not stated"
