"""The report page as a file: self-contained, escaped, repeatable, complete. All numbers are made up."""

import base64
import hashlib
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from analysis_rows import handoff_cells, paper_memory, write
from report_pages import HOSTILE, Page, drawings, report, small, unsafe

from analysis import catalog
from analysis.__main__ import main
from analysis.catalog import AGREES, INCONCLUSIVE, NOT_MEASURED, REPRODUCED, Claim
from analysis.load import load
from analysis.render import measured
from analysis.report import settings
from analysis.style import Picture
from polykv.archive import pack
from polykv.config import REPO

FETCHING = {"src", "srcset", "href", "action", "data", "poster", "background", "formaction"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return (
        write(tmp_path_factory.mktemp("papers"), small() + paper_memory(("full", "polykv"))),
        write(tmp_path_factory.mktemp("handoff"), handoff_cells()),
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with its report."""
    root = write(tmp_path_factory.mktemp("plain"), small())
    assert report(root, out=root / "report.html")[0] == 0
    return root


@pytest.fixture(scope="module")
def text(folders, tmp_path_factory):
    code, text = report(*folders, out=tmp_path_factory.mktemp("page") / "report.html")
    assert code == 0
    return text


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.mark.slow
def test_nothing_is_fetched(page):
    for _, attrs in page.elements:
        for name in FETCHING & set(attrs):
            assert attrs[name].startswith(("#", "data:")), attrs
    assert not re.search(r"url\(|@import", page.text["style"])
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|WebSocket", page.text["script"])
    drawn = drawings(page)
    assert len(drawn) > 2
    for element in (element for svg in drawn for element in svg.iter()):
        links = [value for name, value in element.items() if name.endswith("href")]
        assert all(link.startswith("#") for link in links)


@pytest.mark.slow
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


@pytest.mark.slow
def test_hostile_text_adds_no_markup(page, tmp_path):
    root = write(tmp_path, unsafe())
    (root / "cells" / "compare" / "<img src=x>.json").write_text(HOSTILE)
    code, text = report(root, out=tmp_path / "hostile.html")
    assert code == 1
    found, usual = Page(text), Counter(tag for tag, _ in page.elements)
    tags = Counter(tag for tag, _ in found.elements)
    assert set(tags) <= {*usual, "ul", "li", "code", "h4", "details", "summary", "dl", "dt", "dd"}
    for tag in ("script", "style", "link", "meta", "form"):
        assert tags[tag] == usual[tag], tag
    names = {name for _, attrs in found.elements for name in attrs}
    assert names <= {name for _, attrs in page.elements for name in attrs}
    assert all(link.startswith(("#", "data:,")) for link in found.all("href"))
    assert all(svg.tag.endswith("svg") for svg in drawings(found))
    for start in ("m", "d", "reason"):
        assert f"{start} {HOSTILE}" in found.text[""], start
    assert "<img src=x>.json" in found.text[""]


@pytest.mark.slow
def test_same_input_gives_the_same_bytes_in_another_process(plain, tmp_path):
    """Whose sets, for one, are in another order."""
    out = tmp_path / "again.html"
    command = [sys.executable, "-m", "analysis", "report", "--results", plain, "--out", out]
    other = str(1 + int(os.environ.get("PYTHONHASHSEED", "0").replace("random", "0")))
    environment = os.environ | {"PYTHONHASHSEED": other}
    subprocess.run(command, cwd=REPO, env=environment, check=True, capture_output=True)
    assert out.read_bytes() == (plain / "report.html").read_bytes()


@pytest.mark.slow
def test_all_that_was_measured_is_on_the_page_and_nothing_else(page, folders):
    rows = load(*folders).rows
    ids = set(page.all("id"))
    for name, build in catalog.pieces("TABLES").items():
        table = build(rows)
        assert (f"table-{name}" in ids) == bool(table and measured(table).rows), name
    for name, build in catalog.pieces("FIGURES").items():
        assert (f"figure-{name}" in ids) == isinstance(build(rows), Picture), name
    assert {"table-compare", "figure-memory_agents", "table-what_ran", "table-produced_by"} <= ids


def made_up(rows):
    """Claims whose numbers are how many rows there are."""
    said = f"{len(rows)} rows"
    return [
        Claim("qkvshare", "ttft", INCONCLUSIVE, "a card is sooner", said),
        Claim("polykv", "memory", REPRODUCED, "memory <shrinks>", said),
        Claim("polykv", "memory", AGREES, "bits are bits", said),
        Claim("polykv", "memory", NOT_MEASURED, "nobody looked", "run it"),
    ]


def test_claims_and_findings_of_every_module_are_collected(tmp_path, monkeypatch):
    for module in catalog.modules().values():
        for name in ("CLAIMS", "FINDINGS"):
            monkeypatch.delattr(module, name, raising=False)
    compare = catalog.modules()["compare"]
    monkeypatch.setattr(compare, "CLAIMS", made_up, raising=False)
    monkeypatch.setattr(
        compare, "FINDINGS", lambda rows: {"Ours": ["one <b> **two** a_b_c"]}, raising=False
    )
    root = write(tmp_path, small()[:1] + paper_memory(("full",))[:1])
    rows = load(root).rows
    n_rows = (rows["study"] == "compare").sum()
    assert {claim.said for claim in catalog.claims(rows)} == {f"{n_rows} rows", "run it"}
    _, text = report(root, out=tmp_path / "report.html")
    shown = Page(text).text[""]
    places = [
        shown.index(said) for said in ("memory <shrinks>", "bits are bits", "a card is sooner")
    ]
    assert (
        places == sorted(places) and "nobody looked" not in shown and "one <b> two a_b_c" in shown
    )
    assert "1 more published claim." in shown
    written = catalog.findings_page(rows)
    assert "**reproduced**: memory <shrinks>" in written and "nobody looked" not in written
    assert "## Ours" in written
    other = rows[rows["study"] == "polykv_memory"]
    monkeypatch.delattr(compare, "CLAIMS")
    assert catalog.findings_page(other) is None


@pytest.mark.slow
def test_ids_are_unique_links_arrive_and_headings_nest(page):
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    links = [link.removeprefix("#") for link in page.all("href") if not link.startswith("data:")]
    assert links and set(links) <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in page.elements}
    assert all(len(alt) > 20 for alt in page.all("alt"))
    assert ("html", {"lang": "en"}) in page.elements


def test_a_cell_in_two_folders_counts_once_and_the_newest_counts(tmp_path):
    old, new = write(tmp_path / "old", small()), tmp_path / "new"
    made = small()
    for one in made:
        for row in one[3]:
            row["value"] = 42.0
    write(new, made)
    for path in old.glob("cells/*/*.json"):  # as if made long before
        other = new / path.relative_to(old)
        assert other.is_file()
    for order in ((old, new), (new, old)):
        results = load(*order)
        assert len(results.cells) == len(made)
        newest = max(cell.provenance["created_at"] for cell in results.cells.values())
        assert newest == max(c.provenance["created_at"] for c in load(new).cells.values())
    assert len(load(old, write(tmp_path / "more", paper_memory(("full",)))).cells) > len(made)


@pytest.mark.slow
def test_packed_folders_give_the_same_page(plain, tmp_path):
    pack(plain)
    (packed := tmp_path / "packed").mkdir()
    for path in plain.glob("*.gz"):
        (packed / path.name).write_bytes(path.read_bytes())
    _, text = report(packed, out=tmp_path / "report.html")
    assert text == (plain / "report.html").read_text(encoding="utf-8")


def test_damaged_cell_is_named_on_the_page_and_by_the_exit_code(tmp_path, capsys):
    root = write(tmp_path, small()[:1])
    (root / "cells" / "compare" / "broken.json").write_text("{")
    code, text = report(root, out=tmp_path / "report.html")
    assert code == 1 and "broken.json" in capsys.readouterr().err
    assert 'id="damaged"' in text and "broken.json" in text


def test_default_place_is_said_and_errors_are_one_line(tmp_path, capsys):
    root = write(tmp_path / "results", small()[:1])
    assert main(["report", "--results", str(root)]) == 0
    assert capsys.readouterr().out.startswith(f"report: {root / 'report.html'} (")
    for arguments in ([str(tmp_path / "nowhere")], ["--out", str(root / "cells")]):
        assert main(["report", "--results", str(root), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: ")


@pytest.mark.parametrize("command", ["upload", "pack"])
def test_nothing_to_upload_or_pack_is_refused(tmp_path, capsys, command):
    assert main([command, "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error


def test_settings_and_provenance_say_what_produced_it(folders, page, tmp_path):
    results = load(*folders)
    cell = next(iter(results.cells.values()))
    assert str(folders[0]) not in page.text[""]
    for said in (
        cell.provenance["commit"],
        cell.provenance["machine"],
        *cell.provenance["versions"],
    ):
        assert said in page.text[""]
    made = small()[:2]
    for seed, one in enumerate(made):
        one[2].update({"seed": seed, "model": {"name": "m"}, "results_dir": "here"})
    found = settings(load(write(tmp_path, made)))
    assert found["compare"] == [("model.name", "m"), ("seed", "0, 1")]
