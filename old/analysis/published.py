"""The published figures, and which measured point answers which of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from analysis.apart import without_settings
from analysis.reduce import BASELINE, Point, Value

from polykv.errors import PolyKVError

FILE = Path(__file__).resolve().parent.parent / "results" / "published" / "published.csv"
# Our documents that stand for a published one: the same text, or one of the same kind and length.
FAMILY = {
    "wikitext-2": ("wikitext2", "wikitext2_raw"),
    "apollo-11": ("moon_landing",),
    "arpanet": ("packet_networks",),
}
RECIPE_OF = {"no_sharing": BASELINE, "baseline": BASELINE, "polykv": "polykv"}
# Our policy and budget that stand for one of QKVShare. Its cards are read as 4 bits, topology-aware.
CONTROLLER_OF: dict[str, tuple[str, float | None]] = {
    "fp16_share": ("fp16", None),
    "fp16_copy": ("fp16", None),
    "reprefill": ("reprefill", None),
    "qkvshare": ("topology", 4),
    "q4_reload": ("uniform", 4),
} | {
    f"{name}_q{bits}": (name, bits) for name in ("uniform", "local", "topology") for bits in (4, 8)
}
# How the authors scored answers and loaded weights (experiment log of PolyKV's repository); others: as trained.
SCORER = "roberta-large"
WEIGHTS_OF = {"llama-3-8b-instruct": "nf4"}
SAME_LENGTH = 0.1  # contexts within this relative distance count as the published one
NOT_HERE = "not measured here: "


@dataclass(frozen=True)
class Figure:
    """One published number. `n_agents` and token counts are None where the source names none.

    `at`: handoffs of QKVShare's accuracy, its label of the context (1K) of its times, else empty.
    `label_tokens`: the tokens that the label stands for. They are those that the file states for it
    anywhere, since the times are of one run: the stages at 3,877 tokens add up to the abstract's time at 8K.
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


def load(paper: str, file: Path = FILE) -> list[Figure]:
    """All figures of one paper, in the file's order; those from a secondary digest carry a note.

    Raises:
        PolyKVError: the file is not there.
    """
    if not file.is_file():
        raise PolyKVError(f"no published figures at {file}; restore it with `git checkout`")
    rows = pd.read_csv(file, dtype=str, keep_default_na=False)
    rows = rows[rows["paper"] == paper]
    labelled = rows[rows["hop_or_context"].str.endswith("K")]
    tokens = {label: 1024 * int(label.removesuffix("K")) for label in labelled["hop_or_context"]}
    stated = labelled[labelled["document_tokens"] != ""]
    tokens |= dict(
        zip(stated["hop_or_context"], stated["document_tokens"].astype(int), strict=True)
    )
    return [_figure(row, tokens.get(row["hop_or_context"])) for _, row in rows.iterrows()]


def _figure(row: pd.Series, label_tokens: int | None) -> Figure:
    note = row["source"] if "secondary digest" in row["source"] else ""
    return Figure(
        paper=row["paper"],
        table=row["figure_or_table"],
        model=row["model"],
        document=row["document"],
        document_tokens=_count(row["document_tokens"]),
        prefilled_tokens=_count(row["prefilled_tokens"]),
        n_agents=_count(row["n_agents"]),
        policy=row["policy"],
        at=row["hop_or_context"],
        metric=row["metric"],
        value=Value(float(row["value"]), note=note),
        unit=row["unit"],
        source=row["source"],
        label_tokens=label_tokens,
    )


def _count(text: str) -> int | None:
    return int(text) if text else None


def same_model(published: str, measured: str) -> bool:
    """conf/model leaves out the `-instruct` of the published names; what runs are told apart by is in brackets."""
    bare = without_settings(measured)
    return published.removesuffix("-instruct") == bare.removesuffix("-instruct")


def distance(figure: Figure, point: Point) -> float:
    """How far the point's context is from the published one, as |log ratio|."""
    if not figure.document_tokens or not point.context_tokens:
        return math.inf
    return abs(math.log(point.context_tokens / figure.document_tokens))


def is_beside(figure: Figure, measure: str, point: Point) -> bool:
    """Whether the published figure may be drawn among points like this one: nothing else compares."""
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
    """How the format of a point's weights differs from the one that the authors ran, or nothing."""
    ours, theirs = point.dtype.partition(", weights ")[2], WEIGHTS_OF.get(figure.model, "")
    if ours == theirs:
        return ""
    return f"{ours or 'unquantized'} weights, theirs {theirs or 'unquantized'}"


def memory_answer(figure: Figure, points: Sequence[Point]) -> Point | str:
    """The point with the figure's model, context and agents, or why there is none.

    Any document answers: bytes do not depend on what it says.
    """
    left = [p for p in points if p["paper"].value is not None or p["stored"].value is not None]
    for why, keep in (
        (f"{figure.model} was not run", lambda p: same_model(figure.model, p.model)),
        (f"recipe {figure.recipe} was not run", lambda p: p.recipe == figure.recipe),
        (
            f"{figure.document_tokens:,} tokens were not run",
            lambda p: p.context_tokens == figure.document_tokens,
        ),
        (f"{figure.n_agents} agents were not run", lambda p: p.n_agents == figure.n_agents),
    ):
        left = [p for p in left if keep(p)]
        if not left:
            return NOT_HERE + why
    return left[0]


def quality_answer(figure: Figure, points: Sequence[Point]) -> Point | str:
    """The point with the figure's model, family of documents, context, scorer and agents, or why none."""
    left = list(points)
    for why, keep in (
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
    ):
        left = [p for p in left if keep(p)]
        if not left:
            return NOT_HERE + why
    return nearest(figure, left)


def nearest(figure: Figure, points: Sequence[Point]) -> Point | str:
    """The point with the figure's recipe, metric and agents (if they matter), nearest in context.

    Of several, one whose weights are in the authors' format.
    """
    left = [p for p in points if p.recipe == figure.recipe]
    if not left:
        return f"{NOT_HERE}recipe {figure.recipe} was not run"
    with_agents = [p for p in left if p.n_agents in (figure.n_agents, None)]
    if not with_agents and figure.metric.startswith("bertscore"):
        return f"{NOT_HERE}{figure.n_agents} agents were not run"
    left = with_agents or left  # perplexity reads the pool once, however many agents there are
    measured = [p for p in left if p[figure.metric].value is not None]
    if not measured:
        return NOT_HERE + left[0][figure.metric].note
    kin = FAMILY.get(figure.document, ())
    return min(
        measured,
        key=lambda p: (other_weights(figure, p), p.document not in kin, distance(figure, p)),
    )
