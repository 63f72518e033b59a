"""What the page shows: of each topic its main table, its figures and the tables of detail; and the texts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
from analysis.captions import caption
from analysis.reduce import Value
from analysis.registry import Topic
from analysis.report_figures import Image, image
from analysis.report_tables import Shown, shown
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.figure import Figure as Canvas

from analysis.render import Row, Table, measured

PUBLISHED = "published"  # the topic that holds the papers' own figures


@dataclass(frozen=True)
class Written:
    """A text of the analysis as HTML; its first heading is the title."""

    name: str
    title: str
    html: Markup


@dataclass(frozen=True)
class Part:
    """One topic: `tables` holds the main one first, the rest are folded."""

    topic: Topic
    tables: list[Shown]
    figures: list[Image]


def parts(topics: Sequence[Topic], rows: pd.DataFrame) -> list[Part]:
    """The topics that were run, in their order, without the published figures."""
    found = [_part(topic, rows) for topic in topics if topic.name != PUBLISHED]
    return [part for part in found if part.tables or part.figures]


def texts(topics: Sequence[Topic], rows: pd.DataFrame) -> list[Written]:
    """What is said in sentences, about all topics."""
    entries = {name: entry for topic in topics for name, entry in topic.texts.items()}
    found = [_written(name, text) for name, entry in entries.items() if (text := entry.of(rows))]
    return [text for text in found if text.html]


def published(topics: Sequence[Topic], rows: pd.DataFrame) -> list[Shown]:
    """Every published figure, in the tables that have at least one of ours beside theirs."""
    builders = [of for topic in topics if topic.name == PUBLISHED for of in topic.tables.values()]
    tables = [table for of in builders if (table := of(rows))]
    return [shown(table) for table in tables if measured(table).rows]


def _part(topic: Topic, rows: pd.DataFrame) -> Part:
    tables = [table for of in topic.tables.values() if (table := of(rows))]
    drawn = {name: of(rows) for name, of in topic.figures.items()}
    return Part(
        topic,
        [shown(_run_here(table)) for table in tables if measured(table).rows],
        [
            image(canvas, name, caption(name, rows))
            for name, canvas in drawn.items()
            if isinstance(canvas, Canvas)
        ],
    )


def _run_here(table: Table) -> Table:
    """Without the lines that only repeat what was published; those with a reason for a missing value stay."""

    def only_published(row: Row) -> bool:
        had = {name for name, v in row.items() if isinstance(v, Value) and v.value is not None}
        return had == {"published"}

    return replace(table, rows=[row for row in table.rows if not only_published(row)])


def _written(name: str, text: str) -> Written:
    """Markdown without HTML, links or images of its own; headings stand below those of the page."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.disable(["link", "image", "autolink", "html_inline", "html_block", "reference"])
    markdown.add_render_rule(
        "table_open",
        lambda *_: (
            '<div class="wide"><div class="box" tabindex="0" role="group" aria-label="Table"><table>'
        ),
    )
    markdown.add_render_rule("table_close", lambda *_: "</table></div></div>")
    heading, _, body = text.partition("\n")
    tokens = markdown.parse(_without_claims(body))
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{int(token.tag[1]) + 1}"
        elif token.type in ("th_open", "td_open"):  # the policy allows no style attributes
            right = token.attrs.pop("style", "") == "text-align:right"
            token.attrs["class"] = "number" if right else "words"
    html = markdown.renderer.render(tokens, markdown.options, {})
    return Written(name, heading.lstrip("# "), Markup(html))


def _without_claims(text: str) -> str:
    """They have a section of their own."""
    sections = re.split(r"(?m)^(?=## )", text)
    return "".join(part for part in sections if not re.match(r"## .*\bclaims\n", part))
