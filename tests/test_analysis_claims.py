"""Verdicts on both papers' claims, and every published figure beside its measured one, on synthetic rows."""

import math

import pandas as pd
import pytest
from analysis.claims import AGREES, NO, OPEN, YES, claims
from analysis.counterpart import COMPUTED, EXACT, NEAR, NONE, OTHER
from analysis.published_table import PUBLISHED_TABLES
from analysis.relay_claims import difference
from analysis_rows import handoff_rows, paper_memory, quickstart, write

from analysis import published
from analysis.load import load


def judged(tmp_path, rows, about):
    """The claims that say `about`, from these rows."""
    found = claims(load(write(tmp_path, rows)).rows)
    return [claim for claim in found if about in claim.claim]


def test_what_was_not_run_is_open_and_names_the_command(tmp_path):
    rows = [row for row in quickstart((512,), (3,)) if row["metric"] == "exact_match"]
    found = claims(load(write(tmp_path, rows)).rows)
    assert {claim.paper for claim in found} == {"polykv", "qkvshare"}
    for claim in found:
        assert claim.verdict == OPEN and "run experiment=" in claim.said, claim
        assert not claim.measured, claim


def test_a_verdict_names_the_weights_and_device_it_holds_for(tmp_path):
    for claim in claims(load(write(tmp_path, handoff_rows())).rows):
        if claim.paper == "qkvshare" and claim.verdict != OPEN:
            assert (
                "(on reference weights of reference, " in claim.claim and ", cpu, " in claim.claim
            )


@pytest.mark.parametrize(("loss", "verdict"), [(0, YES), (3, OPEN), (20, NO)])
def test_accuracy_holds_where_a_loss_is_ruled_out_and_not_where_it_is_significant(
    tmp_path, loss, verdict
):
    (claim,) = judged(tmp_path, handoff_rows(loss=loss), "accuracy holds over 2 to 5 hops")
    assert claim.verdict == verdict and claim.measured
    assert f"{-100 * loss / 80:+.1f} points" in claim.said


def test_hops_outside_the_published_ones_do_not_decide(tmp_path):
    (claim,) = judged(tmp_path, handoff_rows(hops=(1, 7), loss=20), "accuracy holds")
    assert claim.verdict == OPEN and "Not measured" in claim.said


@pytest.mark.parametrize(("loss", "verdict"), [(-8, YES), (0, OPEN), (20, NO)])
def test_topology_beats_uniform_by_the_paired_test(tmp_path, loss, verdict):
    (claim,) = judged(tmp_path, handoff_rows(loss=loss), "topology-aware cards answer better")
    assert claim.verdict == verdict


def test_times_are_judged_by_quartiles(tmp_path):
    rows = handoff_rows()
    (sooner,) = judged(tmp_path, rows, "sooner than re-prefilling")
    (grows,) = judged(tmp_path, rows, "the longer the context")
    (forward,) = judged(tmp_path, rows, "mostly the receiver's forward pass")
    assert (sooner.verdict, grows.verdict, forward.verdict) == (YES, YES, YES)
    for row in rows:
        if row["metric"] == "ttft_speedup":
            row |= {"value": 0.8, "ci_low": 0.7, "ci_high": 0.9}
        if row["metric"] == "stage_create":
            row |= {"value": 900.0, "ci_low": 890.0, "ci_high": 910.0}
    slower = tmp_path / "slower"
    assert judged(slower, rows, "sooner than re-prefilling")[0].verdict == NO
    assert judged(slower, rows, "the longer the context")[0].verdict == OPEN
    assert judged(slower, rows, "mostly the receiver's forward pass")[0].verdict == NO


@pytest.mark.parametrize(("inject", "verdict"), [(0.5, YES), (0.97, NO), (1.1, NO)])
def test_memory_is_judged_by_what_published_readers_take(tmp_path, inject, verdict):
    rows = quickstart((256, 512), (3, 15), ("full", "polykv"))
    private = {(row["context_tokens"], row["n_agents"]): row["value"] for row in rows
               if row["protocol"] == "resident" and row["recipe"] == "full"}  # fmt: skip
    for row in rows:
        if row["protocol"] == "resident" and row["recipe"] == "polykv":
            row["value"] = inject * private[row["context_tokens"], row["n_agents"]]
    (claim,) = judged(tmp_path, rows, "agents that read one pool")
    assert claim.verdict == verdict and "15 agents decode after 512 tokens on cpu" in claim.said
    assert f"{1e3 * private[512, 15]:.3g} MB; one pool" in claim.said


def test_paired_interval_of_accuracy_has_a_width_even_without_differences():
    exact, low, high = difference([True] * 80, [True] * 80)
    assert exact == 0 and low == -high and 2 < high < 3
    exact, low, high = difference([True] * 10 + [False] * 90, [False] * 10 + [True] * 90)
    assert exact == -80 and low < exact < high


