"""reader=in_place: agents attend together to the one compressed copy, and say what unshared copies would say."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import dispatch_model
from conftest import ARCHITECTURES, TEXT, tiny_model
from hydra import compose, initialize_config_dir
from pairwise import slow
from test_codecs import of_each_pair
from torch import nn
from transformers import Cache, DynamicCache

import polykv
from experiments import settings
from experiments.session import Session
from polykv.attention.cache import CascadeCache
from polykv.attention.cascade import NAME, attend_in_place, cascade_attention
from polykv.config import CONF
from polykv.errors import PolyKVError
from polykv.evaluation.continuation import score_rest
from polykv.kernels import cpu
from polykv.pool import SharedKVPool
from polykv.recipe import load_recipe

WORDS = TEXT.split()
# 15 queries of 1 to 33 tokens.
QUERIES = [" ".join(WORDS[3 * i : 4 * i + 1]) for i in range(15)]
DOCUMENT = TEXT[:300]


def pooled(model, tokenizer, name="polykv", text=DOCUMENT):
    return SharedKVPool.from_text(model, tokenizer, text, load_recipe(name), backend="torch")


@pytest.fixture(scope="module")
def pool(llama, tokenizer):
    return pooled(llama, tokenizer)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def batch(rows, n_prefix):
    """Left-padded ids and their mask, the prefix before each."""
    longest = max(len(row) for row in rows)
    ids = [[0] * (n_prefix + longest - len(row)) + row for row in rows]
    mask = [[1] * n_prefix + [0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def generate(model, cache, ids, mask, **options):
    """The new tokens (rows, tokens)."""
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12} | options
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    return out[:, ids.shape[1] :]


def unshared_copies(pool, n_agents):
    """What reading in place stands for: every agent's own full cache, as one batch."""
    layers = (pool.decode_layer(index) for index in range(pool.n_layers))
    return DynamicCache([tuple(t.repeat(n_agents, 1, 1, 1) for t in layer) for layer in layers])


@pytest.mark.parametrize(
    "architecture",
    [
        "gpt_neox",
        *slow(*(a for a in ARCHITECTURES if a != "gpt_neox")),
    ],  # rotary on part of head_dim
)
def test_fifteen_agents_say_what_injected_ones_say(architecture, tokenizer):
    model = tiny_model(architecture)
    pool = pooled(model, tokenizer)
    lengths = {len(ids_of(tokenizer, query)) for query in QUERIES}
    assert len(lengths) > 8 and max(lengths) > 30
    injected = pool.ask(model, tokenizer, QUERIES, max_new_tokens=64)
    assert pool.ask(model, tokenizer, QUERIES, max_new_tokens=64, reader="in_place") == injected
    assert len(set(injected)) > 10  # the answers depend on the queries


