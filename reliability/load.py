"""Many readers, many pools, and a long prefix: nothing is mixed up, nothing grows, memory stays as computed."""

import gc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

import polykv
from polykv import config
from polykv.errors import PolyKVError
from polykv.evaluation.concurrency import QUERY_TOKENS, decode, kept_bytes, synthetic_layers
from polykv.evaluation.process import CpuMeter, in_fresh_process
from polykv.geometry import Geometry
from polykv.models import load_weights
from polykv.pool import SharedKVPool, prefill
from polykv.recipe import Recipe
from polykv.tokens import encode
from reliability.finding import Finding

TEXT = (
    "The key of the red house lies in the blue box. Mary gave the blue box to John on Monday. " * 5
)
QUESTIONS = ("Where is the key?", "Who has the box?", "On what day", "The red house")
NEW_TOKENS = 4
N_THREADS = 64

GROWTH_BYTES = (
    8 << 20
)  # of 1,000 pools or cards; a single pool's page-aligned tensors are about as much
PREFIX_TOKENS = 1 << 17
N_AGENTS = 4
SLACK_BYTES = (
    64 << 20
)  # weights touched first, the allocator, threads' scratch: whatever the prefix
LAYERS = {"quick": (4, 2), "full": (16, 8)}  # layers and kv heads of 64; full is llama-3.2-1b's


def run(quick: bool) -> list[Finding]:
    """Threads on one pool, 1,000 pools and cards (quick: 100), and a prefix of 128K tokens."""
    return [
        _threads(rounds=1 if quick else 10),
        _threads_of_another_attention(rounds=1 if quick else 10),
        _threads_that_seal(rounds=1 if quick else 10),
        _growth("pools made, read and dropped", _make_pools, 100 if quick else 1000),
        _growth("cards sealed and opened", _make_cards, 100 if quick else 1000),
        *_long_prefix("quick" if quick else "full"),
    ]


