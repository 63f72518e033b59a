"""Capacity on paper: formulas against hand-made numbers, against real tensors, and against measured rows."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from analysis.capacity import capacity
from analysis.capacity_figure import draw_capacity
from conftest import TEXT, checked_cell, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import polykv
from analysis.load import load
from analysis.render import latex, markdown, plain, to_csv
from polykv.config import REPO, available, load_group
from polykv.errors import PolyKVError
from polykv.evaluation.capacity import Architecture, Crowd, paying, pool_bytes
from polykv.evaluation.concurrency import QUERY_TOKENS, READERS, caches_of, kept_bytes
from polykv.evaluation.hardware import Hardware, Replica
from polykv.geometry import Geometry
from polykv.recipe import load_recipe
from polykv.results import COLUMNS, Store

GEOMETRY = Geometry.even(n_layers=4, n_kv_heads=2, head_dim=64)  # 1,024 values, 2,048 bytes a token
MODEL = Architecture(
    geometry=GEOMETRY,
    dtype="bfloat16",
    n_parameters=1_000_000,
    n_multiplied=900_000,
    attention_flops=4 * 8 * 64 * 4,
)
# 2 MB of weights beside 10 MB; 1 MB/s, and operations that never bind.
REPLICA = Replica(split=1, count=1, usable_bytes=12_000_000, bandwidth=1e6, flops=1e30)
# A pool of 512,000 bytes for 1,000 tokens (2,048,000 bytes in full), and 100 tokens an agent.
CROWD = Crowd(MODEL, REPLICA, pool_bytes=512_000, n_prefix=1000, n_suffix=100)
SMALL = ("model=reference", "context=1024", "suffix_tokens=[64]", "agents=[1,4]")


def cell(*overrides):
    return checked_cell("experiment=capacity", *overrides)


def rows_of(*overrides):
    module, settled = cell(*overrides)
    return pd.DataFrame(module.run(settled), columns=COLUMNS)


def of(rows, metric, **columns):
    for name, wanted in ({"metric": metric} | columns).items():
        rows = rows[rows[name] == wanted]
    (found,) = rows.to_dict("records")
    return found


def test_llama_3_1_8b_has_the_sizes_that_everybody_knows():
    model = Architecture.of(load_group("model", "llama-3.1-8b"))
    assert model.n_parameters == 8_030_261_248
    assert model.weights_bytes == 16_060_522_496
    assert model.n_multiplied == 8_030_261_248 - 128_256 * 4096  # all but the table of embeddings
    assert model.token_bytes == 131_072
    assert round(32_768 * model.token_bytes / 1e9, 2) == 4.29
    assert 131_072 * model.token_bytes == 16 * 2**30
    tied = Architecture.of(load_group("model", "qwen2.5-0.5b"))
    assert tied.n_parameters == tied.n_multiplied == 494_032_768


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_the_model(tied):
    model = tiny_model("llama", tie_word_embeddings=tied)
    cfg = OmegaConf.create({"name": "tiny", "dtype": "float32", "geometry": model.config.to_dict()})
    found = Architecture.of(cfg)
    assert found.weights_bytes == sum(p.nbytes for p in model.parameters())
    assert found.n_parameters - found.n_multiplied == (0 if tied else 300 * 32)
    assert found.attention_flops == 4 * 4 * 8 * 4  # heads, head_dim, layers


@pytest.mark.parametrize("name", available("recipe"))
@pytest.mark.parametrize("n_tokens", [5, 179])
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
    cfg = OmegaConf.create({"name": "tiny", "dtype": "float32", "geometry": llama.config.to_dict()})
    model = Architecture.of(cfg)
    crowd = Crowd.of(model, REPLICA, recipe, pool.n_tokens, 1)
    assert crowd.pool_bytes == pool.stored_bytes
    layers = [pool.decode_layer(index) for index in range(pool.n_layers)]
    used = None if reader == "private" else pool
    caches = caches_of(reader, layers, used, n_agents, together=True)
    assert crowd.prefix_bytes(reader, n_agents) == kept_bytes(used, caches)


def test_the_same_bytes_as_polykv_ratio():
    from experiments import polykv_ratio

    overrides = ("model=smollm2-135m", "weights=random", "context=200", "recipe=polykv")
    module, settled = checked_cell("experiment=polykv_ratio", *overrides)
    pool = polykv_ratio.pool_of(settled)
    model = Architecture.of(settled.model)
    assert pool_bytes(load_recipe("polykv"), model, pool.n_tokens) == pool.stored_bytes


def test_memory_by_hand():
    grown = 1100 * 2048 * 9 // 8  # one of eight tensors is there twice
    assert MODEL.grown_bytes(1100) == grown == 2_534_400
    assert CROWD.cache_bytes("private", 3) == 3 * grown
    assert CROWD.cache_bytes("inject", 3) == 3 * grown + 512_000
    assert CROWD.cache_bytes("cascade", 3) == 3 * 230_400 + 512_000
    assert [CROWD.max_agents(reader) for reader in READERS] == [3, 3, 41]
    assert [CROWD.max_documents(reader, 3) for reader in READERS] == [1, 1, 8]
    nodes = replace(CROWD, replica=replace(REPLICA, count=4))
    assert [nodes.max_agents(reader) for reader in READERS] == [12, 12, 164]


def test_time_by_hand():
    step = CROWD.step("private", 3)
    assert (step.linear, step.prefix, step.suffix) == pytest.approx((1.8, 6.144, 0.6144))
    assert CROWD.step("inject", 3) == step
    step = CROWD.step("cascade", 3)
    assert (step.linear, step.prefix, step.suffix) == pytest.approx((1.8, 0.512, 0.6144))
    assert step.seconds == pytest.approx(2.9264)
    # Four copies with an agent each, and one with none: no slower than one agent.
    apart = replace(CROWD, replica=replace(REPLICA, count=4))
    assert apart.step("private", 3) == CROWD.step("private", 1)
    assert apart.step("private", 5) == CROWD.step("private", 2)


def test_operations_bind_where_they_take_longer():
    slow = replace(CROWD, replica=replace(REPLICA, flops=1e6))
    step = slow.step("cascade", 3)
    assert step.linear == pytest.approx(3 * 2 * 0.9)
    assert step.prefix == pytest.approx(3 * 8192 * 1000 / 1e6)
    assert step.suffix == pytest.approx(3 * 8192 * 100 / 1e6)
    # One pool is read once, but multiplied with once an agent.
    middle = replace(CROWD, replica=replace(REPLICA, flops=8.192e6 / 0.1))
    assert [middle.step("cascade", n).prefix for n in (1, 5)] == pytest.approx([0.512, 0.512])
    assert middle.step("cascade", 10).prefix == pytest.approx(1.0)


def test_break_even_by_hand():
    # 2.0 + 1.0 N against 3.5 + 0.5 N: 1.0 times less from N = 3, 1.5 times from N = 13 (15.0 to 10.0).
    agents = np.arange(1, 101)
    private, shared = 2.0 + 1.0 * agents, 3.5 + 0.5 * agents
    assert paying(1.0, private, shared) == (3, None)
    assert paying(1.5, private, shared) == (13, None)
    assert paying(2.0, private, shared) == (None, None)  # half of what grows, but never all
    assert paying(1.0, shared, private) == (1, 3)  # where it stops


def test_break_even_of_a_crowd_by_hand():
    agents = np.arange(1, 1001)
    # (1.8 + 2.2528 N) / (1.8 + 0.512 + 0.2048 N) is 4 from N = 5.19 on.
    times = (CROWD.step(reader, agents).seconds for reader in ("private", "cascade"))
    assert paying(4.0, *times) == (6, None)
    # (2,000,000 + 2,534,400 N) / (2,512,000 + 230,400 N) is 4 from N = 4.99 on.
    held = (2_000_000 + CROWD.cache_bytes(reader, agents) for reader in ("private", "cascade"))
    assert paying(4.0, *held) == (5, None)
    for cost in (
        lambda reader: CROWD.step(reader, agents).seconds,
        lambda reader: CROWD.cache_bytes(reader, agents),
    ):
        assert paying(1.001, cost("private"), cost("inject")) == (None, None)


crowds = st.builds(
    lambda memory, pool, prefix, suffix, count, flops: Crowd(
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


@given(crowd=crowds, more=st.integers(0, 10**8), n=st.integers(1, 50))
def test_more_memory_never_holds_fewer(crowd, more, n):
    larger = replace(
        crowd, replica=replace(crowd.replica, usable_bytes=crowd.replica.usable_bytes + more)
    )
    for reader in READERS:
        assert larger.max_agents(reader) >= crowd.max_agents(reader)
        assert larger.max_documents(reader, n) >= crowd.max_documents(reader, n)


@given(crowd=crowds, n=st.integers(1, 200))
def test_what_fits_fits_and_one_more_does_not(crowd, n):
    count, usable = crowd.replica.count, crowd.replica.usable_bytes
    for reader in READERS:
        held = [
            MODEL.weights_bytes + crowd.cache_bytes(reader, crowd.max_agents(reader) // count + one)
            for one in (0, 1)
        ]
        assert held[1] > usable and (held[0] <= usable or crowd.max_agents(reader) == 0)
        documents = crowd.max_documents(reader, n) // count
        assert documents == 0 or documents * crowd.cache_bytes(reader, n) <= crowd.room
        assert (documents + 1) * crowd.cache_bytes(reader, n) > crowd.room


@given(crowd=crowds, n=st.integers(1, 200))
def test_readers_keep_their_order(crowd, n):
    private, inject, cascade = (crowd.max_agents(reader) for reader in READERS)
    assert cascade >= inject and private >= inject
    private, inject, cascade = (crowd.max_documents(reader, n) for reader in READERS)
    assert cascade >= inject and private >= inject
    steps = {reader: crowd.step(reader, n) for reader in READERS}
    assert steps["cascade"].seconds <= steps["inject"].seconds == steps["private"].seconds
    assert steps["cascade"].linear == steps["private"].linear
    for reader, step in steps.items():
        assert step.seconds <= crowd.step(reader, n + 1).seconds


@pytest.mark.parametrize("name", available("hardware"))
def test_every_device_has_its_figures_and_their_sources(name):
    rows = rows_of(f"hardware={name}", *SMALL)
    sheet = load_group("hardware", name)
    assert sheet.name == name
    inputs = rows[rows["protocol"] == "input: hardware"].set_index("metric")
    assert set(sheet.sources) == {"memory_gb", "usable", "bandwidth_gb_s", "tflops"}
    for metric in sheet.sources:
        assert inputs.loc[metric, "note"] == sheet.sources[metric]
    assert inputs.loc["memory_gb", "value"] > 4 and inputs.loc["bandwidth_gb_s", "value"] > 20
    hardware = Hardware.from_config(sheet)
    # A data sheet in TB/s or MB instead of GB/s and GB would be far outside.
    assert 4 < hardware.memory_gb < 1000 and 20 < hardware.bandwidth_gb_s < 20_000
    assert all(0.1 < tflops < 10_000 for tflops in hardware.tflops.values())
    assert of(rows, "max_agents", reader="cascade")["value"] > 100


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


def test_every_row_says_that_it_is_computed(rows):
    assert rows["protocol"].str.match("computed: |input: ").all()
    assert rows["note"].str.len().gt(0).all()
    missing = rows[rows["value"].isna()]
    assert missing["note"].str.match("never|does not fit").all()


def test_rows_agree_with_each_other(rows):
    for reader in READERS:
        most = of(rows, "max_agents", reader=reader)["value"]
        for n_agents in (1, 4, 10, most):
            step, speed = (
                of(rows, metric, reader=reader, n_agents=n_agents)
                for metric in ("step_time", "throughput")
            )
            assert speed["value"] == pytest.approx(1e3 * n_agents / step["value"])
            assert (step["unit"], speed["unit"]) == ("ms", "tokens/s")
        share = of(rows, "weights_share", reader=reader, n_agents=1)
        assert share["unit"] == "%" and 0 < share["value"] <= 100
    for metric in ("time_pays_agents", "memory_pays_agents", "time_pays_tokens"):
        assert np.isnan(of(rows, metric, reader="inject")["value"])
        assert of(rows, metric, reader="cascade")["value"] >= 1


def test_documents_shorter_than_the_least_do_not_pay(rows):
    least = int(of(rows, "time_pays_tokens", reader="cascade")["value"])
    module, settled = cell(*SMALL, "hardware=laptop", "recipe=polykv")
    model = Architecture.of(settled.model)
    replica, recipe = module._replica(settled, model), load_recipe("polykv")
    assert least > 1
    for n_prefix, pays in ((least - 1, False), (least, True), (2 * least, True)):
        crowd = Crowd.of(model, replica, recipe, n_prefix, 64)
        private, shared = (crowd.step(reader, 10).seconds for reader in ("private", "cascade"))
        assert (private >= 1.1 * shared) == pays


def test_a_model_that_does_not_fit_has_rows_that_say_so():
    found = rows_of(*SMALL, "model=llama-3.1-8b", "hardware.memory_gb=16")
    most = of(found, "max_agents", reader="cascade")
    assert most["value"] == 0 and "weights alone need 16.1 GB of 14.4 GB" in most["note"]
    speed = found[found["metric"].isin(("step_time", "throughput"))]
    assert speed["value"].isna().all() and speed["note"].str.contains("weights alone").all()
    assert of(found, "memory_gb")["note"] == "set by an override"
    assert "data sheet" in of(found, "bandwidth_gb_s")["note"]


def test_a_local_model_needs_its_config_only(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    found = rows_of("model=local", f"model.path={tmp_path}", "context=256", "suffix_tokens=[16]")
    assert of(found, "max_agents", reader="cascade")["value"] > 1000


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
def measured(extra_bytes, stored_off=0, commit="abc"):
    model = Architecture.of(load_group("model", "reference"))
    n_prefix, n_suffix = 1000, QUERY_TOKENS + 16
    crowd = Crowd.of(model, REPLICA, load_recipe("polykv"), n_prefix, n_suffix)
    found = []
    for n_agents in (1, 4):
        for reader in READERS:
            about = {"model": "reference", "weights": "reference", "document": "random tokens"}
            about |= {"context_tokens": n_prefix + n_suffix, "n_agents": n_agents, "seed": 0}
            about |= {"recipe": "polykv", "reader": reader, "device": "cpu", "dtype": "float32"}
            note = f"with a shared prefix of {n_prefix} tokens; 1 CPU thread"
            resident = crowd.cache_bytes(reader, n_agents) + extra_bytes
            stored = crowd.prefix_bytes(reader, n_agents) + stored_off
            read = sum(crowd.read_bytes(reader, n_agents))
            for metric, value, protocol, said in (
                ("kv_memory", stored / 1e9, "stored", note),
                ("kv_memory", resident / 1e9, "resident", note),
                ("step_time", read / 1e9 / 5 * 1e3, "1 CPU thread", "median"),  # as if at 5 GB/s
            ):
                row = dict.fromkeys(COLUMNS) | about
                row |= {"metric": metric, "value": value, "protocol": protocol, "note": said}
                found.append(row | {"unit": "GB", "backend": "torch", "commit": commit})
    return found


def checked(folder, *overrides):
    return rows_of(*SMALL, f"measured={folder}", "model.dtype=float32", *overrides)


@pytest.fixture
def folder(tmp_path):
    def write(**made):
        Store(tmp_path).write("concurrency", f"{made}", {}, measured(**made))
        return tmp_path

    return write


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measured_rows_stand_beside_computed_ones(folder, dtype):
    where = folder(extra_bytes=3_000_000)
    found = checked(where, f"model.dtype={dtype}")
    errors = found[found["metric"] == "kv_memory_error"]
    assert len(errors) == 2 * 2 * 3 and errors["note"].str.contains("within").all()
    assert (errors.loc[errors["protocol"] == "computed: stored", "value"] == 0).all()
    assert (errors.loc[errors["protocol"] == "computed: resident", "value"] < 0).all()
    implied = found.loc[found["metric"] == "implied_bandwidth", "value"]
    assert len(implied) == 6 and implied.to_numpy() == pytest.approx(5.0)
    quoted = found[found["protocol"].str.startswith("measured: ", na=False)]
    assert quoted["note"].str.startswith("quoted, measured at commit").all()
    assert set(quoted["device"]) == {"cpu"} and set(quoted["dtype"]) == {"float32"}


@pytest.mark.parametrize(
    ("made", "protocol"),
    [
        ({"extra_bytes": 30_000_000}, "computed: resident"),
        ({"extra_bytes": -1000}, "computed: resident"),  # less than the formula says is held
        ({"extra_bytes": 0, "stored_off": 1}, "computed: stored"),  # one byte
    ],
)
def test_what_the_formulas_miss_is_said(folder, made, protocol):
    found = checked(folder(**made))
    errors = found[found["metric"] == "kv_memory_error"].set_index("protocol")["note"]
    assert errors[protocol].str.contains("BEYOND").all()
    assert errors.drop(protocol).str.contains("within").all()


@pytest.mark.parametrize("model", ["reference", "qwen2.5-0.5b"])
def test_what_was_really_measured_is_within_the_tolerance(model):
    where = f"measured={REPO / 'results' / 'concurrency'}"
    found = rows_of("context=1024", "suffix_tokens=[64]", "agents=[1]", f"model={model}", where)
    errors = found[(found["metric"] == "kv_memory_error") & (found["device"] == "cpu")]
    assert set(errors["protocol"]) == {"computed: stored", "computed: resident"}
    assert set(errors["reader"]) == set(READERS)
    assert errors["note"].str.contains("within").all()


def test_only_rows_of_this_model_and_recipe_are_quoted(folder):
    where = folder(extra_bytes=0)
    for override in ("recipe=full", "model=smollm2-135m"):
        found = checked(where, override)
        assert not found["metric"].isin(("kv_memory", "implied_bandwidth")).any()


def test_committed_rows_are_read_from_their_table(folder, tmp_path_factory):
    where, other = folder(extra_bytes=0), tmp_path_factory.mktemp("committed")
    load(where).rows.to_csv(other / "rows.csv", index=False)
    compared = ["metric", "value", "protocol", "reader", "n_agents"]
    pd.testing.assert_frame_equal(checked(where)[compared], checked(other)[compared])


def test_what_was_measured_belongs_to_the_cell(folder, tmp_path_factory):
    where, empty = folder(extra_bytes=0), tmp_path_factory.mktemp("empty")
    digests = [
        cell(*SMALL, f"results_dir={root}")[1].measured_digest for root in (empty, where, where)
    ]
    assert digests[0] != digests[1] == digests[2]


def test_the_table_that_a_run_leaves_does_not_make_other_cells(drawn, tmp_path):
    before = cell(*SMALL, f"results_dir={tmp_path}")[1].measured_digest
    drawn[drawn["experiment"] == "capacity"].to_csv(tmp_path / "rows.csv", index=False)
    assert cell(*SMALL, f"results_dir={tmp_path}")[1].measured_digest == before
    (tmp_path / "rows.csv").write_text("")
    with pytest.raises(PolyKVError, match="cannot read .*rows.csv"):
        cell(*SMALL, f"results_dir={tmp_path}")


def test_nothing_of_this_machine_belongs_to_the_cell():
    cells = [
        OmegaConf.to_container(cell(*SMALL, *overrides)[1])
        for overrides in ((), ("reader=cascade",), ("device=cpu", "backend=torch"))
    ]
    assert cells[0] == cells[1] == cells[2]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Rows as the analysis gets them: two devices, two recipes, and measured ones."""
    root = tmp_path_factory.mktemp("drawn")
    Store(root).write("concurrency", "0", {}, measured(extra_bytes=1_000_000))
    for hardware in ("h200", "laptop"):
        for recipe in ("full", "polykv"):
            overrides = ("context=2048", "suffix_tokens=[64,512]", f"results_dir={root}")
            module, settled = cell(
                "model=reference", *overrides, f"hardware={hardware}", f"recipe={recipe}"
            )
            Store(root).write("capacity", f"{hardware}-{recipe}", {}, module.run(settled))
    return load(root).rows


