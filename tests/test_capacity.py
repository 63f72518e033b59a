"""Capacity on paper: formulas against hand-made numbers, against real tensors, and against measured rows."""

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TEXT, checked_cell, tiny_model
from conftest import rows_of as made_by
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pairwise import slow

import polykv
from analysis.capacity import figure, table
from analysis.load import load
from analysis.render import latex, markdown, plain, to_csv
from experiments import capacity as study
from experiments import concurrency
from polykv.archive import pack
from polykv.cellfile import COLUMNS
from polykv.config import available, load_group
from polykv.errors import PolyKVError
from polykv.evaluation.capacity import Architecture, DecodeWorkload, gain_range, pool_bytes
from polykv.evaluation.concurrency import QUERY_TOKENS, READERS, caches_of, kept_bytes
from polykv.evaluation.hardware import Hardware, Replica
from polykv.geometry import Geometry
from polykv.models import load_config
from polykv.recipe import load_recipe
from polykv.results import Rows, Store

GEOMETRY = Geometry.even(n_layers=4, n_kv_heads=2, head_dim=64)  # 1,024 values, 2,048 bytes a token
MODEL = Architecture(
    geometry=GEOMETRY,
    dtype="bfloat16",
    n_parameters=1_000_000,
    n_multiplied=900_000,
    attention_flops=4 * 8 * 64 * 4,
    n_logits=1000,
)
# 2 MB of weights beside 10 MB; 1 MB/s, and operations that never bind.
REPLICA = Replica(split=1, count=1, usable_bytes=12_000_000, bandwidth=1e6, flops=1e30)
# A pool of 512,000 bytes for 1,000 tokens (2,048,000 bytes in full), and 100 tokens an agent.
WORKLOAD = DecodeWorkload(MODEL, REPLICA, pool_bytes=512_000, n_prefix=1000, n_suffix=100)
SMALL = ("model=reference", "context=1024", "suffix_tokens=[64]", "agents=[1,4]")


def cell(*overrides):
    return checked_cell("experiment=capacity", *overrides)


def rows_of(*overrides):
    return pd.DataFrame(
        made_by("experiment=capacity", *overrides), columns=[*COLUMNS, *study.COLUMNS]
    )


def of(rows, metric, **columns):
    for name, wanted in ({"metric": metric} | columns).items():
        rows = rows[rows[name] == wanted]
    return rows


def only(rows, metric, **columns):
    (found,) = of(rows, metric, **columns).to_dict("records")
    return found


def architecture(name):
    cfg = load_group("model", name)
    return Architecture.of(load_config(cfg), cfg.dtype)


def test_llama_3_1_8b_has_the_sizes_that_everybody_knows():
    model = architecture("llama-3.1-8b")
    assert model.n_parameters == 8_030_261_248
    assert model.weights_bytes == 16_060_522_496
    assert model.n_multiplied == 8_030_261_248 - 128_256 * 4096  # all but the table of embeddings
    assert model.token_bytes == 131_072
    assert round(32_768 * model.token_bytes / 1e9, 2) == 4.29
    assert 131_072 * model.token_bytes == 16 * 2**30
    tied = architecture("qwen2.5-0.5b")
    assert tied.n_parameters == tied.n_multiplied == 494_032_768


@pytest.mark.slow
def test_gpt_oss_20b_has_the_sizes_that_are_published():
    model = architecture("gpt-oss-20b")
    assert model.n_parameters == 20_914_757_184
    assert model.n_used(1) == 3_608_307_264  # "3.6B active": without the input embeddings
    assert [(one.count, one.n_chosen) for one in model.experts] == [(32, 4)] * 24
    # All experts are in memory; 15 agents read a share of them that the mean over their choices gives.
    assert model.weights_bytes == 2 * 20_914_757_184
    share = (model.n_used(15) - model.n_multiplied) / (
        model.n_parameters - 579_133_440 - model.n_multiplied
    )
    assert share == pytest.approx(1 - 0.875**15)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_the_model(tied):
    model = tiny_model("llama", tie_word_embeddings=tied)
    found = Architecture.of(model.config, "float32")
    assert found.weights_bytes == sum(p.nbytes for p in model.parameters())
    assert found.n_parameters - found.n_multiplied == (0 if tied else 300 * 32)
    assert found.attention_flops == 4 * 4 * 8 * 4  # heads, head_dim, layers


