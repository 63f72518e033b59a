"""Recipes that drop tokens: which are kept, at which positions, and in how many bytes."""

import pytest
import torch
from conftest import TEXT, checked_cell, tiny_model

from polykv.attention.cascade import attend_in_place
from polykv.codecs.context import NOTHING, LayerContext
from polykv.documents import Document
from polykv.errors import PolyKVError
from polykv.evaluation import decode_drift, online
from polykv.evaluation.continuation import score_rest
from polykv.greedy import greedy
from polykv.keep import SinksRecent, SnapKV, attention_received
from polykv.pool import SharedKVPool, prefill
from polykv.recipe import EXACT, Recipe, load_recipe
from polykv.tokens import encode

DROPPING = ("streaming_2", "streaming_4", "streaming_8", "snapkv_2", "snapkv_4", "snapkv_8")


@pytest.fixture(scope="module")
def prefix_BT(tokenizer):
    return encode(tokenizer, TEXT[:260])


@pytest.fixture(scope="module")
def rest_BT(tokenizer):
    return encode(tokenizer, TEXT[260:300])


def pool_of(model, prefix_BT, recipe):
    return SharedKVPool.from_cache(prefill(model, prefix_BT), recipe, backend="torch")


def keys(n_tokens, heads=2):
    return torch.randn(1, heads, n_tokens, 8, generator=torch.Generator().manual_seed(0))


def test_sinks_and_the_most_recent_are_kept():
    places = SinksRecent(0.5, sinks=2).places(keys(12), NOTHING)
    assert places.tolist() == [[[0, 1, 8, 9, 10, 11]] * 2]
    assert SinksRecent(0.1, sinks=4).places(keys(12), NOTHING).tolist() == [[[0]] * 2]


def test_what_the_last_tokens_attend_to_is_kept_by_head():
    k_BHTD = torch.zeros(1, 2, 40, 8)
    k_BHTD[0, 0, 10, 0] = k_BHTD[0, 1, 25, 0] = 9.0
    queries = torch.zeros(1, 4, 6, 8)
    queries[..., 0] = 1
    places = SnapKV(0.25, window=5, kernel=3).places(k_BHTD, LayerContext(queries=queries))
    assert places.shape == (1, 2, 10)
    for head, planted in enumerate((10, 25)):
        found = places[0, head].tolist()
        assert found == sorted(found) and found[-5:] == [35, 36, 37, 38, 39]
        assert {planted - 1, planted, planted + 1} <= {*found}


def test_attention_received_is_the_models_own(prefix_BT):
    model = tiny_model("llama")
    cache = prefill(model, prefix_BT)
    model.set_attn_implementation("eager")
    weights = model(prefix_BT, output_attentions=True).attentions
    for context, layer, own_BQTT in zip(cache.contexts, cache.layers, weights, strict=True):
        found = attention_received(context.queries[:, :, -7:], layer.keys)
        expected = own_BQTT[:, :, -7:].unflatten(1, (2, -1)).mean(dim=(2, 3))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", DROPPING)
def test_bytes_are_those_of_the_kept_tokens(name, llama, prefix_BT):
    recipe, n_tokens = load_recipe(name), prefix_BT.shape[1]
    pool, share = pool_of(llama, prefix_BT, recipe), 1 / int(name.rpartition("_")[2])
    n_kept = int(share * n_tokens)
    assert pool.n_tokens == n_tokens and pool.decode_layer(1)[0].shape == (1, 2, n_kept, 8)
    assert (
        pool.stored_bytes == 4 * 2 * 2 * n_kept * 8 * 2
    )  # layers, sides, kv heads, head_dim, fp16
    assert pool.stored_ratio == pytest.approx(n_tokens / n_kept)
    assert pool.nominal_ratio == 1 / share


