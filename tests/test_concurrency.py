"""N agents that decode together: that they share what they should, what is measured, table and figure."""

import os
import platform
import resource
from itertools import product

import pandas as pd
import pytest
import torch
from conftest import checked_cell, rows_of, tiny_model, wide_model
from omegaconf import OmegaConf

import polykv.config
from analysis.concurrency import figure, table
from analysis.load import load
from analysis.render import markdown
from analysis.style import READERS as NAMES
from experiments.concurrency import STUDY
from experiments.session import Session
from polykv.errors import PolyKVError
from polykv.evaluation import memory
from polykv.evaluation.concurrency import (
    QUERY_TOKENS,
    READERS,
    _step_times,
    caches_of,
    decode,
    is_prefilled,
    kept_bytes,
    synthetic_layers,
)
from polykv.evaluation.memory import resident_bytes
from polykv.evaluation.process import CpuMeter, in_fresh_process, keep_freed_memory
from polykv.evaluation.ttft import Route, measure
from polykv.geometry import Geometry
from polykv.handoff.policy import load_policy
from polykv.models import ModelSource
from polykv.pool import SharedKVPool
from polykv.results import Store

N_TOKENS = 100
N_STEPS = 5
GEOMETRY = Geometry.even(n_layers=4, n_kv_heads=2, head_dim=8)  # of conftest's llama
CACHE = N_TOKENS * GEOMETRY.values_per_token * 4
SMALL = ("context=160", "max_new_tokens=5", "repeats=2", "backend=torch")


@pytest.fixture(scope="module")
def layers():
    return list(synthetic_layers(GEOMETRY, N_TOKENS, torch.float32, torch.device("cpu")))


def pool_under(recipe, layers):
    return SharedKVPool.from_layers(layers, polykv.load_recipe(recipe), backend="torch")


