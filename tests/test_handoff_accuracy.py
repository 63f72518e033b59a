"""experiment=handoff_accuracy: relays from a cell to tables, figure and claims."""

import json
import math
from itertools import product
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from analysis_rows import relay_cells, write
from conftest import checked_cell, rows_of
from figure_checks import assert_readable
from scipy import stats

from analysis import catalog, handoff_accuracy, handoff_findings, render
from analysis.catalog import INCONCLUSIVE, NOT_MEASURED, NOT_REPRODUCED, REPRODUCED
from analysis.handoff_accuracy import difference
from analysis.load import load
from experiments import handoff_accuracy as study
from experiments.handoff_accuracy import STUDY
from experiments.relay_arrays import Played
from polykv.errors import PolyKVError
from polykv.evaluation.continuation import Comparison
from polykv.evaluation.statistics import skewed_interval
from polykv.handoff.relay import RESEALS, Turn
from polykv.results import Rows, Store

SMALL = (
    "experiment=handoff_accuracy", "n_problems=3", "relay.n_facts=8", "relay.max_new_tokens=12", "budget_bits=3",
    "n_hops=2", "device=cpu",
)  # fmt: skip
NAMES = ("handoff_accuracy", "handoff_pairs")
POLICIES = ("fp16", "uniform", "topology")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    for policy in POLICIES:
        made = rows_of(*SMALL, f"policy={policy}")
        Store(root).write(STUDY.declaration(), policy, {"policy": {"name": policy}}, made)
    return load(root).rows


def table(name, rows):
    return catalog.pieces("TABLES")[name](rows)


def samples(rows, metric, hop=2, **where):
    found = rows[(rows["metric"] == metric) & (rows["hop"] == hop)]
    for column, wanted in where.items():
        found = found[found[column] == wanted]
    return found.sort_values("sample")["value"].to_numpy(float)


def test_a_cell_has_a_row_for_each_problem_and_hop(rows):
    right = rows[rows["metric"] == "answer_right"]
    assert len(right) == 3 * 3 * 3 * len(POLICIES) and set(right["value"]) <= {0.0, 1.0}
    assert set(right["hop"]) == {0, 1, 2} and set(rows["n_hops"]) == {2}
    assert set(right["sample"]) == {0, 1, 2} and set(rows["n_agents"]) == {3}
    # A budget of 3 is nominal; scales, maps, channels and the exact sinks of a short text come on top.
    bits = samples(rows, "mean_bits", policy="topology")
    assert len(bits) == 3 and (bits > 3.5).all() and (bits < 5).all()
    assert (samples(rows, "file_bits", policy="topology") > bits).all()
    assert (samples(rows, "kl", policy="fp16") == 0).all()
    assert (samples(rows, "kl", policy="uniform") > 0).all()
    assert (samples(rows, "kl", hop=1, policy="uniform") > 0).all()
    assert (samples(rows, "kl", hop=0) == 0).all()  # no card was handed on yet
    passing = samples(rows, "kl_passing", policy="uniform")
    assert (passing == samples(rows, "kl_once", policy="uniform")).all()  # reseal=append


def test_the_table_has_the_means_and_intervals_of_the_problems(rows):
    lines = {line["policy"]: line for line in table("handoff_accuracy", rows).rows[-len(POLICIES):]}  # fmt: skip
    for policy, line in lines.items():
        kl = samples(rows, "kl", policy=policy)
        assert line["kl"].value == pytest.approx(kl.mean()) and line["kl"].n == 3
        ends = skewed_interval(kl, (0, math.inf))
        assert (line["kl"].low, line["kl"].high) == pytest.approx(ends)
        deep = kl - samples(rows, "kl_once", policy=policy)
        assert line["working"].value == pytest.approx(deep.mean())
        assert (line["working"].low, line["working"].high) == pytest.approx(skewed_interval(deep))
        assert line["passing"].value == 0
        right = samples(rows, "answer_right", policy=policy, extraction="strict")
        wilson = stats.binomtest(int(right.sum()), 3).proportion_ci(method="wilson")
        assert line["strict"].value == pytest.approx(100 * right.mean())
        assert (line["strict"].low, line["strict"].high) == pytest.approx(
            (100 * wilson.low, 100 * wilson.high)
        )
        assert line["bits"].value == pytest.approx(samples(rows, "mean_bits", policy=policy).mean())
        assert line["relay_minutes"].value > 0 and line["replay_minutes"].value > 0
    assert all("set." not in column.name for column in table("handoff_accuracy", rows).columns)


