"""The frontier experiments on a tiny local model: rows, refusals, resume, and the layers' errors."""

import sqlite3

import pytest
import torch
from conftest import ARCHITECTURES, TEXT, checked_cell, tiny_model
from hydra import compose, initialize_config_dir

from experiments import common, sweep
from polykv.attention import cascade
from polykv.attention.suffix import attend_suffix
from polykv.codecs.identity import Identity
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.codecs.uniform import Uniform
from polykv.config import CONF, available, load_group
from polykv.errors import PolyKVError
from polykv.evaluation import layers, outside
from polykv.evaluation.continuation import score_rest
from polykv.pool import READERS, SharedKVPool, prefill
from polykv.recipe import Recipe, load_recipe


def cell(checkpoint, tmp_path, experiment, *overrides):
    """(module, settled config) of one cell of an experiment on the tiny model and its text."""
    local = [f"experiment={experiment}", "model=local", f"model.path={checkpoint}", "document=file",
             f"document.path={checkpoint}/text.txt", "context=60", "n_documents=8",
             f"results_dir={tmp_path}"]  # fmt: skip
    return checked_cell(*local, *overrides)


def run(*arguments):
    module, settled = cell(*arguments)
    return module.run(settled)


def values(rows, **columns):
    return {
        (row["metric"], row["protocol"]): row["value"]
        for row in rows
        if all(row[name] == value for name, value in columns.items())
    }


def test_frontier_counts_bits_and_keeps_each_document(checkpoint, tmp_path):
    rows = run(checkpoint, tmp_path, "recipe_frontier", "recipe=q4_0")
    got = values(rows)
    # head_dim 8: a block of 32 per vector is 18 bytes for 8 values.
    assert got["bits", "stored"] == 18 and got["bits", "nominal"] == 4
    documents = [row for row in rows if row["metric"] == "document_kl_mean"]
    assert len(documents) == 8
    mean = next(row for row in rows if row["metric"] == "kl_mean")
    assert sum(row["value"] for row in documents) / 8 == pytest.approx(mean["value"])
    assert mean["ci_low"] < mean["value"] < mean["ci_high"]


def test_the_seed_draws_the_rotation_too(checkpoint, tmp_path):
    _, zero = cell(checkpoint, tmp_path, "recipe_frontier", "recipe=q4_0_rotated", "seed=0")
    _, seven = cell(checkpoint, tmp_path, "recipe_frontier", "recipe=q4_0_rotated", "seed=7")
    assert (zero.recipe.key.seed, seven.recipe.key.seed) == (0, 7)
    _, own = cell(checkpoint, tmp_path, "recipe_frontier", "recipe=turboquant_3bit",
                  "+recipe.key.seed=3", "seed=7")  # fmt: skip
    assert (own.recipe.key.seed, own.recipe.value.seed) == (3, 7)


def test_added_exemptions_are_named_and_the_recipes_own_are_not(checkpoint, tmp_path):
    def name(*overrides):
        settled = cell(checkpoint, tmp_path, "recipe_frontier", *overrides)[1]
        return common.label(settled, "recipe")

    assert name("recipe=q4_0") == "q4_0"
    assert name("recipe=q4_0", "recipe.exempt.sinks=4", "recipe.exempt.recent=8") == (
        "q4_0+exempt.recent=8+exempt.sinks=4"
    )
    assert name("recipe=kivi_2bit") == "kivi_2bit"
    assert name("recipe=vllm_k8v4_bare") == "vllm_k8v4_bare"
    assert name("recipe=vllm_k8v4_bare", "recipe.exempt.last_layers=2") == (
        "vllm_k8v4_bare+exempt.last_layers=2"
    )
    assert name("recipe=vllm_k8v4") == "vllm_k8v4"  # chosen by name, called by its name


