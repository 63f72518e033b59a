"""Sliding-window layers: pools and both readers say what the model says with its own hybrid cache."""

from dataclasses import replace

import pytest
import torch
from pairwise import slow
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from polykv.attention.cascade import attend_in_place
from polykv.config import load_group
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
from polykv.evaluation.memory import DECODE_STEPS, resident_bytes
from polykv.evaluation.retrieval import log_probs
from polykv.geometry import Geometry
from polykv.greedy import greedy
from polykv.models import ModelSource, load_config, settle
from polykv.pool import SharedKVPool
from polykv.prefill import prefill
from polykv.recipe import EXACT, Exempt, load_recipe

W = 8
PLAIN = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "sliding_window": W,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": None,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MODELS = {
    "gemma2": MIXED | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 30.0},
    "gemma3_text": MIXED,  # two rotary bases
    "gpt_oss": MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},  # attention sinks
    "mistral": {},  # every layer has a window
    "olmo3": MIXED,
}
N_NEW = 12  # more than a window


def model_of(name, **options):
    config = AutoConfig.for_model(name, **(PLAIN | MODELS[name] | options))
    config.initializer_range = 0.2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # sinks and norms
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return model_of(request.param)


def ids_of(n_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 96, (n_tokens,), generator=generator)


def pool_of(model, ids_T, recipe="full", **options):
    return SharedKVPool.from_cache(prefill(model, ids_T[None]), load_recipe(recipe), **options)


def generated(model, ids_T):
    """What plain `generate` appends."""
    out = model.generate(ids_T[None], max_new_tokens=N_NEW, do_sample=False, pad_token_id=0)
    return out[0, len(ids_T) :].tolist()


@pytest.mark.parametrize("n_prefix", [W, W + 1, *slow(3, W - 1, 2 * W, 40)])
def test_agents_say_what_plain_generate_says(model, n_prefix):
    prefix_T = ids_of(n_prefix)
    queries = [ids_of(length, seed=length) for length in (1, 3, W + 2)]
    expected = [generated(model, torch.cat([prefix_T, query_T])) for query_T in queries]
    assert len({tuple(one) for one in expected}) > 1
    pool = pool_of(model, prefix_T)
    found = [greedy(model, pool.dequantize(), [one], N_NEW)[0].tolist() for one in queries]
    assert found == expected
    with attend_in_place(model):
        together = greedy(model, pool.reader(3), queries, N_NEW)
    assert [one.tolist() for one in together] == expected


@pytest.fixture(scope="module")
def gemma():
    return model_of("gemma3_text", vocab_size=300)


def logits(model, cache, rest_T):
    return model(input_ids=rest_T[None], past_key_values=cache).logits


@pytest.mark.parametrize(
    "name", ["polykv_sinks4_token", *slow("polykv", "kivi_2bit", "waterfill_4", "nvfp4")]
)
@pytest.mark.parametrize("n_prefix", [W, 40])
def test_both_readers_read_compressed_windows_alike(name, n_prefix, gemma):
    ids_T = ids_of(n_prefix + 2 * W)
    pool = pool_of(gemma, ids_T[:n_prefix], name, backend="torch")
    rest_T = ids_T[n_prefix:]
    dequantized = logits(gemma, pool.dequantize(), rest_T)
    with attend_in_place(gemma):
        in_place = logits(gemma, pool.reader(1), rest_T)
    torch.testing.assert_close(in_place, dequantized, rtol=0, atol=2e-5)
    exact = logits(gemma, pool_of(gemma, ids_T[:n_prefix]).dequantize(), rest_T)
    assert (dequantized - exact).abs().max() > 1e-4


def test_agents_in_place_drop_what_no_window_sees_any_more(gemma):
    prefix_T, pool = ids_of(20), pool_of(gemma, ids_of(20))
    cache = pool.reader(3)
    said = [torch.cat([prefix_T, ids_of(3, seed=seed)]) for seed in range(3)]
    more = [ids_of(length, seed=length) for length in (1, 5, 2)]  # padded to 5
    with attend_in_place(gemma):
        first = greedy(gemma, cache, [one[20:] for one in said], N_NEW)
        n_suffix = cache.get_seq_length() - 20
        kept = Architecture.of(gemma.config, "float32").kept_bytes(n_suffix, in_place=True)
        assert n_suffix == 3 + N_NEW - 1 and cache.layers[0].keys.shape[2] == W + 1
        assert kept_bytes(None, [cache]) == 3 * kept
        # The last token of a reply has not been read yet.
        rest = [torch.cat([one[-1:], two]) for one, two in zip(first, more, strict=True)]
        second = greedy(gemma, cache, rest, N_NEW)
    for start, one, two, new in zip(said, first, more, second, strict=True):
        assert one.tolist() == generated(gemma, start)
        assert new.tolist() == generated(gemma, torch.cat([start, one, two]))


