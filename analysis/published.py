"""The published figures, and which measured point answers which of them.

published.csv holds every figure that we know. Its column `source` says where each comes from: the abstract (PolyKV is
arXiv 2604.24971, QKVShare arXiv 2605.03884), RESULTS.md of the authors' repository, or a secondary digest: a summary,
not the paper itself, and marked so in every table. `document_tokens` are those of the whole document,
`prefilled_tokens` the 70 % of it that the pool holds; GB are 10^9 bytes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files

import pandas as pd

from analysis.catalog import NOT_MEASURED, Claim
from analysis.points import RUN, Point, parts
from analysis.statistics import BASELINE, Value

# Our documents that stand for a published one: the same text, or one of the same kind and length.
FAMILY = {
    "wikitext-2": ("wikitext2", "wikitext2_raw", "wikitext2_evaluation"),
    "apollo-11": ("moon_landing",),
    "arpanet": ("packet_networks",),
}
RECIPE_OF = {"no_sharing": BASELINE, "baseline": BASELINE, "polykv": "polykv"}
# Our policy and budget that stand for one of QKVShare. `qkvshare` is in its tables of times only, whose cards have
# uniform 4 bits according to the digest.
CONTROLLER_OF: dict[str, tuple[str, float | None]] = {
    "fp16_share": ("fp16", None),
    "fp16_copy": ("fp16", None),
    "reprefill": ("reprefill", None),
    "qkvshare": ("uniform", 4),
    "q4_reload": ("uniform", 4),
} | {
    f"{name}_q{bits}": (name, bits) for name in ("uniform", "local", "topology") for bits in (4, 8)
}
# How the authors scored answers and loaded weights (experiment log of PolyKV's repository); others: as trained.
SCORER = "roberta-large"
WEIGHTS_OF = {"llama-3-8b-instruct": "nf4"}
TOTAL = "total"
# Our stages that a published time holds; the published stages, and the whole time.
HOLDS = {
    "card_create": ("create",),
    "inject": ("dequantize", "inject"),
    "generate": ("first_forward",),
    "ttft": (TOTAL,),
}
SAME = 1e-9  # bits; budgets nearer than this are the same
SAME_LENGTH = 0.1  # contexts within this relative distance count as the published one
Judge = Callable[[pd.DataFrame], tuple[str, str]]  # the rows of one run -> verdict and sentence
NOT_HERE = "not measured here: "


@dataclass(frozen=True)
class Figure:
    """One published number. `n_agents` and token counts are None where the source names none.

    Attributes:
        at: handoffs of QKVShare's accuracy, its label of the context (1K) of its times, else empty.
        label_tokens: the tokens that the label stands for: those that the file states for it anywhere, since the times
            are of one run (the stages at 3,877 tokens add up to the abstract's time at 8K).
    """

    paper: str
    table: str
    model: str
    document: str
    document_tokens: int | None
    prefilled_tokens: int | None
    n_agents: int | None
    policy: str
    at: str
    metric: str
    value: Value
    unit: str
    source: str
    label_tokens: int | None = None

    @property
    def recipe(self) -> str:
        return RECIPE_OF[self.policy]

    @property
    def controller(self) -> tuple[str, float | None]:
        """Our policy and budget (bits; None: no budget) for a policy of QKVShare."""
        return CONTROLLER_OF[self.policy]

    @property
    def digest(self) -> bool:
        """Taken from a summary of the paper, not from the paper."""
        return "secondary digest" in self.source


@cache
def load(paper: str) -> tuple[Figure, ...]:
    """All figures of one paper, in the file's order; those from a secondary digest carry a note."""
    with (files("analysis") / "published.csv").open(encoding="utf-8") as file:
        rows = pd.read_csv(file, dtype=str, keep_default_na=False)
    rows = rows[rows["paper"] == paper]
    labelled = rows[rows["hop_or_context"].str.endswith("K")]
    tokens = {label: 1024 * int(label.removesuffix("K")) for label in labelled["hop_or_context"]}
    stated = labelled[labelled["document_tokens"] != ""]
    tokens |= dict(
        zip(stated["hop_or_context"], stated["document_tokens"].astype(int), strict=True)
    )
    return tuple(_figure(row, tokens.get(row["hop_or_context"])) for _, row in rows.iterrows())


def _figure(row: pd.Series, label_tokens: int | None) -> Figure:
    source = row["source"]
    counts = ("document_tokens", "prefilled_tokens", "n_agents")
    return Figure(
        **{name: row[name] for name in ("paper", "model", "document", "policy", "metric", "unit")},
        **{name: int(row[name]) if row[name] else None for name in counts},
        table=row["figure_or_table"],
        at=row["hop_or_context"],
        value=Value(float(row["value"]), note=source if "secondary digest" in source else ""),
        source=source,
        label_tokens=label_tokens,
    )


def same_model(published: str, measured: str) -> bool:
    """Whether two names are of one model; conf/model leaves out the `-instruct` of the published names."""
    return published.removesuffix("-instruct") == measured.removesuffix("-instruct")


def of_model(rows: pd.DataFrame, published: str) -> pd.Series:
    """Mask of the rows of a published model."""
    return rows["model"].map(partial(same_model, published)).astype(bool)


def of_models(paper: str, models: Iterable[str]) -> list[Figure]:
    """The figures of a paper that are of one of these models."""
    names = set(models)
    return [f for f in load(paper) if any(same_model(f.model, name) for name in names)]


def distance(figure: Figure, point: Point) -> float:
    """How far the point's context is from the published one, as |log ratio|."""
    if not figure.document_tokens or not point.context_tokens:
        return math.inf
    return abs(math.log(point.context_tokens / figure.document_tokens))


def is_beside(figure: Figure, measure: str, point: Point) -> bool:
    """Whether the published figure is of the same setting as the point, so that it may be drawn beside it."""
    if not same_model(figure.model, point.model):
        return False
    if measure == "paper":
        return figure.metric == "kv_memory" and figure.document_tokens == point.context_tokens
    if figure.metric != measure or point.document not in FAMILY.get(figure.document, ()):
        return False
    return scored_alike(figure, point) and (
        measure == "perplexity_delta" or distance(figure, point) <= SAME_LENGTH
    )


def scored_alike(figure: Figure, point: Point) -> bool:
    """Whether the paper's scorer gave the point's BERTScore: those of two scorers do not compare."""
    return not figure.metric.startswith("bertscore") or point.scorer == SCORER


def other_weights(figure: Figure, point: Point) -> str:
    """How the format of the point's weights differs from the authors'; "" if it does not."""
    theirs = WEIGHTS_OF.get(figure.model, "")
    if point.quantization == theirs:
        return ""
    return f"{point.quantization or 'unquantized'} weights, theirs {theirs or 'unquantized'}"


def memory_answer(figure: Figure, found: Sequence[Point]) -> Point | str:
    """The point with the figure's model, context and agents, or why there is none.

    Any document answers: bytes do not depend on what it says.
    """
    left = [p for p in found if p["paper"].value is not None or p["stored"].value is not None]
    return _narrowed(
        left,
        (f"{figure.model} was not run", lambda p: same_model(figure.model, p.model)),
        (f"recipe {figure.recipe} was not run", lambda p: p.recipe == figure.recipe),
        (
            f"{figure.document_tokens:,} tokens were not run",
            lambda p: p.context_tokens == figure.document_tokens,
        ),
        (f"{figure.n_agents} agents were not run", lambda p: p.n_agents == figure.n_agents),
        choose=lambda left: left[0],
    )


def quality_answer(figure: Figure, found: Sequence[Point]) -> Point | str:
    """The point with the figure's model, family of documents, context, scorer and agents, or why there is none."""
    return _narrowed(
        found,
        (f"{figure.model} was not run", lambda p: same_model(figure.model, p.model)),
        ("random weights have no quality", lambda p: p.weights != "random"),
        (
            f"no document like {figure.document} was run",
            lambda p: p.document in FAMILY[figure.document],
        ),
        (
            f"no context near {figure.document_tokens:,} tokens was run",
            lambda p: distance(figure, p) <= SAME_LENGTH,
        ),
        (f"it was not scored by {SCORER}", partial(scored_alike, figure)),
        choose=partial(nearest, figure),
    )


def _narrowed(
    found: Sequence[Point],
    *needs: tuple[str, Callable[[Point], bool]],
    choose: Callable[[list[Point]], Point | str],
) -> Point | str:
    """`choose` from the points that meet all needs, or the text of the first need that none meets."""
    left = list(found)
    for why, keep in needs:
        left = [p for p in left if keep(p)]
        if not left:
            return NOT_HERE + why
    return choose(left)


def nearest(figure: Figure, found: Sequence[Point]) -> Point | str:
    """The point with the figure's recipe and metric that is most like it.

    Its document's kind comes first, then the authors' format of weights, then the context. BERTScore is of the figure's
    number of agents; perplexity reads the pool once, however many agents there are.
    """
    left = [p for p in found if p.recipe == figure.recipe]
    if not left:
        return f"{NOT_HERE}recipe {figure.recipe} was not run"
    if figure.metric.startswith("bertscore"):
        left = [p for p in left if p.n_agents in (figure.n_agents, None)]
        if not left:
            return f"{NOT_HERE}{figure.n_agents} agents were not run"
    measured = [p for p in left if p[figure.metric].value is not None]
    if not measured:
        return NOT_HERE + left[0][figure.metric].note
    kin = FAMILY.get(figure.document, ())

    def unlikeness(point: Point) -> tuple:
        others = point.n_agents not in (figure.n_agents, None)
        unlike = point.document not in kin
        return unlike, other_weights(figure, point), distance(figure, point), others

    return min(measured, key=unlikeness)


def with_budget(rows: pd.DataFrame, bits: float | None) -> pd.Series:
    """Mask of the rows with this budget; None: those without a budget."""
    return rows["budget_bits"].isna() if bits is None else (rows["budget_bits"] - bits).abs() < SAME


def judged_runs(table: str, claim: str, run: str, rows: pd.DataFrame, judge: Judge) -> list[Claim]:
    """The verdict of every run on a claim about this `table` of QKVShare, or the command that would give one."""
    found = []
    for where, mine in parts(rows, [*RUN, "document"], sort=True):
        on = [f"{where['weights']} weights of {where['model']}", where["document"]]
        on = ", ".join(filter(None, [*on, where["device"], where["dtype"]]))
        verdict, said = judge(mine)
        found.append(Claim("qkvshare", table, verdict, f"{claim} (on {on})", said))
    return found or [Claim("qkvshare", table, NOT_MEASURED, claim, f"Not measured; run {run}.")]
