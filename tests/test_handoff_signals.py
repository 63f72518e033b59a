"""Signals, against eager attention and a plain forward pass."""

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, TEXT, tiny_model

from polykv import config
from polykv.handoff import replay as replay_module
from polykv.handoff.policy import load_policy
from polykv.handoff.replay import replay
from polykv.handoff.signals import DEMAND, IMPORTANCE, WINDOW, Sender, Topology
from polykv.pool import prefill


def reading(tokenizer, model, n_tokens=120):
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[0, :n_tokens]
    return ids, prefill(model, ids[None])


def eager_received(model, ids, start):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    layers = model(input_ids=ids[None], output_attentions=True).attentions
    model.set_attn_implementation(before)
    return torch.stack(layers)[:, 0, :, start:].double().sum((0, 1, 2))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("start", (0, 56))
def test_attention_received_is_that_of_eager_attention(architecture, start, tokenizer):
    model = tiny_model(architecture)
    ids, cache = reading(tokenizer, model)
    received = replay(model, cache, ids, start).received_T
    torch.testing.assert_close(received, eager_received(model, ids, start), rtol=1e-4, atol=1e-4)


def test_chunks_do_not_matter(llama, tokenizer, monkeypatch):
    ids, cache = reading(tokenizer, llama)
    whole = replay(llama, cache, ids, 10)
    monkeypatch.setattr(replay_module, "CHUNK", 7)
    monkeypatch.setattr(replay_module, "SCORES", 1000)
    for a, b in zip(whole, replay(llama, cache, ids, 10), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_surprisal_is_minus_log_p(llama, tokenizer):
    ids, cache = reading(tokenizer, llama)
    surprisal = replay(llama, cache, ids, 0).surprisal_T
    log_probs = llama(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    expected = -log_probs.gather(1, ids[1:, None])[:, 0].double()
    assert surprisal[0].isnan()
    torch.testing.assert_close(surprisal[1:], expected, rtol=1e-4, atol=1e-4)


def test_reading_again_leaves_model_and_cache_as_they_were(llama, tokenizer):
    ids, cache = reading(tokenizer, llama)
    keys, before = cache.layers[0].keys.clone(), llama.config._attn_implementation
    replay(llama, cache, ids, 20)
    assert llama.config._attn_implementation == before
    assert torch.equal(cache.layers[0].keys, keys)


@pytest.mark.parametrize("name", [*IMPORTANCE, *DEMAND])
def test_every_signal_is_finite_and_not_negative(name, llama, tokenizer):
    ids, cache = reading(tokenizer, llama)
    signal = (IMPORTANCE | DEMAND)[name](Sender(llama, cache, ids, Topology(30, 3), seed=0))
    assert signal.shape == (120,) and np.isfinite(signal).all() and (signal >= 0).all()


def test_window_only_counts_the_last_tokens(llama, tokenizer):
    ids, cache = reading(tokenizer, llama)
    sender = Sender(llama, cache, ids, Topology(), seed=0)
    total = IMPORTANCE["attention_window"](sender).sum()
    # Every query of every layer and head spreads an attention of 1.
    assert total == pytest.approx(WINDOW * 4 * 4, rel=1e-5)


def test_shared_demand_grows_with_the_hops_that_are_left(llama, tokenizer):
    ids, cache = reading(tokenizer, llama)
    shares = []
    for hops in (1, 4):
        demand = DEMAND["shared"](Sender(llama, cache, ids, Topology(30, hops), seed=0))
        shares.append(demand[:30].sum() / demand.sum())
    assert shares[1] > shares[0] > 30 / 120


def test_random_tokens_keep_their_draw_as_the_relay_grows(llama, tokenizer):
    short = Sender(llama, None, torch.zeros(50), Topology(), seed=1)
    long = Sender(llama, None, torch.zeros(80), Topology(), seed=1)
    draw = IMPORTANCE["random"]
    assert np.array_equal(draw(short), draw(long)[:50])


@pytest.mark.parametrize("name", config.available("policy"))
def test_every_policy_has_a_score_with_mean_and_spread(name, llama, tokenizer):
    ids, cache = reading(tokenizer, llama)
    score = load_policy(name).score(Sender(llama, cache, ids, Topology(30, 2), seed=0))
    assert score.shape == (120,) and np.isfinite(score).all() and (score >= 0).all()
    assert load_policy(name).name == name
