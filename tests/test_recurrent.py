"""States of linear attention, convolution and recurrence: copied exactly, never changed, counted to the byte."""

from dataclasses import replace

import pytest
import torch
from conftest import TEXT, checked_cell, rows_of
from omegaconf import OmegaConf
from pairwise import slow
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from polykv.attention.cascade import attend_in_place
from polykv.config import REPO, load_group
from polykv.errors import PolyKVError
from polykv.evaluation.capacity import (
    TOLERANCE,
    WORKSPACE,
    Architecture,
    DecodeWorkload,
    pool_bytes,
)
from polykv.evaluation.concurrency import (
    QUERY_TOKENS,
    READERS,
    caches_of,
    decode,
    kept_bytes,
    synthetic_layers,
)
from polykv.evaluation.concurrency import pool_of as pool_for
from polykv.evaluation.continuation import score_rest
from polykv.evaluation.layers import queries_of
from polykv.evaluation.memory import DECODE_STEPS, paper_bytes, resident_bytes
from polykv.evaluation.online import score
from polykv.evaluation.readings import Reading
from polykv.evaluation.retrieval import log_probs
from polykv.geometry import Geometry
from polykv.greedy import greedy
from polykv.models import ModelSource, load_config, settle
from polykv.pool import SharedKVPool
from polykv.prefill import prefill
from polykv.recipe import load_recipe
from polykv.recurrent import State
from polykv.supported import check_model

EXACT = OmegaConf.to_container(OmegaConf.load(REPO / "docs" / "families.yaml"))["exact"]
# Delta rule; convolution alone; Mamba-2 and layers without a cache.
NAMES = ("qwen3_next", "lfm2", "nemotron_h")
N_PREFIX, N_NEW = 20, 12


def model_of(name, dtype=torch.float32, **options):
    # Without an end token, so that answers have N_NEW tokens.
    config = AutoConfig.for_model(
        name, **(EXACT[name]["config"] | options | {"eos_token_id": None})
    )
    config.initializer_range = 0.2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=[NAMES[0], *slow(*NAMES[1:])])
def model(request):
    return model_of(request.param)


@pytest.fixture(scope="module")
def qwen():
    return model_of("qwen3_next", vocab_size=300, max_position_embeddings=512)


def ids_of(n_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 96, (n_tokens,), generator=generator)


def pool_of(model, ids_T, recipe="full", **options):
    return SharedKVPool.from_cache(prefill(model, ids_T[None]), load_recipe(recipe), **options)


def states(pool):
    """Copies of the tensors of a pool's states."""
    kept = (one for one in pool.kept() if isinstance(one, State))
    return [x.clone() for one in kept for x in one.tensors.values()]


@pytest.mark.parametrize("n_query", [1, 4])
def test_agents_say_what_plain_generate_says_and_leave_the_pool_as_it_is(model, n_query):
    prefix_T = ids_of(N_PREFIX)
    queries = [ids_of(n_query, seed=number) for number in range(3)]
    ids_BT = torch.stack([torch.cat([prefix_T, query_T]) for query_T in queries])
    out = model.generate(ids_BT, max_new_tokens=N_NEW, do_sample=False, pad_token_id=0)
    expected = out[:, ids_BT.shape[1] :].tolist()
    assert len({tuple(one) for one in expected}) > 1
    pool = pool_of(model, prefix_T)
    before = states(pool)
    found = [one.tolist() for one in greedy(model, pool.dequantize(3), queries, N_NEW)]
    assert found == expected
    with attend_in_place(model):
        cache = pool.reader(3)
        for _ in range(2):  # and again from the start
            assert [one.tolist() for one in greedy(model, cache, queries, N_NEW)] == expected
            cache.reset()
        for alone in (pool.reader(1), pool.dequantize()):
            assert greedy(model, alone, queries[:1], N_NEW)[0].tolist() == expected[0]
    assert all(map(torch.equal, before, states(pool)))