@pytest.mark.slow
@pytest.mark.parametrize("n_tokens", [4, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", of_each_pair(polykv.available_recipes()))
def test_every_recipe_says_what_injected_agents_say(name, n_tokens, llama, tokenizer):
    pool = pooled(llama, tokenizer, name)
    injected = pool.ask(llama, tokenizer, QUERIES[::5], n_tokens)
    assert pool.ask(llama, tokenizer, QUERIES[::5], n_tokens, reader="in_place") == injected


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_for_every_head_dim_and_group(dim, kv_heads, tokenizer):
    model = tiny_model("llama", head_dim=dim, num_key_value_heads=kv_heads, num_hidden_layers=2)
    pool = pooled(model, tokenizer, "polykv_q8_0")
    rest = torch.tensor([ids_of(tokenizer, TEXT[300:420])])
    injected = score_rest(model, pool.dequantize(), rest)
    with attend_in_place(model):
        in_place = score_rest(model, pool.reader(1), rest)
    torch.testing.assert_close(in_place, injected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("n_agents", "n_queries"), [(1, 1), (15, 1), (64, 1), (3, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_against_fp64(n_agents, n_queries, dtype):
    """Prefix of 200, own tokens with padding, causal within the query; group of 3, head_dim 64."""
    torch.manual_seed(0)
    layers = [tuple(torch.randn(2, 1, 2, 200, 64).to(dtype))]
    pool = SharedKVPool.from_layers(layers, load_recipe("polykv"), backend="torch")
    cache, n_own = pool.reader(n_agents), n_queries + 5
    own = torch.randn(2, n_agents, 2, n_own, 64).to(dtype)
    query = torch.randn(n_agents, 6, n_queries, 64).to(dtype)
    mask = torch.ones(n_agents, 1, n_queries, n_own, dtype=torch.bool).tril(5)
    mask[0, ..., :3] = False
    key, value = cache.update(*own, 0)
    out, _ = cascade_attention(nn.Module(), query, key, value, mask, scaling=0.2)
    assert out.dtype == dtype
    k, v = (
        torch.cat([shared.expand(n_agents, -1, -1, -1), mine], dim=2).double()
        for shared, mine in zip(pool.decode_layer(0), own, strict=True)
    )
    k, v = (t.repeat_interleave(3, dim=1) for t in (k, v))
    seen = torch.cat([torch.ones(n_agents, 1, n_queries, 200, dtype=torch.bool), mask], dim=3)
    scores = (query.double() @ k.mT * 0.2).masked_fill(~seen, -torch.inf)
    true = (scores.softmax(dim=-1) @ v).transpose(1, 2)
    assert float((out - true).abs().max()) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_a_long_query_in_blocks_changes_nothing(pool, llama, tokenizer, monkeypatch):
    rest = torch.tensor([ids_of(tokenizer, TEXT[300:420])])
    with attend_in_place(llama):
        whole = score_rest(llama, pool.reader(1), rest)
        monkeypatch.setattr("polykv.attention.cascade.QUERY_BYTES", 7 * 4 * 8 * 4)
        assert rest.shape[1] > 3 * 7
        blocks = score_rest(llama, pool.reader(1), rest)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-4)


def test_padding_changes_nothing(pool, llama, tokenizer):
    """Every agent alone has the logits that it has in the padded batch."""
    rows = [ids_of(tokenizer, query) for query in QUERIES[::4]]
    with attend_in_place(llama), torch.no_grad():
        ids, mask = batch(rows, pool.n_tokens)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, pool.n_tokens :]
        together = llama(
            ids[:, pool.n_tokens :],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=pool.reader(len(rows)),
        ).logits[:, -1]
        for row, logits in zip(rows, together, strict=True):
            alone = llama(torch.tensor([row]), past_key_values=pool.reader(1)).logits[0, -1]
            torch.testing.assert_close(logits, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt_neox", *slow("llama", "gpt2")])
def test_several_turns_with_agents_that_stop_early(architecture, tokenizer):
    """Two turns of three agents, one batch, against each agent alone with its own full cache."""
    model = tiny_model(architecture)
    pool = pooled(model, tokenizer)
    n_prefix = pool.n_tokens
    first, second = ([ids_of(tokenizer, q) for q in QUERIES[i : i + 9 : 3]] for i in (2, 3))
    ids, mask = batch(first, n_prefix)
    cache = pool.reader(3)
    with attend_in_place(model):
        free = generate(model, pool.reader(3), ids, mask)
        stop = int(free[1, 4])  # where this ends a sequence, agents stop at different lengths
        answers = generate(model, cache, ids, mask, eos_token_id=stop)
        seen = (answers == stop).cumsum(dim=1).sub((answers == stop).long()) == 0
        assert len(set(seen.sum(dim=1).tolist())) > 1
        # What the cache holds stays where it is: the second turn's padding comes after the first's answers.
        more_ids, more_mask = batch(second, 0)
        ids, mask = (
            torch.cat(parts, dim=1)
            for parts in ((ids, answers, more_ids), (mask, seen.long(), more_mask))
        )
        more = generate(model, cache, ids, mask, eos_token_id=stop)
    for row in range(3):
        alone, said = pool.dequantize(), answers[row, seen[row]].tolist()
        once = generate(model, alone, *batch([first[row]], n_prefix), eos_token_id=stop)
        assert once[0].tolist() == said
        so_far = first[row] + said + second[row]
        again = generate(model, alone, *batch([so_far], n_prefix), eos_token_id=stop)[0]
        assert torch.equal(more[row, : len(again)], again)
        assert not more[row, len(again) :].any()


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.5, "top_k": 0},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
    ids=["sampling", "beams", "several answers", "several beams"],
)
def test_every_way_to_generate_as_from_private_copies(options, pool, llama, tokenizer):
    ids, mask = batch([ids_of(tokenizer, query) for query in QUERIES[1::4]], pool.n_tokens)
    torch.manual_seed(5)
    rows = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    unshared = generate(llama, unshared_copies(pool, len(ids) * rows), ids, mask, **options)
    torch.manual_seed(5)
    with attend_in_place(llama):
        in_place = generate(llama, pool.reader(len(ids)), ids, mask, **options)
    assert torch.equal(in_place, unshared)


def test_guesses_are_cropped_as_from_a_private_copy(pool, llama, tokenizer, monkeypatch):
    """Prompt lookup guesses several tokens at once and takes wrong ones back."""
    ids, mask = batch([ids_of(tokenizer, TEXT[:150])], pool.n_tokens)
    unshared = generate(llama, pool.dequantize(), ids, mask, prompt_lookup_num_tokens=4)
    cropped = []
    monkeypatch.setattr(
        CascadeCache, "crop", lambda self, n: (cropped.append(n), Cache.crop(self, n))
    )
    with attend_in_place(llama):
        guessed = generate(llama, pool.reader(1), ids, mask, prompt_lookup_num_tokens=4)
    assert min(cropped) < 0
    assert torch.equal(guessed, unshared)


def test_agents_can_be_repeated_selected_and_reset(pool, llama, tokenizer):
    ids, _ = batch([ids_of(tokenizer, TEXT[i : i + 40])[:8] for i in (0, 30, 60)], 0)
    cache, n_prefix = pool.reader(3), pool.n_tokens
    cache.batch_select_indices(torch.tensor([0]))  # nothing is there yet
    with attend_in_place(llama), torch.no_grad():
        llama(ids, past_key_values=cache)
        keys = cache.layers[1].keys
        assert cache.get_seq_length() == n_prefix + 8
        cache.crop(-3)
        assert cache.get_seq_length() == n_prefix + 5
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 5]))
        assert torch.equal(cache.layers[1].keys, keys[:, :, :5])
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        assert torch.equal(cache.layers[1].keys, keys[[2, 0, 1], :, :5])
        for n_tokens in (-6, 5):
            with pytest.raises(PolyKVError, match=r"crop\(.*agents with 5 tokens"):
                cache.crop(n_tokens)
        cache.reset()
        assert cache.get_seq_length() == n_prefix
        llama(ids, past_key_values=cache)
        assert torch.equal(cache.layers[1].keys, keys)