@pytest.mark.parametrize("name", available("recipe"))
@pytest.mark.parametrize("n_tokens", [179, *slow(5)])
def test_pool_bytes_are_those_of_a_real_pool(name, n_tokens):
    recipe = load_recipe(name)
    model = replace(MODEL, dtype="float32")
    shape = (1, 2, n_tokens, 64)
    layers = [(torch.randn(shape), torch.randn(shape)) for _ in range(GEOMETRY.n_layers)]
    pool = polykv.SharedKVPool.from_layers(layers, recipe, backend="torch")
    assert pool_bytes(recipe, model, n_tokens) == pool.stored_bytes


@pytest.mark.parametrize("reader", READERS)
def test_prefix_bytes_are_those_of_the_caches_that_agents_hold(llama, tokenizer, reader):
    recipe, n_agents = load_recipe("polykv"), 3
    pool = polykv.SharedKVPool.from_text(llama, tokenizer, TEXT[:200], recipe)
    model = Architecture.of(llama.config, "float32")
    workload = DecodeWorkload.of(model, REPLICA, recipe, pool.n_tokens, 1)
    assert workload.pool_bytes == pool.stored_bytes
    layers = [pool.decode_layer(index) for index in range(pool.n_layers)]
    used = None if reader == "unshared" else pool
    caches = caches_of(reader, layers, used, n_agents, together=True)
    assert workload.prefix_bytes(reader, n_agents) == kept_bytes(used, caches)


def test_the_same_bytes_as_polykv_ratio():
    overrides = ("model=smollm2-135m", "weights=random", "context=200", "recipe=polykv")
    found = pd.DataFrame(made_by("experiment=polykv_ratio", *overrides))
    stored = only(found, "compression_ratio", accounting="stored")
    model, n_tokens = architecture("smollm2-135m"), int(stored["n_tokens"])
    fp16 = 2 * n_tokens * model.geometry.values_per_token
    assert pool_bytes(load_recipe("polykv"), model, n_tokens) == pytest.approx(
        fp16 / stored["value"]
    )


def test_memory_by_hand():
    grown = 1100 * 2048 * 9 // 8  # one of eight tensors is there twice
    assert MODEL.grown_bytes(1100) == grown == 2_534_400
    assert WORKLOAD.cache_bytes("unshared", 3) == 3 * grown
    assert WORKLOAD.cache_bytes("dequantize", 3) == 3 * grown + 512_000
    assert WORKLOAD.cache_bytes("in_place", 3) == 3 * 230_400 + 512_000
    assert [WORKLOAD.max_agents(reader) for reader in READERS] == [3, 3, 41]
    assert [WORKLOAD.max_documents(reader, 3) for reader in READERS] == [1, 1, 8]
    nodes = replace(WORKLOAD, replica=replace(REPLICA, count=4))
    assert [nodes.max_agents(reader) for reader in READERS] == [12, 12, 164]


def test_time_by_hand():
    step = WORKLOAD.step("unshared", 3)
    assert (step.linear, step.prefix, step.suffix) == pytest.approx((1.8, 6.144, 0.6144))
    assert WORKLOAD.step("dequantize", 3) == step
    step = WORKLOAD.step("in_place", 3)
    assert (step.linear, step.prefix, step.suffix) == pytest.approx((1.8, 0.512, 0.6144))
    assert step.seconds == pytest.approx(2.9264)
    # Four copies with an agent each, and one with none: no slower than one agent.
    apart = replace(WORKLOAD, replica=replace(REPLICA, count=4))
    assert apart.step("unshared", 3) == WORKLOAD.step("unshared", 1)
    assert apart.step("unshared", 5) == WORKLOAD.step("unshared", 2)


