"""Evaluators against what can be worked out by hand."""

import math
import os
import platform
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TEXT, wide_model
from hydra import compose, initialize_config_dir
from scipy import stats
from transformers import DynamicCache

import polykv
import polykv.config
from analysis.statistics import QUALITY, Value, mean_of_answers, rescaled
from experiments.compare import STUDY
from experiments.rows import SCORES, add_answers, add_scores
from experiments.settings import settle
from polykv.cellfile import Cell
from polykv.documents import Document, Question
from polykv.evaluation import bertscore
from polykv.evaluation.continuation import Comparison, compare, score_rest
from polykv.evaluation.memory import (
    GB,
    check_fits,
    paper_bytes,
    resident_bytes,
    synthetic_pool,
)
from polykv.evaluation.process import (
    CpuMeter,
    in_fresh_process,
    keep_freed_memory,
    return_freed_memory,
)
from polykv.evaluation.statistics import document_interval, wilson
from polykv.geometry import Geometry
from polykv.models import ModelSource
from polykv.pool import prefill
from polykv.results import Rows, frame, provenance

LLAMA_3_8B = Geometry.even(n_layers=32, n_kv_heads=8, head_dim=128)
MINILM = bertscore.MINILM


def figures(rows: Rows) -> dict[str, Value]:
    """What the analysis computes from one cell's rows."""
    stored = frame([Cell(STUDY.declaration(), "cell", {}, provenance(), rows.by_column())])
    return {name: measure.of(stored) for name, measure in QUALITY.items()}


def answer_rows(answers: list[list[str]], references: list[list[str]]) -> Rows:
    """The rows of a cell whose agents say this: a list for each document."""

    class Said:
        def answers(self, cfg, n_documents, recipe=None):
            return references if recipe else answers

        def documents(self, cfg):
            asked = Question("Q:", None, "Q")
            return [
                Document("text", torch.full((1, 9), number), 6, (asked,) * len(of))
                for number, of in enumerate(answers)
            ]

    overrides = [f"answers={len(answers)}", f"n_agents={len(answers[0])}", "scorer=minilm"]
    with initialize_config_dir(str(polykv.config.CONF), version_base="1.3"):
        cfg = settle(compose("config", overrides))
    rows = Rows(STUDY.columns)
    add_answers(rows, cfg, Said())
    return rows


def test_continuation_equals_the_model_run_in_one_piece(llama, tokenizer):
    ids = tokenizer(TEXT[:400], return_tensors="pt").input_ids
    cut = int(0.7 * ids.shape[1])
    scored = score_rest(llama, prefill(llama, ids[:, :cut]), ids[:, cut:])
    whole = llama(ids).logits[0, cut:-1].log_softmax(-1)
    assert scored.shape == (ids.shape[1] - cut - 1, 300)
    torch.testing.assert_close(scored, whole, atol=1e-4, rtol=1e-4)


def test_divergence_of_known_distributions():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    q = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    found = compare(p.log(), q.log(), torch.tensor([[0, 0, 1]]))
    assert found.kl == pytest.approx([0.5 * math.log(2) - 0.25 * math.log(2), 0], abs=1e-6)
    assert found.nll == pytest.approx([-math.log(0.25), -math.log(0.8)])
    assert found.nll_full == pytest.approx([-math.log(0.5), -math.log(0.8)])
    assert found.others["same_top1"].tolist() == [False, True]


def test_perplexity_delta_is_the_ratio_of_perplexities():
    rng = np.random.default_rng(0)
    full = [rng.uniform(1, 3, 50) for _ in range(10)]
    rows = Rows(SCORES)
    same = {"same_top1": np.ones(50, bool)}
    found = [Comparison(f, f + 0.01, np.full(50, 0.2), same) for f in full]
    add_scores(rows, found, [f"{n}" for n in range(len(found))])
    got = figures(rows)
    ratio = got["perplexity"].value / got["perplexity_full"].value
    assert ratio == pytest.approx(math.exp(0.01))
    delta = got["perplexity_delta"]
    assert delta.value == pytest.approx(100 * math.expm1(0.01))
    assert (got["kl_mean"].value, got["same_top1"].value) == (pytest.approx(0.2), 1)
    # The same difference at every token: pairing leaves no spread at all.
    assert delta.low == pytest.approx(delta.high) and delta.over == "documents"


