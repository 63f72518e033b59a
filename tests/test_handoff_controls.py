"""Causal controls of cards: what the receiver gets instead, and what the tables make of it."""

from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from analysis_rows import cell, write
from conftest import checked_cell, tiny_model
from figure_checks import assert_readable
from test_handoff_accuracy import SMALL

from analysis import catalog, render
from analysis.load import load
from analysis.statistics import Value
from experiments.session import Session
from polykv.errors import PolyKVError
from polykv.evaluation.statistics import detectable, mcnemar
from polykv.handoff.card import CacheCard
from polykv.handoff.policy import Policy, load_policy
from polykv.handoff.relay import Handoff, force, ids_of, play
from polykv.handoff.tasks import Task
from polykv.pool import prefill

OWN, OTHER = "The pool is written once .", "Each agent asks a question of its own ."
CONTROLS = ("other_card", "random_card", "no_card")


def relay_of(model, tokenizer, text, donors=None):
    task = Task((text, " And then ?", " A cache ."), (8,) * 3, ("1",) * 3)
    way = Handoff(model, tokenizer, load_policy("full"), 16.0, "requantize", donors=donors)
    (turns,) = play([task], [way])
    return turns, way


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def test_a_receiver_reads_the_donors_tokens_before_its_own_turn(model, tokenizer):
    donor, _ = relay_of(model, tokenizer, OTHER)
    given = [ids_of(donor[:1]), ids_of(donor[:2])]
    own, way = relay_of(model, tokenizer, OWN, given)
    found = list(force(own, way))
    for number, ids_T in enumerate(given, start=1):
        turn = own[number]
        whole_T = torch.cat([ids_T, turn.prompt_T, turn.answer_T])
        expected = model(whole_T[None]).logits[0].log_softmax(-1)
        expected = expected[len(ids_T) + len(turn.prompt_T) - 1 : -1]
        torch.testing.assert_close(found[number], expected, rtol=1e-4, atol=1e-4)
        assert turn.answer_T.tolist() == expected.argmax(-1).tolist()
    assert way.card.ids_T.tolist() == given[1].tolist()


def test_a_receiver_without_a_card_reads_its_own_turn_alone(model, tokenizer):
    turns, way = relay_of(model, tokenizer, OWN, [torch.empty(0, dtype=torch.long)] * 2)
    alone = model(torch.cat([turns[1].prompt_T, turns[1].answer_T])[None]).logits[0].argmax(-1)
    assert turns[1].answer_T.tolist() == alone[len(turns[1].prompt_T) - 1 : -1].tolist()
    assert way.card is None and not way.bits


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_seals_no_card_of_the_sender(name, model, tokenizer):
    ids_BT = torch.arange(20)[None]
    with pytest.raises(PolyKVError, match=name):
        CacheCard.seal(prefill(model, ids_BT), ids_BT[0], model, tokenizer, name)


def test_settings_of_controls_are_checked():
    with pytest.raises(PolyKVError, match="anything"):
        Policy("x", carries="anything")
    with pytest.raises(PolyKVError, match="n_problems=1"):
        checked_cell(*SMALL, "policy=other_card", "n_problems=1")


@pytest.mark.slow
def test_controls_leave_the_first_answer_and_worsen_the_next():
    session = Session()  # whose first turns and fp16 relays all policies share

    def values(policy, metric, hop):
        study, settled = checked_cell(*SMALL, f"policy={policy}", "n_hops=1", "budget_bits=8")
        rows = study.run(settled, session)
        return [r["value"] for r in rows if (r["metric"], r["hop"]) == (metric, hop)]

    quantized = max(values("uniform", "kl", 1))
    for policy in CONTROLS:
        assert values(policy, "kl", 0) == [0, 0, 0]
        assert min(values(policy, "kl", 1)) > 10 * quantized > 0
    assert values("no_card", "mean_bits", 1) == [None] * 3
    assert min(values("random_card", "mean_bits", 1)) > 16


