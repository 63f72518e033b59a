"""Ranks, pairs, fronts, trends and their tables and figures on synthetic samples: all numbers are made up."""

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from pairwise import slow

from analysis import catalog, frontier, scaling
from analysis.__main__ import main
from analysis.catalog import INCONCLUSIVE, NOT_MEASURED, NOT_REPRODUCED, REPRODUCED
from analysis.frontier import compared, measured, scores
from analysis.load import load
from analysis.scaling import trend
from analysis.statistics import pairs_of, samples_of
from experiments.compare import STUDY
from polykv.evaluation.statistics import MIN_DOCUMENTS, document_interval
from polykv.results import Rows, Store

# recipe: (stored bits, mean KL); `twin` differs from `cheap` by noise only.
TRUTH = {"cheap": (3.0, 1e-2), "twin": (3.0, 1e-2), "good": (4.0, 1e-3), "poor": (5.0, 5e-3),
         "polykv": (5.6, 4e-3)}  # fmt: skip
TOKENS = 50  # of a document


def store(
    root, recipe, kl, delta=None, bits=4.0, spread=None, config=None, tag="", text="", **about
):
    """One cell: KL and difference of log-probabilities of each document; `text` names the texts, "" leaves them out."""
    place = {"context_tokens": 512, "n_agents": 1, "seed": 0, "reader": "dequantize"} | about
    rows = Rows(STUDY.columns, model="m", weights="reference", document="d", recipe=recipe, dtype="float32",
                device="cpu", **place)  # fmt: skip
    for accounting, of in (("stored", bits), ("nominal", bits - 0.1)):
        rows.add("compression_ratio", 16 / of, "x", accounting=accounting)
    delta = np.zeros(len(kl)) if delta is None else delta
    for metric, values in (("kl", kl), ("nll_delta", delta), ("same_top1", 0.9 + 0 * kl)):
        for sample, value in enumerate(values):
            of = {"text": f"{text}{sample}"} if text else {}
            rows.add(metric, float(value), "nats", sample=sample, n=TOKENS, **of)
            if len(kl) < MIN_DOCUMENTS:
                for block in range(3):
                    rows.add(
                        metric,
                        float(value) * (1 + block / 9),
                        "nats",
                        sample=sample,
                        block=block,
                        n=9,
                        **of,
                    )
    for sample, value in enumerate(spread or ()):
        rows.add("agent_spread", float(value), "nats", sample=sample)
    n = TOKENS * len(kl)
    rows.add("nll_delta", 0.3, "nats", statistic="sd", n=n)
    for statistic in frontier.KL:
        rows.add("kl", float(9 * kl.mean()), "nats", statistic=statistic, n=n)
    for statistic in frontier.DELTA_P:
        rows.add("delta_p", 0.01, "probability", statistic=statistic, n=n)
    for sample in range(len(kl)):
        rows.add("delta_p", 0.001, "probability", sample=sample, n=TOKENS)
    cell = "-".join([recipe, tag, *(f"{value}" for value in place.values())])
    settings = {"recipe": {"name": recipe}, "n_documents": len(kl)} | (config or {})
    Store(root).write(STUDY.declaration(), cell, settings, rows)


def frontier_cells(root, n_documents=20, seeds=(0,)):
    rng = np.random.default_rng(0)
    for seed in seeds:
        difficulty = rng.lognormal(0, 0.5, n_documents)
        for recipe, (bits, mean) in TRUTH.items():
            kl = mean * difficulty * rng.lognormal(0, 0.1, n_documents)
            store(root, recipe, kl, kl / 3 - mean / 9, bits, seed=seed)
        store(root, "full", np.zeros(n_documents), bits=32.0, seed=seed)


def all_cells(root):
    frontier_cells(root)
    for key, value in product((8, 3), (8, 3)):
        kl = 0.1 / key**2 + 1 / value**2 + np.arange(10) / 1e3
        store(
            root,
            f"k{key}v{value}",
            kl,
            bits=(key + value) / 2 + 0.25,
            key_bits=key,
            value_bits=value,
        )
    for context in (128, 256, 512):
        delta = 0.02 - 0.005 * math.log2(context / 128) + np.arange(10) / 1e4
        store(root, "q4_0", np.full(10, 0.01), delta, context_tokens=context)
    for n in (1, 15):
        store(root, "polykv", np.full(8, 0.01), spread=[0.0] * 7 + [1e-5 * n], n_agents=n, reader="in_place",
              config={"together": True})  # fmt: skip
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return all_cells(tmp_path_factory.mktemp("frontier"))