def test_agents_whose_windows_move_back_are_refused(gemma):
    ids_T, pool = ids_of(20 + 2 * W + 1), pool_of(gemma, ids_of(20))

    def read(cache, n_hidden=0):
        n_tokens = cache.get_seq_length()
        mask_BT = torch.ones(1, n_tokens + 1, dtype=torch.long)
        mask_BT[:, n_tokens - n_hidden : n_tokens] = 0
        return gemma(ids_T[None, :1], attention_mask=mask_BT, past_key_values=cache).logits

    with attend_in_place(gemma):
        for n_hidden, n_cropped in ((4, 0), (0, 4)):
            cache = pool.reader(1)
            logits(gemma, cache, ids_T[20:])
            cache.crop(-1)  # nothing has been dropped before the next update
            read(cache)
            read(cache)
            cache.crop(-n_cropped)
            with pytest.raises(PolyKVError, match="had left their windows and were dropped"):
                read(cache, n_hidden)
            cache.reset()
            assert torch.equal(read(cache), read(pool.reader(1)))


def test_a_window_treated_as_full_changes_the_logits(gemma):
    """The same weights with full attention in every layer: alike within a window, and not beyond."""
    base = {"rope_type": "default", "rope_theta": 10000.0}
    both = {"sliding_attention": base, "full_attention": base}
    whole, windowed = (
        model_of("gemma3_text", vocab_size=300, rope_parameters=both, layer_types=types)
        for types in (["full_attention"] * 3, MIXED["layer_types"])
    )
    ids_T = ids_of(20)
    for n_tokens, alike in ((W, True), (W + 1, False), (20, False)):
        pool = pool_of(windowed, ids_T[: n_tokens - 1])
        with attend_in_place(windowed):
            read = logits(windowed, pool.reader(1), ids_T[n_tokens - 1 : n_tokens])
        gap = (read - whole(ids_T[None, :n_tokens]).logits[:, -1:]).abs().max()
        assert (gap < 1e-5) == alike and (alike or gap > 1e-3)


@pytest.mark.parametrize("n_prefix", [3, W - 1, W, 40])
@pytest.mark.parametrize("exempt", [{}, {"sinks": 4, "recent": 3}, {"sliding": True}])
def test_a_pool_stores_what_its_windows_see(n_prefix, exempt, gemma):
    recipe = replace(load_recipe("polykv"), exempt=Exempt(**exempt))
    pool = SharedKVPool.from_cache(prefill(gemma, ids_of(n_prefix)[None]), recipe)
    kept = [min(n_prefix, W - 1), n_prefix, min(n_prefix, W - 1)]
    assert [pool.decode_layer(layer)[0].shape[2] for layer in range(3)] == kept
    assert pool.n_tokens == n_prefix and pool.n_values == 2 * 2 * 8 * sum(kept)
    architecture = Architecture.of(gemma.config, "float32")
    assert pool.stored_bytes == pool_bytes(recipe, architecture, n_prefix)
    assert architecture.kept_bytes(n_prefix) == 4 * pool.n_values
    # The only full layer is the middle one.
    full_bytes = sum(one.nbytes for one in recipe.encode_layer(*pool.decode_layer(1), 1, 3))
    stored_ratio = 2 * 2 * 2 * 8 * n_prefix / full_bytes
    assert pool.full_layers_ratios == pytest.approx((32 / 11, stored_ratio))
    # Exempt are the first tokens of the document, not of what a window has left of it.
    segments = recipe.encode_layer(*pool.decode_layer(0), 0, 3, n_left=n_prefix - kept[0])
    exact = sum(one.n_tokens for one in segments if one.key_codec == EXACT)
    if exempt.get("sliding"):
        assert exact == kept[0]
    elif exempt:
        assert exact == min(kept[0], max(4 - (n_prefix - kept[0]), 0) + 3)
    else:
        assert exact == 0


def test_a_recipe_that_drops_tokens_is_refused(gemma):
    recipe, architecture = load_recipe("streaming_4"), Architecture.of(gemma.config, "float32")
    for make in (
        lambda: SharedKVPool.from_cache(prefill(gemma, ids_of(20)[None]), recipe),
        lambda: pool_bytes(recipe, architecture, 20),
    ):
        with pytest.raises(PolyKVError, match="streaming_4.*sliding window"):
            make()


def test_codecs_know_the_rotation_of_a_layers_own_base_and_tokens(gemma):
    contexts = prefill(gemma, ids_of(40)[None]).contexts
    for layer, (first, base) in enumerate([(33, 1e4), (0, 1e6), (33, 1e4)]):
        angles = torch.arange(first, 40)[:, None] * base ** -(torch.arange(4) / 4)
        torch.testing.assert_close(contexts[layer].rope.cos_TP, angles.cos())


def test_ask_answers_queries_of_different_lengths(gemma, tokenizer):
    pool = pool_of(gemma, ids_of(30))
    queries = ["by", "many agents at once", "one", "a pool of tokens"]
    each = [pool.ask(gemma, tokenizer, [query], 10)[0] for query in queries]
    assert pool.ask(gemma, tokenizer, queries, 10) == each and len({*each}) > 1
    assert pool.ask(gemma, tokenizer, queries, 10, reader="in_place") == each
    with pytest.raises(PolyKVError, match="gemma3_text counts the padding"):
        greedy(gemma, pool.dequantize(2), [ids_of(1), ids_of(3)], 2)


