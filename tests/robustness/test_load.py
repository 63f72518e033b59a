"""Many readers, many pools and a long prefix: no answer is mixed up, and memory stays as computed."""

import gc
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from threading import Barrier

import pytest
import torch
from conftest import wide_model

import polykv
from polykv.evaluation.concurrency import QUERY_TOKENS, decode, kept_bytes, synthetic_layers
from polykv.evaluation.process import CpuMeter, in_fresh_process
from polykv.geometry import Geometry
from polykv.models import ModelSource
from polykv.pool import SharedKVPool, prefill
from polykv.tokens import encode
from robustness.stage import first

TEXT = (
    "The key of the red house lies in the blue box. Mary gave the blue box to John on Monday. " * 5
)
QUESTIONS = ("Where is the key?", "Who has the box?", "On what day", "The red house")
NEW_TOKENS = 3
N_THREADS = 32
GROWTH_BYTES = 8 << 20  # of 1,000 pools or cards; one pool's page-aligned tensors are about as much
PREFIX_TOKENS = 1 << 17
N_AGENTS = 4
SLACK_BYTES = 64 << 20  # weights touched first, the allocator, threads' scratch


def answering(model, tokenizer, recipe, reader):
    """(what answers a question, the pool that it reads)"""
    pool = SharedKVPool.from_text(model, tokenizer, TEXT, polykv.load_recipe(recipe))
    ask = lambda text: pool.ask(model, tokenizer, [text, "Who?"], NEW_TOKENS, reader)  # noqa: E731
    return ask, pool


def together(ways):
    """(what each way gives for each question, in turn; what N_THREADS threads, started together, get)"""
    work = [(way, question) for question in QUESTIONS for way in ways]
    gate = Barrier(N_THREADS)

    def one(job):
        gate.wait()
        return job[0](job[1])

    alone = [way(question) for way, question in work]
    with ThreadPoolExecutor(N_THREADS) as threads:
        found = list(threads.map(one, islice(cycle(work), N_THREADS)))
    return list(islice(cycle(alone), N_THREADS)), found


@pytest.mark.slow
@pytest.mark.parametrize("round_", first(1, range(10)))
def test_threads_that_read_pools_and_the_model(round_):
    model, tokenizer = polykv.load_model("reference")
    made = [("polykv", "dequantize"), ("polykv", "in_place"), ("turboquant_4bit", "in_place")]
    ways, pools = zip(*(answering(model, tokenizer, *each) for each in made), strict=True)
    before = [pool.decode_layer(0) for pool in pools]

    def plain(question):
        ids = tokenizer(TEXT + question, return_tensors="pt")
        return model.generate(
            **ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        ).tolist()

    alone, found = together([*ways, plain])
    assert found == alone
    for pool, layer in zip(pools, before, strict=True):
        assert all(map(torch.equal, pool.decode_layer(0), layer))


@pytest.mark.slow
@pytest.mark.parametrize("round_", first(1, range(10)))
def test_threads_that_seal_cards(round_):
    model, tokenizer = polykv.load_model("reference")

    def seal(question):
        ids_BT = encode(tokenizer, question + TEXT, begins=True)
        cache = prefill(model, ids_BT)
        card = polykv.CacheCard.seal(cache, ids_BT[0], model, tokenizer, "local", 4.5)
        return card.payload.key.tiers_T.tolist(), card.payload.value.tiers_T.tolist()

    alone, found = together([seal])
    assert found == alone


def make_pools(times):
    """Pools of 1.4 MB; each is read in both modes, every tenth by the model in place."""
    model, _ = polykv.load_model("reference")
    geometry, recipe = Geometry.of(model.config), polykv.load_recipe("polykv")
    layers = list(synthetic_layers(geometry, 1000, model.dtype, torch.device("cpu")))
    for number in range(times):
        pool = SharedKVPool.from_layers(layers, recipe)
        pool.dequantize()
        cache = pool.reader(2)
        if number % 10 == 0:
            for _ in decode(model, [cache], pool.n_tokens, 2, 1):
                pass


def make_cards(times):
    """Cards of a real prefill, through their bytes."""
    model, tokenizer = polykv.load_model("reference")
    ids_BT = encode(tokenizer, TEXT, begins=True)
    cache = prefill(model, ids_BT)
    for _ in range(times):
        card = polykv.CacheCard.seal(cache, ids_BT[0], model, tokenizer, "uniform", 4.5)
        polykv.CacheCard.from_bytes(card.to_bytes(), model, tokenizer).dequantize()


def grown(make, times) -> int:
    """Bytes of resident memory after `times` rounds above those after a tenth of them."""
    torch.set_num_threads(1)
    make(times // 10)  # what is loaded, compiled and kept on first use is no growth
    gc.collect()
    meter = CpuMeter()
    meter.start()
    make(times - times // 10)
    gc.collect()
    meter.reset_peak()  # to the present size
    return meter.peak()


@pytest.mark.faults
@pytest.mark.parametrize("make", [make_pools, make_cards], ids=lambda make: make.__name__)
def test_memory_does_not_grow(make):
    assert in_fresh_process(grown, make=make, times=1000) <= GROWTH_BYTES


def test_a_leak_is_found():
    kept = []
    leak = lambda times: kept.extend(torch.ones(1 << 18) for _ in range(times))  # noqa: E731
    assert grown(leak, 40) > GROWTH_BYTES  # a MiB each
    kept.clear()
    assert grown(lambda times: None, 40) < GROWTH_BYTES


@torch.no_grad()
def peaks(source) -> dict[str, tuple[int, int]]:
    """Of pooling and of decoding: bytes at the peak above the loaded model, and bytes computed for it."""
    model, _ = source.load("cpu")
    geometry, recipe = Geometry.of(model.config), polykv.load_recipe("polykv")
    one_tensor = PREFIX_TOKENS * geometry.values_per_token // (2 * geometry.n_layers)
    meter = CpuMeter()
    meter.start()
    meter.reset_peak()
    layers = synthetic_layers(geometry, PREFIX_TOKENS, model.dtype, model.device)
    pool = SharedKVPool.from_layers(layers, recipe, n_layers=geometry.n_layers)
    # Keys and values of one layer in full, and what Codec.encode may take beside them.
    working = 2 * one_tensor * model.dtype.itemsize + 2 * (2 * one_tensor)
    found = {"pooling": (meter.peak(), pool.stored_bytes + working + SLACK_BYTES)}
    meter.reset_peak()
    cache = pool.reader(N_AGENTS)
    for _ in decode(model, [cache], pool.n_tokens, N_AGENTS, 2):
        pass
    # transformers' mask has 8 bytes a token and agent; three of it exist while it grows and is checked.
    masks = 3 * 8 * N_AGENTS * (PREFIX_TOKENS + QUERY_TOKENS)
    found["decoding"] = (meter.peak(), kept_bytes(pool, [cache]) + masks + SLACK_BYTES)
    return found


@pytest.mark.faults
@pytest.mark.parametrize(("n_layers", "heads"), [(4, 2), (16, 8)])
def test_memory_of_a_long_prefix(n_layers, heads):
    sizes = {"hidden_size": 64 * heads, "intermediate_size": 64, "num_hidden_layers": n_layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 300}
    model = wide_model(**sizes, max_position_embeddings=2 * PREFIX_TOKENS)
    found = in_fresh_process(peaks, ModelSource.of(model))
    for part, (peak, computed) in found.items():
        assert peak <= computed, part