def test_the_interval_over_blocks_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = document_interval([rng.normal(0, 1, 100)])
        hits += low <= 0 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_answers_about_few_documents_are_each_a_unit_of_the_interval():
    values = np.random.default_rng(0).normal(size=15)
    rows = pd.DataFrame({"agent": range(15), "value": values, "n": 1})
    rows = rows.assign(document="moon_landing", sample=0, document_digest="", seed=0, note="")
    found = mean_of_answers(rows, (-math.inf, math.inf))
    reach = stats.t.ppf(0.975, 14) * values.std(ddof=1) / math.sqrt(15)
    assert found.n == 15 and found.over == "answers"
    assert found.high - found.low == pytest.approx(2 * reach, rel=0.1)  # but for the skewness


def test_wilson_interval_at_the_edge():
    low, high = wilson(0, 10)
    assert low == 0 and high == pytest.approx(0.2775, abs=1e-4)


@pytest.mark.parametrize(("right", "n"), [(1, 7), (150, 300), (299, 300)])
def test_wilson_interval_by_its_formula(right, n):
    """Wilson 1927: the rates p whose score (right - n p)^2 = z^2 n p (1 - p)."""
    for p in wilson(right, n):
        assert (right - n * p) ** 2 == pytest.approx(1.959963985**2 * n * p * (1 - p))


def test_paper_accounting_gives_the_published_gigabytes():
    unshared = {(1285, 3): 1.011, (1285, 5): 1.684, (1285, 10): 3.369, (5035, 10): 13.199,
                (5035, 15): 19.798}  # fmt: skip
    for (tokens, agents), published in unshared.items():
        assert round(paper_bytes(LLAMA_3_8B, tokens, agents, None) / GB, 3) == published
        pooled = {1285: 0.116, 5035: 0.454}[tokens]
        assert round(paper_bytes(LLAMA_3_8B, tokens, agents, 32 / 11) / GB, 3) == pooled


@pytest.mark.parametrize(
    ("recipe", "head_dim", "nominal", "stored"),
    [
        ("polykv", 128, 2.909, 2.876),
        ("polykv", 64, 2.909, 2.844),
        ("polykv_q8_0", 128, 2.909, 2.753),
        ("polykv_q8_0", 64, 2.909, 2.723),
    ],
)
def test_ratios_of_a_synthetic_pool(recipe, head_dim, nominal, stored):
    geometry = Geometry.even(n_layers=2, n_kv_heads=2, head_dim=head_dim)
    pool = synthetic_pool(geometry, 256, torch.bfloat16, polykv.load_recipe(recipe))
    assert round(pool.nominal_ratio, 3) == nominal
    assert round(pool.stored_ratio, 3) == stored


def test_the_cpu_meter_sees_what_is_kept_and_not_what_was_freed():
    meter = CpuMeter()
    meter.start()
    freed = torch.ones(100_000_000, dtype=torch.uint8)
    del freed
    meter.reset_peak()
    kept = torch.ones(50_000_000, dtype=torch.uint8)
    assert 45e6 < meter.peak() < 65e6
    assert kept.sum() == 50_000_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no other malloc has the settings")
def test_the_cpu_meter_sees_a_cache_that_grows_where_memory_was_freed_before():
    keep_freed_memory()
    sizes = range(2_000_000, 4_000_000, 200_000)
    # A block between two others keeps what they leave from becoming one gap.
    blocks = [(torch.ones(n, dtype=torch.uint8), torch.ones(100_000)) for n in sizes]
    between = [block for _, block in blocks]
    del blocks
    meter = CpuMeter()
    meter.start()
    meter.reset_peak()
    grows = torch.empty(0, dtype=torch.uint8)
    for n in sizes:
        grows = torch.cat([grows, torch.ones(n - len(grows), dtype=torch.uint8)])
    # The last two of ten, which add up to 29 MB.
    assert 7e6 < meter.peak() < 9e6
    assert len(between) == len(sizes) and grows.sum() == len(grows)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no other malloc keeps freed memory")
def test_freed_memory_that_is_kept_can_be_returned():
    left = {returned: in_fresh_process(_left_of_a_block, returned) for returned in (False, True)}
    assert left[False] > 290e6  # the test can fail
    assert left[True] < 40e6


def _left_of_a_block(returned):
    """Resident bytes that a freed block of 300 MB leaves behind."""
    keep_freed_memory()
    before = _resident()
    block = torch.ones(300_000_000, dtype=torch.uint8)
    after = torch.ones(100_000)
    del block
    if returned:
        return_freed_memory()
    return _resident() - before - after.nbytes


