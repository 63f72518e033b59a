"""experiment=compare: what was asked is on the screen, and recipes are told apart where the documents allow it."""

import re

import numpy as np
import pandas as pd
import pytest
from conftest import run_process, run_py
from scipy import stats

from analysis import compare
from analysis.load import load
from experiments.compare import STUDY
from polykv.evaluation.statistics import paired_ratio
from polykv.results import Rows, Store

BASE = ["experiment=compare", "model=local", "document=file", "context=64", "n_documents=3",
        "n_agents=2", "answers=1", "max_new_tokens=4", "device=cpu"]  # fmt: skip


SECOND = "recipe=polykv,vllm_4bit_nc,turboquant_3bit"


@pytest.fixture(scope="module")
def own(checkpoint):
    return [*BASE, f"model.path={checkpoint}", f"document.path={checkpoint}/text.txt"]


@pytest.fixture(scope="module")
def swept(own, tmp_path_factory):
    """Two sweeps in one folder, and what the second printed."""
    root = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analysis.__main__.show", lambda *shown: 0)
        assert run_py(*own, "recipe=q4_0", f"results_dir={root}").returncode == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analysis.__main__.PICTURES", ())  # what is on the screen needs no figure
        done = run_py(*own, SECOND, f"results_dir={root}")
    assert done.returncode == 0, done.stderr
    return root, done.stdout


@pytest.mark.slow
def test_the_screen_shows_every_recipe_that_was_asked_and_no_other(swept):
    _, printed = swept
    head = next(i for i, line in enumerate(printed.splitlines()) if line.startswith("recipe"))
    table = printed.splitlines()[head : head + 5]
    assert [line.split()[0] for line in table[2:]] == ["vllm_4bit_nc", "polykv", "turboquant_3bit"]
    assert "q4_0" not in printed
    assert max(map(len, printed.splitlines()[: head + 5])) <= 100
    assert printed.count("recipe  ") == 1  # one table


def test_every_value_on_the_screen_is_that_of_the_rows(swept):
    root, printed = swept
    rows = load(root).rows
    line = next(line for line in printed.splitlines() if line.startswith("turboquant_3bit"))
    mine = rows[rows["recipe"] == "turboquant_3bit"]
    stored = mine[(mine["metric"] == "compression_ratio") & (mine["accounting"] == "stored")]
    whole = mine[mine["block"].isna() & mine["sample"].notna()]
    mean = {
        metric: np.average(part["value"], weights=part["n"].astype(float))
        for metric, part in whole[whole["n"] > 1].groupby("metric")
    }
    assert f"{16 / stored['value'].iloc[0]:.2f}" in line and f"{mean['kl']:.2g}" in line
    assert f"{100 * np.expm1(mean['nll_delta']):+.2f}" in line


@pytest.mark.slow
def test_progress_names_cell_and_phase_in_a_pipe(own, tmp_path):
    progress = run_process(*own, SECOND, f"results_dir={tmp_path}").stderr
    assert re.search(r"cell 1/3, .*document", progress) and "3 of 3 cells finished" in progress


def test_answers_can_be_read(swept):
    root, _ = swept
    pages = list((root / "answers").glob("*.md"))
    text = "".join(page.read_text() for page in pages)
    for said in ("uncompressed", "polykv", "vllm_4bit_nc", "turboquant_3bit", "q4_0"):
        assert text.count(f"**{said}**") == 2 * (len(pages) if said == "uncompressed" else 1)


def samples(tmp_path, kl: dict[str, np.ndarray], reader: str = "dequantize") -> pd.DataFrame:
    """Results in which each recipe has this KL divergence on each document."""
    for recipe, values in kl.items():
        rows = Rows(STUDY.columns, model="m", weights="random", document="d", context_tokens=9, recipe=recipe,
                    reader=reader, dtype="float32", device="cpu", seed=0)  # fmt: skip
        for index, value in enumerate(values):
            rows.add("kl", float(value), "nats", sample=index, n=9)
        config = {"recipe": {"name": recipe}, "reader": reader}
        Store(tmp_path).write(STUDY.declaration(), f"{recipe}-{reader}", config, rows)
    return load(tmp_path).rows