def test_rows_can_be_chosen_and_repeated_before_and_after_a_token(model):
    pool, first_T, then_T = pool_of(model, ids_of(N_PREFIX)), ids_of(3), ids_of(2, seed=5)
    others_T = ids_of(3, seed=1)
    alone = pool.dequantize()
    model(first_T[None], past_key_values=alone)
    expected = model(then_T[None], past_key_values=alone).logits
    with attend_in_place(model):
        cache = pool.reader(1)
        cache.batch_repeat_interleave(2)
        model(torch.stack([others_T, first_T]), past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_select_indices(torch.tensor([0]))
        cache.batch_repeat_interleave(2)
        found = model(then_T.expand(2, -1), past_key_values=cache).logits
    torch.testing.assert_close(found, expected.expand(2, -1, -1), rtol=1e-4, atol=1e-4)


def test_beams_in_place_are_those_of_plain_generate(qwen):
    prefix_T, query_T = ids_of(N_PREFIX), ids_of(3, seed=1)
    ids_BT = torch.cat([prefix_T, query_T])[None]
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    expected = qwen.generate(ids_BT, **options)
    pool = pool_of(qwen, prefix_T)
    with attend_in_place(qwen):
        with pytest.raises(PolyKVError, match="3 queries.*1 agents.*batch_repeat_interleave"):
            qwen.generate(ids_BT, past_key_values=pool.reader(1), **options)
        cache = pool.reader(1)
        cache.batch_repeat_interleave(3)
        assert torch.equal(qwen.generate(ids_BT, past_key_values=cache, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*NAMES, *slow("granitemoehybrid", "olmo_hybrid", "lfm3")])
def test_bytes_are_those_of_the_models_own_cache(name, dtype):
    model, n_agents, n_own = model_of(name, dtype), 3, 4
    own = DynamicCache(config=model.config)
    model(ids_of(N_PREFIX)[None], past_key_values=own)
    kept = [
        one.keys.nbytes + one.values.nbytes
        for one in own.layers
        if hasattr(one, "keys") and one.keys is not None
    ]
    each = [
        getattr(one, f"{kind}_states", {}) for one in own.layers for kind in ("conv", "recurrent")
    ]
    state = sum(x.nbytes for of in each for x in of.values() if x is not None)
    assert state > 0

    full = pool_of(model, ids_of(N_PREFIX))
    assert full.stored_bytes == sum(kept) + state
    architecture = Architecture.of(model.config, str(dtype).removeprefix("torch."))
    assert architecture.state_bytes == full.state_bytes == state
    assert architecture.kept_bytes(N_PREFIX) == full.stored_bytes
    for recipe in map(load_recipe, ("full", "polykv", "waterfill_4")):
        pool = pool_of(model, ids_of(N_PREFIX), recipe.name, backend="torch")
        assert pool.stored_bytes == pool_bytes(recipe, architecture, N_PREFIX)
        fp16 = sum(kept) * 2 // dtype.itemsize
        assert pool.stored_ratio == pytest.approx((fp16 + state) / pool.stored_bytes)
        nominal, stored = pool.full_layers_ratios
        assert nominal == pool.nominal_ratio
        assert stored == pytest.approx(fp16 / (pool.stored_bytes - state))

    query_BT = ids_of(n_own)[None].expand(n_agents, -1)
    tokens = n_agents * n_own * sum(kept) // N_PREFIX
    with attend_in_place(model):
        cache = full.reader(n_agents)
        assert kept_bytes(full, [cache]) == full.stored_bytes  # shared until they read
        model(query_BT, past_key_values=cache)
    assert kept_bytes(full, [cache]) == full.stored_bytes + n_agents * state + tokens
    assert kept_bytes(None, [cache]) == n_agents * architecture.kept_bytes(n_own, in_place=True)
    cache = full.dequantize(n_agents)
    model(query_BT, past_key_values=cache)
    assert kept_bytes(None, [cache]) == n_agents * architecture.kept_bytes(N_PREFIX + n_own)


def test_the_papers_accounting_compresses_no_state(qwen):
    geometry = Geometry.of(qwen.config)
    state, keys = geometry.state_bytes(torch.float32), geometry.values(100) * 4
    assert paper_bytes(geometry, 100, 5, None) == 5 * (keys + state)
    assert paper_bytes(geometry, 100, 5, 4.0) == keys / 4 + state


@pytest.mark.parametrize("reader", READERS)
def test_caches_of_measurements_are_the_models_own(reader, model):
    geometry = Geometry.of(model.config)
    layers = list(synthetic_layers(geometry, 40, torch.float32, torch.device("cpu")))
    pool = pool_for((reader,), layers, load_recipe("full"), "torch", (), geometry.windows, 40)
    (cache,) = caches_of(reader, layers, pool, 3, True, geometry.windows, 40)
    state = geometry.state_bytes(torch.float32)
    own = 0 if reader == "in_place" else 3 * (geometry.values(40) * 4 + state)
    assert kept_bytes(pool, [cache]) == own + (pool.stored_bytes if pool else 0)
    for _ in decode(model, [cache], 40, 3, 2):
        pass
    assert kept_bytes(None, [cache]) == 3 * (
        state + 4 * geometry.values(QUERY_TOKENS + 2 + 40 * (own > 0))
    )


def test_scores_are_those_of_the_uncompressed_pass(model):
    ids_T = ids_of(40)
    plain = model(ids_T[None]).logits[0, N_PREFIX:-1].log_softmax(-1)
    pool = pool_of(model, ids_T[:N_PREFIX])
    rest_BT = ids_T[None, N_PREFIX:]
    torch.testing.assert_close(
        score_rest(model, pool.dequantize(), rest_BT), plain, rtol=1e-4, atol=1e-4
    )
    with attend_in_place(model):
        in_place = score_rest(model, pool.reader(1), rest_BT)
    torch.testing.assert_close(in_place, plain, rtol=1e-4, atol=1e-4)


def test_recipes_count_the_models_layers(qwen):
    """Layer 1 of three has keys: exempting the first two keeps it in fp16, and its bits are the second entry's."""
    cache = prefill(qwen, ids_of(N_PREFIX)[None])
    assert [context is not None for context in cache.contexts] == [False, True, False]
    ratios = {}
    for exempt in ({}, {"first_layers": 1}, {"first_layers": 2}):
        cfg = load_group("recipe", "polykv")
        cfg.exempt = exempt
        recipe = load_recipe("polykv").from_config(cfg)
        ratios[len(ratios)] = SharedKVPool.from_cache(cache, recipe).full_layers_ratios[1]
    assert ratios[0] == ratios[1] > 2 > ratios[2] == 1.0
    recipe = replace(load_recipe("kivi_4bit"), layer_bits=((8, 8), (2, 4), (8, 8)))
    pool = SharedKVPool.from_cache(cache, recipe)
    assert pool.nominal_ratio == pool.full_layers_ratios[0] == 32 / 6


def test_ask_answers_queries_of_different_lengths(qwen, tokenizer):
    pool = pool_of(qwen, ids_of(30))
    queries = ["by", "many agents at once", "one", "a pool of tokens", "be"]
    each = [pool.ask(qwen, tokenizer, [query], 10)[0] for query in queries]
    assert len({*each}) > 1
    for reader in ("dequantize", "in_place"):
        assert pool.ask(qwen, tokenizer, queries, 10, reader=reader) == each


def test_padding_between_pool_and_query_changes_logits_in_transformers(qwen):
    """Why queries of different lengths are refused."""
    pool, query_T = pool_of(qwen, ids_of(N_PREFIX)), ids_of(3, seed=1)
    expected = qwen(query_T[None], past_key_values=pool.dequantize()).logits
    mask_BT = torch.ones(1, N_PREFIX + 5, dtype=torch.long)
    mask_BT[:, N_PREFIX : N_PREFIX + 2] = 0
    padded_BT = torch.nn.functional.pad(query_T, (2, 0))[None]
    options = {
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(-1) - 1)[:, N_PREFIX:],
    }
    padded = qwen(padded_BT, past_key_values=pool.dequantize(), **options).logits[:, 2:]
    assert (padded - expected).abs().max() > 1e-2 * expected.abs().max()
    with attend_in_place(qwen), pytest.raises(PolyKVError, match="states of other layers"):
        qwen(padded_BT, past_key_values=pool.reader(1), **options)