def test_the_frontier_calls_bare_what_is_no_preset_of_vllm():
    """On a model of four layers a preset of vLLM would keep all of them exact."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        swept = compose("config", ["experiment=recipe_frontier"], return_hydra_config=True)
    names = swept.hydra.sweeper.params.recipe.replace(" ", "").split(",")
    assert {"vllm_4bit_nc_bare", "vllm_k8v4_bare"} <= set(names)
    for name in names:
        exempt = load_group("recipe", name).exempt
        assert exempt.first_layers == exempt.last_layers == 0, name


@pytest.mark.parametrize("name", [n for n in available("recipe") if n.endswith("_bare")])
def test_a_bare_recipe_is_its_namesake_without_exemptions(name):
    bare, whole = (load_group("recipe", n) for n in (name, name.removesuffix("_bare")))
    assert (bare.key, bare.value) == (whole.key, whole.value)
    assert not any(bare.exempt.values()) and any(whole.exempt.values())


def test_asymmetry_sets_the_bits_of_keys_and_values(checkpoint, tmp_path):
    module, settled = cell(checkpoint, tmp_path, "kv_asymmetry", "key_bits=8", "value_bits=2")
    assert common.label(settled, "recipe") == "k8v2"
    _, exempt = cell(checkpoint, tmp_path, "kv_asymmetry", "key_bits=8", "value_bits=2",
                     "recipe.exempt.sinks=4")  # fmt: skip
    assert common.label(exempt, "recipe") == "k8v2+exempt.sinks=4"
    got = values(module.run(settled), recipe="k8v2")
    assert got["bits", "nominal"] == 5
    # Codes of 8 and 2 bytes and an fp16 step each, for 8 values.
    assert got["bits", "stored"] == (8 * (8 + 2) + 8 * (2 + 2)) / 16


def test_auto_document_follows_the_weights():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        reference = compose("config", ["experiment=recipe_frontier"])
        hub = compose("config", ["experiment=recipe_frontier", "model=qwen2.5-0.5b"])
    module, settled, _ = sweep.prepare(reference)
    assert settled.document.name == "generated"
    module, settled, _ = sweep.prepare(hub)
    assert settled.document.name == "wikitext2" and settled.document.digest
    with pytest.raises(PolyKVError, match="hub"):  # which has the weights
        module.check(settled)


def agents(checkpoint, tmp_path, reader, n_agents=4):
    options = (f"reader={reader}", f"n_agents={n_agents}", "recipe=polykv", "backend=torch")
    rows = run(checkpoint, tmp_path, "agent_scaling", *options)
    return {row["metric"]: row["value"] for row in rows}


@pytest.mark.parametrize("reader", READERS)
def test_agents_in_a_batch_read_what_one_reads_alone(reader, checkpoint, tmp_path):
    alone, crowd = (agents(checkpoint, tmp_path, reader, n_agents) for n_agents in (1, 4))
    assert alone["agent_spread"] < 1e-4 and crowd["agent_spread"] < 1e-4
    assert 0 < crowd["kl_mean"] == pytest.approx(alone["kl_mean"], rel=1e-3)


@pytest.mark.parametrize("fault", ["mask", "agent"])
def test_agents_that_disturb_each_other_show(fault, checkpoint, tmp_path, monkeypatch):
    def disturbed(q, k, v, mask, scaling):
        if fault == "mask":
            return attend_suffix(q, k, v, torch.ones_like(mask).tril(), scaling)
        return attend_suffix(q, k.roll(1, 0), v.roll(1, 0), mask, scaling)

    monkeypatch.setattr(cascade, "attend_suffix", disturbed)
    assert agents(checkpoint, tmp_path, "cascade")["agent_spread"] > 0.01


def test_layer_sensitivity_names_layers_and_heads(checkpoint, tmp_path):
    rows = run(checkpoint, tmp_path, "layer_sensitivity", "recipe=turboquant_2bit")
    got = values(rows)
    for kind in layers.KINDS:
        heads = [got[f"error_{kind}", f"layer 2 head {head}"] for head in range(2)]
        assert got[f"error_{kind}", "layer 2"] == pytest.approx(sum(heads) / 2)
    assert {got["layer_kl_mean", f"layer {layer}"] > 0 for layer in range(4)} == {True}
    assert ("gaussian_error_key", "layer 0") in got


def test_search_keeps_the_budget_beats_no_table_it_tried_and_resumes(checkpoint, tmp_path):
    pytest.importorskip("optuna")
    arguments = (checkpoint, tmp_path, "recipe_search", "widths=[2,4]", "budget_bits=5.0")
    module, settled = cell(*arguments, "n_trials=6", "n_documents=4")
    module._search(settled.copy(), module._study(settled))
    study = module._study(settled)
    assert len([t for t in study.trials if t.value is not None]) == 6
    rows = module.run(settled)  # nothing is left to try: the study holds all six
    assert len(module._study(settled).trials) == 6
    database = next((tmp_path / "search").glob("*.db"))
    assert sqlite3.connect(database).execute("select count(*) from trials").fetchone() == (6,)
    bits = {row["recipe"]: row["value"] for row in rows if row["protocol"] == "stored"}
    assert bits.keys() == {"search_per_layer", "search_uniform"} and max(bits.values()) <= 5
    within = [t for t in study.trials if t.user_attrs["over"] <= 0]
    best = min(within, key=lambda t: t.value)
    assert f"layer_bits={best.user_attrs['table']}" in {row["note"] for row in rows}
    assert {row["seed"] for row in rows} == {1}  # measured on documents that it did not see


def test_search_refuses_what_cannot_be_had(checkpoint, tmp_path):
    for override, message in (("budget_bits=1", "budget_bits"), ("n_trials=0", "n_trials"),
                              ("widths=[2,99]", "bits=99")):  # fmt: skip
        with pytest.raises(PolyKVError, match=message):
            cell(checkpoint, tmp_path, "recipe_search", override)


def test_transformers_own_fp8_cache_is_an_outside_reference(checkpoint, tmp_path):
    ours = values(run(checkpoint, tmp_path, "recipe_frontier", "recipe=fp8_e4m3"))
    theirs = values(run(checkpoint, tmp_path, "outside_references"))
    kl = next(key for key in ours if key[0] == "kl_mean")
    assert theirs["bits", "stored"] == ours["bits", "stored"]
    # The prefix is the same to the bit (test_frontier_codecs.py), but theirs also quantizes what is read
    # after it.
    assert theirs[kl] > ours[kl] > 0
    assert theirs[kl] == pytest.approx(ours[kl], rel=0.5)
    with pytest.raises(PolyKVError, match="no outside reference named 'gguf'"):
        cell(checkpoint, tmp_path, "outside_references", "outside=gguf")


def test_a_missing_backend_is_one_clear_line(llama):
    try:
        import optimum.quanto  # noqa: F401
    except ImportError:
        with pytest.raises(PolyKVError, match="optimum-quanto"):
            outside.new_cache(llama.config, {"backend": "quanto", "nbits": 4})
    with pytest.raises(PolyKVError, match="Unknown quantization backend"):
        outside.new_cache(llama.config, {"backend": "abacus"})


# The layers' errors against what can be worked out


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


def test_shared_readings_are_made_once(checkpoint, tmp_path):
    _, first = cell(checkpoint, tmp_path, "recipe_frontier", "recipe=q4_0")
    _, second = cell(checkpoint, tmp_path, "recipe_frontier", "recipe=q8_0")
    assert common.full_readings(first) is common.full_readings(second)
