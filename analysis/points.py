"""Points: everything that was measured of one recipe in one setting; and how tables group, order and name rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from analysis.load import SETTING, of_paper, swept, with_protocol
from analysis.statistics import BASELINE, BYTES, QUALITY, UNMEASURED, Measure, Value, rescaled

IN_PLACE = "in_place"
UNSHARED = "unshared"  # the reader of an uncompressed cache, however it got there
RECIPES = (BASELINE, "fp16", "polykv", "polykv_q8_0")  # first in tables and figures, in this order
# From exact to control, as tables and figures order them.
POLICIES = (
    "full", "reprefill", "fp16", "uniform", "trellis", "waterfill", "local", "topology", "dont_waste_bits", "qkvshare",
    "random", "sinks_recent", "inverse", "other_card", "random_card", "no_card",
)  # fmt: skip
ANSWERS = (
    "bertscore_f1", "bertscore_floor", "exact_match", "contains", "empty_answer", "empty_reference",
)  # fmt: skip
# Measures of a difference from the baseline; those that need trained weights are these and the baseline's own.
RELATIVE = (
    "perplexity_delta", "kl_mean", "same_top1", "bertscore_f1", "bertscore_floor", "bertscore_rescaled",
)  # fmt: skip
TRAINED = ("perplexity", *RELATIVE, "exact_match")
MEASURES: Mapping[str, Measure] = {**BYTES, **QUALITY}
KEYS = (
    "model", "weights", "dtype", "device", "document", "context_tokens", "n_agents", "recipe", "reader", "backend",
)  # fmt: skip
RUN = ["model", "weights", "device", "dtype"]
ORDER = ["model", "weights", "document", "context_tokens", "n_hops", "hop", "budget_bits"]
OF_CELL = ("scorer", "quantization")  # columns that some rows of a cell state for all of them
RESCALED = "bertscore_rescaled"


@dataclass(frozen=True)
class Point:
    """One recipe in one setting. `point[measure]` is the value of MEASURES, or RESCALED; None with the reason.

    Attributes:
        reader: `unshared` where every agent keeps an uncompressed cache.
        backend: "" of unshared caches.
        scorer: BERTScore's model, "" without answers.
        quantization: the format of the weights, "" of unquantized ones.
        settings: what else tells its cells from others (`max_new_tokens=32`), mostly "".
    """

    model: str
    weights: str
    dtype: str
    device: str
    document: str
    context_tokens: int | None
    n_agents: int | None
    recipe: str
    reader: str
    backend: str
    scorer: str = ""
    quantization: str = ""
    settings: str = ""
    rows: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False, compare=False)
    _found: dict[str, Value] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getitem__(self, measure: str) -> Value:
        if measure not in self._found:
            self._found[measure] = self._value(measure)
        return self._found[measure]

    def _value(self, measure: str) -> Value:
        if measure == RESCALED:
            return rescaled(self["bertscore_f1"], self["bertscore_floor"])
        found = over_seeds(self.rows, MEASURES[measure].of)
        return Value(None, note=self._why_absent(measure)) if found == UNMEASURED else found

    def _why_absent(self, measure: str) -> str:
        if self.weights == "random" and measure in TRAINED:
            return "random weights: memory and timing only"
        if self.recipe == BASELINE and measure in RELATIVE:
            return f"recipe {BASELINE} is the baseline that the others are compared with"
        return UNMEASURED.note

    @property
    def name(self) -> str:
        """The recipe, with the settings that tell it from others."""
        return f"{self.recipe} ({self.settings})" if self.settings else self.recipe

    @property
    def run(self) -> str:
        """Model, weights, device and dtype."""
        return run_text(vars(self))

    @property
    def head_dim(self) -> int | None:
        """Of the pool, where its bytes were counted."""
        found = self.rows["head_dim"].dropna() if "head_dim" in self.rows else ()
        return int(found.iloc[-1]) if len(found) else None


def points(rows: pd.DataFrame) -> list[Point]:
    """The points of rows (analysis.load) of protocol `paper`, models by name and recipes from exact to small."""
    rows = of_paper(rows)
    if rows.empty:
        return []
    found = tidied(rows)
    for name in OF_CELL:
        found[name] = _of_cell(found, name) if name in found else ""
    made = [
        Point(
            **{name: line[name] for name in (*KEYS, *OF_CELL)},
            settings=settings_text(line).removeprefix(", "),
            rows=part,
        )
        for line, part in groups(found, *KEYS, *OF_CELL)
    ]
    return sorted(made, key=order)


def order(point: Point) -> tuple:
    """Models by name, then document, context, agents; recipes from exact to small."""
    rank = RECIPES.index(point.recipe) if point.recipe in RECIPES else len(RECIPES)
    where = (point.model, point.weights, point.dtype, point.device, point.document)
    size = (point.context_tokens or 0, point.n_agents or 0)
    return (*where, *size, rank, point.recipe, point.reader, point.backend, point.scorer)


def having(found: Iterable[Point], *measures: str) -> list[Point]:
    """The points in which at least one of `measures` has a value."""
    return [p for p in found if any(p[m].value is not None for m in measures)]


def over_seeds(rows: pd.DataFrame, reduce: Callable[[pd.DataFrame], Value]) -> Value:
    """The mean over seeds of `reduce` of each seed's rows; the interval is the hull of the seeds' intervals."""
    by_seed = [rows]  # to group the rows of one seed takes seconds over thousands of figures
    if rows["seed"].nunique(dropna=False) > 1:
        by_seed = [part for _, part in rows.groupby("seed", dropna=False)]
    found = [reduce(part) for part in by_seed]
    present = [value for value in found if value.value is not None]
    if len(present) < 2:
        return (present or found or [UNMEASURED])[-1]
    lows, highs = ([getattr(v, end) for v in present] for end in ("low", "high"))
    ends = (None, None) if None in (*lows, *highs) else (min(lows), max(highs))
    return Value(
        sum(value.value for value in present) / len(present),
        *ends,
        f"mean over {len(present)} seeds, interval: hull of theirs",
        min((value.n for value in present if value.n is not None), default=None),
        present[0].over,
    )


def tidied(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows by time of creation, with one dtype, one reader and one protocol per cell.

    A baseline's cell reads unshared caches and has no backend; the reader whose floor it measured is in `floor_of`.
    """
    found = with_protocol(cell_dtype(rows))
    read = _of_cell(found, "reader")
    shared = found["recipe"] != BASELINE
    found = found.assign(floor_of=read, reader=read.where(shared, UNSHARED))
    found = found.assign(backend=found["backend"].where(shared, ""))
    return found.sort_values(["created_at", "cell"], kind="stable")