def test_what_states_do_not_allow_is_refused(qwen, tokenizer, llama):
    ids_T = ids_of(N_PREFIX)
    pool = pool_of(qwen, ids_T)
    reading = Reading(qwen, None, pool)
    for refused in (
        lambda: greedy(qwen, pool.dequantize(2), [ids_of(1), ids_of(3)], 2),
        lambda: greedy(qwen, pool.reader(2), [ids_of(1), ids_of(3)], 2),
        lambda: reading.score_together(2),
        lambda: log_probs(qwen, pool.dequantize(1), [ids_of(2)], [[ids_of(2)]]),
        lambda: score(qwen, None, load_recipe("q8_0"), 8),
        lambda: queries_of(qwen, pool, ids_of(2)[None]),
    ):
        with pytest.raises(PolyKVError, match="qwen3_next"):
            refused()
    for recipe in (
        lambda: pool_of(qwen, ids_T, "streaming_4"),
        lambda: pool.under(load_recipe("streaming_4")),
    ):
        with pytest.raises(PolyKVError, match="streaming_4.*states"):
            recipe()
    architecture = Architecture.of(qwen.config, "float32")
    with pytest.raises(PolyKVError, match="streaming_4.*states"):
        pool_bytes(load_recipe("streaming_4"), architecture, 20)
    with pytest.raises(PolyKVError, match="layer 0 keeps a state"):
        pool.decode_layer(0)
    with attend_in_place(qwen):
        cache = pool.reader(1)
        qwen(ids_of(2)[None], past_key_values=cache)
        with pytest.raises(PolyKVError, match="crop"):
            cache.crop(-1)
        assert cache.get_seq_length() == N_PREFIX + 2
    with (
        attend_in_place(llama),
        pytest.raises(PolyKVError, match="layer 0 of the pool keeps a state"),
    ):
        llama(ids_of(2)[None], past_key_values=pool.reader(1))
    with pytest.raises(PolyKVError, match="layer 0 of the cache has no state"):
        SharedKVPool.from_cache(DynamicCache(config=qwen.config), load_recipe("full"))
    other = AutoConfig.for_model(
        "qwen3_next", **(EXACT["qwen3_next"]["config"] | {"layer_types": ["linear_attention"] * 3})
    )
    with pytest.raises(PolyKVError, match="nothing to compress"):
        check_model(other)