def test_recipes_that_differ_on_every_document_are_told_apart(tmp_path):
    base = np.exp(np.random.default_rng(0).normal(-5, 1, 16))
    noise = np.exp(np.random.default_rng(1).normal(0, 0.05, 16))
    (line,) = compare.separations(
        samples(tmp_path, {"a": base, "b": 1.5 * base * noise, "c": 4 * base})
    )
    assert "a < b < c" in line and "every pair differs" in line and "16 documents" in line


def test_a_tie_comes_with_what_the_documents_could_have_shown(tmp_path):
    base = np.exp(np.random.default_rng(0).normal(-5, 1, 8))
    noise = np.exp(np.random.default_rng(2).normal(0.02, 0.3, 8))
    (line,) = compare.separations(samples(tmp_path, {"a": base, "b": base * noise}))
    found = paired_ratio(base * noise, base)
    assert f"{found.ratio:.2f} [{found.low:.2f}, {found.high:.2f}]" in line
    assert f"{found.detectable:.2f}" in line and f"{found.documents_needed:,}" in line


@pytest.mark.parametrize(("n", "shift"), [(3, 0.1), (8, 0.1), (8, 0.02), (8, 1.0)])
def test_so_many_documents_as_are_needed_detect_the_ratio_and_fewer_do_not(n, shift):
    logs = shift + np.random.default_rng(3).normal(0, 0.1, n)
    found = paired_ratio(np.exp(logs), np.ones(n), 0.01)
    spread, mean = logs.std(ddof=1), abs(logs.mean())

    def detects(size):
        least = stats.t.ppf(1 - 0.01 / 2, size - 1) + stats.t.ppf(0.8, size - 1)
        return least * spread / size**0.5 <= mean

    assert detects(found.documents_needed)
    assert found.documents_needed == 2 or not detects(found.documents_needed - 1)
    assert (found.documents_needed <= n) == (found.detectable <= max(found.ratio, 1 / found.ratio))


def test_each_reader_has_its_own_comparison(tmp_path):
    kl = np.exp(np.random.default_rng(0).normal(-5, 1, 8))
    samples(tmp_path, {"a": kl, "b": 2 * kl, "full": 0 * kl})
    rows = samples(tmp_path, {"a": 2 * kl, "b": kl}, "in_place")
    lines = dict(line.split(": ", 1) for line in compare.separations(rows))
    assert set(lines) == {"reader=dequantize", "reader=in_place"}
    assert "a < b" in lines["reader=dequantize"] and "b < a" in lines["reader=in_place"]


def test_one_document_compares_nothing_and_says_so(tmp_path):
    (line,) = compare.separations(samples(tmp_path, {"a": np.ones(1), "b": np.full(1, 2.0)}))
    assert line.startswith("1 document") and "n_documents" in line


def test_a_paired_ratio_is_the_t_test_on_logarithms():
    first, second = np.exp(np.random.default_rng(3).normal(0, 1, (2, 12)))
    found = paired_ratio(first, second)
    assert found.p == pytest.approx(stats.ttest_rel(np.log(first), np.log(second)).pvalue)
    interval = stats.ttest_1samp(np.log(first / second), 0).confidence_interval(0.95)
    assert np.log([found.low, found.high]) == pytest.approx([interval.low, interval.high])


def test_the_detectable_ratio_is_found_in_four_of_five_draws():
    rng, spread, n = np.random.default_rng(4), 0.4, 16
    typical = np.log(np.mean([paired_ratio(np.exp(rng.normal(0, spread, n)), np.ones(n)).detectable
                              for _ in range(200)]))  # fmt: skip
    found = [
        paired_ratio(np.exp(rng.normal(typical, spread, n)), np.ones(n)).p < 0.05
        for _ in range(800)
    ]
    assert 0.74 < np.mean(found) < 0.86


@pytest.mark.parametrize(
    "bad", [([1.0], [2.0]), ([1.0, 0.0], [1.0, 1.0]), ([1.0, np.nan], [1.0, 1.0])]
)
def test_what_has_no_logarithm_or_no_spread_is_refused(bad):
    with pytest.raises(ValueError):
        paired_ratio(*bad)