def test_agents_of_a_pool_that_drops_tokens_hold_and_read_the_kept_ones():
    recipe = load_recipe("streaming_4")
    dropping = DecodeWorkload.of(MODEL, REPLICA, recipe, 1000, 100)
    kept = DecodeWorkload.of(MODEL, REPLICA, load_recipe("fp16"), 250, 100)
    for reader in ("dequantize", "in_place"):
        assert dropping.cache_bytes(reader, 3) == kept.cache_bytes(reader, 3)
        assert dropping.prefix_bytes(reader, 3) == kept.prefix_bytes(reader, 3)
        bound = (replace(load, replica=replace(REPLICA, flops=1e6)) for load in (dropping, kept))
        assert len({load.step(reader, 3) for load in (dropping, kept)}) == 1
        assert len({load.step(reader, 3) for load in bound}) == 1
    assert dropping.cache_bytes("unshared", 3) == WORKLOAD.cache_bytes("unshared", 3)
    assert dropping.step("unshared", 3) == WORKLOAD.step("unshared", 3)


def test_operations_bind_where_they_take_longer():
    slow = replace(WORKLOAD, replica=replace(REPLICA, flops=1e6))
    step = slow.step("in_place", 3)
    assert step.linear == pytest.approx(3 * 2 * 0.9)
    assert step.prefix == pytest.approx(3 * 8192 * 1000 / 1e6)
    assert step.suffix == pytest.approx(3 * 8192 * 100 / 1e6)
    # One pool is read once, but multiplied with once an agent.
    middle = replace(WORKLOAD, replica=replace(REPLICA, flops=8.192e6 / 0.1))
    assert [middle.step("in_place", n).prefix for n in (1, 5)] == pytest.approx([0.512, 0.512])
    assert middle.step("in_place", 10).prefix == pytest.approx(1.0)


def test_break_even_by_hand():
    # 2.0 + 1.0 N against 3.5 + 0.5 N: 1.0 times less from N = 3, 1.5 times from N = 13 (15.0 to 10.0).
    agents = np.arange(1, 101)
    unshared, shared = 2.0 + 1.0 * agents, 3.5 + 0.5 * agents
    assert gain_range(1.0, unshared, shared) == (3, None)
    assert gain_range(1.5, unshared, shared) == (13, None)
    assert gain_range(2.0, unshared, shared) == (None, None)  # half of what grows, but never all
    assert gain_range(1.0, shared, unshared) == (1, 3)  # where it stops


def test_break_even_of_a_workload_by_hand():
    agents = np.arange(1, 1001)
    # (1.8 + 2.2528 N) / (1.8 + 0.512 + 0.2048 N) is 4 from N = 5.19 on.
    times = (WORKLOAD.step(reader, agents).seconds for reader in ("unshared", "in_place"))
    assert gain_range(4.0, *times) == (6, None)
    # (2,000,000 + 2,534,400 N) / (2,512,000 + 230,400 N) is 4 from N = 4.99 on.
    held = (2_000_000 + WORKLOAD.cache_bytes(reader, agents) for reader in ("unshared", "in_place"))
    assert gain_range(4.0, *held) == (5, None)
    for cost in (
        lambda reader: WORKLOAD.step(reader, agents).seconds,
        lambda reader: WORKLOAD.cache_bytes(reader, agents),
    ):
        assert gain_range(1.001, cost("unshared"), cost("dequantize")) == (None, None)


workloads = st.builds(
    lambda memory, pool, prefix, suffix, count, flops: DecodeWorkload(
        MODEL,
        Replica(1, count, memory, bandwidth=1e6, flops=flops),
        min(pool, prefix * MODEL.token_bytes),
        prefix,
        suffix,
    ),
    memory=st.integers(1_000_000, 10**9),
    pool=st.integers(1, 10**8),
    prefix=st.integers(1, 10_000),
    suffix=st.integers(1, 10_000),
    count=st.integers(1, 4),
    flops=st.floats(1e5, 1e12),
)


@given(workload=workloads, more=st.integers(0, 10**8), n=st.integers(1, 50))
def test_more_memory_never_holds_fewer(workload, more, n):
    larger = replace(
        workload,
        replica=replace(workload.replica, usable_bytes=workload.replica.usable_bytes + more),
    )
    for reader in READERS:
        assert larger.max_agents(reader) >= workload.max_agents(reader)
        assert larger.max_documents(reader, n) >= workload.max_documents(reader, n)


