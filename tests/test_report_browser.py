"""The report page in a browser: it sorts, fits a phone and a laptop, and asks for nothing."""

import shutil

import pytest
from analysis_rows import write
from report_pages import small

from analysis import catalog
from analysis.__main__ import main
from analysis.render import Column, Table, fixed
from analysis.statistics import Value

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason=f"no browser: none of {', '.join(NAMES)}"),
]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
PHONE, LAPTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 800}
ROWS = (
    ("b", Value(1234.5, 1000, 2000), "1,024"),
    ("C", Value(None, note="not run"), "per doubling"),
    ("a", Value(99.25, 90, 100), "512"),
    ("d", Value(-3e-7, -1, 1), "16,384"),
    ("E", Value(None, note="not run"), None),
)


def made_up(rows):
    """A table in which to sort is not easy, and which is wider than a phone."""
    names = ("name", "value", "context")
    columns = [
        Column("name", "name", key=True),
        Column("value", "value [95 %]", fixed(2), interval=True),
        Column("context", "context"),
        *(Column(f"wide{i}", f"a_further_column_of_its_own_{i}") for i in range(6)),
    ]
    lines = [dict(zip(names, row, strict=True)) for row in ROWS]
    lines = [line | {f"wide{i}": i for i in range(6)} for line in lines]
    return Table("made_up", "Made up.", columns, lines)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("results"), small())
    with pytest.MonkeyPatch.context() as patch:
        compare = catalog.modules()["compare"]
        patch.setattr(compare, "TABLES", {"made_up": made_up, **compare.TABLES})
        patch.setattr("analysis.render.measured", lambda table: table)
        catalog.pieces.cache_clear()
        main(["report", "--results", str(folder)])
    catalog.pieces.cache_clear()
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, file):
    """(page, what the console said, what was asked for), by size and scheme."""
    contexts = []

    def open_page(size=LAPTOP, **settings):
        contexts.append(browser.new_context(viewport=size, **settings))
        page, said, asked = contexts[-1].new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        return page, said, asked

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, LAPTOP], ids=str)
def test_fits_without_errors_or_requests(opened, file, size, scheme):
    page, said, asked = opened(size, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    wide = "[...document.querySelectorAll('.box')].some(b => b.scrollWidth > b.clientWidth)"
    assert page.evaluate(wide)  # and those that are too wide scroll by themselves
    drawn = page.evaluate("[...document.querySelectorAll('img')].map(i => i.naturalWidth)")
    assert len(drawn) >= 3 and all(width > 100 for width in drawn)
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {file.as_uri()}


@pytest.mark.parametrize(
    ("number", "up", "down"),
    [
        (1, ["a", "b", "C", "d", "E"], ["E", "d", "C", "b", "a"]),
        (2, ["-3", "99", "1,", "–", "–"], ["1,", "99", "-3", "–", "–"]),
        (3, ["512", "1,024", "16,384", "per doubling", "–"], ["per doubling", "16,384", "1,024", "512", "–"]),
    ],
)  # fmt: skip
def test_tables_sort_up_down_and_back(opened, number, up, down):
    page, said, _ = opened()
    head = page.locator(f"#table-made_up th:nth-child({number})")
    cells = page.locator(f"#table-made_up tbody td:nth-child({number})")
    before = cells.all_inner_texts()
    for order, expected in (("ascending", up), ("descending", down)):
        head.get_by_role("button").press("Enter")
        assert head.get_attribute("aria-sort") == order
        shown = cells.all_inner_texts()
        assert all(text.startswith(start) for text, start in zip(shown, expected, strict=True))
    head.get_by_role("button").click()
    assert cells.all_inner_texts() == before and said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(opened, scheme):
    """The contrast that WCAG AA asks for, 4.5 to 1."""
    page, *_ = opened(color_scheme=scheme)
    pairs = page.evaluate(
        """[...document.querySelectorAll("h1, h2, p, dt, dd, td, th button, a, li, figcaption")].map(e => {
            let ground = e;
            while (ground && /, 0\\)$/.test(getComputedStyle(ground).backgroundColor))
                ground = ground.parentElement;
            return [e.className, getComputedStyle(e).color, getComputedStyle(ground || document.body).backgroundColor];
        })"""
    )

    def luminance(colour):
        parts = [int(part) / 255 for part in colour[4:-1].split(",")]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert len(pairs) > 50
    for name, ink, ground in set(map(tuple, pairs)):
        low, high = sorted((luminance(ink), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ink, ground)
