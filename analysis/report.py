"""`python -m analysis report`: all that results folders hold on one page, a file that needs nothing else.

The page holds its style, script, tables and figures; a content security policy lets it fetch nothing and
run nothing but its own script. All that comes from results is escaped. The same input gives the same bytes.
"""

import argparse
import base64
import errno
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from analysis import report_origin
from analysis.captions import caption
from analysis.claims import AGREES, NO, OPEN, YES, Claim, claims
from analysis.load import Results
from analysis.registry import TOPICS, Topic, measured
from analysis.report_figures import Image, image
from analysis.report_tables import Shown, shown
from polykv.cellfile import write_atomically
from polykv.errors import PolyKVError

COMMAND = "report"
TEMPLATES = Path(__file__).with_name("templates")
VERDICTS = {YES: "yes", NO: "no", OPEN: "open", AGREES: "computed"}
SPELLED = {"polykv": "PolyKV", "qkvshare": "QKVShare", "kv": "KV", "ttft": "TTFT"}
SPELLED |= {"bertscore": "BERTScore"}
PAPERS = {"polykv": "PolyKV (arXiv 2604.24971)", "qkvshare": "QKVShare (arXiv 2605.03884)"}


@dataclass(frozen=True)
class Written:
    """A text of the analysis as HTML; its first heading is the title."""

    name: str
    title: str
    html: Markup


@dataclass(frozen=True)
class Part:
    """What a topic has to show; `absent` says why a figure is not drawn."""

    topic: Topic
    texts: list[Written]
    figures: list[Image]
    tables: list[Shown]
    absent: list[str]


def main(argv: Sequence[str]) -> tuple[str, ...]:
    """Write the page and say where it is; the damaged cells.

    Raises:
        PolyKVError: a folder holds no readable row, or the page cannot be written.
    """
    parser = argparse.ArgumentParser(
        f"python -m analysis {COMMAND}", description="One HTML file with all that was measured."
    )
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[Path("results/local")],
        metavar="FOLDER",
        help="one page of all of them; of a cell in several, the newest copy counts",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report.html in the first FOLDER"
    )
    arguments = parser.parse_args(argv)
    file = arguments.out or arguments.results[0] / "report.html"
    results, origins = report_origin.union(arguments.results)
    try:
        _check_writable(file)
        write_atomically(file, page(results, origins))
    except OSError as error:
        raise PolyKVError(
            f"cannot write {file} ({error.strerror or error}); free space or give --out another file"
        ) from error
    print(f"report: {file} ({file.stat().st_size / 1e6:.1f} MB)")
    return results.damaged


def _check_writable(file: Path) -> None:
    """Fail before all is drawn rather than after."""
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    file.parent.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=file.parent).close()


def page(results: Results, origins: Sequence[report_origin.Origin]) -> str:
    """The whole page as HTML."""
    rows = results.rows
    style, script = ((TEMPLATES / name).read_text("utf-8") for name in ("report.css", "report.js"))
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["title_of"] = _title
    said = claims(rows)
    return environment.get_template("report.html").render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        facts=_facts(measured(rows)),
        damaged=results.damaged,
        unsealed=results.unsealed,
        ran=shown(report_origin.what_ran(rows, measured(rows))),
        papers={PAPERS.get(paper, paper): _of_paper(said, paper) for paper in _papers(said)},
        counts=Counter(claim.verdict for claim in said),
        verdicts=VERDICTS,
        parts=[part for topic in TOPICS if (part := _part(topic, rows))],
        produced=shown(report_origin.produced_by(origins)),
        settings=report_origin.settings(origins),
    )


def _title(name: str) -> str:
    """recipe_frontier -> Recipe frontier."""
    title = " ".join(SPELLED.get(word, word) for word in name.split("_"))
    return title[0].upper() + title[1:]


def _hash(text: str) -> str:
    """As a content security policy names the one text that it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _facts(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """At the top of the page; nothing of what is computed only."""
    models = sorted(set(zip(rows["model"], rows["weights"], strict=True)))
    dates = sorted({text[:10] for text in rows["created_at"] if text})
    return [
        ("experiments", f"{rows['experiment'].nunique():,}"),
        ("cells", f"{len(rows[report_origin.COPY].drop_duplicates()):,}"),
        ("measured values", f"{rows['value'].notna().sum():,}"),
        ("devices", ", ".join(sorted(set(rows["device"]) - {""})) or "not stated"),
        ("measured", " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "undated"),
        ("models (weights)", ", ".join(f"{model} ({weights})" for model, weights in models)),
    ]


def _papers(said: Sequence[Claim]) -> list[str]:
    return list(dict.fromkeys(claim.paper for claim in said))


def _of_paper(said: Sequence[Claim], paper: str) -> list[Claim]:
    return [claim for claim in said if claim.paper == paper]


def _part(topic: Topic, rows: pd.DataFrame) -> Part | None:
    """None where nothing of the topic was run."""
    texts = [
        _written(name, _without_claims(text))
        for name, entry in topic.texts.items()
        if (text := entry.of(rows))
    ]
    tables = [shown(table) for build in topic.tables.values() if (table := build(rows))]
    figures, absent = [], []
    for name, build in topic.figures.items():
        canvas = build(rows)
        if isinstance(canvas, str):
            absent.append(f"{_title(name)}: {canvas}")
        elif canvas:
            figures.append(image(canvas, name, caption(name, rows)))
    return Part(topic, texts, figures, tables, absent) if texts or tables or figures else None


def _without_claims(text: str) -> str:
    """They have a section of their own."""
    sections = re.split(r"(?m)^(?=## )", text)
    return "".join(part for part in sections if not re.match(r"## .*\bclaims\n", part))


def _written(name: str, text: str) -> Written:
    """Markdown without HTML, links or images of its own; headings stand below those of the page."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.disable(["link", "image", "autolink", "html_inline", "html_block", "reference"])
    markdown.add_render_rule(
        "table_open",
        lambda *_: '<div class="box" tabindex="0" role="group" aria-label="Table"><table>',
    )
    markdown.add_render_rule("table_close", lambda *_: "</table></div>")
    heading, _, body = text.partition("\n")
    tokens = markdown.parse(body)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{int(token.tag[1]) + 2}"
        elif token.type in ("th_open", "td_open"):  # the policy allows no style attributes
            right = token.attrs.pop("style", "") == "text-align:right"
            token.attrs["class"] = "number" if right else "words"
    html = markdown.renderer.render(tokens, markdown.options, {})
    return Written(name, heading.lstrip("# "), Markup(html))
