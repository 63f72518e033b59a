"""Trained controllers: their features by hand, their target against finite differences, budget, causality, weights."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import TEXT
from transformers import DynamicCache

from polykv.errors import PolyKVError
from polykv.handoff import training
from polykv.handoff.card import CacheCard
from polykv.handoff.controller import DATA, FEATURES, Controller, load, log_ratios, read
from polykv.handoff.examples import Relay, examples, read_on, relays
from polykv.handoff.mixed import TIERS
from polykv.handoff.policy import Policy, load_policy
from polykv.handoff.signals import BACKGROUND, DEMAND, IMPORTANCE, Sender, Topology
from polykv.handoff.training import fit, held_out, main, target
from polykv.pool import prefill

RELAY = Topology(n_shared=40, hops_left=3)


def sender_of(model, tokenizer, n_tokens=90, cache=None):
    ids_T = tokenizer(TEXT, return_tensors="pt").input_ids[0, :n_tokens]
    return Sender(model, cache or prefill(model, ids_T[None]), ids_T, RELAY, seed=0)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Six problems in GSM8K's format."""
    path = tmp_path_factory.mktemp("problems") / "train.jsonl"
    lines = [
        {"question": f"Tom has {n} apples and buys {n + 1}. How many?",
         "answer": f"He buys {n + 1}.\nHe has {n}+{n + 1}=<<{n}+{n + 1}={2 * n + 1}>>{2 * n + 1}.\n#### {2 * n + 1}"}
        for n in range(2, 8)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(path)


def test_rarity_counts_the_context_itself():
    sender = Sender(None, None, torch.tensor([7, 5, 7, 7]), RELAY, seed=0)
    expected = [-math.log(3 / 4), -math.log(1 / 4), -math.log(3 / 4), -math.log(3 / 4)]
    assert IMPORTANCE["rarity"](sender) == pytest.approx(expected)


def test_quality_and_entropy_are_those_of_the_plain_predictions(llama, tokenizer):
    sender = sender_of(llama, tokenizer)
    probs = llama(input_ids=sender.ids_T[None]).logits[0].double().softmax(-1)
    given = probs[:-1].gather(1, sender.ids_T[1:, None])[:, 0].numpy()
    expected = np.append(given.mean(), given)
    assert IMPORTANCE["quality"](sender) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    entropy = -(probs * probs.log()).sum(-1).numpy()
    assert IMPORTANCE["entropy"](sender) == pytest.approx(entropy, rel=1e-3, abs=1e-5)


def test_attention_variance_is_that_of_eager_attention(llama, tokenizer):
    sender = sender_of(llama, tokenizer)
    llama.set_attn_implementation("eager")
    layers = llama(input_ids=sender.ids_T[None], output_attentions=True).attentions
    llama.set_attn_implementation("sdpa")
    probs_LHQT = torch.stack(layers)[:, 0].double()
    expected = [float(probs_LHQT[:, :, t:, t].var(correction=0)) for t in range(90)]
    assert IMPORTANCE["attention_variance"](sender) == pytest.approx(expected, rel=1e-3, abs=1e-8)


def test_segment_and_downstream_demand_by_hand(llama, tokenizer):
    sender = sender_of(llama, tokenizer)
    assert DEMAND["segment"](sender).tolist() == [1.0] * 40 + [BACKGROUND] * 50
    shared = np.array([3.0] * 40 + [BACKGROUND] * 50)
    anchors = DEMAND["anchors"](sender)
    expected = (shared / shared.mean() + anchors / anchors.mean()) / 2
    assert DEMAND["downstream"](sender) == pytest.approx(expected)


def test_one_token_has_every_feature(llama, tokenizer):
    sender = sender_of(llama, tokenizer, n_tokens=1)
    for name in FEATURES:
        (weight,) = load_policy(name).score(sender)
        assert math.isfinite(weight) and weight > 0


def test_a_controller_is_the_network_it_says():
    weights = (np.array([[1.0, 0.0]]), np.array([0.5, 0.0]), np.array([2.0, 3.0]))
    made = Controller(("rarity",), np.array([0.1]), np.array([2.0]), *weights, provenance={})
    found = made(np.array([[1.0, 3.0]]))
    for weight, signal in zip(found, (1.0, 3.0), strict=True):
        z = (math.log(signal / 2 + 1e-3) - 0.1) / 2
        assert weight == pytest.approx(math.exp(2 * math.tanh(z + 0.5)))
    assert log_ratios(np.zeros((1, 3))).tolist() == [[math.log(1.001)] * 3]


@pytest.mark.parametrize(("name", "n_parameters"), [("dont_waste_bits", 384), ("qkvshare", 512)])
def test_the_packaged_weights_say_where_they_are_from(name, n_parameters):
    made = load(name)
    assert made.features == FEATURES[name] and made.n_parameters == n_parameters
    assert (DATA / f"{name}.json").stat().st_size < 10_000
    about = made.provenance
    assert about["model"] and len(about["weights_sha256"]) == 64 and about["n_train"] >= 20
    assert about["seed"] == 0 and len(about["problems_sha256"]) == 64 and about["commit"]


def test_the_packaged_weights_beat_a_random_order_on_held_out_problems():
    """As measured by the command that made them; the README of the folder has the same numbers."""
    found = json.loads((DATA / "held_out.json").read_text())
    readme = (DATA / "README.md").read_text()
    cost = {(row["policy"], tuple(row["tiers"]), row["budget_bits"]): row for row in found["rows"]}
    for name in FEATURES:
        assert {**load(name).provenance} == {k: v for k, v in found.items() if k != "rows"}
        for budget in training.BUDGETS:
            ours, theirs = (cost[who, (2, 4, 8, 16), budget] for who in (name, "random"))
            assert ours["cost"] < theirs["cost"] and ours["kl"] < theirs["kl"]
    for row in found["rows"]:
        assert f"{row['cost']:.4f} | {row['kl']:.4f}" in readme, row


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("budget", (2.0, 3.3, 4.0, 9.0))
def test_the_budget_holds_and_two_bits_are_on_offer(name, budget, llama, tokenizer):
    sender = sender_of(llama, tokenizer)
    card = CacheCard.seal(
        sender.cache, sender.ids_T, llama, tokenizer, name, budget, topology=RELAY, backend="torch"
    )
    assert budget - 16 / 170 < card.nominal_bits <= budget
    used = {
        TIERS[tier]
        for tier in torch.cat([card.payload.key.tiers_T, card.payload.value.tiers_T]).tolist()
    }
    assert used <= {2, 4, 8, 16} and (2 in used or budget > 4)
    again = CacheCard.from_bytes(card.to_bytes(), llama, tokenizer, backend="torch")
    for one, other in zip(card.decode(), again.decode(), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("name", FEATURES)
def test_bits_do_not_depend_on_what_is_read_later(name, llama, tokenizer):
    alone = sender_of(llama, tokenizer, n_tokens=60)
    read_further = prefill(llama, tokenizer(TEXT, return_tensors="pt").input_ids[:, :90])
    read_further.crop(-30)  # the last 30 of 90
    later = sender_of(llama, tokenizer, n_tokens=60, cache=read_further)
    policy = load_policy(name)
    assert policy.score(alone) == pytest.approx(policy.score(later), rel=1e-3)


def test_relays_split_a_problem_at_a_line(problems, tokenizer):
    for relay in relays(problems, tokenizer, 6, seed=0):
        text = tokenizer.decode(torch.cat([relay.ids_T, relay.rest_T]))
        n_rest = tokenizer.decode(relay.rest_T).count("\n")
        assert text.count("\n") == 4 and "<<" not in text and relay.topology.hops_left == n_rest
        assert tokenizer.decode(relay.ids_T[: relay.topology.n_shared]).endswith("How many?\n")
    with pytest.raises(PolyKVError, match="has 6 problems and 7 are wanted"):
        relays(problems, tokenizer, 7, seed=0)


def test_the_receivers_text_does_not_reach_the_features(llama, tokenizer):
    ids_T = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    one, other = (Relay(ids_T[:50], rest_T, RELAY) for rest_T in (ids_T[50:60], ids_T[70:75]))
    (one, other) = (next(examples(llama, [relay], 1, seed=0)) for relay in (one, other))
    assert (
        load_policy("qkvshare").score(one.sender).tolist()
        == load_policy("qkvshare").score(other.sender).tolist()
    )
    assert not np.allclose(target(one), target(other))


def test_the_target_is_the_divergence_that_small_errors_cause(llama, tokenizer):
    """Errors of one number at a time: half of F times the square of the error is the KL, summed over predictions."""
    ids_T = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    (example,) = examples(llama, [Relay(ids_T[:20], ids_T[20:26], RELAY)], n_draws=120, seed=0)
    estimated, measured = 0.0, 0.0
    for layer, token in ((0, 3), (1, 10), (4, 7), (5, 15), (6, 18), (2, 12)):
        spot = (0, 1, token, 2)
        step = float(0.02 * example.layers[layer][spot].abs() + 0.01)
        moved = [x.clone() for x in example.layers]
        moved[layer][spot] += step
        estimated += float(example.cost(moved).sum())
        log_RV, other_RV = (
            example.log_probs_RV.double(),
            read_on(llama, moved, example.rest_T).double(),
        )
        kl = float((log_RV.exp() * (log_RV - other_RV)).sum())
        assert example.cost(moved)[token] == pytest.approx(example.cost(moved).sum())
        measured += kl
    assert estimated == pytest.approx(measured, rel=0.3) and measured > 1e-7


@pytest.mark.slow
def test_a_fit_finds_the_feature_that_matters():
    draw = np.random.default_rng(0)
    signals = [
        {"rarity": draw.exponential(size=200), "entropy": draw.exponential(size=200)}
        for _ in range(3)
    ]
    targets = [one["rarity"] ** 2 * draw.exponential(size=200) for one in signals]
    made = fit(("entropy", "rarity"), signals, targets, seed=0, provenance={})
    few, many = made(np.stack([np.ones(3), np.array([0.1, 1.0, 1.9])]))[[0, 2]]
    assert 30 < many / few < 2000  # 361 in truth
    assert (
        np.corrcoef(made(np.stack([signals[0]["entropy"], np.ones(200)])), signals[0]["entropy"])[
            0, 1
        ]
        < 0.9
    )


@pytest.mark.slow
def test_the_command_makes_the_same_weights_again_and_others_from_another_seed(
    checkpoint, problems, tmp_path
):
    command = [
        "--model",
        str(checkpoint),
        "--problems",
        problems,
        "--n-train",
        "3",
        "--n-held-out",
        "2",
    ]
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        main([*command, "--seed", seed, "--out", str(tmp_path / folder)])
    for name in (*FEATURES, "held_out"):
        one, same, other = ((tmp_path / folder / f"{name}.json").read_text() for folder in "abc")
        assert one == same and one != other
    assert read(tmp_path / "a" / "qkvshare.json").n_parameters == 512


def test_held_out_relays_are_scored_by_what_their_cards_decode_to(llama, tokenizer):
    ids_T = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    (example,) = examples(llama, [Relay(ids_T[:60], ids_T[60:70], RELAY)], 1, seed=0)
    rows = {
        (row["policy"], *row["tiers"], row["budget_bits"]): row
        for row in held_out(iter([example]), {})
    }
    card = CacheCard.seal(
        example.sender.cache,
        example.sender.ids_T,
        llama,
        tokenizer,
        Policy("u"),
        4.0,
        backend="torch",
    )
    other_RV = read_on(
        llama, [x for side in zip(*card.decode(), strict=True) for x in side], example.rest_T
    )
    plain = (
        llama(input_ids=example.rest_T[None], past_key_values=DynamicCache(card.decode()))
        .logits[0]
        .log_softmax(-1)
    )
    assert torch.equal(other_RV, plain)
    log_RV = example.log_probs_RV
    kl = float((log_RV.exp() * (log_RV - plain)).sum(-1).mean())
    assert rows["uniform", 3, 4, 8, 16, 4.0]["kl"] == pytest.approx(
        kl, rel=1e-3
    )  # its exact tokens are in fp16
