"""Recipe.suffix: agents' own tokens under a codec, read in place."""

from dataclasses import replace

import pytest
import torch
from conftest import TEXT, checked_cell, tiny_model
from test_cascade import DOCUMENT, QUERIES, batch, generate, ids_of
from test_prefix_attention import peak_bytes
from test_sliding import ids_of as windowed_ids
from test_sliding import model_of
from transformers import AutoConfig

from polykv.attention.cascade import attend_in_place, cascade_attention
from polykv.attention.layers import QuantizedSuffixLayer
from polykv.codecs.identity import Identity
from polykv.codecs.int8 import Int8
from polykv.codecs.kivi import KiviKey
from polykv.codecs.q8_0 import Q8_0
from polykv.codecs.rotated import Rotated
from polykv.codecs.uniform import Uniform
from polykv.errors import PolyKVError
from polykv.evaluation.capacity import Architecture, pool_bytes
from polykv.evaluation.concurrency import caches_of
from polykv.evaluation.continuation import score_rest
from polykv.greedy import greedy
from polykv.kernels import cpu
from polykv.pool import SharedKVPool, suffix_scale
from polykv.prefill import prefill
from polykv.recipe import load_recipe
from polykv.recurrent import layer_bytes

N_AGENTS = 5


def pools(model, tokenizer, suffix, backend="torch", recipe="polykv", document=DOCUMENT):
    """The same document without and with a codec of the suffixes."""
    loaded = load_recipe(recipe)
    return [
        SharedKVPool.from_text(model, tokenizer, document, one, backend=backend)
        for one in (loaded, replace(loaded, suffix=suffix))
    ]


def writing_through(cache, pool):
    """A cache of unshared copies that keeps of new tokens what the pool's readers keep of them."""
    codec = pool.recipe.suffix

    def through(update, scale):
        def rounded(keys, values, *rest, **options):
            keys = codec.decode(codec.encode(keys.float() / scale.float())) * scale.float()
            return update(keys, codec.decode(codec.encode(values)), *rest, **options)

        return rounded

    for layer, shared in zip(cache.layers, pool.reader(1).layers, strict=True):
        layer.update = through(layer.update, shared.scale)
    return cache


@pytest.fixture(scope="module")
def wide():
    """A model whose heads are wide enough for the C++ kernels."""
    return tiny_model("qwen3", head_dim=32)


@pytest.fixture
def kernel_calls(monkeypatch):
    """Names of the C++ functions that took what they were given."""
    taken = []

    def watch(name):
        original = getattr(cpu, name)

        def watched(*given, **options):
            found = original(*given, **options)
            if found is not None:
                taken.append(name)
            return found

        monkeypatch.setattr(cpu, name, watched)

    watch("encode"), watch("attend_suffix")
    return taken


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_agents_say_what_copies_that_round_their_own_tokens_say(
    backend, wide, tokenizer, kernel_calls
):
    plain, pool = pools(wide, tokenizer, Uniform(4), backend)
    rows = batch([ids_of(tokenizer, q) for q in QUERIES[:N_AGENTS]], plain.n_tokens)
    copies = writing_through(plain.dequantize(N_AGENTS), pool)
    expected = generate(wide, copies, *rows, max_new_tokens=40)
    assert not torch.equal(
        expected, generate(wide, plain.dequantize(N_AGENTS), *rows, max_new_tokens=40)
    )
    kernel_calls.clear()
    with attend_in_place(wide):
        got = generate(wide, pool.reader(N_AGENTS), *rows, max_new_tokens=40)
    assert torch.equal(got, expected)
    assert set(kernel_calls) == ({"encode", "attend_suffix"} if backend == "cpu" else set())


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("name", ["gemma3_text", "mistral", "gemma2"])  # gemma2: capped scores
def test_windows_drop_quantized_tokens_as_uncompressed_ones(name, backend):
    model, codec = model_of(name, head_dim=16), Q8_0()
    prefix_T, queries = windowed_ids(20), [windowed_ids(3, seed=seed) for seed in range(3)]
    recipe = load_recipe("polykv")
    plain, pool = (
        SharedKVPool.from_cache(prefill(model, prefix_T[None]), one, backend)
        for one in (recipe, replace(recipe, suffix=codec))
    )
    copies = writing_through(plain.dequantize(3), pool)
    expected = [one.tolist() for one in greedy(model, copies, queries, 24)]
    with attend_in_place(model):
        cache = pool.reader(3)
        assert [one.tolist() for one in greedy(model, cache, queries, 24)] == expected
    assert max(layer.n_dropped for layer in cache.layers) > 0


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(
    "codec",
    [Q8_0(), Int8("token"), Uniform(4), Rotated(Uniform(8)), Identity("bfloat16")],
    ids=lambda c: type(c).__name__,
)
def test_logits_of_every_kind_of_codec(codec, backend, wide, tokenizer):
    plain, pool = pools(wide, tokenizer, codec, backend)
    rest = torch.tensor([ids_of(tokenizer, TEXT[300:420])])
    expected = score_rest(wide, writing_through(plain.dequantize(), pool), rest)
    with attend_in_place(wide):
        cache = pool.reader(1)
        torch.testing.assert_close(score_rest(wide, cache, rest), expected, rtol=0, atol=1e-3)
    shape = (1, pool.reader(1).layers[0].segments[0].key.shape[1], cache.layers[0].n_suffix)
    of_layer = 2 * codec.stored_bytes((*shape, pool.head_dim), torch.float32)
    assert [layer_bytes(layer) for layer in cache.layers] == [of_layer] * pool.n_layers
    kept = Architecture.of(wide.config, "float32").kept_bytes(shape[2], True, codec)
    assert kept == of_layer * pool.n_layers


