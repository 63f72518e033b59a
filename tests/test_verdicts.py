"""Verdicts on levels: rows on both sides of every edge, none a measurement. A wide interval is never a YES."""

import math

import pytest
from analysis.claims import NO, OPEN, YES, claims
from analysis.counterpart import EXACT, NEAR, NONE
from analysis.published_table import PUBLISHED_TABLES
from analysis.qkvshare_claims import FACTOR
from analysis.quality_claims import MARGIN
from analysis.reduce import Value
from analysis.verdict import equivalent
from analysis_rows import BYTES, cell_rows, handoff_rows, write

from analysis import published
from analysis.load import load

NF4 = "bfloat16, weights nf4"


def judged(tmp_path, rows, about):
    (claim,) = [c for c in claims(load(write(tmp_path, rows)).rows) if about in c.claim]
    return claim


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.0, 2.0, YES),
        (1.5, 1.5, YES),
        (0.999, 2.0, OPEN),
        (1.0, 2.001, OPEN),
        (-9.0, 9.0, OPEN),
        (0.5, 1.0, OPEN),
        (2.0, 2.5, OPEN),
        (0.5, 0.999, NO),
        (2.001, 2.5, NO),
        (None, 1.5, OPEN),
        (1.5, None, OPEN),
    ],
)
def test_the_same_is_all_of_the_interval_within_the_margin(low, high, verdict):
    assert equivalent(Value(1.5, low, high), 1.0, 2.0) == verdict


def quality(monkeypatch, delta=(None, None), f1=(None, None), **more):
    """Eight documents and fifteen agents of the abstract's setting, by default as its authors ran it."""
    monkeypatch.setitem(BYTES, "llama-3-8b", 262144)
    scorer, n = more.pop("scorer", "roberta-large"), more.pop("n", 8 * 15)
    over = more.pop("over", "documents")
    place = {"document": "wikitext2", "device": "cuda", "dtype": NF4} | more
    rows = []
    for recipe in ("full", "polykv"):
        rows += cell_rows("llama-3-8b", "hub", 7194, 15, recipe, True, **place)
    for row in rows:
        if row["metric"] == "perplexity_delta":
            row |= {"value": 0.5, "ci_low": delta[0], "ci_high": delta[1]}
            row["protocol"] = f"paper; interval: skewness-corrected t over {over}"
        if row["metric"] == "bertscore_f1":
            row |= {"value": 0.92, "ci_low": f1[0], "ci_high": f1[1]}
            row |= {"protocol": f"bertscore {scorer}", "n": n}
    return rows


DELTA, F1 = MARGIN["perplexity_delta"], MARGIN["bertscore_f1"]


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ((0.57 - DELTA, 0.57 + DELTA), YES),
        ((0.2, 0.4), YES),  # narrow, beside the published value, and the same for all that matters
        ((0.57 - DELTA - 0.01, 0.6), OPEN),
        ((0.5, 0.57 + DELTA + 0.01), OPEN),
        ((-6.0, 5.0), OPEN),  # it holds the published value, and everything else
        ((0.57 + DELTA + 0.01, 2.0), NO),
        ((-1.0, 0.57 - DELTA - 0.01), NO),
        ((None, None), OPEN),
    ],
)
def test_perplexity_is_the_same_within_a_margin_that_is_said(tmp_path, monkeypatch, ends, verdict):
    claim = judged(tmp_path, quality(monkeypatch, delta=ends), "perplexity +0.57 %")
    assert claim.verdict == verdict
    assert (
        f"hub weights of llama-3-8b, wikitext2, 7,194 tokens, cuda, {NF4}, n = 1,000" in claim.said
    )
    assert (f"within {DELTA:g} points of the published (our margin)" in claim.said) == (
        ends[0] is not None
    )


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"dtype": "bfloat16"}, "unquantized weights, theirs nf4; run experiment=polykv_quality"),
        ({"dtype": "float16, weights int8"}, "int8 weights, theirs nf4"),
        ({"over": "blocks of tokens"}, "not over 8 documents or more; run"),
    ],
)
def test_what_is_unlike_the_papers_run_decides_nothing_and_says_what_would(
    tmp_path, monkeypatch, more, why
):
    claim = judged(tmp_path, quality(monkeypatch, (0.5, 0.6), **more), "perplexity +0.57 %")
    assert claim.verdict == OPEN and why in claim.said
    assert "model.quantization=bnb_4bit" in claim.said and "n_documents=8" in claim.said


def test_of_two_formats_of_weights_the_authors_own_answers(tmp_path, monkeypatch):
    rows = quality(monkeypatch, (0.5, 0.6))
    rows += [row | {"cell": f"plain {row['cell']}"} for row in quality(
        monkeypatch, (5.0, 6.0), dtype="bfloat16")]  # fmt: skip
    assert judged(tmp_path, rows, "perplexity +0.57 %").verdict == YES


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ((0.9279 - F1, 0.9279 + F1), YES),
        ((0.90, 0.95), OPEN),
        ((0.9279 + F1 + 1e-4, 0.96), NO),
        ((0.80, 0.9279 - F1 - 1e-4), NO),
    ],
)
def test_bertscore_is_the_same_within_a_margin_by_the_papers_scorer(
    tmp_path, monkeypatch, ends, verdict
):
    claim = judged(tmp_path, quality(monkeypatch, f1=ends), "BERTScore F1 0.9279")
    assert claim.verdict == verdict and "n = 120" in claim.said
    few = judged(tmp_path / "few", quality(monkeypatch, f1=ends, n=7 * 15), "BERTScore F1 0.9279")
    assert few.verdict == OPEN and "not over 8 documents" in few.said
    rows = quality(monkeypatch, f1=ends, scorer="minilm")
    other = judged(tmp_path / "other", rows, "BERTScore F1 0.9279")
    assert other.verdict == OPEN and "it was not scored by roberta-large; run" in other.said
    assert "scorer=roberta-large" in other.said and "scored by minilm, it is" in other.said


