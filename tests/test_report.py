"""The report page as a file: self-contained, escaped, repeatable, complete. All numbers are made up."""

import base64
import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import test_frontier_analysis as frontier
from analysis.claims import claims
from analysis.reduce import Value
from analysis.registry import FIGURES, TABLES, TEXTS, TOPICS, Topic
from analysis.report_origin import settings, union
from analysis.report_parts import PUBLISHED, parts
from analysis.report_tables import shown, titled
from analysis_rows import paper_memory
from report_pages import HOSTILE, Page, drawings, report, small, unsafe, write

from analysis.__main__ import main
from analysis.render import Column, Table, keys, measured

ROOT = Path(__file__).resolve().parent.parent
FETCHING = {"src", "srcset", "href", "action", "data", "poster", "background", "formaction"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    more = [*frontier.frontier_rows(), *frontier.context_rows(-0.5), *frontier.agent_rows()]
    return (
        write(tmp_path_factory.mktemp("papers"), small() + paper_memory(("full", "polykv"))),
        write(tmp_path_factory.mktemp("frontier"), more),
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with its report, and what was said about it."""
    root = write(tmp_path_factory.mktemp("plain"), small())
    with redirect_stdout(StringIO()) as said:
        assert main(["report", "--results", str(root)]) == 0
    return root, said.getvalue()


@pytest.fixture(scope="module")
def text(folders, tmp_path_factory):
    code, text = report(*folders, out=tmp_path_factory.mktemp("page") / "report.html")
    assert code == 0
    return text


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_nothing_is_fetched(page):
    for _, attrs in page.elements:
        for name in FETCHING & set(attrs):
            assert attrs[name].startswith(("#", "data:")), attrs
    assert not re.search(r"url\(|@import", page.text["style"])
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|WebSocket", page.text["script"])
    drawn = drawings(page)
    assert len(drawn) > 5
    for element in (element for svg in drawn for element in svg.iter()):
        links = [value for name, value in element.items() if name.endswith("href")]
        assert all(link.startswith("#") for link in links)


def test_policy_allows_the_one_style_and_the_one_script_only(page):
    (policy,) = [
        a["content"] for _, a in page.elements if a.get("http-equiv", "").endswith("Policy")
    ]
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    for kind in ("style", "script"):
        digest = hashlib.sha256(page.text[kind].encode()).digest()
        assert f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    names = {name for _, attrs in page.elements for name in attrs}
    assert not {name for name in names if name == "style" or name.startswith("on")}


def test_hostile_text_adds_no_markup(plain, tmp_path):
    safe = Page((plain[0] / "report.html").read_text(encoding="utf-8"))
    root = write(tmp_path, unsafe(), {"model": {"path": HOSTILE, HOSTILE: 1}})
    (root / "cells" / "synthetic" / "<img src=x>.json").write_text(HOSTILE)
    code, text = report(root, out=tmp_path / "hostile.html")
    assert code == 1
    found, usual = Page(text), Counter(tag for tag, _ in safe.elements)
    tags = Counter(tag for tag, _ in found.elements)
    assert set(tags) <= {*usual, "ul", "li", "code"}
    for tag in ("script", "style", "img", "link", "meta", "dialog", "form"):
        assert tags[tag] == usual[tag], tag
    names = {name for _, attrs in found.elements for name in attrs}
    assert names == {name for _, attrs in safe.elements for name in attrs}
    assert all(link.startswith(("#", "data:,")) for link in found.all("href"))
    assert all(svg.tag.endswith("svg") for svg in drawings(found))
    for start in ("m", "d", "reason", "c"):
        assert f"{start} {HOSTILE}" in found.text[""], start
    assert "<img src=x>.json" in found.text[""]


def test_same_input_gives_the_same_bytes_in_another_process(plain, tmp_path):
    """Whose sets, for one, are in another order."""
    root, _ = plain
    out = tmp_path / "again.html"
    command = [sys.executable, "-m", "analysis", "report", "--results", root, "--out", out]
    other = str(1 + int(os.environ.get("PYTHONHASHSEED", "0").replace("random", "0")))
    environment = os.environ | {"PYTHONHASHSEED": other}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert out.read_bytes() == (root / "report.html").read_bytes()


def test_all_that_was_measured_is_on_the_page(page, folders):
    rows = union(folders)[0].rows
    ids = set(page.all("id"))
    for name, build in TABLES.items():
        table = build(rows)
        held = table is not None and bool(measured(table).rows)
        assert (f"table-{name}" in ids) == held, name
    drawn = {name for name in FIGURES if f"figure-{name}" in ids}
    assert {"memory_agents", "recipe_frontier", "context_scaling"} <= drawn
    assert {"text-findings", "text-polykv_memory_decomposition"} <= ids
    assert not drawn & {"concurrency", "handoff_ttft"}
    assert "table-what_ran-title" in ids and "measured on" in page.text[""].lower()


def test_each_measured_claim_stands_once_with_its_verdict_and_the_others_are_counted(text, folders):
    every = claims(union(folders)[0].rows)
    found = [claim for claim in every if claim.measured]
    assert found and len(found) < len(every)
    assert f"{len(every) - len(found)} more published claims" in text
    badges = re.findall(r'<li><span class="badge \w+">([^<]+)</span><div><p>(.*?)</p>', text)
    assert [verdict for verdict, _ in badges] == [claim.verdict for claim in found]
    plain = " ".join(Page(text).text[""].split())
    for claim, times in Counter(claim.claim for claim in found).items():
        assert plain.count(" ".join(claim.split())) >= times
    assert not any(claim.said in plain for claim in every if not claim.measured)
    assert "claims</h3>" not in text


def test_results_come_first_then_claims_then_what_was_published(page, folders):
    rows = union(folders)[0].rows
    ran = [topic.name for topic in TOPICS if any(of(rows) for of in topic.tables.values())]
    ran = [name for name in ran if name != PUBLISHED]
    assert len(ran) > 1
    sections = [attrs["id"] for tag, attrs in page.elements if tag == "section"]
    texts = [name for name in sections if name.startswith("text-")]
    assert sections == [*ran, *texts, "claims", "published", "words", "provenance"]
    places = page.all("id")
    for topic in TOPICS:
        if topic.name in ran:
            first = next(name for name, of in topic.tables.items() if of(rows))
            start = places.index(topic.name)
            items = [name for name in places[start:] if name.startswith(("table-", "figure-"))]
            assert items[0] == f"table-{first}", "a topic opens with its main table"


def test_what_was_run_is_said_before_anything_else(text):
    head = text[: text.index("<main")]
    for said in ("reference (reference weights)", "llama-3-8b (random weights)", "3 to 15 agents"):
        assert said in head
    assert "generated" in head and "n = " in head and "cpu, float32" in head


def test_no_heading_is_a_file_name_and_no_section_is_empty(text):
    headings = re.findall(r"<h[1-4][^>]*>(.*?)</h[1-4]>", text)
    assert len(headings) > 10 and not {*TABLES, *FIGURES, *TEXTS} & set(headings)
    assert not [title for title in headings if "_" in title or not title.strip()]
    for kind in ("section", "article", "details"):
        for body in re.findall(rf"<{kind} .*?</{kind}>", text, re.DOTALL):
            without = re.sub(
                r"<h[1-4].*?</h[1-4]>|<summary>.*?</summary>", "", body, flags=re.DOTALL
            )
            assert re.sub(r"<[^>]*>", "", without).strip() or "<img" in without


def test_topic_of_which_nothing_was_run_is_not_there(tmp_path):
    rows = union([write(tmp_path, frontier.agent_rows())])[0].rows
    nothing = Topic("nothing", "Nothing", "?", {"a": lambda rows: None}, {"b": lambda rows: "why"})
    last = TOPICS[::-1]
    assert [part.topic.name for part in parts([nothing, *last], rows)] == ["frontier"]
    assert parts([nothing], rows) == []


def test_lines_that_only_repeat_the_paper_stand_with_the_published_figures(tmp_path):
    rows = union([write(tmp_path, small())])[0].rows
    (part,) = (part for part in parts(TOPICS, rows) if part.topic.name == "polykv")
    (quality,) = [table for table in part.tables if table.name == "polykv_quality"]
    lines = sum(len(block.lines) for block in quality.blocks)
    assert lines and lines < len(TABLES["polykv_quality"](rows).rows)
    models = {cell.text for block in quality.blocks for line in block.lines for cell in line}
    assert not {name for name in models if "instruct" in name}


@pytest.mark.parametrize(
    ("caption", "title", "rest"),
    [
        ("Delta by context. More: of it.", "Delta by context", "More: of it."),
        ("Computed, not measured: by hand.", "Computed, not measured", "By hand."),
        ("KL at 0.5 bits, by layer. Bars.", "KL at 0.5 bits", "KL at 0.5 bits, by layer. Bars."),
        ("Bare", "Bare", ""),
    ],
)
def test_first_clause_of_a_caption_is_its_title(caption, title, rest):
    assert titled(caption) == (title, rest)


def test_a_key_that_all_lines_share_is_said_once():
    columns = [*keys("model", "recipe"), Column("kl", "KL")]
    lines = [{"model": "m", "recipe": name, "kl": Value(1.0)} for name in ("a", "b")]
    (block,) = shown(Table("t", "T.", columns, lines)).blocks
    assert block.same == [("model", "m")] and block.headers == ["recipe", "KL"]
    (block,) = shown(Table("t", "T.", columns, lines[:1])).blocks
    assert block.same == [] and block.headers == ["model", "recipe", "KL"]


def test_ids_are_unique_and_links_arrive(page):
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    for name in ("href", "aria-labelledby"):
        links = [link.removeprefix("#") for link in page.all(name) if not link.startswith("data:")]
        assert links and set(links) <= set(ids)


def test_headings_images_and_buttons_can_be_heard(page):
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in page.elements}
    assert all(len(alt) > 20 for alt in page.all("alt") if alt)
    assert page.all("alt").count("") == 1  # of the dialog, which has none before a figure is in it
    assert ("html", {"lang": "en"}) in page.elements


def test_a_cell_in_two_folders_counts_once_and_the_newest_counts(tmp_path):
    rows = small()
    newer = [row | {"value": 42.0, "created_at": "2027-01-02T03:04:05+00:00"} for row in rows]
    old, new = write(tmp_path / "old", rows), write(tmp_path / "new", newer)
    for order in ((old, new), (new, old)):
        results, origins = union(order)
        assert len(results.rows) == len(rows) and set(results.rows["value"]) == {42.0}
        assert len(origins) == len({row["cell"] for row in rows})
    assert len(union((old, write(tmp_path / "more", frontier.agent_rows())))[0].rows) > len(rows)


def test_damaged_cell_is_named_on_the_page_and_by_the_exit_code(tmp_path, capsys):
    root = write(tmp_path, small())
    (root / "cells" / "synthetic" / "broken.json").write_text("{")
    code, text = report(root, out=tmp_path / "report.html")
    assert code == 1 and "broken.json" in capsys.readouterr().err
    assert "1 damaged cell is left out" in text and "broken.json" in text


def test_default_place_is_said_and_errors_are_one_line(plain, tmp_path, capsys):
    root, said = plain
    assert said.startswith(f"report: {root / 'report.html'} (0.")
    for arguments in ([str(tmp_path / "nowhere")], ["--out", str(root / "cells")]):
        assert main(["report", "--results", str(root), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: ")


def test_upload_of_nothing_is_refused(tmp_path, capsys):
    assert main(["upload", "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error


def test_settings_say_what_was_swept_and_provenance_what_produced_it(folders, page):
    found = {each.experiment: each for each in settings(union(folders)[1])}
    assert ("recipe.name", "full, polykv") in found["synthetic"].swept
    assert ("seed", "0") in found["synthetic"].same
    assert str(folders[0]) not in page.text[""]
    for said in ("2.13.0", "0123456789ab", "Linux x86_64, 2 cores", "resident", "recipe.name"):
        assert said in page.text[""]


def test_an_experiment_is_of_one_topic_and_a_name_means_one_thing():
    experiments = [name for topic in TOPICS for name in topic.experiments]
    assert len(experiments) == len(set(experiments))
    assert len(TABLES) == sum(len(topic.tables) for topic in TOPICS)
    assert len(FIGURES) == sum(len(topic.figures) for topic in TOPICS)


def test_captions_stand_beside_the_figures_as_latex(folders):
    assert main(["--results", str(folders[0]), "--only", "memory_agents", "--format", "pdf"]) == 0
    caption = (folders[0] / "figures" / "memory_agents.tex").read_text()
    assert caption.isascii() and "0123456789ab" in caption and "{table}" not in caption
    assert not re.search(r"(?<!\\)[_%#&]", caption)


def test_numbers_sort_as_numbers_whatever_they_look_like(folders):
    table = shown(TABLES["polykv_memory"](union(folders)[0].rows))
    column = table.blocks[0].headers.index("context")
    cells = [line[column] for line in table.blocks[0].lines]
    assert {(cell.text, cell.key) for cell in cells} == {("1,837", "1837"), ("7,194", "7194")}
    table = shown(TABLES["polykv_quality"](union(folders)[0].rows))
    cells = [cell for block in table.blocks for line in block.lines for cell in line]
    missing = [cell for cell in cells if cell.missing]
    assert missing and not any(cell.key for cell in missing)
    assert {cell.note for cell in missing} <= {number for number, _ in table.notes}
    delta = next(cell for cell in cells if cell.interval)
    assert re.fullmatch(r"\[\+[\d.]+, \+[\d.]+\]", delta.interval)
    assert float(delta.key) == pytest.approx(float(delta.text), abs=0.005)