def test_capacity_counts_layers_with_attention_only():
    config = AutoConfig.for_model(
        "lfm2",
        **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2},
        layer_types=["conv", "full_attention", "conv"],
    )
    model, codec = Architecture.of(config, "float32"), Uniform(4)
    own = model.kept_bytes(10, True, codec) - model.state_bytes
    assert own == 2 * codec.stored_bytes((1, 2, 10, 8), torch.float32)
    assert model.grown_bytes(10, True, codec) > model.kept_bytes(10, True, codec)


def test_tokens_are_cropped_selected_and_repeated_as_uncompressed_ones(wide, tokenizer):
    plain, pool = pools(wide, tokenizer, Q8_0())
    ids_BT = torch.tensor([ids_of(tokenizer, QUERIES[i])[:2] for i in (3, 5, 7)])
    next_BT = torch.tensor([ids_of(tokenizer, QUERIES[9])[:2]])

    def logits(cache):
        wide(ids_BT, past_key_values=cache)
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        return wide(next_BT.expand(4, -1), past_key_values=cache).logits

    expected = logits(writing_through(plain.dequantize(3), pool))
    with attend_in_place(wide):
        cache = pool.reader(3)
        got = logits(cache)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
        cache.reset()
        assert [layer.suffix_bytes for layer in cache.layers] == [0] * pool.n_layers
        assert torch.equal(logits(cache), got)


def test_beams_say_what_those_of_copies_say(wide, tokenizer):
    plain, pool = pools(wide, tokenizer, Q8_0())
    rows = batch([ids_of(tokenizer, QUERIES[3])], plain.n_tokens)
    copies = writing_through(plain.dequantize(3), pool)
    expected = generate(wide, copies, *rows, num_beams=3)
    with attend_in_place(wide):
        assert torch.equal(generate(wide, pool.reader(1), *rows, num_beams=3), expected)


def test_a_layer_grows_one_side_at_a_time():
    k_BHTD = torch.randn(1, 2, 64, 64)
    segments = load_recipe("polykv").encode_layer(k_BHTD, k_BHTD, 0, 1, "cpu")
    own_BHTD = torch.randn(8, 2, 4000, 64)
    layer = QuantizedSuffixLayer(Q8_0(), suffix_scale(k_BHTD), segments, "cpu")

    def grow():
        layer.reset()
        layer.update(own_BHTD, own_BHTD)
        layer.update(own_BHTD[:, :, :1], own_BHTD[:, :, :1])

    scaled = own_BHTD.nbytes  # keys divided by their scale, at first
    assert peak_bytes(grow) < 1.6 * layer.suffix_bytes + scaled


def test_tokens_that_cannot_be_encoded_are_placed(wide, tokenizer):
    _, pool = pools(wide, tokenizer, Q8_0())
    cache = pool.reader(1)
    k_BHTD = torch.zeros(1, 2, 3, 32)
    with pytest.raises(PolyKVError, match="layer 1: values of the agents' own tokens"):
        cache.update(k_BHTD, torch.full_like(k_BHTD, torch.nan), 1)


def test_overflowing_sums_saturate_in_fp16():
    model = tiny_model("qwen3", head_dim=32).half()
    layers = [tuple(torch.full((1, 2, 4, 32), 60000.0).half() for _ in range(2))] * 4
    recipe = replace(load_recipe("full"), suffix=Q8_0())
    cache = SharedKVPool.from_layers(layers, recipe, backend="torch").reader(1)
    value = torch.full((1, 2, 1, 32), 65504.0).half()
    keys, values = cache.update(torch.zeros_like(value), value, 0)
    module, query = model.model.layers[0].self_attn, torch.zeros(1, 4, 1, 32).half()
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    out, _ = cascade_attention(module, query, keys, values, mask)
    assert out.isfinite().all()


@pytest.mark.parametrize("codec", [Int8("tensor"), KiviKey()], ids=lambda c: type(c).__name__)
def test_a_codec_whose_tokens_share_metadata_is_refused(codec):
    with pytest.raises(PolyKVError, match="Q8_0"):
        replace(load_recipe("polykv"), suffix=codec)