def published_rows():
    return pd.read_csv(published.FILE, dtype=str, keep_default_na=False)


@pytest.mark.parametrize("rows", [quickstart() + paper_memory() + handoff_rows(), handoff_rows()])
def test_every_published_row_stands_once_beside_a_value_or_a_reason(tmp_path, rows):
    rows = load(write(tmp_path, rows)).rows
    lines = [line for table in PUBLISHED_TABLES.values() for line in table(rows).rows]
    said = published_rows()
    assert len(lines) == len(said) == 85
    shown = sorted(
        (line["metric"], line["unit"], line["policy"], line["published"].value) for line in lines
    )
    policies = said["policy"].replace("", "any")
    assert shown == sorted(
        zip(said["metric"], said["unit"], policies, said["value"].astype(float), strict=True)
    )
    for line in lines:
        assert line["match"] in (EXACT, NEAR, OTHER, COMPUTED, NONE)
        assert (line["ours"].value is None) == (line["match"] == NONE)
        if line["match"] == NONE:
            assert "run experiment=" in line["ours"].note, line
        else:
            assert "(" in line["on"] and line["at"]
    digest = sum("secondary digest" in line["published"].note for line in lines)
    assert digest == said["source"].str.contains("secondary digest").sum() > 0


def test_only_the_published_model_is_compared(tmp_path):
    rows = load(write(tmp_path, quickstart() + paper_memory() + handoff_rows())).rows
    lines = [line for table in PUBLISHED_TABLES.values() for line in table(rows).rows]
    for line in lines:
        assert (line["against"].value is None) == (line["match"] in (OTHER, NONE)), line
    by_match = {
        match: [line for line in lines if line["match"] == match] for match in (COMPUTED, OTHER)
    }
    assert not any(line["match"] in (EXACT, NEAR) for line in lines)
    assert all(line["on"].startswith("reference") for line in by_match[OTHER])
    memory = [line for line in by_match[COMPUTED] if line["metric"] == "kv_memory"]
    assert len(memory) == 10 and all(abs(line["against"].value) < 0.0005 for line in memory)
    (saved,) = [line for line in by_match[COMPUTED] if line["metric"] == "memory_reduction"]
    assert saved["ours"].value == pytest.approx(100 * (1 - 11 / 32 / 15))
    (ratio,) = [line for line in by_match[COMPUTED] if line["metric"] == "compression_ratio"]
    assert ratio["ours"].value == pytest.approx(32 / 11)


def test_arithmetic_agrees_and_is_never_counted_as_measured_or_reproduced(tmp_path):
    rows = load(write(tmp_path, paper_memory())).rows
    caption = PUBLISHED_TABLES["published_polykv"](rows).caption
    assert "0 measured on the published model, 12 computed" in caption
    assert "Computed for llama-3-8b" in caption and "Measured on" not in caption
    found = [c for c in claims(rows) if " GB for " in c.claim or "times smaller" in c.claim]
    assert [claim.verdict for claim in found] == [AGREES] * 3
    assert not any(claim.verdict == YES for claim in claims(rows))


def test_arithmetic_that_does_not_agree_is_not_reproduced(tmp_path):
    rows = paper_memory()
    for row in rows:
        if row["protocol"] in ("paper", "nominal"):
            row["value"] *= 1.01
    found = claims(load(write(tmp_path, rows)).rows)
    found = [c for c in found if " GB for " in c.claim or "times smaller" in c.claim]
    assert [claim.verdict for claim in found] == [NO] * 3


def test_the_published_model_in_its_setting_is_exact_and_elsewhere_near(tmp_path):
    rows = handoff_rows("llama-3.1-8b", "hub", "gsm8k")
    lines = PUBLISHED_TABLES["published_qkvshare"](load(write(tmp_path, rows)).rows).rows
    accuracy = {
        (line["policy"], line["setting"]): line
        for line in lines
        if line["metric"] == "gsm8k_accuracy"
    }
    exact = accuracy["topology_q4", "gsm8k, 3 hops"]
    assert exact["match"] == EXACT and exact["against"].value == pytest.approx(90 - 80.67)
    near = accuracy["topology_q4", "gsm8k, 4 hops"]
    assert near["match"] == NEAR and "another number of handoffs" in near["ours"].note
    assert accuracy["topology_q8", "gsm8k, 3 hops"]["match"] == NONE
    slow = next(line for line in lines if (line["policy"], line["setting"]) == ("reprefill", "8K"))
    assert slow["match"] == NEAR and slow["against"].value == pytest.approx(9 * 81.92 / 1029.7)
    assert not any(math.isnan(line["ours"].value or 0) for line in lines)