def control_cells(n=150, seed=0, **right):
    """Cells of the study in which a policy answers the first so many problems right."""
    made = []
    for policy, n_right in right.items():
        about = {"document": "gsm8k", "policy": policy, "budget_bits": None, "seed": seed}
        one = cell("handoff_accuracy", f"{policy}-{seed}", **about)
        for how in ("strict", "flexible"):
            for sample in range(n):
                where = {"n_hops": 1, "hop": 1, "reseal": "append", "extraction": how}
                one[3].add("answer_right", float(sample < n_right), "rate", sample=sample, **where)
        made.append(one)
    return made


def test_a_card_is_held_to_the_controls_on_the_same_problems(tmp_path):
    cells = control_cells(fp16=60, reprefill=60, other_card=2, no_card=56, uniform=50)
    rows = load(write(tmp_path, cells)).rows
    shown = catalog.pieces("TABLES")["handoff_controls"](rows)
    lines = {line["given"]: line for line in shown.rows if line["how"] == "strict"}
    assert list(lines) == ["text", "right card", "another problem's card", "no card"]
    other, none = lines["another problem's card"], lines["no card"]
    assert other["verdict"] == "worse" and none["verdict"] == "no difference shown"
    p = [mcnemar([True] * 60, [True] * n + [False] * (60 - n))[2] for n in (2, 56, 60)]
    assert other["p"].value == pytest.approx(3 * p[0]) and none["p"].value == 2 * p[1]
    assert other["apart"].value == pytest.approx(-100 * 58 / 150)
    # At the level that the smallest of the three p values has to pass.
    assert none["detectable"].value == pytest.approx(100 * detectable(150, 4, 0.05 / 3))
    assert "p < 0.05" not in shown.legend
    assert lines["right card"]["apart"].value is None and lines["right card"]["right"].value == 40
    render.plain(shown, 160)
    canvas = catalog.pieces("FIGURES")["handoff_controls"](rows).canvas
    assert_readable(canvas)
    plt.close(canvas)


def test_a_control_is_compared_on_the_problems_of_one_seed(tmp_path):
    """Problems of a file are drawn by the seed; a control lacks the last seed, another was not run with it at all."""
    cells = control_cells(fp16=60, other_card=60) + control_cells(seed=1, fp16=150, no_card=150)
    shown = catalog.pieces("TABLES")["handoff_controls"](load(write(tmp_path, cells)).rows)
    lines = {line["given"]: line for line in shown.rows if line["how"] == "strict"}
    assert lines["no card"]["apart"].value == 0
    assert lines["no card"]["apart"].note == "of seed 1 alone"  # accuracies are over both
    assert lines["another problem's card"]["apart"] == Value(
        None, note="the right card was not run on the same problems"
    )


def test_relays_without_controls_have_no_table_of_them(tmp_path):
    rows = load(write(tmp_path, control_cells(fp16=60, reprefill=50))).rows
    assert catalog.pieces("TABLES")["handoff_controls"](rows) is None
    assert isinstance(catalog.pieces("FIGURES")["handoff_controls"](rows), str)


def test_the_legend_says_what_a_receiver_without_the_right_card_has_seen(tmp_path):
    rows = load(write(tmp_path, control_cells(fp16=60, other_card=2))).rows
    legend = catalog.pieces("TABLES")["handoff_controls"](rows).legend
    assert (
        "no word of the problem" not in legend
    )  # the instruction and common words are in every card
    assert "state another problem" in legend and "relay.restate" in legend


@pytest.mark.parametrize(
    ("n", "n_apart", "alpha"),
    [(150, 10, 0.05), (150, 60, 0.05), (24, 0, 0.05), (150, 10, 0.05 / 4), (150, 60, 0.05 / 20)],
)
def test_the_detectable_difference_is_found_in_four_samples_of_five(n, n_apart, alpha):
    least = detectable(n, n_apart, alpha)
    share = max((n_apart + 1) / (n + 2), least)
    rng = np.random.default_rng(0)
    one_only, other_only = (share + least) / 2, (share - least) / 2
    draws = rng.multinomial(n, [one_only, other_only, 1 - share], size=1000)
    significant = cache(
        lambda a, b: (
            mcnemar([True] * a + [False] * (b + 1), [False] * a + [True] * b + [False])[2] < alpha
        )
    )
    found = [significant(int(a), int(b)) for a, b, _ in draws]
    assert np.mean(found) == pytest.approx(0.8, abs=0.05)
    assert detectable(4, 0) is None