def test_padding_before_all_tokens_changes_nothing(gemma):
    prompts = [ids_of(20), ids_of(5, seed=1)]
    together = greedy(gemma, DynamicCache(config=gemma.config), prompts, N_NEW)
    assert [one.tolist() for one in together] == [generated(gemma, one) for one in prompts]


@pytest.mark.parametrize("n_prefix", [0, 3, 30])
def test_answers_to_questions_of_one_batch_are_scored_as_alone(gemma, n_prefix):
    prefix_T = ids_of(n_prefix)
    questions = [ids_of(n, seed=n) for n in (W + 4, 2, W)]
    answers = [[ids_of(n, seed=9 * n + i) for n in (3, 1, W + 2)] for i in range(3)]
    with attend_in_place(gemma):
        cache = pool_of(gemma, prefix_T).reader(3) if n_prefix else DynamicCache()
        found = log_probs(gemma, cache, questions, answers)
    for question_T, options, own in zip(questions, answers, found, strict=True):
        for answer_T, got in zip(options, own, strict=True):
            ids_BT = torch.cat([prefix_T, question_T, answer_T])[None]
            told_TV = gemma(ids_BT).logits[0, -len(answer_T) - 1 : -1].log_softmax(-1)
            assert got == pytest.approx(float(told_TV.gather(1, answer_T[:, None]).sum()), abs=1e-3)


def test_another_window_is_refused(gemma, tokenizer):
    pool, other = (
        pool_of(gemma, ids_of(20)),
        model_of("gemma3_text", vocab_size=300, sliding_window=6),
    )
    with pytest.raises(PolyKVError, match="layer 0 .*window of 6 tokens.*with 8"):
        pool.ask(other, tokenizer, ["by"], 2)
    with (
        pytest.raises(PolyKVError, match="sliding window of 6 tokens.*one of 8"),
        attend_in_place(other),
    ):
        logits(other, pool.reader(1), ids_of(1))
    cache = DynamicCache()  # without the config it keeps all tokens of every layer
    gemma(ids_of(20)[None], past_key_values=cache)
    whole = SharedKVPool.from_cache(cache, load_recipe("full"))
    with (
        pytest.raises(PolyKVError, match="window of 8 tokens.*one of None"),
        attend_in_place(gemma),
    ):
        logits(gemma, whole.reader(1), ids_of(1))
    k_BHTD, v_BHTD = torch.randn(2, 1, 2, 20, 8)
    with pytest.raises(
        PolyKVError, match="layer 0 has 20 of 20 tokens and a window of 8; give its last 7"
    ):
        SharedKVPool.from_layers([(k_BHTD, v_BHTD)], load_recipe("full"), windows=[8])


def test_unshared_caches_inside_attend_in_place_keep_caps_and_sinks():
    for name in ("gemma2", "gpt_oss"):
        model, ids_T = model_of(name), ids_of(20)
        expected = model(ids_T[None], use_cache=False).logits
        with attend_in_place(model):
            found = model(ids_T[None], use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("reader", READERS)
def test_caches_of_measurements_are_the_models_own(reader, gemma):
    geometry = Geometry.of(gemma.config)
    layers = list(synthetic_layers(geometry, 40, torch.float32, torch.device("cpu")))
    seen = (geometry.windows, 40)
    pool = pool_for((reader,), layers, load_recipe("full"), "torch", (), *seen)
    (cache,) = caches_of(reader, layers, pool, 3, True, *seen)
    steps = decode(gemma, [cache], 40, 3, 2)
    next(steps)
    # float32, keys and values, 2 heads of 8: the cache keeps windows of 7, and in place 8 tokens of each query.
    own = 3 * 2 * 2 * 8 * 4 * ((7 + 48 + 7) if reader != "in_place" else 3 * 8)
    assert kept_bytes(pool, [cache]) == own + (pool.stored_bytes if pool else 0)
    for _ in steps:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_memory_of_15_agents_is_what_the_formulas_say(reader):
    cfg = load_group("model", "gemma-3-270m")
    cfg.weights = "random"
    settle(cfg)
    # A third of the layers; the other two are no part of a cache.
    cfg.geometry.update(num_hidden_layers=6, hidden_size=64, intermediate_size=64)
    recipe = load_recipe("polykv")
    model = Architecture.of(load_config(cfg), "float32")
    found = resident_bytes(ModelSource.of(cfg), recipe, reader, 4096, 15, "cpu", "torch")
    workload = DecodeWorkload.of(model, None, recipe, 4096, QUERY_TOKENS + DECODE_STEPS)
    expected = workload.cache_bytes(reader, 15)
    assert expected < found < (1 + TOLERANCE) * expected + WORKSPACE