def test_answers_in_another_dtype_stand_on_the_line_of_their_cell(tmp_path):
    cells = relay_cells(hops=(2,))
    for _, _, _, made in cells:
        for row in made:
            row["dtype"] = "bfloat16" if row["metric"] == "answer_right" else "float32"
    found = load(write(tmp_path, cells)).rows
    (line,) = [
        line
        for line in table("handoff_accuracy", found).rows
        if line["policy"] == "uniform" and line["section"].startswith("measured")
    ]
    assert line["strict"].value == 90 and line["kl"].n == 80
    assert "float32 (answers bfloat16)" in line["section"]


def test_pairs_are_tested_at_equal_budgets_only(tmp_path):
    found = load(write(tmp_path, relay_cells(loss=8))).rows
    lines = table("handoff_pairs", found).rows
    pairs = (("fp16", "uniform"), ("fp16", "topology"), ("uniform", "topology"))
    assert {(line["one"], line["other"], line["hop"], line["how"]) for line in lines} == {
        (*pair, hops, how) for pair in pairs for hops in (2, 3, 5) for how in ("strict", "flexible")
    }
    assert len(lines) == 18
    for line in lines:
        lost = 8 if line["other"] == "topology" else 0
        assert (line["only_one"], line["only_other"], line["n"]) == (lost, 0, 80)
        assert line["p"].value == pytest.approx(2 / 2**8 if lost else 1)


def test_the_problems_replayed_do_not_part_those_answered(tmp_path):
    cells = relay_cells(loss=8)
    for _, policy, config, _ in cells:
        config |= {"n_forced": 16 if policy.endswith("uniform") else 1}
    found = load(write(tmp_path, [*cells, *relay_cells(hops=(1, 7))])).rows
    lines = table("handoff_pairs", found).rows
    assert len([line for line in lines if line["hops"] == 5]) == 18
    assert any(
        "Does a card answer" in said for said in handoff_findings.findings(found).popitem()[1]
    )


