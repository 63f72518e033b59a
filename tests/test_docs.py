"""The documentation: it builds, its links lead somewhere, and what it tells a reader to type works."""

import html
import importlib
import inspect
import os
import re
import resource
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import chain
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest
from analysis_rows import quickstart, write
from conftest import first_cell
from filelock import FileLock
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import polykv
from experiments.study import studies
from polykv.archive import pack
from polykv.config import CONF, REPO
from polykv.pool import prefill
from polykv.reference.documents import generate_document

EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))
README = (REPO / "README.md").read_text(encoding="utf-8")
SECONDS = 60  # of CPU, for the whole site


def typed_commands():
    """Every `run.py` command of the README and of the experiments' headers, as a list of its overrides."""
    texts = ["\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)).replace("\\\n", " ")]
    texts += [path.read_text(encoding="utf-8").splitlines()[1] for path in EXPERIMENTS]
    found = []
    for text in texts:
        for line in re.findall(r"run\.py +(.*)", text):
            found.append(re.split(r"\s{3,}|\s#", line)[0].split())
    return found


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The site, built once for all of pytest's processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            partial = folder.with_suffix(".part")
            subprocess.run([sys.executable, REPO / "docs" / "build.py", partial], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            assert spent < SECONDS
            partial.rename(folder)
    return folder


class Page(HTMLParser):
    """A page's links and the places that a link may lead to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.ids = [], [], set()
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)
                if tag != "a":
                    self.loaded.append(value)


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


@pytest.mark.slow
def test_every_internal_link_leads_somewhere(site, pages):
    broken, followed = [], 0
    for path, page in pages.items():
        for link in page.links:
            to = urlsplit(link)
            if to.scheme or link.startswith("//"):
                continue
            target = (path.parent / unquote(to.path)).resolve() if to.path else path
            followed += 1
            lost = to.fragment and target in pages and to.fragment not in pages[target].ids
            if not target.is_file() or lost:
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken, broken[:20]
    assert followed > 1000


@pytest.mark.slow
def test_no_page_asks_the_network_for_anything(pages):
    for path, page in pages.items():
        assert not [link for link in page.loaded if urlsplit(link).scheme in ("http", "https")], (
            path
        )


def study_of(path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [f"experiment={path.stem}"]).study


@pytest.mark.slow
@pytest.mark.parametrize("name", studies())
def test_every_study_has_a_page_with_its_question_and_all_its_presets(site, name):
    text = Page(site / "studies" / f"{name}.html").text
    plain = " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())
    study = studies()[name]
    assert study.title in plain and study.question in plain
    presets = [path.stem for path in EXPERIMENTS if study_of(path) == name]
    assert name in presets
    for preset in presets:
        assert f"experiment={preset}" in plain, preset
    for said in (*study.columns, *study.answers):
        assert said in plain, said


@pytest.mark.slow
def test_every_experiment_is_of_a_study():
    assert {study_of(path) for path in EXPERIMENTS} == set(studies())


@pytest.mark.slow
def test_packed_results_are_shown_on_their_studys_page(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPO / "docs")
    pages = importlib.import_module("pages")
    folder = write(tmp_path / "results" / "mine", quickstart((512,), (3,)))
    write(tmp_path / "results" / "local", quickstart((256,), (3,)))
    for one in ("mine", "local"):
        pack(tmp_path / "results" / one)
    shutil.rmtree(folder / "cells")
    for kept in ("figures/compare.png", "figures/compare.md", "tables/compare.md"):
        (folder / kept).parent.mkdir(exist_ok=True)
        (folder / kept).write_text(kept)
    monkeypatch.setattr(pages, "RESULTS", tmp_path / "results")
    folders = pages.committed()
    assert list(folders) == ["mine"]
    text = pages.study(studies()["compare"], folders, tmp_path / "figures")
    shown = ("../figures/mine/compare.png", "figures/compare.md", "tables/compare.md")
    assert all(each in text for each in shown)
    drawn = tmp_path / "figures" / "mine" / "compare.png"
    assert drawn.read_text() == "figures/compare.png"
    assert "results/mine" not in pages.study(studies()["capacity"], folders, tmp_path / "figures")


@pytest.mark.slow
def test_every_family_of_models_is_listed(site):
    text = (site / "families.html").read_text(encoding="utf-8")
    families = OmegaConf.to_container(OmegaConf.load(REPO / "docs" / "families.yaml"))
    names = [*families["exact"], *families["decoded"], *chain(*families["refused"].values())]
    assert len(names) > 150
    assert not [name for name in names if f"<code>{name}</code>" not in text]


@pytest.mark.slow
def test_every_public_name_is_documented(site):
    page = Page(site / "polykv.html")
    for name in polykv.__all__:
        assert (inspect.getdoc(getattr(polykv, name)) or "").strip(), name
        assert name in page.ids
        section = page.text.split(f'<section id="{name}">')[1].split("</section>")[0]
        assert 'class="docstring"' in section, name


def test_a_study_answers_published_tables_only():
    tables = set(pd.read_csv(REPO / "analysis" / "published.csv")["figure_or_table"])
    for name, study in studies().items():
        assert set(study.answers) <= tables, name


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_in_the_repository_lead_to_files(name):
    links = re.findall(r"\]\(([^)#\s]+)", (REPO / name).read_text(encoding="utf-8"))
    own = [link for link in links if "://" not in link]
    assert own or name == "CHANGELOG.md"
    assert not [link for link in own if not (REPO / link).exists()]


@pytest.mark.slow
def test_every_command_in_the_documents_composes():
    commands = typed_commands()
    assert len(commands) > len(EXPERIMENTS)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for command in commands:
            cfg = compose("config", first_cell([word for word in command if word != "--help"]))
            assert OmegaConf.to_container(cfg, resolve=True)["study"]


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    model, tokenizer = polykv.load_model("reference")
    document = generate_document(tokenizer, 128, seed=0)
    ids_BT = tokenizer(document.text, return_tensors="pt").input_ids
    given = {
        "text": document.text,
        "queries": [question.prompt for question in document.questions[:2]],
        "cache": prefill(model, ids_BT),
        "token_ids": ids_BT[0],
    }
    for block in blocks:
        exec(compile(block, "README.md", "exec"), given)
    assert [answer.strip() for answer in given["answers"]] == [
        question.answer.strip() for question in document.questions[:2]
    ]