def test_several_pools_and_plain_caches_at_once(llama, tokenizer):
    """Two pools, an unshared cache, and all of their tokens one by one in turn."""
    pools = [pooled(llama, tokenizer, "polykv"), pooled(llama, tokenizer, "q8_0", TEXT[90:280])]
    rest = torch.tensor([ids_of(tokenizer, TEXT[300:340])])
    expected = [score_rest(llama, pool.dequantize(), rest) for pool in pools]
    caches = [pool.reader(1) for pool in pools] + [pools[0].dequantize()]
    logits = [[], [], []]
    with attend_in_place(llama), torch.no_grad():
        for token in rest[0, :-1]:
            for cache, found in zip(caches, logits, strict=True):
                found.append(llama(token.view(1, 1), past_key_values=cache).logits[0, -1])
    for found, true in zip(logits, [*expected, expected[0]], strict=True):
        torch.testing.assert_close(torch.stack(found).log_softmax(-1), true, rtol=0, atol=1e-3)


def test_other_caches_are_read_as_before(pool, llama, tokenizer):
    rest = torch.tensor([ids_of(tokenizer, TEXT[300:340])])
    before = score_rest(llama, pool.dequantize(), rest)
    with attend_in_place(llama):
        assert torch.equal(score_rest(llama, pool.dequantize(), rest), before)
        assert torch.equal(score_rest(llama, DynamicCache(), rest), score_rest(llama, None, rest))


