"""What a prefill knows of its layers: RoPE as the model applies it, and the queries that meet the keys."""

import threading

import pytest
import torch
from conftest import tiny_model
from test_families import model_of
from transformers import DynamicCache

import polykv
from polykv.codecs.context import Rope
from polykv.errors import PolyKVError
from polykv.pool import SharedKVPool
from polykv.prefill import prefill

SCALED = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "linear": {"factor": 2.0},
}
# Pairs of halves, of neighbours (GLM, Cohere, Ernie, Helium), of a part of the head, turned the other way (NanoChat),
# angles for half the channels (GPT-OSS), several sets of angles (Gemma 3).
FAMILIES = ("qwen2", "glm", "cohere", "ernie4_5", "helium", "gpt_neox", "phi", "nanochat",
            "gemma3_text", "gpt_oss")  # fmt: skip


def same_token(model, n_tokens=12):
    """A cache of one token many times over: before RoPE, its keys are equal."""
    return prefill(model, torch.full((1, n_tokens), 5))


def spread(k_BHTD):
    return float((k_BHTD - k_BHTD[:, :, :1]).abs().max() / k_BHTD.abs().max())


def assert_undone(cache, n_layers=None):
    for layer, context in [*zip(cache.layers, cache.contexts, strict=True)][:n_layers]:
        assert spread(layer.keys) > 0.1
        assert spread(context.rope.turn_back(layer.keys)) < 2e-6
        again = context.rope.turn(context.rope.turn_back(layer.keys))
        torch.testing.assert_close(again, layer.keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_rope_is_undone_as_each_family_applies_it(name):
    # Later keys of GPT-OSS are not equal: its attention sinks weigh more the fewer tokens there are.
    assert_undone(same_token(model_of(name)), 1 if name == "gpt_oss" else None)


@pytest.mark.parametrize("kind", SCALED)
def test_rope_is_undone_with_its_scaling(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **SCALED[kind]}
    rope["original_max_position_embeddings"] = 64
    assert_undone(same_token(tiny_model("llama", rope_parameters=rope), 100))


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom"])
def test_models_without_rope_have_none(name):
    assert all(context.rope is None for context in same_token(model_of(name)).contexts)


def test_layers_that_do_not_use_their_angles_have_none():
    contexts = same_token(tiny_model("smollm3", no_rope_layers=[1, 0, 1, 0])).contexts
    assert [context.rope is None for context in contexts] == [False, True, False, True]


def test_a_bf16_model_is_undone_with_its_own_rounded_angles():
    cache = same_token(tiny_model("llama").bfloat16())
    context, keys = cache.contexts[0], cache.layers[0].keys
    # What is left is the rounding of the keys themselves.
    assert spread(context.rope.turn_back(keys)) < 3 * 2**-8


def test_layers_share_one_table_of_angles(llama):
    first, *others = (context.rope for context in same_token(llama).contexts)
    assert all(other.cos_TP is first.cos_TP for other in others)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_query_rms_is_that_of_the_projected_queries(name):
    """Against hooks on the projection, or the norm after it; RoPE keeps the mean square of a pair."""
    model, seen = tiny_model(name), []
    for layer in model.model.layers:
        module = getattr(layer.self_attn, "q_norm", layer.self_attn.q_proj)
        module.register_forward_hook(lambda module, args, out: seen.append(out))
    cache = prefill(model, torch.arange(20)[None])
    n_heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    for q, context in zip(seen, cache.contexts, strict=True):
        square = q.reshape(20, kv_heads, n_heads // kv_heads, -1).square().mean((0, 2))
        half = square.shape[1] // 2
        pairs = (square[:, :half] + square[:, half:]) / 2
        found = context.rope.pair_mean(context.query_rms.square())[0, :, 0]
        torch.testing.assert_close(found, torch.cat([pairs, pairs], 1))


def test_prefill_gives_the_models_own_cache_and_leaves_no_hook(llama):
    ids_BT = torch.arange(30)[None]
    cache, own = prefill(llama, ids_BT), DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(input_ids=ids_BT, past_key_values=own)
    for ours, theirs in zip(cache.layers, own.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    assert not any(module._forward_pre_hooks for module in llama.modules())


def test_threads_that_prefill_one_model_know_their_own_layers(llama):
    alone = {n: prefill(llama, torch.arange(n)[None]).contexts for n in (10, 25)}
    found, start = {}, threading.Barrier(2)

    def work(n):
        start.wait()
        found[n] = [prefill(llama, torch.arange(n)[None]).contexts for _ in range(5)]

    threads = [threading.Thread(target=work, args=(n,)) for n in alone]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for n, contexts in alone.items():
        for again in found[n]:
            for one, other in zip(contexts, again, strict=True):
                assert torch.equal(one.rope.cos_TP, other.rope.cos_TP)
                assert torch.equal(one.query_rms, other.query_rms)


def test_a_recipe_that_asks_refuses_a_cache_that_does_not_know(llama):
    recipe, ids_BT = polykv.load_recipe("waterfill_4"), torch.arange(30)[None]
    own = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(input_ids=ids_BT, past_key_values=own)
    with pytest.raises(PolyKVError, match="'waterfill_4' needs .*query_rms and rope.*prefill"):
        SharedKVPool.from_cache(own, recipe)
    lossy = SharedKVPool.from_cache(prefill(llama, ids_BT), polykv.load_recipe("polykv"))
    with pytest.raises(PolyKVError, match="'waterfill_4' needs"):
        lossy.under(recipe)


def test_a_cache_that_has_grown_does_not_know_its_layers(llama):
    cache = prefill(llama, torch.arange(30)[None])
    assert len(cache.contexts) == 4
    with torch.no_grad():
        llama(input_ids=torch.arange(5)[None], past_key_values=cache)
    with pytest.raises(PolyKVError, match="'waterfill_4' needs"):
        SharedKVPool.from_cache(cache, polykv.load_recipe("waterfill_4"))


def test_a_pool_made_of_an_uncompressed_one_knows_what_it_knew(llama):
    cache, recipe = prefill(llama, torch.arange(30)[None]), polykv.load_recipe("waterfill_4")
    full = SharedKVPool.from_cache(cache, polykv.load_recipe("full"))
    ours, theirs = full.under(recipe), SharedKVPool.from_cache(cache, recipe)
    for index in range(ours.n_layers):
        for one, other in zip(ours.decode_layer(index), theirs.decode_layer(index), strict=True):
            assert torch.equal(one, other)


def test_rope_parts_and_joins():
    rope = Rope(torch.rand(9, 2), torch.rand(9, 2), torch.tensor([0, 1]), torch.tensor([3, 4]))
    x = torch.randn(1, 2, 9, 6)
    parts = [rope.narrow(0, 4), rope.narrow(4, 9)]
    turned = torch.cat([p.turn(c) for p, c in zip(parts, x.split([4, 5], 2), strict=True)], 2)
    assert torch.equal(turned, rope.turn(x))
    assert torch.equal(parts[0].join(parts[1]).turn(x), rope.turn(x))
    assert torch.equal(rope.turn(x)[..., [2, 5]], x[..., [2, 5]])
    one = x[:, :, :1]
    assert torch.equal(rope.turn(one), rope.turn(one.expand_as(x)))
