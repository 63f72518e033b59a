"""Every table, figure and text of the analysis: a new experiment is one more topic here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
from analysis.figures import FIGURES as PAPER_FIGURES
from analysis.frontier import EXPERIMENTS as FRONTIER
from analysis.frontier_figures import FRONTIER_FIGURES
from analysis.frontier_tables import FRONTIER_TABLES
from analysis.handoff_figures import HANDOFF_FIGURES
from analysis.handoff_reduce import EXPERIMENTS as HANDOFF
from analysis.handoff_tables import HANDOFF_TABLES
from analysis.published_table import PUBLISHED_TABLES
from analysis.reduce import points
from analysis.tables import TABLES as PAPER_TABLES
from matplotlib.figure import Figure as Canvas

from analysis import capacity, compare, concurrency, decomposition, findings, published, separation
from analysis.render import Table

# From all rows; None where nothing of it was run, and of a figure also why it cannot be drawn.
TableOf = Callable[[pd.DataFrame], Table | None]
FigureOf = Callable[[pd.DataFrame], Canvas | str | None]
TextOf = Callable[[pd.DataFrame], str | None]
COMPARE = "compare"
NOTE = "polykv_memory_decomposition"
FINDINGS = "findings"


@dataclass(frozen=True)
class Text:
    """Markdown, printed with the tables named in `beside`."""

    of: TextOf
    beside: tuple[str, ...]


@dataclass(frozen=True)
class Topic:
    """What answers one question.

    Attributes:
        experiments: those whose rows no other topic shows.
        computed: their rows are arithmetic about a device, measured on none.
    """

    name: str
    title: str
    question: str
    tables: Mapping[str, TableOf]
    figures: Mapping[str, FigureOf] = field(default_factory=dict)
    texts: Mapping[str, Text] = field(default_factory=dict)
    experiments: Sequence[str] = ()
    computed: bool = False


def of_papers(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that no other topic shows."""
    others = [experiment for topic in TOPICS for experiment in topic.experiments]
    return rows[~rows["experiment"].isin(others)]


def measured(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the rows that are computed only."""
    computed = [
        experiment for topic in TOPICS if topic.computed for experiment in topic.experiments
    ]
    return rows[~rows["experiment"].isin(computed)]


def _paper_table(name: str) -> TableOf:
    def build(rows: pd.DataFrame) -> Table | None:
        mine = of_papers(rows)
        return None if mine.empty else PAPER_TABLES[name](mine, published.load("polykv"))

    return build


def _paper_figure(name: str) -> FigureOf:
    def build(rows: pd.DataFrame) -> Canvas | str | None:
        mine = of_papers(rows)
        return None if mine.empty else PAPER_FIGURES[name](points(mine), published.load("polykv"))

    return build


def _decomposition(rows: pd.DataFrame) -> str | None:
    mine = of_papers(rows)
    published_model = mine["model"].str.startswith("llama-3-8b")  # whose gigabytes the paper states
    if not published_model.any():
        return None
    return decomposition.text(points(mine), published.load("polykv"))


def _of_answers(of: Callable) -> Callable:
    """None where only experiments were run that answer neither paper."""

    def build(rows: pd.DataFrame) -> Table | str | None:
        answering = rows["experiment"].isin((*FRONTIER, *HANDOFF)).any()
        return of(rows) if answering or not of_papers(rows).empty else None

    return build


TOPICS = (
    Topic(
        COMPARE,
        "Recipes side by side",
        "What each recipe keeps, and what it costs on this model and text.",
        {COMPARE: lambda rows: compare.table(of_papers(rows))},
        {COMPARE: lambda rows: compare.figure(of_papers(rows))},
    ),
    Topic(
        "polykv",
        "PolyKV: memory and quality",
        "One document's cache, compressed once and read by many agents: what is kept, what is resident, "
        "and what it costs in perplexity and answers.",
        {name: _paper_table(name) for name in PAPER_TABLES},
        {name: _paper_figure(name) for name in PAPER_FIGURES},
        {NOTE: Text(_decomposition, ("polykv_memory",))},
    ),
    Topic(
        "concurrency",
        "Agents that decode together",
        "What a user pays in memory and time when all agents decode at once: private caches, copies of "
        "the pool, or one pool attended to in place.",
        concurrency.CONCURRENCY_TABLES,
        concurrency.CONCURRENCY_FIGURES,
        experiments=(concurrency.EXPERIMENT,),
    ),
    Topic(
        "capacity",
        "Capacity on paper",
        "How many agents and documents fit a device, how fast a step can be, and where sharing stops "
        "paying: computed from a model's geometry, a recipe's stored bits and a device's data sheet.",
        capacity.CAPACITY_TABLES,
        capacity.CAPACITY_FIGURES,
        experiments=(capacity.EXPERIMENT,),
        computed=True,
    ),
    Topic(
        "frontier",
        "Recipes at equal stored bits",
        "Which recipe loses least for the bytes that it really keeps, and where the damage is.",
        FRONTIER_TABLES,
        FRONTIER_FIGURES,
        {FINDINGS: Text(_of_answers(findings.text), tuple(FRONTIER_TABLES))},
        experiments=FRONTIER,
    ),
    Topic(
        "separation",
        "What a recipe costs in answers",
        "Questions and problems of a fixed evaluation set, answered from each recipe's cache.",
        separation.SEPARATION_TABLES,
        separation.SEPARATION_FIGURES,
        experiments=(separation.EXPERIMENT,),
    ),
    Topic(
        "handoff",
        "QKVShare: handing a cache on",
        "A card of mixed precision in place of the text: time to first token, accuracy over several "
        "handoffs, and which signal earns its bits.",
        HANDOFF_TABLES,
        HANDOFF_FIGURES,
        experiments=HANDOFF,
    ),
    Topic(
        "published",
        "Every published figure",
        "Each number that the papers state, beside the measured one or beside the reason why there is "
        "none.",
        {name: _of_answers(of) for name, of in PUBLISHED_TABLES.items()},
    ),
)  # fmt: skip


def table_of(experiment: str) -> str:
    """The table in which an experiment's own rows are looked at first."""
    owned = any(experiment in topic.experiments for topic in TOPICS)
    return experiment if owned and experiment in TABLES else COMPARE


def names_of(experiment: str) -> list[str]:
    """The tables, figures and texts in which an experiment's rows are shown, and those that rows of any answer."""
    own = [topic for topic in TOPICS if experiment in topic.experiments]
    shown = own or [topic for topic in TOPICS if not topic.experiments]
    shown += [topic for topic in TOPICS if topic.name == "published" and topic not in shown]
    names = [name for t in shown for name in (*t.texts, *t.tables, *t.figures)]
    return list(dict.fromkeys([*names, FINDINGS]))


TABLES: dict[str, TableOf] = {name: of for topic in TOPICS for name, of in topic.tables.items()}
FIGURES: dict[str, FigureOf] = {name: of for topic in TOPICS for name, of in topic.figures.items()}
TEXTS: dict[str, Text] = {name: text for topic in TOPICS for name, text in topic.texts.items()}
NAMES = tuple(
    dict.fromkeys(n for topic in TOPICS for n in (*topic.texts, *topic.tables, *topic.figures))
)