@given(workload=workloads, n=st.integers(1, 200))
def test_what_fits_fits_and_one_more_does_not(workload, n):
    count, usable = workload.replica.count, workload.replica.usable_bytes
    for reader in READERS:
        held = [
            MODEL.weights_bytes
            + workload.cache_bytes(reader, workload.max_agents(reader) // count + one)
            for one in (0, 1)
        ]
        assert held[1] > usable and (held[0] <= usable or workload.max_agents(reader) == 0)
        documents = workload.max_documents(reader, n) // count
        assert documents == 0 or documents * workload.cache_bytes(reader, n) <= workload.room
        assert (documents + 1) * workload.cache_bytes(reader, n) > workload.room


@given(workload=workloads, n=st.integers(1, 200))
def test_readers_keep_their_order(workload, n):
    unshared, dequantize, in_place = (workload.max_agents(reader) for reader in READERS)
    assert in_place >= dequantize and unshared >= dequantize
    unshared, dequantize, in_place = (workload.max_documents(reader, n) for reader in READERS)
    assert in_place >= dequantize and unshared >= dequantize
    steps = {reader: workload.step(reader, n) for reader in READERS}
    assert steps["in_place"].seconds <= steps["dequantize"].seconds == steps["unshared"].seconds
    assert steps["in_place"].linear == steps["unshared"].linear
    for reader, step in steps.items():
        assert step.seconds <= workload.step(reader, n + 1).seconds


@pytest.mark.parametrize("name", available("hardware"))
def test_every_device_has_its_figures_and_their_sources(name):
    rows = rows_of(f"hardware={name}", *SMALL)
    sheet = load_group("hardware", name)
    assert sheet.name == name
    inputs = rows[rows["assumed"] == "hardware"].set_index("metric")
    assert set(sheet.sources) == {"memory_gb", "usable", "bandwidth_gb_s", "tflops"}
    for metric in sheet.sources:
        assert inputs.loc[metric, "note"] == sheet.sources[metric]
    assert inputs.loc["memory_gb", "value"] > 4 and inputs.loc["bandwidth_gb_s", "value"] > 20
    hardware = Hardware.from_config(sheet)
    # A data sheet in TB/s or MB instead of GB/s and GB would be far outside.
    assert 4 < hardware.memory_gb < 1000 and 20 < hardware.bandwidth_gb_s < 20_000
    assert all(0.1 < tflops < 10_000 for tflops in hardware.tflops.values())
    assert only(rows, "max_agents", reader="in_place")["value"] > 100


def test_a_model_is_split_over_the_devices_that_share_its_heads():
    hardware = Hardware.from_config(load_group("hardware", "h200-2x8"))
    one = Hardware.from_config(load_group("hardware", "h200"))
    replica, alone = (h.replica(8, "bfloat16", 0.5, 0.25) for h in (hardware, one))
    assert (replica.split, replica.count) == (8, 2)
    assert replica.usable_bytes == 8 * alone.usable_bytes == pytest.approx(8 * 141e9 * 0.9)
    assert alone.bandwidth == 0.5 * 4.8e12 and alone.flops == 0.25 * 989.5e12
    assert replica.bandwidth == 8 * alone.bandwidth and replica.flops == 8 * alone.flops
    for n_kv_heads, split in ((2, 2), (3, 1), (32, 8), (12, 4)):
        found = hardware.replica(n_kv_heads, "bfloat16", 1, 1)
        assert (found.split, found.count) == (split, 16 // split)


@pytest.fixture(scope="module")
def rows():
    return rows_of(*SMALL, "hardware=laptop", "recipe=polykv")


def test_rows_agree_with_the_formulas_and_say_what_is_computed(rows):
    assert set(rows["source"]) == {"input", "computed"}
    missing = rows[rows["value"].isna()]
    assert missing["note"].str.match("never|does not fit").all()
    _, settled = cell(*SMALL, "hardware=laptop", "recipe=polykv")
    workload = workload_of(settled, 1024 - 64)
    for reader in READERS:
        most = only(rows, "max_agents", reader=reader)["value"]
        assert most == workload.max_agents(reader)
        for n_agents in (1, 4, 10, most):
            parts = of(rows, "step_time", reader=reader, n_agents=n_agents)
            step = workload.step(reader, int(n_agents))
            assert parts["value"].sum() == pytest.approx(1e3 * step.seconds)
            assert set(parts["part"]) == {"linear", "prefix", "suffix"}
    for metric in ("time_pays_agents", "memory_pays_agents", "time_pays_tokens"):
        assert np.isnan(only(rows, metric, reader="dequantize")["value"])
        assert only(rows, metric, reader="in_place")["value"] >= 1


def workload_of(settled, n_prefix):
    hardware = Hardware.from_config(settled.hardware)
    model = Architecture.of(load_config(settled.model), settled.model.dtype)
    fractions = (settled.bandwidth_fraction, settled.flops_fraction)
    replica = hardware.replica(model.geometry.shape[0], model.dtype, *fractions)
    return DecodeWorkload.of(model, replica, load_recipe("polykv"), n_prefix, 64)


def test_documents_shorter_than_the_least_do_not_pay(rows):
    least = int(only(rows, "time_pays_tokens", reader="in_place")["value"])
    _, settled = cell(*SMALL, "hardware=laptop", "recipe=polykv")
    assert least > 1
    for n_prefix, pays in ((least - 1, False), (least, True), (2 * least, True)):
        workload = workload_of(settled, n_prefix)
        unshared, shared = (
            workload.step(reader, 10).seconds for reader in ("unshared", "in_place")
        )
        assert (unshared >= 1.1 * shared) == pays


def test_a_model_that_does_not_fit_has_rows_that_say_so():
    found = rows_of(*SMALL, "model=llama-3.1-8b", "hardware.memory_gb=16")
    most = only(found, "max_agents", reader="in_place")
    assert most["value"] == 0 and "16.1 GB of 14.4 GB" in most["note"]
    speed = of(found, "step_time")
    assert speed["value"].isna().all() and speed["note"].str.contains("16.1 GB").all()
    assert "override" in only(found, "memory_gb")["note"]
    assert "data sheet" in only(found, "bandwidth_gb_s")["note"]


def test_a_local_model_needs_its_config_only(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    found = rows_of("model=local", f"model.path={tmp_path}", "context=256", "suffix_tokens=[16]")
    assert only(found, "max_agents", reader="in_place")["value"] > 1000


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("context=32769", "32769"),
        ("context=null", "context=32768"),
        ("suffix_tokens=[32768]", "1 to 32767"),
        ("suffix_tokens=[]", "one or more"),
        ("agents=[0]", "agents="),
        ("agents=[]", "agents="),
        ("n_agents=0", "n_agents=0"),
        ("readers=[telepathy]", "no reader named 'telepathy'"),
        ("readers=[]", "no reader"),
        ("gain=1", "gain=1"),
        ("bandwidth_fraction=1.5", "bandwidth_fraction=1.5"),
        ("flops_fraction=0", "flops_fraction=0"),
        ("hardware.memory_gb=-1", "hardware.memory_gb=-1"),
        ("hardware.usable=1.1", "hardware.usable=1.1"),
        ("hardware.devices=0", "hardware.devices=0"),
        ("hardware.bandwidth_gb_s=null", "no bandwidth_gb_s"),
        ("hardware.tflops.bfloat16=fast", "hardware.tflops.bfloat16"),
        ("~hardware.tflops.bfloat16", "no tflops for bfloat16"),
        ("measured=/nowhere", "measured=/nowhere"),
    ],
)
def test_refusals(override, said):
    with pytest.raises(PolyKVError, match=said.replace("[", r"\[")) as refused:
        cell("model=qwen2.5-0.5b", override)
    assert "\n" not in str(refused.value)


# What `concurrency` would have measured, had it needed exactly so many bytes more than the formulas say.
def measured(extra_bytes, stored_off=0):
    model = architecture("reference")
    n_prefix, n_suffix = 1000, QUERY_TOKENS + 16
    workload = DecodeWorkload.of(model, REPLICA, load_recipe("polykv"), n_prefix, n_suffix)
    about = {"model": "reference", "weights": "reference", "recipe": "polykv", "device": "cpu"}
    about |= {"dtype": "float32", "backend": "torch", "seed": 0, "quantization": ""}
    about |= {"context_tokens": n_prefix + n_suffix, "n_tokens": n_prefix}
    rows = Rows(concurrency.COLUMNS, synthetic=False, n_threads=1, **about)
    for n_agents, reader in product((1, 4), READERS):
        of = {"n_agents": n_agents, "reader": reader}
        resident = workload.cache_bytes(reader, n_agents) + extra_bytes
        stored = workload.prefix_bytes(reader, n_agents) + stored_off
        rows.add("kv_memory", stored / 1e9, "GB", accounting="stored", **of)
        rows.add("kv_memory", resident / 1e9, "GB", accounting="resident", **of)
        read = sum(workload.read_bytes(reader, n_agents))
        for sample, speed in enumerate((4, 5, 10)):  # GB/s
            rows.add("step_time", read / 1e9 / speed * 1e3, "ms", sample=sample, **of)
    return rows


def write(root, **made):
    Store(root).write(concurrency.STUDY.declaration(), f"{made}", {}, measured(**made))
    return root


def lines_of(folder, root, *overrides):
    """The table's lines of what was measured, beside what is computed for it."""
    overrides = (*SMALL, f"measured={folder}", "model.dtype=float32", *overrides)
    made = made_by("experiment=capacity", *overrides)
    Store(root).write(study.STUDY.declaration(), "capacity", {}, made)
    shown = table(load(root).rows)
    return [line for line in shown.rows if "resident_error" in line]


@pytest.mark.parametrize("dtype", ["bfloat16", *slow("float32")])
def test_measured_rows_stand_beside_computed_ones(tmp_path, dtype):
    lines = lines_of(
        write(tmp_path / "a", extra_bytes=3_000_000), tmp_path / "b", f"model.dtype={dtype}"
    )
    assert [(line["agents"], line["reader"]) for line in lines] == [*product("14", READERS)]
    for line in lines:
        assert line["within"] == "yes" and line["resident_error"].value < 0
        assert line["stored_measured"].value == pytest.approx(line["stored_computed"].value)
        assert line["implied"].value == pytest.approx(5.0)  # of the median step
        less = line["resident_measured"].value - line["resident_computed"].value
        assert less == pytest.approx(3.0)


@pytest.mark.parametrize(
    "made",
    [
        {"extra_bytes": 0, "stored_off": 1},  # one byte
        # Too much, and less than the formula says is held.
        *slow({"extra_bytes": 30_000_000}, {"extra_bytes": -1000}),
    ],
)
def test_what_the_formulas_miss_is_said(tmp_path, made):
    lines = lines_of(write(tmp_path / "a", **made), tmp_path / "b")
    assert len(lines) == 6 and {line["within"] for line in lines} == {"NO"}


def test_what_was_not_measured_is_not_said_to_be_within(tmp_path):
    rows = measured(extra_bytes=0)
    only_timed = Rows(concurrency.STUDY.columns)
    only_timed.extend(row for row in rows if row["metric"] == "step_time")
    Store(tmp_path / "a").write(concurrency.STUDY.declaration(), "timed", {}, only_timed)
    lines = lines_of(tmp_path / "a", tmp_path / "b")
    assert all(line["within"].value is None for line in lines)


@pytest.mark.slow
def test_what_is_really_measured_is_within_the_tolerance(tmp_path):
    small = ("context=1024", "n_agents=3", "device=cpu", "max_new_tokens=4", "repeats=1")
    made = made_by("experiment=concurrency", *small)
    Store(tmp_path / "a").write(concurrency.STUDY.declaration(), "a", {}, made)
    lines = lines_of(tmp_path / "a", tmp_path / "b")
    assert {line["reader"] for line in lines} == set(READERS)
    assert {line["within"] for line in lines} == {"yes"}


@pytest.mark.slow
def test_only_rows_of_this_model_and_recipe_are_quoted_and_the_newest_of_a_line(tmp_path):
    where = write(tmp_path, extra_bytes=0)
    for override in ("recipe=full", "model=smollm2-135m"):
        assert "measured" not in set(rows_of(*SMALL, f"measured={where}", override)["source"])
    once = of(rows_of(*SMALL, f"measured={where}"), "kv_memory", source="measured")
    for copy in ("1", "2"):
        Store(where).write(concurrency.STUDY.declaration(), copy, {}, measured(1000))
    again = of(rows_of(*SMALL, f"measured={where}"), "kv_memory", source="measured")
    assert len(again) == len(once) and (again["value"] >= once["value"]).all()


def test_damaged_rows_are_not_left_out_of_what_is_quoted(tmp_path):
    write(tmp_path, extra_bytes=0)
    with (tmp_path / "cells" / "concurrency" / "half.json").open("w") as half:
        half.write("{")
    with pytest.raises(PolyKVError, match="half.json"):
        rows_of(*SMALL, f"measured={tmp_path}")


def test_packed_rows_are_the_same_cell_and_what_was_measured_belongs_to_it(tmp_path):
    where, packed = write(tmp_path / "a", extra_bytes=0), tmp_path / "packed"
    pack(where)
    packed.mkdir()
    for name in ("rows.csv.gz", "cells.json.gz"):
        (packed / name).write_bytes((where / name).read_bytes())
    (tmp_path / "empty").mkdir()
    cells = [cell(*SMALL, f"results_dir={root}") for root in (tmp_path / "empty", where, packed)]
    empty, *same = [made.identity(settled) for made, settled in cells]
    assert empty != same[0] == same[1]
    cells = [cell(*SMALL, f"measured={root}") for root in (where, packed)]
    assert {made.identity(settled) for made, settled in cells} == {same[0]}


def test_nothing_of_this_machine_belongs_to_the_cell():
    cells = [
        OmegaConf.to_container(cell(*SMALL, *overrides)[1])
        for overrides in ((), ("reader=in_place",), ("device=cpu", "backend=torch"))
    ]
    assert cells[0] == cells[1] == cells[2]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Rows as the analysis gets them: two devices, two recipes, and measured ones."""
    root = write(tmp_path_factory.mktemp("drawn"), extra_bytes=1_000_000)
    common = ("model=reference", "context=2048", "suffix_tokens=[64,512]", f"results_dir={root}")
    for hardware, recipe in product(("h200", "laptop"), ("full", "polykv")):
        made, settled = cell(*common, f"hardware={hardware}", f"recipe={recipe}")
        found = made_by("experiment=capacity", *common, f"hardware={hardware}", f"recipe={recipe}")
        Store(root).write(
            made.declaration(), made.identity(settled), OmegaConf.to_container(settled), found
        )
    rows = load(root).rows
    return rows[rows["study"] == "capacity"]


def test_table(drawn):
    shown = table(drawn)
    lines = pd.DataFrame([line for line in shown.rows if "max_agents" in line])
    # own tokens, devices, unshared once and two readers by recipe
    assert len(lines) == 2 * 2 * (1 + 2 * 2)
    assert list(dict.fromkeys(lines["hardware"])) == ["h200", "laptop"]
    in_place = lines[(lines["reader"] == "in_place") & (lines["recipe"] == "polykv")].iloc[0]
    unshared = lines[lines["reader"] == "unshared"].iloc[0]
    ratio = in_place["throughput_most"].value / unshared["throughput_most"].value
    assert in_place["faster"].value == pytest.approx(ratio) and unshared["faster"].value == 1
    assert in_place["throughput"].value == pytest.approx(1e4 / in_place["step_time"].value)
    assert 0 < in_place["weights_share"].value <= 100
    assert unshared["time_pays_agents"].value is None
    inputs = [line for line in shown.rows if "figure" in line]
    assert sum(line["hardware"] == "any" for line in inputs) == 3
    assert all(line["source"] for line in inputs)
    for text in (markdown(shown), latex(shown), to_csv(shown), plain(shown, 100)):
        assert "nan" not in text.lower()
    assert latex(shown).isascii()


def test_figure(drawn):
    panels = [ax for ax in figure(drawn).canvas.axes if ax.lines]
    assert [ax.get_title(loc="left") for ax in panels] == ["h200", "laptop"]
    for ax in panels:
        ends = [line for line in ax.lines if line.get_marker() == "x"]
        # unshared, dequantize polykv, and two recipes under in_place with the fewest and the most own tokens
        assert len(ends) == 6 and len(ax.lines) == 12
        most = of(drawn, "max_agents", device=ax.get_title(loc="left"))
        assert {line.get_xdata()[0] for line in ends} <= set(most["value"])
    lost = drawn.assign(
        value=drawn["value"].where(drawn["device"] != "laptop"), note="does not fit"
    )
    texts = [text.get_text() for ax in figure(lost).canvas.axes for text in ax.texts]
    assert texts == ["not one agent fits"]