def cell_dtype(rows: pd.DataFrame, metrics: Sequence[str] = ANSWERS) -> pd.DataFrame:
    """The rows with the dtype of their cell's scores, as "float32 (answers bfloat16)" where its answers have another.

    `metrics`: those that are about answers.
    """
    answers = rows["metric"].isin(metrics)
    own, answered = (
        rows["dtype"].where(which).groupby(rows["cell"]).transform("first")
        for which in (~answers, answers)
    )
    apart = own.notna() & answered.notna() & (own != answered)
    return rows.assign(
        dtype=own.fillna(rows["dtype"]).where(~apart, own + " (answers " + answered + ")")
    )


def _of_cell(rows: pd.DataFrame, column: str) -> pd.Series:
    """The column, with empty entries filled from the first row of the same cell that has one."""
    stated = rows[column].where(rows[column] != "")
    return stated.fillna(stated.groupby(rows["cell"]).transform("first")).fillna("")


def ordered(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows sorted by run, document, context, handoffs, budget and policy (POLICIES), the newest last."""
    places = {policy: place for place, policy in enumerate(POLICIES)}
    rank = rows["policy"].map(places).fillna(len(POLICIES))
    by = [*(name for name in ORDER if name in rows), "_rank", "policy", "created_at", "cell"]
    return rows.assign(_rank=rank).sort_values(by, kind="stable", na_position="first")


def counted(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the number of samples (problems) of their cell as `n`, for render.describe."""
    return rows.assign(n=rows.groupby("cell")["sample"].transform("nunique").astype("Int64"))


def less(rows: pd.DataFrame, other: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Rows of `metric`: values less those of `other` for the same cell and sample; unpaired rows are dropped."""
    theirs = other[["cell", "sample", "value"]].rename(columns={"value": "_theirs"})
    found = rows.merge(theirs, on=["cell", "sample"])
    return found.assign(metric=metric, value=found["value"] - found.pop("_theirs"))


def parts(
    rows: pd.DataFrame, about: Sequence[str], sort: bool = False
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """(values of the columns `about`, None for missing; rows) of each group, in order of the rows or (`sort`) keys."""
    if not about:
        yield {}, rows
        return
    for key, part in rows.groupby([*about], dropna=False, sort=sort):
        yield {n: None if pd.isna(x) else x for n, x in zip(about, key, strict=True)}, part


def groups(
    rows: pd.DataFrame, *names: str, sort: bool = False
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """`parts` by these columns and the settings in which the rows differ."""
    return parts(rows, [*names, *swept(rows)], sort)


def run_text(run: Mapping[str, object]) -> str:
    """The model, weights, device and dtype of a run."""
    return f"{run['model']} ({run['weights']} weights), {run['device']}, {run['dtype']}"


def settings_text(line: Mapping[str, object]) -> str:
    """The settings that tell a line or a panel from others, as text to append; "" without any."""
    told = (name for name in line if name.startswith(SETTING))
    return "".join(f", {name.removeprefix(SETTING)}={line[name] or 'unset'}" for name in told)


def bits_text(bits: float | None) -> str:
    """A budget as text."""
    return "none" if bits is None or pd.isna(bits) else f"{bits:g} bits"


def hops_text(n: float) -> str:
    """A number of handoffs as text."""
    return f"{n:g} handoff" + "s" * (n != 1)
