"""`python -m analysis report`: what results folders hold on one page, a file that needs nothing else.

What ran, findings, a section for each study with its tables and figures, and what produced it all. A content security
policy lets the page fetch nothing and run nothing but its own script. All that comes from results is escaped. The same
input gives the same bytes.
"""

import argparse
import base64
import errno
import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from analysis import catalog, render
from analysis.catalog import AGREES, INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from analysis.load import Results, load
from analysis.render import Column, Table, keys, span
from analysis.style import STYLE, Picture
from polykv.cellfile import write_atomically
from polykv.errors import PolyKVError
from polykv.naming import flat
from polykv.results import NOT_IDENTITY

TEMPLATES = Path(__file__).with_name("templates")
VERDICTS = {REPRODUCED: "yes", NOT_REPRODUCED: "no", INCONCLUSIVE: "open", AGREES: "computed"}
RUN = ["study", "model", "weights", "device", "dtype"]
LISTED = 12  # values of a setting
PIXELS = 120  # per inch of a figure: larger than on paper, where text has 8 points
# Without HTML, links or images of the text's own.
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")
MARKDOWN.disable(["link", "image", "autolink", "html_inline", "html_block", "reference"])


@dataclass(frozen=True)
class Shown:
    """A table: its caption with the legend, the headings and HTML of its sections, and its footnotes."""

    name: str
    caption: str
    sections: list[tuple[str, Markup]]
    notes: list[str]


@dataclass(frozen=True)
class Image:
    """A figure: `uri` holds it whole; `width` in CSS pixels."""

    name: str
    caption: str
    uri: str
    width: int


@dataclass(frozen=True)
class Section:
    """What one module of the analysis shows; `title` and `question` are those that its study declares."""

    name: str
    title: str
    question: str
    tables: list[Shown]
    images: list[Image]
    texts: list[Markup]


def main(argv: Sequence[str]) -> tuple[str, ...]:
    """Write the page and say where it is; the damaged cells."""
    description = "One HTML file with all that was measured."
    parser = argparse.ArgumentParser("python -m analysis report", description=description)
    several = "one page of all of them; of a cell in several, the newest copy counts"
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[Path("results/local")], metavar="FOLDER", help=several
    )  # fmt: skip
    default = "default: report.html in the first FOLDER"
    parser.add_argument("--out", type=Path, metavar="FILE", help=default)
    arguments = parser.parse_args(argv)
    file = arguments.out or arguments.results[0] / "report.html"
    results = load(*arguments.results)
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        file.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=file.parent).close()  # fail before drawing, if it cannot be written
        write_atomically(file, page(results))
    except OSError as error:
        raise PolyKVError(
            f"cannot write {file} ({error.strerror or error}); free space or give --out another file"
        ) from error
    print(f"report: {file} ({file.stat().st_size / 1e6:.1f} MB)")
    return results.damaged


def page(results: Results) -> str:
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
    said = catalog.claims(rows)
    judged = [claim for claim in said if claim.measured]
    return environment.get_template("report.html").render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        models=sorted(set(rows["model"])),
        damaged=results.damaged,
        ran=shown(what_ran(rows)),
        claims=judged,
        n_unmeasured=len(said) - len(judged),
        verdicts=VERDICTS,
        findings={
            heading: [Markup(MARKDOWN.renderInline(line)) for line in lines]
            for heading, lines in catalog.findings(rows).items()
        },
        sections=sections(results),
        produced=shown(produced_by(results)),
        settings=settings(results),
    )


def sections(results: Results) -> list[Section]:
    """One section per study that was run, then one per set of studies shown together."""
    by_studies: dict[tuple[str, ...], list[str]] = {}
    for name in catalog.modules():
        if (studies := catalog.studies_of(name)) != catalog.EVERY:
            by_studies.setdefault(studies, []).append(name)
    found = []
    for studies, modules in sorted(by_studies.items(), key=lambda item: len(item[0]) > 1):
        first = min(modules, key=lambda name: name not in studies)
        rows = results.rows
        title = (catalog.modules()[first].__doc__ or first).split(":")[0].splitlines()[0]
        declared = results.studies.get(studies[0], {}) if len(studies) == 1 else {}
        tables = map(render.measured, _made("TABLES", modules, rows).values())
        drawn = _made("FIGURES", modules, rows).items()
        section = Section(
            first,
            declared.get("title", title.rstrip(".")),
            declared.get("question", ""),
            [shown(table) for table in tables if table.rows],
            [image(name, made) for name, made in drawn if isinstance(made, Picture)],
            [_written(text) for text in _made("TEXTS", modules, rows).values()],
        )
        if section.tables or section.images or section.texts:
            found.append(section)
    return found