def storages(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def pooled(layers_of_segments):
    """The storages of all tensors that these layers' segments hold."""
    return storages(
        tensor
        for segments in layers_of_segments
        for segment in segments
        for packed in (segment.key, segment.value)
        for tensor in packed.tensors.values()
    )


def test_every_reader_refers_to_the_one_pool_and_grows_suffixes_only(llama, layers):
    pool = pool_under("polykv", layers)
    before, written = pool.stored_bytes, pooled(pool._layers)
    for n_agents in (1, 15):
        (cache,) = caches_of("in_place", layers, pool, n_agents, together=True)
        assert kept_bytes(pool, [cache]) == pool.stored_bytes
        list(decode(llama, [cache], N_TOKENS, n_agents, N_STEPS))
        assert pooled(layer.segments for layer in cache.layers) == written
        own = QUERY_TOKENS + N_STEPS
        for layer in cache.layers:
            assert layer.keys.shape == layer.values.shape == (n_agents, 2, own, 8)
    assert pool.stored_bytes == before and pooled(pool._layers) == written


@pytest.mark.parametrize("together", [True, False])
def test_unshared_and_dequantized_copies_share_no_memory(layers, together):
    pool = pool_under("polykv", layers)
    for reader in ("unshared", "dequantize"):
        caches = caches_of(reader, layers, pool, 3, together)
        assert [cache.layers[0].keys.shape[0] for cache in caches] == ([3] if together else [1] * 3)
        own = [x for cache in caches for layer in cache.layers for x in (layer.keys, layer.values)]
        assert len(storages(own)) == len(own)
        assert storages(own).isdisjoint(storages(x for layer in layers for x in layer))
        used = pool if reader == "dequantize" else None
        assert kept_bytes(used, caches) == 3 * CACHE + (pool.stored_bytes if used else 0)


def fed(model, caches, n_agents):
    """The ids that each agent is given after its query: (agents, steps)."""
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    try:
        list(decode(model, caches, N_TOKENS, n_agents, N_STEPS))
    finally:
        hook.remove()
    turns = len(caches)
    steps = [torch.cat(seen[at : at + turns]) for at in range(0, len(seen), turns)]
    assert steps[0].shape == (n_agents, QUERY_TOKENS)
    return torch.cat(steps[1:], dim=1)


def test_every_agent_is_fed_its_own_tokens(layers):
    model, full = tiny_model("llama"), pool_under("full", layers)
    alone = fed(model, caches_of("unshared", layers, None, 5, together=False), 5)
    for reader in READERS:
        assert torch.equal(fed(model, caches_of(reader, layers, full, 5, together=True), 5), alone)
    assert len(set(map(tuple, alone.tolist()))) == 5
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_resident_prefix_memory_does_not_grow_with_the_agents():
    geometry = {"hidden_size": 512, "num_hidden_layers": 2, "max_position_embeddings": 8192}
    source, recipe = ModelSource.of(wide_model(**geometry)), polykv.load_recipe("polykv")
    n_tokens, n_steps = 3072, 2
    per_token = Geometry.even(2, 8, 64).values_per_token * 4
    kinds = product(("unshared", "in_place"), (1, 15))
    how = ("cpu", "torch", n_steps)
    found = {(who, n): resident_bytes(source, recipe, who, n_tokens, n, *how) for who, n in kinds}
    copies = 14 * n_tokens * per_token
    suffixes = 14 * (QUERY_TOKENS + n_steps) * per_token
    unshared, in_place = (
        found[reader, 15] - found[reader, 1] for reader in ("unshared", "in_place")
    )
    # A step of transformers' DynamicCache holds one of its four tensors twice.
    assert copies < unshared < 1.35 * copies
    # The agents' own tokens, and 4 MiB for what a step holds of 14 more agents beside them.
    assert in_place < suffixes + 4 * 2**20
    # The pool is there, and no full copy of the prefix is.
    assert 0.17 * copies / 14 < found["in_place", 1] < 0.6 * copies / 14


def test_a_prefix_is_prefilled_for_real_where_that_is_cheap():
    names = ("reference", "smollm2-1.7b")
    small, large = (ModelSource.of(polykv.config.load_group("model", name)) for name in names)
    assert is_prefilled(small, 4096) and not is_prefilled(large, 4096)


def fail(why):
    raise ZeroDivisionError(why)


def test_a_measurement_that_fails_in_its_process_says_so():
    assert in_fresh_process(dict, {"a": 1}, b=2) == {"a": 1, "b": 2}
    with pytest.raises(PolyKVError, match="ZeroDivisionError: by hand"):
        in_fresh_process(fail, "by hand")
    with pytest.raises(PolyKVError, match="ended with code 3"):
        in_fresh_process(os._exit, 3)


PAGE = os.sysconf("SC_PAGESIZE")
N_BLOCKS, BLOCK_BYTES = 5, 48 * 2**20  # above what glibc learns to keep


def faults_of_blocks():
    """Page faults of blocks that are allocated, filled and freed in turn, after three in which the heap settles."""

    def block():
        torch.ones(BLOCK_BYTES, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    found = [block() for _ in range(3 + N_BLOCKS)]
    return found[-1] - found[2]


def faults_after_steps(source):
    before = faults_of_blocks()
    _step_times(source, polykv.load_recipe("full"), READERS, 20, 2, 2, 1, "cpu", "torch")
    return before, faults_of_blocks()


def faults_after_ttft(source):
    measure(
        *source.load("cpu"), torch.arange(20), 4, [Route(load_policy("reprefill"))], 4.0, repeats=2
    )
    return faults_of_blocks()


def meter_after_keeping():
    keep_freed_memory()
    faults_of_blocks()
    meter = CpuMeter()
    meter.start()
    faults_of_blocks()
    meter.reset_peak()
    kept = torch.ones(BLOCK_BYTES, dtype=torch.uint8)
    return meter.peak() / kept.nbytes


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no other malloc has the settings")
def test_what_is_timed_reuses_memory_and_what_is_metered_gives_it_back():
    cfg = polykv.config.load_group("model", "reference")
    cfg.weights = "reference"
    source = ModelSource.of(cfg)
    before, after = in_fresh_process(faults_after_steps, source)
    fresh = N_BLOCKS * BLOCK_BYTES / PAGE
    # Without the setting each block is mapped anew; huge pages would make few faults of that.
    assert after < 0.01 * fresh and (before < 0.01 * fresh or before > 0.9 * fresh)
    assert in_fresh_process(faults_after_ttft, source) < 0.01 * fresh
    assert 0.9 < in_fresh_process(meter_after_keeping) < 1.2


def cell(*overrides):
    return checked_cell("experiment=concurrency", "device=cpu", *overrides)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    for n in (1, 4):
        made = rows_of("experiment=concurrency", "device=cpu", *SMALL, f"n_agents={n}")
        Store(root).write(STUDY.declaration(), f"{n}", {}, made)
    return load(root).rows


def of(rows, metric, reader, n_agents, **columns):
    for name, wanted in {
        "metric": metric,
        "reader": reader,
        "n_agents": n_agents,
        **columns,
    }.items():
        rows = rows[rows[name] == wanted]
    return rows["value"]


def test_rows_say_what_was_kept_and_how_long_each_step_took(rows):
    assert set(rows["n_threads"]) == {1} and set(rows["n_tokens"]) == {160 - QUERY_TOKENS - 5}
    assert set(rows["backend"]) == {"torch"} and rows["value"].gt(0).all()
    assert not rows["synthetic"].any()
    cache = (160 - QUERY_TOKENS - 5) * Geometry.even(4, 2, 64).values_per_token * 4
    (pool,) = set(
        rows.loc[(rows["reader"] == "in_place") & (rows["accounting"] == "stored"), "value"]
    )
    for n in (1, 4):
        for reader, expected in (("unshared", n * cache), ("dequantize", n * cache + 1e9 * pool)):
            (kept,) = of(rows, "kv_memory", reader, n, accounting="stored")
            assert 1e9 * kept == pytest.approx(expected)
        for reader in READERS:
            assert len(of(rows, "step_time", reader, n)) == 2 * (5 - 2)
            assert len(of(rows, "kv_memory", reader, n, accounting="resident")) == 1


def test_a_reader_that_does_not_fit_has_its_reason_and_the_others_are_measured(monkeypatch):
    study, settled = cell(*SMALL, "n_agents=60", "readers=[unshared,in_place]")
    # Room for the weights and a few copies, not for sixty.
    monkeypatch.setattr(
        memory.psutil, "virtual_memory", lambda: OmegaConf.create({"available": 50e6})
    )
    found = pd.DataFrame(study.run(settled, Session()))
    unshared, in_place = (found[found["reader"] == reader] for reader in ("unshared", "in_place"))
    assert len(unshared) == 3 and unshared["value"].isna().all()
    assert unshared["note"].str.contains("60 agents").all()
    assert len(in_place) == 2 + 2 * (5 - 2) and in_place["value"].gt(0).all()


def test_table_and_figure(rows):
    lines = table(rows).rows
    names = [name for name, _ in NAMES.values()]
    assert [(line["agents"], line["reader"]) for line in lines] == [*product("14", names)]
    unshared, dequantize, in_place = lines[3:]
    times = of(rows, "step_time", "unshared", 4)
    assert unshared["step"].value == times.median() and unshared["step"].n == 6
    assert unshared["throughput"].value == pytest.approx(4e3 / times.median())
    assert unshared["throughput"].low == pytest.approx(4e3 / times.quantile(0.75))
    (resident,) = of(rows, "kv_memory", "unshared", 4, accounting="resident")
    assert unshared["resident"].value == pytest.approx(1e3 * resident)
    assert unshared["per_agent"].value == pytest.approx(1e3 * resident / 4)
    ratio = unshared["resident"].value / in_place["resident"].value
    assert in_place["smaller"].value == pytest.approx(ratio)
    assert dequantize["faster"].value == pytest.approx(
        unshared["step"].value / dequantize["step"].value
    )
    assert "Published" not in table(rows).caption
    drawn = figure(rows)
    assert all(ax.lines for ax in drawn.canvas.axes)
    assert "Dashed:" in drawn.caption and "dashed" in drawn.canvas.axes[0].get_title("left")
    alone = figure(rows[rows["n_agents"] == 4])  # a line needs two numbers of agents
    assert "dashed" not in alone.caption.lower() + alone.canvas.axes[0].get_title("left")
    other = rows[rows["reader"] == "in_place"].assign(backend="cpu")
    both = figure(pd.concat([rows, other], ignore_index=True)).canvas.legends[0].get_texts()
    expected = {*names[:2], f"{names[2]}, cpu", f"{names[2]}, torch"}
    assert {text.get_text() for text in both} == expected
    lost = rows.assign(value=rows["value"].where(rows["reader"] != "unshared"))
    lost["note"] = "does not fit"
    assert "nan" not in markdown(table(lost)).lower() and figure(lost).canvas.axes


def test_cells_that_differ_in_a_setting_are_lines_of_their_own(rows):
    more = rows.assign(cell=rows["cell"] + "b", **{"set.max_new_tokens": "9"})
    fewer = rows.assign(**{"set.max_new_tokens": "5"})
    both = pd.concat([fewer, more], ignore_index=True)
    assert len(table(both).rows) == 2 * len(table(rows).rows)
    assert len(figure(both).canvas.axes) == 2 * len(figure(rows).canvas.axes)


def test_published_gigabytes_are_named_only_beside_the_same_pool(rows):
    there = rows.assign(model="llama-3-8b", context_tokens=5055, n_agents=15)
    assert "19.798 GB" in table(there).caption and "0.454 GB" in table(there).caption
    for other in ({"context_tokens": 4096}, {"n_agents": 7}, {"model": "smollm2-135m"}):
        assert "Published" not in table(there.assign(**other)).caption


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("readers=[telepathy]", "no reader named 'telepathy'"),
        ("readers=[]", "name one or more"),
        ("repeats=0", "repeats=0"),
        ("max_new_tokens=2", "warming up"),
        ("context=null", "context=1024"),
        ("context=10", "no prefix"),
        ("context=4097", "4096"),
    ],
)
def test_refusals(override, said):
    with pytest.raises(PolyKVError, match=said) as refused:
        cell(override)
    assert "\n" not in str(refused.value)


def test_the_unused_setting_reader_makes_no_other_cell():
    cfg = [OmegaConf.to_container(cell(f"reader={r}")[1]) for r in ("dequantize", "in_place")]
    assert cfg[0] == cfg[1]
