"""Results folders for the report page, and a reader of it. All numbers are made up."""

from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

from analysis_rows import quickstart

from analysis.__main__ import main
from polykv.cellfile import compose, write_atomically

HOSTILE = (
    '<script>alert(1)</script>"><img src=x onerror=alert(1)> ![i](https://evil.example/i.png) '
    "[l](javascript:alert(1)) {{ 7 * 7 }} </style> &amp;"
)


def write(root, rows, config=None):
    """Whole cells as polykv.results.Store writes them, but of a commit and a time that stay the same."""
    by_cell = {}
    for row in rows:
        by_cell.setdefault((row["experiment"], row["cell"]), []).append(row)
    for (experiment, cell), mine in by_cell.items():
        settled = {"recipe": {"name": mine[0]["recipe"]}, "seed": 0, "results_dir": str(root)}
        provenance = {"commit": mine[0]["commit"], "created_at": mine[0]["created_at"]}
        provenance |= {"machine": "Linux x86_64, 2 cores", "python": "3.11.7"}
        provenance |= {"versions": {"torch": "2.13.0", "bert-score": None}}
        path = root / "cells" / experiment / f"{cell}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            path, compose(experiment, cell, settled | (config or {}), provenance, mine)
        )
    return root


def small():
    return quickstart((512,), (3, 15), ("full", "polykv"))


def unsafe():
    """The small rows, with hostile text wherever a row or a config holds text."""
    rows = small()
    for row in rows:
        row |= {"model": f"m {HOSTILE}", "document": f"d {HOSTILE}", "commit": f"c {HOSTILE}"}
        if row["metric"] == "bertscore_floor":
            row |= {"value": None, "note": f"reason {HOSTILE}"}
    return rows


class Page(HTMLParser):
    """The elements with their attributes, and the text, of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.inside, self.text = [], [], {"style": "", "script": "", "": ""}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass

    def handle_data(self, data):
        place = self.inside[-1] if self.inside else ""
        self.text[place if place in ("style", "script") else ""] += data

    def all(self, attribute):
        return [attrs[attribute] for _, attrs in self.elements if attrs.get(attribute) is not None]


def drawings(page):
    """The figures, parsed."""
    start = "data:image/svg+xml,"
    uris = [uri for uri in page.all("src") if uri.startswith(start)]
    return [ElementTree.fromstring(unquote(uri.removeprefix(start))) for uri in uris]


def report(*folders, out):
    """The exit code and the page."""
    code = main(["report", "--results", *map(str, folders), "--out", str(out)])
    return code, out.read_text(encoding="utf-8")