def _made(kind: str, modules: Sequence[str], rows: pd.DataFrame) -> dict[str, Any]:
    names = [name for own in modules for name in getattr(catalog.modules()[own], kind, {})]
    made = {name: catalog.pieces(kind)[name](rows) for name in names}
    return {name: piece for name, piece in made.items() if piece is not None}


def shown(table: Table) -> Shown:
    """The table as the page holds it."""
    found, notes = render.sections(table)
    parts = [(section.title, render.html(section)) for section in found]
    return Shown(table.name, table.about, parts, notes)


def image(name: str, drawn: Picture) -> Image:
    """The figure as SVG, the same bytes for the same rows; it is closed."""
    out, canvas = io.BytesIO(), drawn.canvas
    # Ids are hashes of the content and of this salt; by default they are random.
    with plt.style.context(STYLE), plt.rc_context({"svg.hashsalt": "polykv"}):
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(canvas)
    uri = "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()
    return Image(name, drawn.caption, uri, round(canvas.get_size_inches()[0] * PIXELS))


def _written(text: str) -> Markup:
    """Markdown as HTML without style attributes, which the page's policy does not allow."""
    tokens = MARKDOWN.parse(text)
    for token in tokens:
        token.attrs.pop("style", None)
        if token.type in ("heading_open", "heading_close"):
            token.tag = "h3"
    return Markup(MARKDOWN.renderer.render(tokens, MARKDOWN.options, {}))


def what_ran(rows: pd.DataFrame) -> Table:
    """A line for each study, model, weights, device and dtype."""
    lines = []
    for key, mine in rows.groupby(RUN, sort=True):
        spans = {name: span(mine[name].dropna(), ",") for name in ("context_tokens", "n_agents")}
        line = dict(zip(RUN, key, strict=True)) | spans
        line |= {"cells": mine["cell"].nunique(), "rows": len(mine)}
        line |= {"documents": _listed(sorted(set(mine["document"]) - {""}))}
        lines.append(line | {"dates": span(text[:10] for text in mine["created_at"])})
    columns = [*keys(*RUN, "documents"), Column("context_tokens", "context")]
    columns += [Column("n_agents", "agents")]
    columns += [Column(name, name) for name in ("cells", "rows", "dates")]
    caption = "What ran. A cell is one point of a sweep; a row is one observation"
    return Table("what_ran", caption, columns, lines)


def produced_by(results: Results) -> Table:
    """A line for each commit, machine and set of versions."""
    lines: dict[tuple, list[str]] = {}
    packages: dict[str, None] = {}
    for (study, _), cell in results.cells.items():
        versions = cell.provenance.get("versions") or {}
        packages |= dict.fromkeys(versions)
        about = {name: cell.provenance.get(name) for name in ("commit", "machine", "python")}
        key = tuple((name, str(value or "")) for name, value in (about | versions).items())
        lines.setdefault(key, []).append(study)
    found = [
        dict(key) | {"studies": _listed(sorted({*mine})), "cells": len(mine)}
        for key, mine in sorted(lines.items())
    ]
    columns = [*keys("commit", "studies"), Column("cells", "cells")]
    columns += keys("machine", "python", *packages)
    caption = (
        "Commits, machines and versions. A commit with +dirty: files of the checkout differed from it, so the code "
        "that ran is not that commit alone"
    )
    return Table("produced_by", caption, columns, found)


def settings(results: Results) -> dict[str, list[tuple[str, str]]]:
    """The resolved configs of each study's cells: each setting with its values."""
    values: dict[str, dict[str, dict[str, None]]] = {}
    for (study, _), cell in sorted(results.cells.items()):
        kept = {key: value for key, value in cell.config.items() if key not in NOT_IDENTITY}
        for name, value in flat(kept).items():
            said = value if isinstance(value, str) else json.dumps(value)
            values.setdefault(study, {}).setdefault(name, {})[said] = None
    return {
        study: [(name, _listed([*said])) for name, said in sorted(mine.items())]
        for study, mine in values.items()
    }


def _listed(values: list[str]) -> str:
    more = f" and {len(values) - LISTED} more" if len(values) > LISTED else ""
    return ", ".join(values[:LISTED]) + more


def _hash(text: str) -> str:
    """The hash of a text in the form that a content security policy takes."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