@pytest.mark.slow
def test_every_table_and_figure_is_written(root):
    names = [*frontier.TABLES, *scaling.TABLES, *frontier.FIGURES, *scaling.FIGURES]
    assert main(["--results", str(root), "--only", ",".join(dict.fromkeys(names))]) == 0
    for name, kind in product({**frontier.TABLES, **scaling.TABLES}, ("md", "tex", "csv")):
        assert (root / "tables" / f"{name}.{kind}").stat().st_size > 200
    for name, kind in product({**frontier.FIGURES, **scaling.FIGURES}, ("png", "pdf")):
        assert (root / "figures" / f"{name}.{kind}").stat().st_size > 2000


def test_only_recipes_read_alone_are_compared(root):
    (found,) = compared(load(root).rows)
    assert {s.recipe for s in found.standings} == {*TRUTH, "q4_0"}


def test_ranks_show_a_tie_as_a_tie_and_a_difference_as_one(tmp_path):
    frontier_cells(tmp_path)
    (found,) = compared(load(tmp_path).rows)
    assert found.pairs.documents == 20
    by_name = {s.recipe: s for s in found.standings}
    assert "full" not in by_name
    assert by_name["good"].rank == "1"
    assert by_name["cheap"].rank == by_name["twin"].rank == "4-5"
    assert found.pairs.ties == [("twin", "cheap")] or found.pairs.ties == [("cheap", "twin")]
    kl = [s["kl_mean"].value for s in found.standings]
    assert kl == sorted(kl)


def test_pareto_front_and_who_is_better_at_no_more_bits(tmp_path):
    frontier_cells(tmp_path)
    (found,) = compared(load(tmp_path).rows)
    by_name = {s.recipe: s for s in found.standings}
    assert by_name["good"].on_front and not by_name["poor"].on_front
    assert by_name["cheap"].on_front != by_name["twin"].on_front  # of the same bits, the lower mean
    assert by_name["poor"].dominated_by == ("good",)
    assert by_name["cheap"].dominated_by == by_name["twin"].dominated_by == ()


def test_documents_of_all_seeds_are_one_sample(tmp_path):
    frontier_cells(tmp_path, n_documents=5, seeds=(0, 1))
    rows = load(tmp_path).rows
    (found,) = compared(rows)
    assert found.pairs.documents == 10
    mine = rows[(rows["recipe"] == "poor") & (rows["metric"] == "kl") & rows["sample"].notna()]
    mine = mine[mine["block"].isna()]
    kl = measured(rows[rows["recipe"] == "poor"], "kl_mean")
    assert kl.value == pytest.approx(mine["value"].mean())
    each = [np.array([value]) for value in mine["value"]]
    assert (kl.low, kl.high) == pytest.approx(document_interval(each, (0, np.inf)))


@pytest.mark.parametrize(
    "n_documents", [4, *slow(8)]
)  # below 8 the intervals are over blocks of tokens
def test_one_text_under_several_seeds_is_one_document(tmp_path, n_documents):
    """Seeds that draw rotations only: intervals, pairs and counts are those of the texts' means over the seeds."""
    rng = np.random.default_rng(0)
    difficulty = rng.lognormal(0, 1, n_documents)
    drawn = {
        recipe: difficulty * mean * rng.lognormal(0, 0.3, (4, n_documents))
        for recipe, mean in (("a", 1e-3), ("b", 2e-3))
    }
    for recipe, of_seeds in drawn.items():
        for seed, kl in enumerate(of_seeds):
            store(tmp_path / "seeds", recipe, kl, kl / 2, seed=seed, text="window")
        mean = of_seeds.mean(0)
        store(tmp_path / "one", recipe, mean, mean / 2, text="window")
    (several,), (one,) = (compared(load(tmp_path / name).rows) for name in ("seeds", "one"))
    assert several.heading == one.heading and several.pairs.documents == n_documents
    for mine, alone in zip(several.standings, one.standings, strict=True):
        assert mine.rank == alone.rank
        for name in ("kl_mean", "perplexity_delta", "perplexity_ratio"):
            got, wanted = mine[name], alone[name]
            assert [got.value, got.low, got.high] == pytest.approx(
                [wanted.value, wanted.low, wanted.high], rel=1e-9
            )
            assert got.n == wanted.n == n_documents * TOKENS
    assert several.pairs.p == pytest.approx(one.pairs.p)