@pytest.fixture(scope="module")
def settings(tmp_path_factory, qwen, tokenizer):
    """Settings of a study of a folder with this model and a text."""
    folder = tmp_path_factory.mktemp("qwen")
    qwen.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT * 4)
    return (
        "model=local", f"model.path={folder}", "device=cpu", "backend=torch", "context=64", "n_documents=2",
        "document=file", f"document.path={folder}/text.txt",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ("compare together=true", "pads agents .* qwen3_next counts padding; use another model"),
        ("compare recipe=streaming_4", "streaming_4.*layer 0 of qwen3_next keeps a state"),
        ("protocols protocol=online", "protocol=online takes models .*keeps a state"),
        (
            "handoff_ttft policies=[topology]",
            "policy 'topology' has signal .*qwen3_next has states",
        ),
        *slow(
            ("outside_references outside=fp8", "outside references takes models .*keeps a state"),
            ("layer_sensitivity", "study layer_sensitivity takes models .*keeps a state"),
            ("decode_drift", "study decode_drift takes models .*keeps a state"),
            (
                "handoff_accuracy policy=uniform",
                "study handoff_accuracy takes models .*keeps a state",
            ),
        ),
    ],
)
def test_studies_refuse_states_before_any_work(study, message, settings):
    name, *more = study.split()
    about = settings[:4] if name in ("handoff_accuracy", "decode_drift") else settings
    with pytest.raises(PolyKVError, match=message):
        checked_cell(f"experiment={name}", *about, *more)


@pytest.mark.slow
def test_a_study_reads_states_alike_in_both_modes(settings):
    found = {}
    for reader in ("dequantize", "in_place"):
        rows = rows_of("experiment=compare", *settings, "recipe=polykv", f"reader={reader}")
        keys = ("metric", "accounting", "sample", "statistic", "block")
        found[reader] = {tuple(map(row.get, keys)): row["value"] for row in rows}
    one, other = found.values()
    for metric in ("kl", "nll"):
        key = (metric, None, 0, None, None)
        assert 0 < one[key] == pytest.approx(other[key], rel=1e-3)
    stored, of_full = (
        one[name, "stored", None, None, None] for name in ("compression_ratio", "full_layers_ratio")
    )
    assert 1 < stored < of_full


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_memory_of_15_agents_is_what_the_formulas_say(reader):
    cfg = load_group("model", "gemma-3-270m")
    cfg.weights, cfg.name = "random", "a tiny Qwen3-Next"
    sizes = {
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "max_position_embeddings": 8192,
    }
    cfg.geometry = {"model_type": "qwen3_next", **EXACT["qwen3_next"]["config"], **sizes}
    settle(cfg)
    recipe = load_recipe("polykv")
    model = Architecture.of(load_config(cfg), "float32")
    found = resident_bytes(ModelSource.of(cfg), recipe, reader, 4096, 15, "cpu", "torch")
    workload = DecodeWorkload.of(model, None, recipe, 4096, QUERY_TOKENS + DECODE_STEPS)
    expected = workload.cache_bytes(reader, 15)
    assert expected < found < (1 + TOLERANCE) * expected + WORKSPACE
