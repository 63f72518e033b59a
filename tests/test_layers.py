"""Errors of layers and heads against what can be worked out, and experiment=layer_sensitivity on a tiny model."""

import pytest
import torch
from conftest import ARCHITECTURES, TEXT, tiny_model

from polykv.codecs.identity import Identity
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.codecs.uniform import Uniform
from polykv.evaluation import layers
from polykv.evaluation.continuation import score_rest
from polykv.pool import SharedKVPool, prefill
from polykv.recipe import Recipe, load_recipe


@pytest.fixture(scope="module")
def pool_and_rest(llama, tokenizer):
    ids = tokenizer(TEXT[:300], return_tensors="pt").input_ids
    cut = int(0.7 * ids.shape[1])
    return SharedKVPool.from_cache(prefill(llama, ids[:, :cut]), load_recipe("full")), ids[:, cut:]


def test_captured_queries_give_the_models_own_attention(llama, pool_and_rest):
    pool, rest = pool_and_rest
    before = llama.config._attn_implementation
    queries = layers.queries_of(llama, pool, rest)
    assert llama.config._attn_implementation == before
    assert [q.shape for q in queries] == [(1, 4, rest.shape[1], 8)] * 4
    # Layer 0's queries are the rotated projections of the normed embeddings.
    decoder = llama.model
    x = decoder.layers[0].input_layernorm(decoder.embed_tokens(rest))
    q = decoder.layers[0].self_attn.q_proj(x).view(1, -1, 4, 8).transpose(1, 2)
    torch.testing.assert_close(queries[0].norm(dim=-1), q.norm(dim=-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_queries_are_captured_from_every_architecture(architecture):
    model = tiny_model(architecture)
    ids = torch.arange(40).view(1, -1)
    pool = SharedKVPool.from_cache(prefill(model, ids[:, :30]), load_recipe("full"))
    queries = layers.queries_of(model, pool, ids[:, 30:])
    assert [q.shape[:3] for q in queries] == [(1, 4, 10)] * 4
    errors = layers.head_errors(queries[2], pool.decode_layer(2), pool.decode_layer(2))
    assert all(error.abs().max() == 0 for error in errors.values())


def test_no_error_where_nothing_is_lost_and_the_right_one_where_it_is_known(pool_and_rest, llama):
    pool, rest = pool_and_rest
    query = layers.queries_of(llama, pool, rest)[1]
    k, v = pool.decode_layer(1)
    assert all((error == 0).all() for error in layers.head_errors(query, (k, v), (k, v)).values())
    found = layers.head_errors(query, (k, v), (k * 1.1, v * 0.5))
    assert found["key"].tolist() == pytest.approx([0.01] * 2, rel=1e-4)
    assert found["value"].tolist() == pytest.approx([0.25] * 2)
    assert found["logits"].tolist() == pytest.approx([0.01] * 2, rel=1e-3)
    # A constant added to all keys shifts each query's logits alike, which softmax ignores.
    shifted = layers.head_errors(query, (k, v), (k + 3.0, v))
    assert shifted["key"].min() > 0.1 and shifted["output"].max() < 1e-6
    assert shifted["logits"].max() < 1e-6
    halved = layers.head_errors(query, (k, v), (k, v * 0.5))
    assert halved["output"].tolist() == pytest.approx([0.25] * 2, rel=1e-4)


def test_one_compressed_layer_leaves_the_others_alone(llama, pool_and_rest):
    pool, rest = pool_and_rest
    recipe = Recipe("mine", Uniform(2), Uniform(2))
    only = layers.only_layer(pool, recipe, load_recipe("full"), 1)
    for layer in range(3):
        same = torch.equal(only.decode_layer(layer)[0], pool.decode_layer(layer)[0])
        assert same == (layer != 1)
    assert not torch.equal(
        score_rest(llama, only.inject(), rest), score_rest(llama, pool.inject(), rest)
    )


def test_gaussian_error_is_the_theorys():
    assert layers.gaussian_error(TurboQuantMSE(3), 128) == pytest.approx(0.03455, rel=0.03)
    assert layers.gaussian_error(Identity(), 64) == 0


def test_diagnostics_of_known_tensors():
    noise = torch.randn(1, 2, 4096, 64, generator=torch.Generator().manual_seed(0))
    white = layers.diagnostics(noise)
    assert white["dc_share"] == pytest.approx(1 / 64, rel=0.1)
    assert white["peak_to_rms"] == pytest.approx(1, abs=0.1)
    # An offset of twice the noise's deviation holds 80 % of the energy.
    assert layers.diagnostics(noise + 2)["dc_share"] == pytest.approx(0.8, abs=0.01)
    outlier = noise.clone()
    outlier[:, 0, :, 5] *= 1000
    assert layers.diagnostics(outlier)["peak_to_rms"] == pytest.approx(8, rel=0.01)  # sqrt(64)