def test_distinct_texts_of_several_seeds_are_one_sample(tmp_path):
    """As generated documents are: their number and the interval are those of all of them."""
    kl = 0.01 * np.random.default_rng(0).lognormal(0, 1, (4, 8))
    for seed, of_seed in enumerate(kl):
        store(tmp_path, "a", of_seed, seed=seed, text=f"{seed}-")
    got = measured(load(tmp_path).rows, "kl_mean")
    assert got.n == 32 * TOKENS
    each = [np.array([value]) for value in kl.ravel()]
    assert (got.low, got.high) == pytest.approx(document_interval(each, (0, np.inf)))


def test_the_slope_over_contexts_counts_a_text_once(tmp_path):
    for seed, context in product(range(3), (128, 256, 512)):
        delta = 0.02 - context / 1e5 + np.arange(9) / 1e4
        store(
            tmp_path,
            "a",
            np.full(9, 0.01),
            delta,
            context_tokens=context,
            seed=seed,
            text=f"{context}-",
        )
    assert len(scaling.deltas_of(load(tmp_path).rows)) == 27


def test_a_cell_measured_again_counts_once(tmp_path):
    kl = np.full(9, 0.01) + np.arange(9) / 1e4
    for n_agents in (1, 3):  # which change no score
        store(tmp_path, "q4_0", kl, n_agents=n_agents)
        store(tmp_path, "q8_0", kl / 9, n_agents=n_agents)
    (found,) = compared(load(tmp_path).rows)
    assert found.pairs.documents == 9 and found.standings[0]["kl_mean"].n == 9 * TOKENS


def test_few_documents_are_not_tested(tmp_path):
    frontier_cells(tmp_path, n_documents=2)
    (found,) = compared(load(tmp_path).rows)
    assert {s.rank for s in found.standings} == {"not tested"} and not found.pairs.p
    assert frontier.recipe_pairs(load(tmp_path).rows) is None


def test_two_recipes_that_an_experiment_gave_one_name_are_told_apart(tmp_path):
    for codec, name in product(("Uniform", "TurboQuant"), ("k8v8", "k8v3")):
        recipe = {"name": name, "key": {"_target_": codec}}
        store(tmp_path, name, np.full(8, 0.01), config={"recipe": recipe}, tag=codec, key_bits=8)
    found = [heading for heading, _ in frontier.by_setting(scores(load(tmp_path).rows))]
    assert len(found) == 2 and "TurboQuant" in found[0] and "Uniform" in found[1]


def test_the_perplexity_ratio_is_that_of_llama_cpps_tool(tmp_path):
    """Its error: var(a) + var(b) - 2 cov(a, b) over n, of the tokens' paired log-probabilities."""
    rng = np.random.default_rng(0)
    rows = Rows(STUDY.columns, model="m", recipe="r", seed=0)
    base = [rng.normal(3, 1, (8, TOKENS)) for _ in range(2)]
    other = [b + rng.normal(0.02, 0.05, b.shape) for b in base]
    for seed, (a, b) in enumerate(zip(other, base, strict=True)):
        rows = Rows(STUDY.columns, model="m", recipe="r", seed=seed)
        for sample, delta in enumerate(a - b):
            rows.add("nll_delta", float(delta.mean()), "nats", sample=sample, n=TOKENS)
        rows.add("nll_delta", float((a - b).std(ddof=1)), "nats", statistic="sd", n=a.size)
        Store(tmp_path).write(STUDY.declaration(), f"{seed}", {}, rows)
    a, b = (np.concatenate([x.ravel() for x in side]) for side in (other, base))
    n = len(a)
    error = math.sqrt((a.var(ddof=1) + b.var(ddof=1) - 2 * np.cov(a, b)[0, 1]) / n)
    found = measured(load(tmp_path).rows, "perplexity_ratio")
    ends = [math.exp((a - b).mean() + sign * 1.959964 * error) for sign in (0, -1, 1)]
    assert [found.value, found.low, found.high] == pytest.approx(ends)


def test_pairs_leave_out_documents_that_a_recipe_lacks():
    index = pd.MultiIndex.from_product([range(5), ["a", "b"]])
    found = pairs_of(pd.Series([1.0, 2.0] * 4 + [1.0, math.nan], index) * (1 + np.arange(10) / 99))
    assert found.documents == 4 and list(found.p) == [("a", "b")]


def test_trend_is_the_slope_per_doubling():
    rng = np.random.default_rng(0)
    contexts = np.repeat([128, 256, 512, 1024], 25)
    deltas = 3 - 0.4 * np.log2(contexts / 128) + rng.normal(0, 0.2, 100)
    slope = trend(contexts, deltas)
    assert slope.low < -0.4 < slope.high and slope.value == pytest.approx(-0.4, abs=0.05)
    assert trend([128, 256], [1, 2]).value is None