def storages(cache):
    """Bytes of every storage that a cache's prefix keeps, by its address."""
    tensors = (
        tensor
        for layer in cache.layers
        for segment in layer.segments
        for packed in (segment.key, segment.value)
        for tensor in packed.tensors.values()
    )
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_the_prefix_is_kept_once_for_any_number_of_agents(pool, llama, tokenizer):
    ids, _ = batch([ids_of(tokenizer, TEXT[:40])[:6]] * 30, 0)
    kept = []
    with attend_in_place(llama), torch.no_grad():
        for n_agents in (1, 15, 30):
            cache = pool.reader(n_agents)
            llama(ids[:n_agents], past_key_values=cache)
            own = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            assert (
                own == n_agents * 6 * 2 * 2 * 8 * 4 * 4
            )  # tokens, K+V, kv heads, dim, fp32, layers
            kept.append(storages(cache))
    assert kept[0] == kept[1] == kept[2]
    assert sum(kept[0].values()) == pool.stored_bytes


def test_the_model_is_left_as_it_was(llama):
    before = llama.config._attn_implementation
    with pytest.raises(ZeroDivisionError), attend_in_place(llama):
        with attend_in_place(llama):
            pass
        assert llama.config._attn_implementation == NAME
        raise ZeroDivisionError
    assert llama.config._attn_implementation == before


@pytest.mark.slow
def test_threads_ask_at_the_same_time(pool, llama, tokenizer):
    expected = pool.ask(llama, tokenizer, QUERIES[:4], 6)
    before = llama.config._attn_implementation
    with ThreadPoolExecutor(8) as threads:
        asked = [
            threads.submit(pool.ask, llama, tokenizer, QUERIES[:4], 6, reader)
            for reader in ("in_place", "dequantize") * 8
        ]
    assert all(future.result() == expected for future in asked)
    assert llama.config._attn_implementation == before


def test_a_model_dispatched_by_accelerate(tokenizer):
    """device_map="auto" puts hooks around every layer, which move what a layer is given to its device."""
    model = tiny_model("llama")
    expected = pooled(model, tokenizer).ask(model, tokenizer, QUERIES[:3], 8)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu"} | {f"model.layers.{i}": "cpu" for i in range(4)}
    model = dispatch_model(model, places, main_device="cpu", force_hooks=True)
    assert hasattr(model.model.layers[0], "_hf_hook")
    pool = pooled(model, tokenizer)
    assert pool.ask(model, tokenizer, QUERIES[:3], 8, reader="in_place") == expected


def test_no_queries_no_answers(pool, llama, tokenizer):
    assert pool.ask(llama, tokenizer, [], reader="in_place") == []


def test_a_model_that_does_not_attend_in_place_is_refused(pool, llama, tokenizer):
    with pytest.raises(PolyKVError, match=r"inside `with attend_in_place\(model\)"):
        score_rest(llama, pool.reader(1), torch.tensor([[1, 2, 3]]))