def test_the_published_table_says_weights_and_does_not_subtract_scores_of_two_scorers(
    tmp_path, monkeypatch
):
    def lines(place, rows):
        table = PUBLISHED_TABLES["published_polykv"](load(write(tmp_path / place, rows)).rows)
        mine = [line for line in table.rows if "7,194 tokens, 15 agents" in line["setting"]]
        return {line["metric"]: line for line in mine if line["policy"] == "polykv"}

    own = lines("own", quality(monkeypatch, (0.5, 0.6), (0.92, 0.93)))
    assert own["perplexity_delta"]["match"] == own["bertscore_f1"]["match"] == EXACT
    assert own["bertscore_f1"]["against"].value == pytest.approx(0.92 - 0.9279)
    rows = quality(monkeypatch, (0.5, 0.6), (0.92, 0.93), dtype="bfloat16", scorer="minilm")
    unlike = lines("unlike", rows)
    assert unlike["perplexity_delta"]["match"] == NEAR
    assert "unquantized weights, theirs nf4" in unlike["perplexity_delta"]["ours"].note
    assert (
        unlike["bertscore_f1"]["match"] == NONE and unlike["bertscore_f1"]["against"].value is None
    )


def times(device="cuda", tokens=3877, gain=2.6, spread=0.1, n=100, other=9.0):
    """The published route, and others that gain `other` and must not decide."""
    rows = handoff_rows("llama-3.1-8b", "random")
    found = []
    for row in rows:
        if row["metric"] == "ttft_speedup" and row["context_tokens"] == 8192:
            row |= {"context_tokens": tokens, "device": device, "value": gain, "n": n}
            row |= {"ci_low": gain - spread / 2, "ci_high": gain + spread / 2}
            found.append(row)
            for route in ("memory, in place", "file"):
                ends = {"ci_low": 0.1, "ci_high": 2 * other}  # holds whatever was published
                found.append(row | {"protocol": route, "value": other} | ends)
            found.append(row | {"budget_bits": 8.0, "value": other, "cell": "newest"})
    return found


RATIO = 1029.7 / 397.1


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        (RATIO, YES),
        (RATIO * FACTOR - 0.03, YES),
        (RATIO * FACTOR, OPEN),
        (RATIO * FACTOR + 0.03, NO),
        (RATIO / FACTOR + 0.03, YES),
        (RATIO / FACTOR - 0.03, NO),
    ],
)
def test_times_are_held_to_one_route_named_before_within_a_factor(tmp_path, gain, verdict):
    """Quartiles 0.1 apart of 100 repeats: the median is known to 0.018."""
    claim = judged(tmp_path, times(gain=gain), "ms at 8K")
    assert claim.verdict == verdict
    assert "3,877 tokens by published.csv" in claim.claim
    assert (
        f"a factor of {FACTOR:g} (our margin)" in claim.said
        and "handed over in memory" in claim.said
    )


def test_quartiles_are_spread_and_few_repeats_decide_nothing(tmp_path):
    wide = {"gain": RATIO, "spread": 3.0}
    assert judged(tmp_path / "few", times(**wide, n=4), "ms at 8K").verdict == OPEN
    assert judged(tmp_path / "many", times(**wide, n=400), "ms at 8K").verdict == YES


def test_what_is_not_sooner_is_not_the_same_as_a_little_sooner(tmp_path):
    """Published 1.15 times at 1K: within the factor lies 0.92 too, which is later."""
    assert judged(tmp_path, times(tokens=476, gain=0.95, spread=0.01), "ms at 1K").verdict == NO
    assert judged(tmp_path / "a", times(tokens=476, gain=1.1), "ms at 1K").verdict == YES


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"device": "cpu"}, "their times are a GPU's; run experiment=handoff_ttft"),
        ({"tokens": 8192}, "another length; run experiment=handoff_ttft model=llama-3.1-8b context=3877"),
    ],
)  # fmt: skip
def test_another_device_or_length_decides_nothing(tmp_path, more, why):
    claim = judged(tmp_path, times(gain=RATIO, **more), "ms at 8K")
    assert claim.verdict == OPEN and why in claim.said


def test_another_model_does_not_answer_the_published_times(tmp_path):
    claim = judged(tmp_path, handoff_rows(), "ms at 8K")
    assert claim.verdict == OPEN and "Not measured; run experiment=handoff_ttft" in claim.said
    assert "1029.7 to 397.1 ms" in claim.claim and "2.59 times" in claim.claim


def test_a_label_stands_for_the_tokens_that_the_file_states_for_it():
    figures = published.load("qkvshare")
    tokens = {f.at: f.label_tokens for f in figures if f.metric == "ttft"}
    assert tokens == {"1K": 476, "4K": 1939, "8K": 3877}
    stages = [f.value.value for f in figures if f.table == "stages" and f.at == "8K"]
    (whole,) = [f for f in figures if (f.metric, f.policy, f.at) == ("ttft", "qkvshare", "8K")]
    assert math.isclose(sum(stages), whole.value.value, abs_tol=0.2)


def test_a_second_backend_does_not_lose_the_claim_on_memory(tmp_path):
    rows = [
        row | {"backend": backend, "cell": f"{row['cell']}-{backend}"}
        for recipe, backend in (("full", "torch"), ("polykv", "torch"), ("polykv", "cpu"))
        for row in cell_rows("reference", "reference", 512, 15, recipe, True)
    ]
    assert judged(tmp_path, rows, "agents that read one pool take less memory").verdict == NO