def _threads(rounds: int) -> Finding:
    """64 threads read one pool in both ways, while some of them read another or no pool at all."""
    start = time.perf_counter()
    model, tokenizer = polykv.load_model("reference")
    pools = [
        SharedKVPool.from_text(model, tokenizer, TEXT, polykv.load_recipe(name))
        for name in ("polykv", "turboquant_4bit")
    ]
    before = [_content(pool) for pool in pools]

    def plain(question: str) -> list[str]:
        ids = tokenizer(TEXT + question, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        return tokenizer.batch_decode(out)

    def ask(pool: SharedKVPool, reader: str, question: str) -> list[str]:
        return pool.ask(model, tokenizer, [question, "Who?"], NEW_TOKENS, reader)

    ways: list[Callable[[str], list[str]]] = [
        lambda q: ask(pools[0], "inject", q),
        lambda q: ask(pools[0], "cascade", q),
        lambda q: ask(pools[1], "cascade", q),
        plain,
    ]
    work = [(way, question) for question in QUESTIONS for way in ways]
    expected = [way(question) for way, question in work]
    wrong = sum(
        got != want
        for _ in range(rounds)
        for got, want in zip(_at_once(work), expected * (N_THREADS // len(work)), strict=True)
    )
    changed = [_content(pool) for pool in pools] != before
    return Finding(
        area="readers under load",
        tried=f"{N_THREADS} threads at once ask one pool, injected and in place, another pool, and the model",
        times=N_THREADS * rounds,
        answered=f"{wrong} answers differ from the sequential ones; pools {'changed' if changed else 'unchanged'}",
        survived=not wrong and not changed,
        seconds=time.perf_counter() - start,
    )


def _threads_of_another_attention(rounds: int) -> Finding:
    """A model whose own attention is not sdpa is read one way at a time: an answer is right or refused."""
    start = time.perf_counter()
    model, tokenizer = polykv.load_model("reference")
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    pool = SharedKVPool.from_text(model, tokenizer, TEXT, polykv.load_recipe("polykv"))

    def ask(reader: str, question: str) -> list[str]:
        return pool.ask(model, tokenizer, [question], NEW_TOKENS, reader)

    work = [(partial(ask, reader), q) for q in QUESTIONS for reader in ("inject", "cascade")]
    expected = [way(question) for way, question in work] * (N_THREADS // len(work))
    wrong, refused = 0, []
    for _ in range(rounds):
        for got, want in zip(_at_once(work), expected, strict=True):
            if isinstance(got, PolyKVError):
                refused.append(str(got))
            else:
                wrong += got != want
    restored = model.config._attn_implementation == "eager"
    model.set_attn_implementation(own)
    return Finding(
        area="readers under load",
        tried=f"{N_THREADS} threads inject and read in place at once a model of eager attention",
        times=N_THREADS * rounds,
        answered=f"{wrong} wrong answers, {len(refused)} refused"
        + "".join(f": {r}" for r in refused[:1]),
        survived=not wrong and restored,
        seconds=time.perf_counter() - start,
    )


def _threads_that_seal(rounds: int) -> Finding:
    """Cards whose bits follow the attention that tokens receive, which is observed inside the model."""
    start = time.perf_counter()
    model, tokenizer = polykv.load_model("reference")

    def seal(text: str) -> tuple[list[int], list[int]]:
        ids_BT = encode(tokenizer, text, begins=True)
        cache = prefill(model, ids_BT)
        card = polykv.CacheCard.seal(cache, ids_BT[0], model, tokenizer, "local", 4.5)
        return card.key.tiers_T.tolist(), card.value.tiers_T.tolist()

    work = [(seal, TEXT[first:]) for first in (0, 4, 8, 12)]
    expected = [seal(text) for _, text in work] * (N_THREADS // len(work))
    wrong = sum(
        got != want
        for _ in range(rounds)
        for got, want in zip(_at_once(work), expected, strict=True)
    )
    return Finding(
        area="readers under load",
        tried=f"{N_THREADS} threads at once seal cards under a policy of observed attention",
        times=N_THREADS * rounds,
        answered=f"{wrong} cards differ in their bits from those sealed in sequence",
        survived=not wrong,
        seconds=time.perf_counter() - start,
    )


def _at_once(work: Sequence[tuple[Callable[[str], Any], str]]) -> list[Any]:
    """What N_THREADS threads, started together, get or raise; they share out the work over and over."""
    gate = Barrier(N_THREADS)

    def one(number: int) -> Any:
        way, question = work[number % len(work)]
        gate.wait()
        try:
            return way(question)
        except Exception as error:
            return error

    with ThreadPoolExecutor(N_THREADS) as threads:
        return list(threads.map(one, range(N_THREADS)))


def _content(pool: SharedKVPool) -> list[bytes]:
    return [
        tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for segment in pool._segments()
        for packed in (segment.key, segment.value)
        for tensor in packed.tensors.values()
    ]


def _growth(what: str, make: Callable[[int], None], times: int) -> Finding:
    """Resident memory after `times` rounds above that after a tenth of them, in a process of its own."""
    start = time.perf_counter()
    grown = in_fresh_process(_grown, make=make, times=times)
    return Finding(
        area="growth",
        tried=f"{what} in one process",
        times=times,
        answered=f"resident memory {grown / 2**20:+.1f} MiB after collection, {GROWTH_BYTES >> 20} are tolerated",
        survived=grown <= GROWTH_BYTES,
        seconds=time.perf_counter() - start,
    )


def _grown(make: Callable[[int], None], times: int) -> int:
    torch.set_num_threads(1)
    make(times // 10)  # what is loaded, compiled and kept on first use is no growth
    gc.collect()
    meter = CpuMeter()
    meter.start()
    make(times - times // 10)
    gc.collect()
    meter.reset_peak()  # to the present size
    return meter.peak()


def _make_pools(times: int) -> None:
    """Pools of 1.4 MB; each is read by both readers, every tenth by the model in place."""
    model, _ = polykv.load_model("reference")
    geometry, recipe = Geometry.of(model.config), polykv.load_recipe("polykv")
    layers = list(synthetic_layers(geometry, 1000, model.dtype, torch.device("cpu")))
    for number in range(times):
        pool = SharedKVPool.from_layers(layers, recipe)
        pool.inject()
        cache = pool.reader(2)
        if number % 10 == 0:
            for _ in decode(model, [cache], pool.n_tokens, 2, 1):
                pass


def _make_cards(times: int) -> None:
    """Cards of a real prefill, through their bytes."""
    model, tokenizer = polykv.load_model("reference")
    ids_BT = encode(tokenizer, TEXT, begins=True)
    cache = prefill(model, ids_BT)
    for _ in range(times):
        card = polykv.CacheCard.seal(cache, ids_BT[0], model, tokenizer, "uniform", 4.5)
        polykv.CacheCard.from_bytes(card.to_bytes(), model, tokenizer).inject()


def _long_prefix(size: str) -> list[Finding]:
    """Peak memory of pooling PREFIX_TOKENS tokens, and of agents' steps in place, against the geometry's."""
    n_layers, heads = LAYERS[size]
    model = OmegaConf.create({"name": "long", "weights": "random", "dtype": "float32"})
    model.geometry = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 64 * heads,
        "intermediate_size": 64,
        "num_hidden_layers": n_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2 * PREFIX_TOKENS,
    }
    found = in_fresh_process(_peaks, model, config.load_group("recipe", "polykv"))
    return [
        Finding(
            area="long prefix",
            tried=f"{what} of {PREFIX_TOKENS:,} tokens, {n_layers} layers x {heads} kv heads x 64",
            times=1,
            answered=f"{peak / 1e6:.0f} MB at most, {stated / 1e6:.0f} MB stated",
            survived=peak <= stated,
            seconds=seconds,
        )
        for what, (peak, stated, seconds) in found.items()
    ]


@torch.no_grad()
def _peaks(model_cfg: DictConfig, recipe_cfg: DictConfig) -> dict[str, tuple[int, int, float]]:
    """Of each part: bytes at its peak above the loaded model, bytes stated for it, seconds."""
    model, _ = load_weights(model_cfg, "cpu")
    geometry, recipe = Geometry.of(model.config), Recipe.from_config(recipe_cfg)
    one_tensor = PREFIX_TOKENS * geometry.values_per_token // (2 * geometry.n_layers)
    meter, start = CpuMeter(), time.perf_counter()
    meter.start()
    meter.reset_peak()
    layers = synthetic_layers(geometry, PREFIX_TOKENS, model.dtype, model.device)
    pool = SharedKVPool.from_layers(layers, recipe, n_layers=geometry.n_layers)
    created, ready = meter.peak(), time.perf_counter()
    # Keys and values of one layer in full, and what Codec.encode may take beside them.
    working = 2 * one_tensor * model.dtype.itemsize + 2 * (2 * one_tensor)
    found = {"a pool made": (created, pool.stored_bytes + working + SLACK_BYTES, ready - start)}
    meter.reset_peak()
    cache = pool.reader(N_AGENTS)
    for _ in decode(model, [cache], pool.n_tokens, N_AGENTS, 2):
        pass
    # transformers' mask has 8 bytes a token and agent; three of it exist while it grows and is checked.
    masks = 3 * 8 * N_AGENTS * (PREFIX_TOKENS + QUERY_TOKENS)
    stated = kept_bytes(pool, [cache]) + masks + SLACK_BYTES
    found["steps in place"] = (meter.peak(), stated, time.perf_counter() - ready)
    return found