def test_trend_is_the_least_squares_slope_of_documents_however_many_a_context_has():
    contexts = np.repeat([128, 256, 1024], [3, 9, 4])
    deltas = np.random.default_rng(0).normal(size=16)
    slope = trend(contexts, deltas)
    assert slope.value == pytest.approx(np.polyfit(np.log2(contexts), deltas, 1)[0])
    flat = trend(contexts, np.log2(contexts))  # no spread at all
    assert flat.low == flat.high == pytest.approx(1)
    lone = trend([128, 256, 512, 512], [1, 2, 3, 4])
    assert lone.value is not None and lone.low is None


@pytest.mark.slow
@pytest.mark.parametrize("n_documents", [8, *slow(16)])
def test_trends_interval_is_wrong_one_time_in_twenty_though_short_contexts_spread_more(n_documents):
    """The measured spreads, which fall 13-fold: one variance for all gave 6 % a side instead of 2.5."""
    contexts = np.repeat([128, 256, 512, 1024, 2048], n_documents)
    spread = np.repeat([1.157, 0.597, 0.396, 0.151, 0.086], n_documents)
    rng, trials = np.random.default_rng(0), 4000
    found = [trend(contexts, rng.normal(0, spread)) for _ in range(trials)]
    for wrong in (sum(v.high < 0 for v in found), sum(v.low > 0 for v in found)):
        assert 0.015 < wrong / trials < 0.035  # 2.5 %, four standard errors each way


def test_the_slope_is_that_of_the_documents_of_one_setting(root):
    rows = load(root).rows
    line = next(r for r in scaling.context_scaling(rows).rows if r["context"] == "per doubling")
    assert line["recipe"] == "q4_0" and line["perplexity_delta"].value == pytest.approx(
        -0.5, rel=0.05
    )
    assert line["perplexity_delta"].high < 0


def test_agents_are_judged_by_the_one_furthest_from_a_single_reader(root):
    lines = scaling.agent_scaling(load(root).rows).rows
    assert [line["agents"] for line in lines] == [1, 15]
    assert lines[1]["agent_spread"].value == pytest.approx(15e-5)


def test_samples_are_those_of_the_documents(root):
    mine = samples_of(scores(load(root).rows), "kl", ["recipe"])
    assert len(mine["good"]) == 20


def judged(root, said):
    """The verdicts of the claims that say this."""
    return [claim.verdict for claim in catalog.claims(load(root).rows) if said in claim.claim]


@pytest.mark.parametrize(
    ("slope", "verdict"), [(-0.5, REPRODUCED), (0.0, INCONCLUSIVE), (0.5, NOT_REPRODUCED)]
)
def test_the_context_claim_is_judged_by_its_slopes_interval(tmp_path, slope, verdict):
    for context in (128, 256, 512):
        level = 2 + slope * math.log2(context / 128)
        delta = np.log1p((level + (np.arange(10) - 4.5) / 100) / 100)
        store(tmp_path, "polykv", np.full(10, 0.01), delta, context_tokens=context)
    assert judged(tmp_path, "shrinks") == [verdict]
    assert judged(tmp_path, "how many agents") == [NOT_MEASURED]


@pytest.mark.parametrize(
    ("numbers", "spread", "verdict"),
    [((1, 15), 1e-5, REPRODUCED), ((1, 15), 3.0, NOT_REPRODUCED), ((5,), 1e-5, INCONCLUSIVE)],
)
def test_the_claim_on_agents_is_judged_by_every_one_of_them(tmp_path, numbers, spread, verdict):
    for n in numbers:
        store(tmp_path, "polykv", np.full(8, 0.01), spread=[0.0, spread], n_agents=n)
    assert judged(tmp_path, "how many agents") == [verdict]


def test_keys_and_values_are_judged_on_the_same_documents(root):
    # These rows make values matter more, so 8-bit keys and 3-bit values lose.
    assert judged(root, "keys deserve more bits") == [NOT_REPRODUCED]


def test_findings_name_the_front_and_what_is_better_at_no_more_bits(tmp_path):
    frontier_cells(tmp_path)
    ((_, lines),) = catalog.findings(load(tmp_path).rows).items()
    text = " ".join(lines)
    assert "good (4.00 bits" in text and "polykv, at 5.60 bits" in text and "poor" not in text
