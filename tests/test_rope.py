"""Rotary embeddings whose frequencies depend on the length: no cache is grown across the switch."""

from contextlib import nullcontext

import pytest
import torch
from conftest import checked_cell, tiny_model

import polykv
from polykv.attention.cascade import attend_in_place
from polykv.errors import PolyKVError
from polykv.evaluation.continuation import score_rest
from polykv.evaluation.ttft import Route, measure
from polykv.greedy import greedy
from polykv.handoff.card import CacheCard
from polykv.handoff.policy import load_policy
from polykv.handoff.relay import prompts_of
from polykv.handoff.replay import replay
from polykv.handoff.tasks import Task
from polykv.pool import SharedKVPool, encode_queries, prefill
from polykv.supported import check_rope

SWITCH, POSITIONS = 32, 128
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": SWITCH,
    "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 8.0, 16.0], "factor": 4.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
IDS_BT = torch.randint(1, 300, (1, POSITIONS), generator=torch.Generator().manual_seed(0))
READERS = ["dequantize", "in_place"]


@pytest.fixture(scope="module")
def longrope():
    return tiny_model("llama", rope_parameters=LONG, max_position_embeddings=POSITIONS)


def read(model, n_prefix, n_tokens, reader):
    pool = SharedKVPool.from_cache(prefill(model, IDS_BT[:, :n_prefix]), polykv.load_recipe("full"))
    rest_BT = IDS_BT[:, n_prefix:n_tokens]
    if reader == "dequantize":
        return score_rest(model, pool.dequantize(), rest_BT)
    with attend_in_place(model):
        return (
            model(input_ids=rest_BT, past_key_values=pool.reader(1)).logits[0, :-1].log_softmax(-1)
        )


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("n_prefix", "n_tokens"), [(20, 32), (33, 60)])
def test_one_side_of_the_switch_is_exact(longrope, reader, n_prefix, n_tokens):
    plain = longrope(input_ids=IDS_BT[:, :n_tokens], use_cache=False).logits[0].log_softmax(-1)
    found = read(longrope, n_prefix, n_tokens, reader)
    torch.testing.assert_close(found, plain[n_prefix:-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("n_prefix", "n_tokens"), [(20, 33), (32, 60)])
def test_across_the_switch_is_refused_with_both_lengths(longrope, reader, n_prefix, n_tokens):
    with pytest.raises(
        PolyKVError, match=rf"\b{n_prefix}\b.*\b{n_tokens}\b.*\b{SWITCH}\b.*longrope"
    ):
        read(longrope, n_prefix, n_tokens, reader)


def test_every_way_to_grow_a_cache_is_refused(longrope, tokenizer):
    cache, ids_T = prefill(longrope, IDS_BT[:, :20]), IDS_BT[0]
    known = {"match": rf"\b20\b.*\b{SWITCH}\b.*longrope"}
    with pytest.raises(PolyKVError, **known):
        greedy(longrope, cache, [ids_T[20:28]], 8)
    with pytest.raises(PolyKVError, **known):
        encode_queries(longrope, tokenizer, ["The pool is written once"], 20, 32)
    with pytest.raises(PolyKVError, **known):
        measure(longrope, tokenizer, ids_T[:40], 20, [Route(load_policy("uniform"))], 4.0, 2)
    task = Task(("The pool is written once", "by many agents"), (16, 16), ("", ""))
    with pytest.raises(PolyKVError, match=rf"\b{SWITCH}\b.*longrope"):
        prompts_of(task, tokenizer, longrope.config)
    card = CacheCard.seal(cache, ids_T[:20], longrope, tokenizer, policy="full")
    with pytest.raises(PolyKVError, **known), attend_in_place(longrope):
        longrope(input_ids=IDS_BT[:, 20:40], past_key_values=card.reader())


def test_tokens_are_not_read_again_in_parts_across_the_switch(longrope, monkeypatch):
    monkeypatch.setattr("polykv.handoff.replay.CHUNK", 16)
    cache = prefill(longrope, IDS_BT[:, :40])
    with pytest.raises(PolyKVError, match=r"\b16\b.*\b40\b"):
        replay(longrope, cache, IDS_BT[0, :40], 0)


@pytest.mark.parametrize("n_prefix", [20, 40])
def test_dynamic_ntk_has_other_frequencies_at_every_length(n_prefix):
    model = tiny_model("llama", rope_parameters=DYNAMIC, max_position_embeddings=SWITCH)
    check_rope(model.config, 20, SWITCH, "the text")
    with pytest.raises(PolyKVError, match=rf"\b{n_prefix}\b.*\b50\b.*dynamic"):
        check_rope(model.config, n_prefix, 50, "the text")


def test_frequencies_that_stay_are_read_at_any_length(llama):
    check_rope(llama.config, 20, 10**6, "the text")
    scaled = tiny_model("llama", rope_parameters=LONG | {"rope_type": "yarn"})
    check_rope(scaled.config, 20, 10**6, "the text")
    check_rope(tiny_model("gpt2").config, 20, 10**6, "the text")


@pytest.mark.parametrize(("context", "refused"), [(30, False), (40, True)])
def test_an_experiment_refuses_before_any_work(context, refused, longrope, tokenizer, tmp_path):
    longrope.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = ("experiment=handoff_ttft", "weights=random", f"context={context}", "turn_tokens=10")
    expected = pytest.raises(PolyKVError, match=rf"\b{context}\b.*longrope")
    with expected if refused else nullcontext():
        checked_cell(*settings, "model=local", f"model.path={tmp_path}")