def test_a_suffix_that_is_no_codec_is_refused():
    with pytest.raises(PolyKVError, match="'q8_0'; give a codec"):
        replace(load_recipe("polykv"), suffix="q8_0")


def test_reading_unshared_copies_is_refused(llama, tokenizer):
    _, pool = pools(llama, tokenizer, Q8_0())
    for read in (
        pool.dequantize,
        lambda: pool.ask(llama, tokenizer, QUERIES[:2]),
        lambda: caches_of("dequantize", (), pool, 2, True),
    ):
        with pytest.raises(PolyKVError, match="reader=in_place"):
            read()


@pytest.mark.parametrize(
    "chosen",
    ["experiment=compare", "experiment=concurrency", "experiment=decode_drift reader=dequantize"],
)
def test_studies_refuse_before_they_work(chosen, checkpoint):
    with pytest.raises(PolyKVError, match="without suffix"):
        checked_cell(
            *chosen.split(),
            *("model=local", f"model.path={checkpoint}", "weights=local", "device=cpu"),
            "recipe=trellis_3_q8_0_suffix",
        )


def test_the_seed_of_a_comparison_is_that_of_the_suffix_too(checkpoint):
    about = ("model=local", f"model.path={checkpoint}", "weights=local", "device=cpu", "seed=3")
    _, settled = checked_cell(
        *("experiment=compare", "document=moon_landing", "context=64", "reader=in_place", *about),
        "+recipe.suffix={_target_: polykv.codecs.rotated.Rotated}",
    )
    assert settled.recipe.suffix.seed == 3


def test_the_uncompressed_recipe_with_such_a_suffix_is_no_baseline():
    full = load_recipe("full")
    assert full.is_full and not replace(full, suffix=Q8_0()).is_full


def test_recipes_of_the_repository_compress_what_they_name():
    recipe = load_recipe("trellis_3_q8_0_suffix")
    assert recipe.suffix == Q8_0()
    assert replace(recipe, name="trellis_3", suffix=None) == load_recipe("trellis_3")
    recipe, of_4 = load_recipe("trellis_k3_75v4_q8_0_suffix"), load_recipe("trellis_4")
    assert recipe.suffix == Q8_0()
    assert replace(recipe, name="trellis_4", suffix=None, key=of_4.key) == of_4
    assert recipe.key == replace(of_4.key, bits=3.75)


def test_large_biases_of_keys_take_no_resolution_from_other_channels(wide, tokenizer):
    _, pool = pools(wide, tokenizer, Q8_0())
    layer = pool.reader(1).layers[0]
    assert torch.equal(layer.scale, layer.scale.float().log2().round().exp2().half())
    k_BHTD = torch.randn(1, 2, 300, 32)
    k_BHTD[..., 3] += 200  # as in Qwen2.5
    segments = load_recipe("polykv").encode_layer(k_BHTD, k_BHTD, 0, 1)
    errors = []
    for scale in (suffix_scale(k_BHTD), torch.ones(1, 2, 1, 32).half()):
        own = QuantizedSuffixLayer(Q8_0(), scale, segments, "torch")
        own.update(k_BHTD, k_BHTD)
        decoded_BHTD = own.own(own.keys, own.values).decode()[0] * scale
        errors.append((decoded_BHTD - k_BHTD)[..., 4:].square().mean().sqrt())
    assert errors[0] < 0.02 < 20 * errors[0] < errors[1]


def test_scaled_queries_do_not_overflow_in_fp16():
    k_BHTD = torch.full((1, 2, 4, 32), 30000.0).half()
    segments = load_recipe("polykv").encode_layer(k_BHTD, 0 * k_BHTD, 0, 1)
    layer = QuantizedSuffixLayer(Q8_0(), suffix_scale(k_BHTD), segments, "torch")
    q_BHRD = torch.full((1, 2, 1, 32), 10.0).half()
    assert layer.scale_queries(q_BHRD).isfinite().all()
    layer.update(k_BHTD, k_BHTD)
    own = layer.own(layer.keys, layer.values)
    scores = layer.scale_queries(q_BHRD) @ own.decode()[0].mT
    torch.testing.assert_close(scores, q_BHRD.float() @ k_BHTD.float().mT, rtol=1e-2, atol=0)


def test_the_scale_of_own_keys_counts_as_stored(wide, tokenizer):
    plain, pool = pools(wide, tokenizer, Q8_0())
    scales = sum(layer.scale.nbytes for layer in pool.reader(1).layers)
    assert pool.stored_bytes == plain.stored_bytes + scales
    model = Architecture.of(wide.config, "float32")
    assert pool_bytes(pool.recipe, model, pool.n_tokens) == pool.stored_bytes
