"""The documentation: it builds, its links lead somewhere, and what it tells a reader to type works."""

import ast
import inspect
import os
import re
import resource
import subprocess
import sys
from html.parser import HTMLParser
from itertools import chain
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import polykv
from polykv.config import CONF, REPO
from polykv.pool import prefill
from polykv.reference.documents import generate_document

EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))
MODULES = sorted({OmegaConf.load(path).get("experiment_name") for path in EXPERIMENTS} - {None})
README = (REPO / "README.md").read_text(encoding="utf-8")
SECONDS = 60  # of CPU, for the whole site


def committed(pattern):
    """Files of results folders; results/local is this machine's own, and git ignores it."""
    return sorted(
        set(REPO.glob(f"results/*/{pattern}")) - set(REPO.glob(f"results/local/{pattern}"))
    )


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


def test_no_page_asks_the_network_for_anything(pages):
    for path, page in pages.items():
        assert not [link for link in page.loaded if urlsplit(link).scheme in ("http", "https")], (
            path
        )


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_has_a_page(site, path):
    text = Page(site / "experiments" / f"{path.stem}.html").text
    plain = " ".join(re.sub(r"<[^>]+>", "", text).split())
    assert f"experiment={path.stem}" in plain
    name = OmegaConf.load(path).get("experiment_name")
    for drawn in committed(f"figures/{path.stem}.png"):
        assert f"../figures/{drawn.parts[-3]}/{drawn.name}" in text
    folders = [
        pd.read_csv(file, low_memory=False).assign(folder=file.parent.name)
        for file in committed("rows.csv")
    ]
    rows = pd.concat(folders)
    rows = rows[rows["experiment"] == path.stem]
    assert ("No run of this very sweep is committed." in plain) == rows.empty
    for _, run in rows.groupby(["folder", "commit"]):
        ended = pd.to_datetime(run["created_at"])
        minutes, seconds = divmod(int((ended.max() - ended.min()).total_seconds()), 60)
        assert f"{minutes} min {seconds} s" in plain
    assert name == path.stem or "A smaller sweep of" in plain


def test_every_committed_figure_is_shown(site, pages):
    figures = {f"{path.parts[-3]}/{path.name}" for path in committed("figures/*.png")}
    shown = " ".join(page.text for page in pages.values())
    lost = sorted(name for name in figures if f"figures/{name}" not in shown)
    assert figures and not lost, f"name them in FIGURES of docs/pages.py: {lost}"


def test_every_family_of_models_is_listed(site):
    text = (site / "families.html").read_text(encoding="utf-8")
    families = OmegaConf.to_container(OmegaConf.load(REPO / "docs" / "families.yaml"))
    names = [*families["exact"], *families["decoded"], *chain(*families["refused"].values())]
    assert len(names) > 150
    assert not [name for name in names if f"<code>{name}</code>" not in text]


def test_every_public_name_is_documented(site):
    page = Page(site / "polykv.html")
    for name in polykv.__all__:
        assert (inspect.getdoc(getattr(polykv, name)) or "").strip(), name
        assert name in page.ids
        section = page.text.split(f'<section id="{name}">')[1].split("</section>")[0]
        assert 'class="docstring"' in section, name


@pytest.mark.parametrize("module", MODULES)
def test_an_experiment_says_which_published_rows_it_answers(module):
    tree = ast.parse((REPO / "experiments" / f"{module}.py").read_text(encoding="utf-8"))
    text = " ".join((ast.get_docstring(tree) or "").split())
    published = pd.read_csv(REPO / "analysis" / "published.csv")["figure_or_table"]
    answered = re.search(r"Answers the published rows ((?:`\w+`(?:, | and )?)+)", text)
    assert answered or "Answers no published row" in text
    if answered:
        assert set(re.findall(r"`(\w+)`", answered[1])) <= set(published)


def test_every_command_in_the_documents_composes():
    commands = typed_commands()
    assert len(commands) > len(EXPERIMENTS)
    parser = OverridesParser.create()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for command in commands:
            overrides = parser.parse_overrides([word for word in command if word != "--help"])
            # Of a sweep, its first cell.
            first = [
                next(override.sweep_string_iterator())
                if override.is_sweep_override()
                else override.get_value_element_as_str()
                for override in overrides
            ]
            names = [override.get_key_element() for override in overrides]
            cfg = compose("config", [f"{n}={v}" for n, v in zip(names, first, strict=True)])
            assert OmegaConf.to_container(cfg, resolve=True)["experiment_name"]


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
