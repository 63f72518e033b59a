"""SharedKVPool: token-identical where nothing is compressed, refused where it would be wrong."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ARCHITECTURES, TEXT, tiny_model
from test_codecs import of_each_pair
from transformers import AutoConfig, DynamicCache, EncoderDecoderCache, StaticCache

import polykv
from polykv.codecs.int8 import Int8
from polykv.errors import PolyKVError
from polykv.pool import SharedKVPool, prefill
from polykv.recipe import Exempt, Recipe
from polykv.supported import check_model

QUERIES = ["What does each agent ask ?", "Is a cache small ?", "A"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_recipe_is_token_identical_to_plain_generate(architecture, tokenizer):
    model = tiny_model(architecture)
    pool = SharedKVPool.from_text(model, tokenizer, TEXT[:300], polykv.load_recipe("full"))
    answers = pool.ask(model, tokenizer, QUERIES, max_new_tokens=12)
    document = tokenizer(TEXT[:300], return_tensors="pt").input_ids
    for query, answer in zip(QUERIES, answers, strict=True):
        asked = tokenizer(query, return_tensors="pt", add_special_tokens=False).input_ids
        ids = torch.cat([document, asked], dim=1)
        plain = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert answer == tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", of_each_pair(polykv.available_recipes()))
def test_every_recipe_pools_and_answers(name, llama, tokenizer):
    recipe = polykv.load_recipe(name)
    pool = SharedKVPool.from_text(llama, tokenizer, TEXT[:200], recipe)
    keys, values = pool.decode_layer(0)
    assert keys.shape == values.shape == (1, 2, recipe.n_kept(pool.n_tokens), 8)
    assert len(pool.ask(llama, tokenizer, QUERIES[:1], max_new_tokens=4)) == 1


def test_stored_bytes_are_the_bytes_of_the_tensors_kept(llama, tokenizer):
    pool = SharedKVPool.from_text(llama, tokenizer, TEXT[:200], polykv.load_recipe("polykv"))
    n_vectors = pool.n_tokens * 2 * 4  # kv heads x layers
    # int8 keys and one fp32 scale a layer; 3 bits a value and an fp16 norm a vector (head_dim 8).
    assert pool.stored_bytes == n_vectors * 8 + 4 * 4 + n_vectors * (3 + 2)
    assert pool.stored_ratio == pytest.approx(2 * 2 * 8 * n_vectors / pool.stored_bytes)
    assert pool.nominal_ratio == pytest.approx(32 / 11)


def test_pool_keeps_no_reference_to_the_full_cache(llama, tokenizer):
    ids = tokenizer(TEXT[:200], return_tensors="pt").input_ids
    cache = prefill(llama, ids)
    pool = SharedKVPool.from_cache(cache, polykv.load_recipe("polykv"))
    before = pool.decode_layer(1)[0].clone()
    cache.layers[1].keys.zero_()
    assert torch.equal(pool.decode_layer(1)[0], before)


def test_readers_do_not_change_the_pool(llama, tokenizer):
    pool = SharedKVPool.from_text(llama, tokenizer, TEXT[:200], polykv.load_recipe("full"))
    before = [tuple(t.clone() for t in pool.decode_layer(i)) for i in range(pool.n_layers)]
    first = pool.ask(llama, tokenizer, QUERIES, max_new_tokens=12)
    assert pool.ask(llama, tokenizer, QUERIES, max_new_tokens=12) == first
    for index, (keys, values) in enumerate(before):
        assert torch.equal(pool.decode_layer(index)[0], keys)
        assert torch.equal(pool.decode_layer(index)[1], values)


@pytest.mark.slow
def test_threads_read_what_one_reader_reads(llama, tokenizer):
    pool = SharedKVPool.from_text(llama, tokenizer, TEXT[:200], polykv.load_recipe("polykv"))
    expected = pool.ask(llama, tokenizer, QUERIES, max_new_tokens=6)
    with ThreadPoolExecutor(8) as threads:
        asked = [
            threads.submit(pool.ask, llama, tokenizer, QUERIES, max_new_tokens=6) for _ in range(16)
        ]
    assert all(future.result() == expected for future in asked)


def test_exempt_tokens_and_layers_stay_exact():
    torch.manual_seed(1)
    layers = [(torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)) for _ in range(3)]
    exempt = Exempt(sinks=4, recent=8, first_layers=1)
    recipe = Recipe("test", Int8(granularity="token"), Int8(granularity="token"), exempt)
    pool = SharedKVPool.from_layers(layers, recipe)
    kept = [k.half().float() for k, _ in layers]
    assert torch.equal(pool.decode_layer(0)[0], kept[0])
    decoded = pool.decode_layer(1)[0]
    assert torch.equal(decoded[:, :, :4], kept[1][:, :, :4])
    assert torch.equal(decoded[:, :, -8:], kept[1][:, :, -8:])
    assert not torch.equal(decoded[:, :, 4:-8], kept[1][:, :, 4:-8])
    exact, coded = 16 * 2, 16 + 2  # bytes a vector
    per_layer = 2 * 2 * (12 * exact + 28 * coded)
    assert pool.stored_bytes == 2 * 2 * 40 * exact + 2 * per_layer


@pytest.mark.parametrize(
    ("architecture", "options", "reason"),
    [
        ("llama4_text", {}, "chunks"),
        ("mistral", {"sliding_window": 1}, r"windows of \[1\]"),
        ("deepseek_v3", {}, "MLA"),
        ("t5", {}, "encoder-decoder"),
        ("jamba", {}, "linear attention"),
        ("falcon_h1", {}, "AndFullAttention"),
        ("mamba", {}, "nothing to compress"),
    ],
)
def test_unsupported_architectures_are_refused(architecture, options, reason):
    with pytest.raises(PolyKVError, match=reason):
        check_model(AutoConfig.for_model(architecture, **options))


def test_unsupported_caches_are_refused(llama):
    recipe = polykv.load_recipe("polykv")
    static = StaticCache(config=llama.config, max_cache_len=16)
    with pytest.raises(PolyKVError, match="StaticLayer"):
        SharedKVPool.from_cache(static, recipe)
    with pytest.raises(PolyKVError, match="encoder-decoder"):
        SharedKVPool.from_cache(EncoderDecoderCache(DynamicCache(), DynamicCache()), recipe)
    latent = DynamicCache([(torch.randn(1, 2, 4, 24), torch.randn(1, 2, 4, 16))])
    with pytest.raises(PolyKVError, match="latent"):
        SharedKVPool.from_cache(latent, recipe)
    with pytest.raises(PolyKVError, match="no layers"):
        SharedKVPool.from_cache(DynamicCache(), recipe)


def test_bad_requests_are_refused_before_any_answer(llama, tokenizer):
    pool = SharedKVPool.from_text(llama, tokenizer, TEXT[:200], polykv.load_recipe("full"))
    with pytest.raises(PolyKVError, match="no reader named 'telepathy'"):
        pool.ask(llama, tokenizer, QUERIES, reader="telepathy")
    with pytest.raises(PolyKVError, match="query 1 is empty"):
        pool.ask(llama, tokenizer, ["A", ""])
    with pytest.raises(PolyKVError, match="256"):
        pool.ask(llama, tokenizer, QUERIES, max_new_tokens=500)
    with pytest.raises(PolyKVError, match="document is empty"):
        SharedKVPool.from_text(llama, tokenizer, "", polykv.load_recipe("full"))
    with pytest.raises(PolyKVError, match="positions"):
        SharedKVPool.from_text(llama, tokenizer, TEXT * 9, polykv.load_recipe("full"))


def test_nan_in_a_cache_names_the_layer():
    layers = [(torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)) for _ in range(2)]
    layers[1][0][0, 0, 2, 3] = float("nan")
    with pytest.raises(PolyKVError, match="layer 1.*NaN"):
        SharedKVPool.from_layers(layers, polykv.load_recipe("polykv"))