def test_table(drawn):
    table = capacity(drawn)
    lines = pd.DataFrame([line for line in table.rows if "max_agents" in line])
    assert len(lines) == 2 * 2 * (
        1 + 2 * 2
    )  # own tokens, devices, private once and two readers by recipe
    assert list(dict.fromkeys(lines["hardware"])) == ["h200", "laptop"]
    polykv_cascade = lines[(lines["reader"] == "cascade") & (lines["recipe"] == "polykv")].iloc[0]
    private = lines[lines["reader"] == "private"].iloc[0]
    assert polykv_cascade["faster"].value == pytest.approx(
        polykv_cascade["throughput_most"].value / private["throughput_most"].value
    )
    assert private["faster"].value == 1 and "compared" in private["time_pays_agents"].note
    checks = [line for line in table.rows if "resident_error" in line]
    assert [(line["agents"], line["reader"]) for line in checks] == [
        (n, reader) for n in ("1", "4") for reader in READERS
    ]
    assert {line["within"] for line in checks} == {"yes"}
    inputs = [line for line in table.rows if "figure" in line]
    assert sum(line["hardware"] == "any" for line in inputs) == 3
    assert all(line["source"] for line in inputs)
    assert table.caption.startswith("Computed, not measured")
    for text in (markdown(table), latex(table), to_csv(table), plain(table, 100)):
        assert "nan" not in text.lower()
    assert latex(table).isascii()