def hidden(model, prefix_BT, rest_BT, kept):
    """Log-probabilities of the rest after the whole prefix, of which the rest sees the `kept` tokens alone."""
    cache, n_prefix, n_rest = prefill(model, prefix_BT), prefix_BT.shape[1], rest_BT.shape[1]
    seen_QT = torch.ones(n_rest, n_prefix + n_rest, dtype=torch.bool).tril(n_prefix)
    seen_QT[:, :n_prefix] = False
    seen_QT[:, kept] = True
    logits = model(rest_BT, attention_mask=seen_QT[None, None], past_key_values=cache).logits
    return logits[0, :-1].float().log_softmax(-1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # rotary and learned positions
def test_kept_tokens_and_what_follows_keep_their_positions(architecture, prefix_BT, rest_BT):
    model = tiny_model(architecture)
    keep = SinksRecent(0.25)
    pool = pool_of(model, prefix_BT, Recipe("r", EXACT, EXACT, keep=keep))
    kept = keep.places(keys(prefix_BT.shape[1]), NOTHING)[0, 0]
    expected = hidden(model, prefix_BT, rest_BT, kept)
    whole = score_rest(model, prefill(model, prefix_BT), rest_BT)
    assert (whole - expected).abs().max() > 0.1  # so that what was dropped counts
    dequantized = score_rest(model, pool.dequantize(), rest_BT)
    with attend_in_place(model):
        in_place = score_rest(model, pool.reader(1), rest_BT)
    for found in (dequantized, in_place):
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("name", DROPPING)
def test_both_read_modes_agree(name, llama, prefix_BT, rest_BT):
    pool = pool_of(llama, prefix_BT, load_recipe(name))
    dequantized = score_rest(llama, pool.dequantize(), rest_BT)
    with attend_in_place(llama):
        in_place = score_rest(llama, pool.reader(1), rest_BT)
    torch.testing.assert_close(in_place, dequantized, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["streaming_4", "snapkv_4"])
def test_questions_of_different_lengths_are_answered_as_one_by_one(
    name, llama, tokenizer, prefix_BT
):
    pool = pool_of(llama, prefix_BT, load_recipe(name))
    questions = [
        encode(tokenizer, TEXT[start:end])[0] for start, end in ((0, 9), (20, 45), (3, 30))
    ]
    together = greedy(llama, pool.dequantize(3), questions, 6, stops=[])
    with attend_in_place(llama):
        in_place = greedy(llama, pool.reader(3), questions, 6, stops=[])
    for ids_T, one, other in zip(questions, together, in_place, strict=True):
        (alone,) = greedy(llama, pool.dequantize(1), [ids_T], 6, stops=[])
        assert torch.equal(one, alone) and torch.equal(other, alone)


def test_what_needs_every_token_refuses(llama, prefix_BT, rest_BT):
    recipe = load_recipe("streaming_4")
    document = Document("d", torch.cat([prefix_BT, rest_BT], 1), prefix_BT.shape[1], ())
    with pytest.raises(PolyKVError, match="drops tokens"):
        online.score(llama, document, recipe, 64)
    reply = decode_drift.reply_of(llama, prefix_BT[0], rest_BT[0, :8])
    with pytest.raises(PolyKVError, match="drops tokens"):
        decode_drift.log_probs(llama, reply, recipe)
    with pytest.raises(PolyKVError, match="drops tokens"):
        pool_of(llama, prefix_BT, recipe).under(load_recipe("q8_0"))
    water = load_recipe("waterfill_4")
    with pytest.raises(PolyKVError, match="rope"):
        Recipe("r", water.key, water.value, keep=SinksRecent(0.5))


@pytest.mark.parametrize(
    "study", ["layer_sensitivity", "decode_drift", "recipe_frontier protocol=online"]
)
def test_studies_that_compare_every_token_refuse(study):
    name, *more = study.split()
    with pytest.raises(PolyKVError, match=r"streaming_4.*needs all"):
        checked_cell(
            f"experiment={name}",
            *more,
            "recipe=streaming_4",
            "document=generated" if name != "decode_drift" else "prompts=writing",
            "device=cpu",
        )


def test_snapkv_refuses_a_model_that_does_not_show_its_queries(prefix_BT):
    eager = tiny_model("llama")
    eager.set_attn_implementation("eager")
    cache = prefill(eager, prefix_BT)
    with pytest.raises(PolyKVError, match="sdpa"):
        SharedKVPool.from_cache(cache, load_recipe("snapkv_4"))


@pytest.mark.parametrize("share", [0, 1.5, "half", None])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(PolyKVError, match="keep.share"):
        SinksRecent(share)


@pytest.mark.parametrize(
    ("keep", "option"),
    [(SinksRecent, {"sinks": -1}), (SnapKV, {"window": 0}), (SnapKV, {"window": 65})]
    + [(SnapKV, {"kernel": kernel}) for kernel in (-1, 4, 2.5)],
)
def test_options_that_keep_other_tokens_than_they_say_are_refused(keep, option):
    (name,) = option
    with pytest.raises(PolyKVError, match=f"keep.{name}"):
        keep(0.5, **option)


@pytest.mark.parametrize(
    "study", ["capacity suffix_tokens=[64]", "polykv_memory", "concurrency context=1024"]
)
def test_sliding_windows_are_refused_before_any_work(study):
    name, *more = study.split()
    about = ("model=gemma-3-270m", "weights=random", "recipe=snapkv_4", "device=cpu")
    with pytest.raises(PolyKVError, match=r"snapkv_4.*sliding windows"):
        checked_cell(f"experiment={name}", "context=1024", *about, *more)


def test_the_whole_share_is_the_whole_cache(llama, prefix_BT, rest_BT):
    pool = pool_of(llama, prefix_BT, Recipe("r", EXACT, EXACT, keep=SnapKV(1)))
    exact = score_rest(llama, pool_of(llama, prefix_BT, load_recipe("fp16")).dequantize(), rest_BT)
    assert torch.equal(score_rest(llama, pool.dequantize(), rest_BT), exact)
