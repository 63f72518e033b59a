"""The report page in a browser: it sorts, zooms, fits a phone and a laptop, and asks for nothing."""

import shutil

import pytest
from analysis.reduce import Value
from analysis.registry import TOPICS, Topic
from report_pages import small, write

from analysis import report
from analysis.render import Column, Table, fixed

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(not BROWSER, reason=f"no browser: none of {', '.join(NAMES)}")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
PHONE, LAPTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 800}
ROWS = (
    ("b", Value(1234.5, 1000, 2000), "1,024", "3-6"),
    ("C", Value(None, note="not run"), "per doubling", "1-2"),
    ("a", Value(99.25, 90, 100), "512", "10-12"),
    ("d", Value(-3e-7, -1, 1), "16,384", "2"),
    ("E", Value(None, note="not run"), None, "none"),
)


def made_up(rows):
    """A table in which to sort is not easy, and which is wider than a phone."""
    names = ("name", "value", "context", "rank")
    columns = [
        Column("name", "name", key=True),
        Column("value", "value [95 %]", fixed(2), interval=True),
        *(Column(name, name) for name in names[2:]),
        *(Column(f"wide{i}", f"a_further_column_of_its_own_{i}") for i in range(6)),
    ]
    lines = [dict(zip(names, row, strict=True)) for row in ROWS]
    lines = [line | {f"wide{i}": i for i in range(6)} for line in lines]
    return Table("made_up", "Made up.", columns, lines)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("results"), small())
    topic = Topic("hard", "Hard to sort", "Does it sort?", {"made_up": made_up})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "TOPICS", (*TOPICS, topic))
        report.main(["--results", str(folder)])
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
@pytest.mark.parametrize("size", [PHONE, {"width": 320, "height": 640}, LAPTOP], ids=str)
def test_fits_without_errors_or_requests(opened, file, size, scheme):
    page, said, asked = opened(size, color_scheme=scheme)
    for name in ("polykv", "hard", "claims", "provenance"):
        page.locator(f"#{name}").scroll_into_view_if_needed()
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert page.evaluate("scrollX") == 0
    wide = (
        "[...document.querySelectorAll('.box')].filter(b => b.scrollWidth > b.clientWidth).length"
    )
    assert page.evaluate(wide) > 0  # and those that are too wide scroll by themselves
    sizes = page.evaluate(
        "[...document.querySelectorAll('figure img')].map(i => [i.naturalWidth, i.naturalHeight])"
    )
    assert len(sizes) >= 3 and all(width > 100 and height > 100 for width, height in sizes)
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {file.as_uri()}


def column(page, number):
    """The texts of a column as they stand, without marks and intervals."""
    cells = page.locator(f"#table-made_up tbody td:nth-child({number})")
    return cells.evaluate_all("cells => cells.map(cell => cell.firstChild.data.trim())")


@pytest.mark.parametrize(
    ("number", "up", "down"),
    [
        (1, ["a", "b", "C", "d", "E"], ["E", "d", "C", "b", "a"]),
        (2, ["-3e-07", "99.25", "1,234.50", "–", "–"], ["1,234.50", "99.25", "-3e-07", "–", "–"]),
        (3, ["512", "1,024", "16,384", "per doubling", "–"], ["per doubling", "16,384", "1,024", "512", "–"]),
        (4, ["2", "1-2", "3-6", "10-12", "none"], ["none", "10-12", "3-6", "1-2", "2"]),
    ],
)  # fmt: skip
def test_tables_sort_up_down_and_back(opened, number, up, down):
    page, said, _ = opened()
    head = page.locator(f"#table-made_up th:nth-child({number})")
    before = column(page, number)
    assert head.get_attribute("aria-sort") == "none"
    for order, expected in (("ascending", up), ("descending", down), ("none", before)):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == order
        assert column(page, number) == expected
    assert said == []


def test_every_table_sorts_by_keyboard_and_one_column_at_a_time(opened):
    page, said, _ = opened()
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true })")
    heads = page.locator(".box:has(button)").evaluate_all("boxes => boxes.length")
    assert heads > 5
    for place in range(heads):
        table = page.locator(".box:has(button)").nth(place)
        buttons = table.get_by_role("button")
        buttons.nth(0).focus()
        page.keyboard.press("Enter")
        buttons.nth(1).focus()
        page.keyboard.press("Space")
        orders = table.locator("th").evaluate_all("heads => heads.map(head => head.ariaSort)")
        assert orders[1] == "ascending" and set(orders) == {"ascending", "none"}
        numbers = table.locator("tbody tr").evaluate_all(
            "rows => rows.map(row => row.cells[1].dataset.key).filter(Boolean).map(Number)"
        )
        assert numbers == sorted(numbers)
    assert said == []