def test_what_is_beyond_is_marked(drawn):
    beyond = drawn.assign(note=drawn["note"].str.replace("within", "BEYOND"))
    lines = [line for line in capacity(beyond).rows if "resident_error" in line]
    assert {line["within"] for line in lines} == {"NO"}


def test_figure(drawn):
    canvas = draw_capacity(drawn)
    panels = [ax for ax in canvas.axes if ax.lines]
    assert [ax.get_title(loc="left") for ax in panels] == ["h200", "laptop"]
    for ax in panels:
        ends = [line for line in ax.lines if line.get_marker() == "x"]
        # private, inject polykv, and two recipes under cascade with the fewest and the most own tokens
        assert len(ends) == 6 and len(ax.lines) == 12
        most = drawn[
            (drawn["device"] == ax.get_title(loc="left")) & (drawn["metric"] == "max_agents")
        ]
        assert {line.get_xdata()[0] for line in ends} <= set(most["value"])
    lost = drawn.assign(value=drawn["value"].where(drawn["device"] != "laptop"))
    texts = [text.get_text() for ax in draw_capacity(lost).axes for text in ax.texts]
    assert texts == ["not one agent fits"]


def test_nothing_without_rows(drawn):
    nothing = drawn[drawn["experiment"] != "capacity"]
    assert capacity(nothing) is None and draw_capacity(nothing) is None
