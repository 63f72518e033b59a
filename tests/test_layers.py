"""Errors of layers and heads against what can be worked out, and experiment=layer_sensitivity on a tiny model."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ARCHITECTURES, TEXT, checked_cell, rows_of, tiny_model
from scipy import stats

from analysis import layer_sensitivity
from analysis.load import load
from experiments.layer_sensitivity import STUDY
from polykv.codecs.identity import Identity
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.codecs.uniform import Uniform
from polykv.errors import PolyKVError
from polykv.evaluation import layers
from polykv.evaluation.continuation import score_rest
from polykv.evaluation.statistics import document_interval
from polykv.pool import SharedKVPool, prefill
from polykv.recipe import Recipe, load_recipe
from polykv.results import Rows, Store


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
        score_rest(llama, only.dequantize(), rest), score_rest(llama, pool.dequantize(), rest)
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


def test_bias_norms_are_those_of_the_projections():
    model = tiny_model("qwen2")
    projection = model.model.layers[2].self_attn.k_proj
    with torch.no_grad():
        projection.bias.zero_()
        projection.bias[:2] = torch.tensor([3.0, 4.0])
    norms = layers.bias_norms(model)
    assert len(norms) == 4 and norms[2]["key"] == pytest.approx(5)


def test_a_model_without_biases_has_norms_of_zero_and_one_with_fused_projections_none(llama):
    assert layers.bias_norms(llama) == [{"key": 0.0, "value": 0.0}] * 4
    assert layers.bias_norms(tiny_model("gpt2")) == [{"key": None, "value": None}] * 4


def test_the_norm_of_a_token_is_over_all_heads():
    x_BHTD = torch.zeros(1, 2, 2, 8)
    x_BHTD[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    assert layers.token_norm(x_BHTD) == pytest.approx(5 / 2**0.5)


# The study, and what the analysis makes of its rows


def local(checkpoint, *overrides):
    return ["experiment=layer_sensitivity", "model=local", f"model.path={checkpoint}", "document=file",
            f"document.path={checkpoint}/text.txt", "context=60", "n_documents=8", *overrides]  # fmt: skip


def test_the_study_names_layers_heads_and_parts(checkpoint):
    rows = pd.DataFrame(rows_of(*local(checkpoint, "recipe=turboquant_2bit")))
    errors = rows[rows["metric"] == "error"]
    counts = errors.groupby("part")[["layer", "head", "sample"]].nunique()
    assert set(counts.index) == set(layers.KINDS) and (counts.to_numpy() == [4, 2, 8]).all()
    kl = rows[(rows["metric"] == "kl") & rows["sample"].notna()]
    assert (kl["value"] > 0).all() and len(kl) == 4 * 8
    theory = rows[rows["metric"] == "gaussian_error"]
    assert len(theory) == 4 * 2 and (theory["value"] == theory["value"].iloc[0]).all()


def test_only_private_caches_are_looked_into(checkpoint):
    with pytest.raises(PolyKVError, match="in_place"):
        checked_cell(*local(checkpoint, "reader=in_place"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Made-up errors and divergences of two recipes: (rows, errors by document, layer and head, KL by document)."""
    root, rng = tmp_path_factory.mktemp("layers"), np.random.default_rng(0)
    errors, kl = rng.uniform(0.01, 0.1, (2, 9, 3, 2)), rng.lognormal(-4, 1, (2, 9, 3))
    for recipe, of_heads, of_layers in zip(("polykv", "good"), errors, kl, strict=True):
        rows = Rows(STUDY.columns, model="m", weights="random", document="d", context_tokens=9, recipe=recipe,
                    reader="dequantize", dtype="float32", device="cpu", seed=0)  # fmt: skip
        for (sample, layer, head), value in np.ndenumerate(of_heads):
            for part in layers.KINDS:
                place = {"sample": sample, "layer": layer, "head": head, "part": part}
                rows.add("error", value, "relative", **place)
        for (sample, layer), value in np.ndenumerate(of_layers):
            rows.add("kl", value, "nats", sample=sample, layer=layer, n=20)
        for layer in range(3):
            rows.add("bias_norm", 100.0 - layer, "norm", layer=layer, part="key")
            for part in ("key", "value"):
                for metric in ("gaussian_error", "dc_share", "peak_to_rms"):
                    rows.add(metric, 0.02 + layer, "ratio", layer=layer, part=part)
        Store(root).write(STUDY.declaration(), recipe, {"recipe": {"name": recipe}}, rows)
    return load(root).rows, errors[0], kl[0]


def test_a_layer_is_the_mean_of_its_heads_and_documents(made):
    rows, errors, kl = made
    lines = layer_sensitivity.table(rows).rows
    assert len(lines) == 2 * 3
    line = next(x for x in lines if (x["recipe"], x["layer"]) == ("polykv", 1))
    assert line["error_output"].value == pytest.approx(errors[:, 1].mean())
    assert line["gaussian_error_key"].value == pytest.approx(1.02)
    found = line["layer_kl"]
    ends = document_interval([np.array([x]) for x in kl[:, 1]], (0, np.inf))
    assert found.value == pytest.approx(kl[:, 1].mean())
    assert (found.low, found.high) == pytest.approx(ends)


def test_the_figure_has_every_head_and_errors_over_theory(made):
    rows, errors, _ = made
    canvas = layer_sensitivity.figure(rows).canvas
    output, key = canvas.axes[1], canvas.axes[2]
    dots = [line for line in output.lines if line.get_marker() == "."]
    assert sorted(len(line.get_ydata()) for line in dots) == [6, 6]
    over = next(c for c in key.containers if c.get_label() == "polykv")[0].get_ydata()
    assert list(over) == pytest.approx(list(errors.mean(axis=(0, 2)) / (0.02 + np.arange(3))))


def test_findings_name_the_layer_that_costs_most(made):
    rows, _, kl = made
    ((_, lines),) = layer_sensitivity.findings(rows).items()
    damage = kl.mean(axis=0)
    said = next(line for line in lines if line.startswith("polykv"))
    assert f"layer {damage.argmax()} " in said and f"{damage.max() / damage.sum():.0%}" in said
    rho = stats.spearmanr(damage, [100, 99, 98]).statistic
    assert f"{rho:+.2f}" in said and "layer 0 (100)" in said