def test_what_cannot_be_read_is_refused(pool, llama):
    ids = torch.tensor([[1, 2, 3]] * 2)

    def read(model=llama, cache=None, **options):
        with attend_in_place(model), torch.no_grad():
            model(ids, past_key_values=cache or pool.reader(2), **options)

    with pytest.raises(PolyKVError, match="2 queries for a reader of 3 agents"):
        read(cache=pool.reader(3))
    with pytest.raises(PolyKVError, match="2 kv heads of 8 and the model 4 of 8"):
        read(tiny_model("llama", num_key_value_heads=4))
    with pytest.raises(PolyKVError, match="the pool has 4 layers, fewer than the model"):
        read(tiny_model("llama", num_hidden_layers=5))
    mask = torch.ones(2, pool.n_tokens + 3, dtype=torch.long)
    mask[1, 5] = 0
    with pytest.raises(PolyKVError, match=f"hides some of the pool's {pool.n_tokens} tokens"):
        read(attention_mask=mask)
    with pytest.raises(PolyKVError, match="4-D"):
        read(attention_mask=torch.ones(2, 1, 3, pool.n_tokens + 3, dtype=torch.bool))
    with pytest.raises(PolyKVError, match="call model.eval"):
        read(tiny_model("llama", attention_dropout=0.5).train())
    with pytest.raises(PolyKVError, match="output_attentions"):
        read(output_attentions=True)
    trained = tiny_model("llama").requires_grad_(True)
    with pytest.raises(PolyKVError, match="no gradients"), attend_in_place(trained):
        trained(ids, past_key_values=pool.reader(2))
    elsewhere = torch.empty(2, 2, 3, 8, device="meta")
    with pytest.raises(PolyKVError, match="layer 0 of the pool is on cpu.* meta"):
        pool.reader(2).update(elsewhere, elsewhere, 0)
    with pytest.raises(PolyKVError, match="n_agents=0"):
        pool.reader(0)
    two = SharedKVPool.from_layers(
        [tuple(torch.randn(2, 2, 2, 10, 8))], load_recipe("full"), backend="torch"
    )
    with pytest.raises(PolyKVError, match="batch size 2"):
        two.reader(2)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("position_bias", "use reader=dequantize for this model"),
        ("block_indices", "use reader=dequantize for this model"),
        ("sliding_window", "sliding window of 1.0 tokens, and the layer of the pool one of None"),
    ],
)
def test_attention_that_is_not_plain_is_refused(option, message, pool):
    key, value = pool.reader(1).update(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8), 0)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    with pytest.raises(PolyKVError, match=message):
        cascade_attention(nn.Module(), torch.randn(1, 4, 1, 8), key, value, mask, **{option: 1.0})


def settled(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return settings.settle(compose("config", ["model=reference", "device=cpu", *overrides]))


def test_the_backend_is_part_of_a_cell(monkeypatch):
    """What `auto` stands for is said; cells that dequantize keep to torch, so that machines agree on them."""
    monkeypatch.setattr(cpu, "available", lambda: None)
    assert settled("reader=dequantize").backend == "torch"
    assert settled("reader=in_place").backend == "cpu"
    assert settled("reader=in_place", "backend=torch").backend == "torch"
    assert settled("reader=dequantize", "backend=cpu").backend == "cpu"
    rows = settings.new_rows(settled("reader=in_place"))
    rows.add("kl", 1.0, "nats")
    assert rows[0]["backend"] == "cpu"
    for override, message in {
        "reader=telepathy": "no reader named 'telepathy'; there are: dequantize, in_place",
        "backend=abacus": "no backend named 'abacus'",
    }.items():
        with pytest.raises(PolyKVError, match=message):
            settings.check_common(settled(override))
    monkeypatch.setattr(cpu, "available", lambda: "no compiler here")
    with pytest.raises(PolyKVError, match="backend=cpu is not available: no compiler here"):
        settings.check_common(settled("reader=in_place", "backend=cpu"))


def test_scores_and_answers_both_read_in_place(tmp_path, checkpoint, monkeypatch):
    overrides = ["model=local", f"model.path={checkpoint}", "document=file", "context=60",
                 f"document.path={checkpoint}/text.txt", "n_documents=1"]  # fmt: skip
    found = {}
    for reader in ("dequantize", "in_place"):
        cfg = settled(*overrides, f"reader={reader}", "backend=torch")
        if reader == "in_place":
            monkeypatch.setattr(SharedKVPool, "dequantize", None)
        session = Session()
        (reading,) = session.readings(cfg)
        found[reader] = reading.log_probs_TV, session.answers(cfg, 1)
    torch.testing.assert_close(found["in_place"][0], found["dequantize"][0], rtol=0, atol=1e-3)
    assert found["in_place"][1] == found["dequantize"][1]