@pytest.mark.parametrize("rewritten", [False, True])
def test_problems_of_a_file_that_was_rewritten_are_not_paired(rewritten, tmp_path):
    cells = relay_cells(document="gsm8k+path=mine.jsonl", loss=8)
    for _, name, config, _ in cells:
        digest = "b" * 12 if rewritten and name.endswith("topology") else "a" * 12
        label = {"relay": "gsm8k+path=mine.jsonl"}
        config |= {"relay": {"name": "gsm8k", "digest": digest}, "labels": label}
    found = load(write(tmp_path, cells)).rows
    pairs = {(line["one"], line["other"]) for line in table("handoff_pairs", found).rows}
    assert (("uniform", "topology") in pairs) == (not rewritten)
    assert set(found["document"]) == (
        {"gsm8k+path=mine.jsonl@aaaaaa", "gsm8k+path=mine.jsonl@bbbbbb"}
        if rewritten
        else {"gsm8k+path=mine.jsonl"}
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_table_renders_and_is_none_without_rows(name, rows):
    shown = table(name, rows)
    assert shown.name == name and shown.rows
    for text in (render.markdown(shown), render.latex(shown), render.to_csv(shown)):
        assert "nan" not in text.lower().replace("minan", "")
    render.plain(shown, 160)
    assert table(name, rows.iloc[:0]) is None


def test_the_figure_is_readable_and_the_fp16_relay_stands_beside_the_others(tmp_path):
    found = load(write(tmp_path, relay_cells(document="gsm8k", loss=8))).rows
    canvas = catalog.pieces("FIGURES")["handoff_hops"](found).canvas
    assert_readable(canvas)
    kl, accuracy = canvas.axes
    lines = {c.get_label(): list(c[0].get_ydata()) for c in accuracy.containers}
    assert lines["fp16"] == lines["uniform"] == [90.0] * 3 and lines["topology"] == [80.0] * 3
    assert "fp16" not in {c.get_label() for c in kl.containers}  # it is what KL is to
    dotted = [
        (list(line.get_xdata()), list(line.get_ydata()))
        for line in accuracy.lines
        if line.get_linestyle() == ":"
    ]
    assert dotted == [
        ([2, 3, 4, 5], said)
        for said in (
            [81.33, 76.67, 75.33, 72.67],
            [82, 75.33, 69.33, 76.67],
            [78.67, 80.67, 77.33, 72],
        )
    ]  # published: fp16, uniform and topology at 4 bits
    plt.close(canvas)
    exact = found[found["policy"] == "fp16"]
    assert isinstance(catalog.pieces("FIGURES")["handoff_hops"](exact), str)


def test_published_figures_meet_rows_of_their_own_model_only(rows):
    def published(of):
        lines = table("handoff_accuracy", of).rows
        return [line for line in lines if line["section"].startswith("published")]

    assert len(published(rows)) == 28
    assert all(line["strict"].value is None for line in published(rows))
    mine = rows[rows["policy"] == "uniform"]
    moved = mine.assign(model="llama-3.1-8b", document="gsm8k", weights="hub", budget_bits=4.0)
    found = published(pd.concat([rows, moved], ignore_index=True))
    answered = [line for line in found if line["strict"].value is not None]
    assert [(r["policy"], r["hop"], r["budget"]) for r in answered] == [("uniform", 2, "4 bits")]
    assert answered[0]["published"].value == 82.0 and "digest" in answered[0]["published"].note


def test_settings_that_a_column_tells_are_not_told_twice(tmp_path):
    cells = [one for n_hops in (2, 3, 5) for one in relay_cells(hops=(n_hops,))]
    for number, (_, _, config, _) in enumerate(cells):
        config |= {"n_hops": (2, 3, 5)[number // 3], "reseal": "requantize", "n_problems": 80}
    found = load(write(tmp_path, cells)).rows
    assert not any(name.startswith("set.") for name in found)
    for _, _, config, _ in cells[:1]:
        config["n_problems"] = 40
    again = [("handoff_accuracy", "again", cells[1][2] | {"n_problems": 40}, cells[1][3])]
    found = load(write(tmp_path, again)).rows
    assert [name for name in found if name.startswith("set.")] == ["set.n_problems"]


def test_several_seeds_are_one_line_and_the_newest_cell_of_a_seed_counts(tmp_path):
    cells = relay_cells(hops=(2,))
    other = [(s, f"{n}-1", c, r) for s, n, c, r in relay_cells(hops=(2,), loss=40)]
    for row, (_, _, _, made) in product((1,), other):
        for one in made:
            one["seed"] = row
    found = load(write(tmp_path, cells + other)).rows
    lines = {line["policy"]: line for line in table("handoff_accuracy", found).rows[-3:]}
    assert lines["topology"]["strict"].value == pytest.approx((90 + 40) / 2)
    assert lines["uniform"]["strict"].value == pytest.approx(90)


# Claims


def judged(tmp_path, cells, about):
    """The one claim that says `about`, from these cells."""
    (claim,) = [
        claim
        for claim in handoff_accuracy.claims(load(write(tmp_path, cells)).rows)
        if about in claim.claim
    ]
    return claim


def test_a_verdict_names_the_weights_and_the_device_that_it_holds_for(tmp_path):
    for claim in handoff_accuracy.claims(load(write(tmp_path, relay_cells())).rows):
        assert "reference weights of reference" in claim.claim and "cpu" in claim.claim


@pytest.mark.parametrize(
    ("loss", "verdict"), [(0, REPRODUCED), (3, INCONCLUSIVE), (20, NOT_REPRODUCED)]
)
def test_accuracy_holds_where_a_loss_is_ruled_out_and_not_where_it_is_significant(
    tmp_path, loss, verdict
):
    claim = judged(tmp_path, relay_cells(loss=loss), "2 to 5 hops")
    assert claim.verdict == verdict and claim.measured
    assert f"{-100 * loss / 80:+.1f} points" in claim.said


def test_a_model_that_never_marks_its_answers_is_judged_by_its_last_numbers(tmp_path):
    cells = relay_cells(loss=20)
    for _, _, _, rows in cells:
        for row in rows:
            if row.get("extraction") == "strict":
                row["value"] = 0.0  # equal under every policy, whatever it answers
    assert judged(tmp_path, cells, "2 to 5 hops").verdict == NOT_REPRODUCED


def test_hops_outside_the_published_ones_do_not_decide(tmp_path):
    assert judged(tmp_path, relay_cells(hops=(1, 7), loss=20), "hops").verdict == NOT_MEASURED


def test_without_rows_no_claim_is_measured(rows):
    found = handoff_accuracy.claims(rows.iloc[:0])
    assert [claim.verdict for claim in found] == [NOT_MEASURED] * 2


@pytest.mark.parametrize(
    ("loss", "verdict"), [(-8, REPRODUCED), (0, INCONCLUSIVE), (20, NOT_REPRODUCED)]
)
def test_topology_beats_uniform_by_the_paired_test(tmp_path, loss, verdict):
    assert judged(tmp_path, relay_cells(loss=loss), "topology").verdict == verdict


def test_the_paired_interval_of_accuracy_has_a_width_even_without_differences():
    exact, low, high = difference([True] * 80, [True] * 80)
    assert exact == 0 and low == -high and 2 < high < 3
    exact, low, high = difference([True] * 10 + [False] * 90, [False] * 10 + [True] * 90)
    assert exact == -80 and low < exact < high


# What is refused, and what a cell is


@pytest.mark.parametrize(
    ("experiment", "override", "message"),
    [
        ("handoff_accuracy", "n_hops=0", "n_hops=0"),
        ("handoff_accuracy", "batch=0", "batch=0"),
        ("handoff_accuracy", "n_forced=none", "n_forced='none'.*null"),
        ("handoff_accuracy", "n_problems=3 n_forced=4", "n_forced=4 and n_problems=3"),
        ("handoff_accuracy", "+model.answer_dtype=float17", "'float17'"),
        ("handoff_accuracy", "n_problems=true", "n_problems=True.*whole number"),
        ("handoff_accuracy", "relay.max_new_tokens=0", "relay.max_new_tokens=0"),
        ("handoff_accuracy", "relay.max_new_tokens=1.5", "relay.max_new_tokens=1.5"),
        ("handoff_accuracy", "reseal=again", "'again'"),
        ("handoff_accuracy", "weights=random", "random weights"),
        ("handoff_accuracy", "budget_bits=-1", "budget_bits=-1"),
        ("handoff_accuracy", "budget_bits=2", "lowest tier of policy 'uniform' has 3 bits"),
        ("handoff_accuracy", "budget_bits=null", "budget_bits=None"),
        ("handoff_accuracy", "policy=waterfill budget_bits=8", "budget_bits=8.*1 to 7"),
        ("handoff_accuracy", "policy=trellis budget_bits=6.5", "budget_bits=6.5.*1 to 6"),
        ("handoff_ttft", "policies=[waterfill] budget_bits=5.37", "budget_bits=5.37.*1 to 7"),
        ("handoff_accuracy", "relay=gsm8k n_problems=301", "openai/gsm8k.*n_problems=300"),
        ("handoff_accuracy", "policy.importance=[luck]", "'luck'"),
        ("controller_ablation", "policy=fp16", "budget"),
    ],
)
def test_bad_input_is_one_clear_line_before_any_work(experiment, override, message):
    with pytest.raises(PolyKVError, match=message) as refused:
        checked_cell(f"experiment={experiment}", "device=cpu", *override.split())
    assert "\n" not in str(refused.value)


def test_a_flip_is_said_of_every_replayed_answer(rows):
    flips = rows[rows["metric"] == "digit_flip"]
    assert len(flips) == 3 * 3 * len(POLICIES) and set(flips["value"]) <= {0.0, 1.0}
    assert not flips.loc[(flips["policy"] == "fp16") | (flips["hop"] == 0), "value"].any()


@pytest.mark.parametrize(
    ("differs", "expected"), [((), 0.0), ((1, 2), 0.0), ((0,), 1.0), ((3,), 1.0), ((4, 6), 0.0)]
)
def test_only_another_digit_is_a_flip(differs, expected, monkeypatch):
    pieces = ["7", " dogs", " cost", " 1", ",", "080", " each"]
    turn = Turn(torch.arange(2), torch.arange(len(pieces)))
    words = Turn(turn.prompt_T, torch.arange(1, 3))  # without digits
    monkeypatch.setattr(study, "fp16_relays", lambda *_: [Played([turn], []), Played([words], [])])
    session = SimpleNamespace(
        model=lambda _: (None, SimpleNamespace(decode=lambda ids: pieces[int(ids[0])]))
    )
    same = np.array([place not in differs for place in range(len(pieces))])
    zeros = np.zeros(len(pieces), np.float32)
    compared = [
        Comparison(zeros, zeros, zeros, {"same_top1": same}),
        Comparison(*[zeros[:2]] * 3, {"same_top1": same[1:3]}),
    ]
    made = Rows(study.COLUMNS)
    study.add_flips(made, compared, None, session, hop=0)
    assert [(row["value"], row["n"], row["sample"]) for row in made] == [(expected, 3, 0)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("relay.plain.first=hello", "relay.plain.first='hello' has no {question}"),
        ("relay.restate=maybe", "relay.restate='maybe'; it takes true or false"),
        ("relay.path=5", "relay.path=5"),
        ("relay.path={twice}", "problems 1 and 3 of .* are the same; remove one"),
    ],
)
def test_problems_that_cannot_be_told_apart_are_refused(override, message, tmp_path):
    twice = tmp_path / "twice.jsonl"
    lines = [{"question": f"{number} + 1?", "answer": "#### 2"} for number in (1, 2, 1)]
    twice.write_text("\n".join(map(json.dumps, lines)))
    given = override.replace("{twice}", str(twice))
    with pytest.raises(PolyKVError, match=message):
        checked_cell(
            "experiment=handoff_accuracy", "relay=gsm8k", "n_problems=2", "n_hops=1", given
        )


def test_with_one_handoff_requantizing_is_appending():
    found = {checked_cell(*SMALL, "n_hops=1", f"reseal={how}")[1].reseal for how in RESEALS}
    assert found == {"append"}


def test_policies_without_a_budget_are_one_cell_whatever_the_budget():
    cells = {
        STUDY.identity(checked_cell(*SMALL[:-3], "policy=fp16", f"budget_bits={bits}", f"reseal={reseal}")[1])
        for bits, reseal in ((3, "append"), (4, "requantize"))
    }  # fmt: skip
    assert len(cells) == 1


def test_the_evaluate_module_gives_accuracy_in_percent():
    from polykv.evaluation.gsm8k_metric import GSM8K

    said = ["#### 3", "it is 4", "no", "#### 4, no, #### 5"]
    found = GSM8K().compute(predictions=said, references=["3", "4", "5", "5"])
    assert found == {"strict": 25, "flexible": 75, "last_mark": 50}
    for right in ("so 9 + 9. #### 18", "#### 18", " 18", "$18", 18, 18.0):
        found = GSM8K().compute(predictions=["#### 18.00", "18"], references=[right] * 2)
        assert found == {"strict": 50, "flexible": 100, "last_mark": 50}
    with pytest.raises(PolyKVError, match="eighteen"):
        GSM8K().compute(predictions=["#### 18"], references=["eighteen"])


def test_a_mean_of_problems_counts_each_the_same(tmp_path):
    cells = relay_cells(hops=(2,))
    for _, _, _, made in cells:
        for row in made:
            row["n"] = 1 + row["sample"]  # long answers weigh no more
    found = load(write(tmp_path, cells)).rows
    line = next(r for r in table("handoff_accuracy", found).rows[-3:] if r["policy"] == "uniform")
    assert line["kl"].value == pytest.approx(np.mean(samples(found, "kl", policy="uniform")))
