"""A reader of the report page, and results folders for it. All numbers are made up."""

import base64
from html.parser import HTMLParser
from xml.etree import ElementTree

from analysis_rows import compare_cell, quickstart

from analysis.__main__ import main

HOSTILE = (
    '<script>alert(1)</script>"><img src=x onerror=alert(1)> ![i](https://evil.example/i.png) '
    "[l](javascript:alert(1)) {{ 7 * 7 }} </style> &amp;"
)


def small():
    return quickstart((512,), (3, 15), ("full", "polykv"))


def unsafe():
    """Cells with hostile text wherever a row or a config holds text."""
    about = {"model": f"m {HOSTILE}", "document": f"d {HOSTILE}"}
    made = [compare_cell(512, 3, recipe, name=recipe) for recipe in ("full", "polykv")]
    made[1][3].add("kl", None, "nats", why=f"reason {HOSTILE}", statistic="p99")
    for one in made:
        for row in one[3]:
            row.update(about)
    made[1][2].update({"model": {"path": HOSTILE, HOSTILE: 1}})
    return made


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
    start = "data:image/svg+xml;base64,"
    uris = [uri for uri in page.all("src") if uri.startswith(start)]
    return [ElementTree.fromstring(base64.b64decode(uri.removeprefix(start))) for uri in uris]


def report(*folders, out):
    """The exit code and the page."""
    code = main(["report", "--results", *map(str, folders), "--out", str(out)])
    return code, out.read_text(encoding="utf-8")