@pytest.mark.parametrize("size", [PHONE, LAPTOP], ids=str)
def test_a_table_that_goes_on_says_so_until_its_end_is_seen(opened, size):
    page, said, _ = opened(size)
    wide, hint = page.locator("#table-made_up .wide"), page.locator("#table-made_up .scroll")
    box = wide.locator(".box")
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    n_hidden = box.evaluate(
        """box => [...box.querySelectorAll("th")].filter(
            head => head.getBoundingClientRect().right > box.getBoundingClientRect().right + 2).length"""
    )
    assert n_hidden > 0 and str(n_hidden) in hint.inner_text()
    assert wide.get_attribute("data-right") is not None
    box.evaluate("box => { box.scrollLeft = box.scrollWidth }")
    page.wait_for_function("!document.querySelector('#table-made_up .wide[data-right]')")
    assert box.locator("th.pinned").bounding_box()["x"] >= box.bounding_box()["x"]
    assert said == []


def test_only_tables_that_go_on_say_so(opened):
    page, *_ = opened()
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true })")
    page.wait_for_timeout(200)
    pairs = page.locator(".box").evaluate_all(
        """boxes => boxes.map(box => [
            box.scrollWidth > box.clientWidth, box.parentElement.querySelector(".scroll").checkVisibility()
        ])"""
    )
    assert {tuple(pair) for pair in pairs} == {(True, True), (False, False)}


def test_a_link_unfolds_what_it_leads_to(opened):
    page, said, _ = opened()
    table = page.locator("#table-polykv_quality")
    assert not table.locator(".box").first.is_visible()
    page.locator("nav a[href='#polykv']").click()
    page.locator("nav a[href='#table-polykv_quality']").click()
    table.locator(".box").first.wait_for(state="visible")
    assert said == []


@pytest.mark.parametrize("size", [PHONE, LAPTOP], ids=str)
def test_figure_zooms_by_click_and_by_enter_and_escape_closes(opened, size):
    page, said, _ = opened(size)
    zoom, dialog = page.locator("#figure-memory_agents .zoom"), page.locator("dialog")
    shown = zoom.locator("img").bounding_box()["width"]
    for enlarge in (zoom.click, lambda: zoom.press("Enter")):
        enlarge()
        assert dialog.is_visible()
        image = dialog.locator("img")
        assert image.evaluate("image => image.complete && image.naturalWidth") > 100
        assert image.bounding_box()["width"] > 1.1 * shown
        caption = page.locator("#figure-memory_agents figcaption").inner_text()
        assert dialog.locator("p").inner_text() == caption and len(caption) > 50
        page.keyboard.press("Escape")
        assert not dialog.is_visible()
        assert page.evaluate("document.activeElement.className") == "zoom"
    zoom.click()
    dialog.get_by_role("button").click()
    assert not dialog.is_visible() and said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(opened, scheme):
    """The contrast that WCAG AA asks for, 4.5 to 1."""
    page, *_ = opened(color_scheme=scheme)
    pairs = page.evaluate(
        """[...document.querySelectorAll("h1, h2, p, dt, dd, td, th button, .badge, a, i, li")].map(e => {
            let ground = e;
            while (ground && /, 0\\)$/.test(getComputedStyle(ground).backgroundColor))
                ground = ground.parentElement;
            return [e.className, getComputedStyle(e).color, getComputedStyle(ground).backgroundColor];
        })"""
    )

    def luminance(colour):
        parts = [int(part) / 255 for part in colour[4:-1].split(",")]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert len(pairs) > 100
    for name, ink, ground in set(map(tuple, pairs)):
        low, high = sorted((luminance(ink), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ink, ground)


def test_paper_gets_all_tables_whole_and_no_contents(opened):
    page, *_ = opened({"width": 794, "height": 1123})
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert not page.locator("nav").is_visible()
    assert page.evaluate("[...document.querySelectorAll('details')].every(d => d.open)")
    clipped = (
        "b => b.scrollHeight > b.clientHeight + 1 && getComputedStyle(b).overflowY !== 'visible'"
    )
    assert page.evaluate(f"[...document.querySelectorAll('.box')].filter({clipped}).length") == 0