def _resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_resident_memory_is_measured_and_grows_with_unshared_caches():
    geometry = {"hidden_size": 256, "num_hidden_layers": 4, "max_position_embeddings": 2048}
    source, recipe = ModelSource.of(wide_model(**geometry)), polykv.load_recipe("polykv")
    cache = 1500 * Geometry.even(4, 8, 32).values_per_token * 4
    # A step copies the keys or values of one of the four layers, of all agents at once.
    peak = cache * (1 + 1 / 8)
    unshared = {n: resident_bytes(source, recipe, "unshared", 1500, n, "cpu") for n in (1, 9)}
    assert unshared[9] - unshared[1] == pytest.approx(8 * peak, rel=0.1)
    # The published way of reading: every agent rebuilds the full cache, beside the pool.
    dequantize = resident_bytes(source, recipe, "dequantize", 1500, 9, "cpu")
    assert dequantize > 0.9 * 9 * cache


def test_what_does_not_fit_is_said_with_numbers():
    model = polykv.config.load_group("model", "llama-3-8b")
    model.weights = "random"
    with pytest.raises(polykv.PolyKVError, match="llama-3-8b.*billion|GB"):
        check_fits(ModelSource.of(model), "unshared", 5035, 15, "cpu")


class TestBertScore:
    def test_two_empty_answers_have_no_score_and_one_has_none_of_it(self):
        scores = bertscore.f1(["", " \u200b", "", "a cat"], ["", "", "a dog", " "], MINILM)
        assert np.isnan(scores[:2]).all() and scores[2:].tolist() == [0, 0]

    def test_pairs_of_empty_answers_are_counted_and_in_no_mean(self):
        answers = [["It was July.", "Two people walked.", "The flag was blue."], ["One.", ""]]
        references = [["In July.", "Two people.", "It was green."], ["", "Two."]]
        few = figures(answer_rows(answers, references))
        empty = [["", "", ""], ["", ""]]
        many = figures(answer_rows(answers + empty, references + empty))
        for name in ("bertscore_f1", "bertscore_floor"):
            assert few[name].value == pytest.approx(many[name].value, abs=1e-5)
            assert few[name].n == many[name].n
        assert few["bertscore_f1"].n == 5
        assert (many["empty_answers"].value, many["empty_answers"].n) == (0.6, 10)

    def test_where_nobody_says_anything_there_is_no_score(self):
        got = figures(answer_rows([["", " "]], [["", ""]]))
        assert got["empty_answers"].value == 1
        for name in ("bertscore_f1", "bertscore_floor"):
            assert got[name].value is None and got[name].note

    def test_order_of_likeness(self):
        reference = "The lander reached the moon in July."
        same, near, far = bertscore.f1(
            [reference, "In July the lander arrived at the moon.", "Butter is made from cream."],
            [reference] * 3,
            MINILM,
        )
        assert same == pytest.approx(1, abs=1e-5)
        assert same > near > far

    def test_answers_beyond_the_scorers_length_are_cut(self):
        long = "the pool is shared by many agents " * 400
        assert bertscore.f1([long], [long], MINILM)[0] == pytest.approx(1, abs=1e-5)

    def test_floor_and_rescaled(self):
        answers = [["It was July.", "Two people walked.", "The flag was blue."]]
        got = figures(answer_rows(answers, answers))
        assert got["bertscore_f1"].value == pytest.approx(1, abs=1e-5)
        assert got["bertscore_floor"].value < 0.9
        above = rescaled(got["bertscore_f1"], got["bertscore_floor"])
        assert above.value == pytest.approx(1, abs=1e-4)

    def test_a_floor_without_mismatched_pairs_is_missing_with_a_reason(self):
        floor = figures(answer_rows([["yes"]], [["yes"]]))["bertscore_floor"]
        assert floor.value is None and "mismatched" in floor.note


def test_damage_shows_in_every_statistic(llama, tokenizer):
    ids = tokenizer(TEXT[:480], return_tensors="pt").input_ids
    cut = int(0.7 * ids.shape[1])
    cache = prefill(llama, ids[:, :cut])
    full = score_rest(llama, DynamicCache((x.keys, x.values) for x in cache.layers), ids[:, cut:])
    kl = []
    for name in ("full", "int8_token", "turboquant_4bit", "turboquant_2bit"):
        pool = polykv.SharedKVPool.from_cache(cache, polykv.load_recipe(name))
        kl.append(
            compare(full, score_rest(llama, pool.dequantize(), ids[:, cut:]), ids[:, cut:]).kl
        )
    means = [float(k.mean()) for k in kl]
    assert means[0] == 0
    assert means == sorted(means) and means[1] < means[2] < means[3]
