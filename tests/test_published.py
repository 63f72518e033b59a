"""Every published figure beside its counterpart, on synthetic rows."""

import math
from importlib.resources import files
from itertools import product

import pandas as pd
import pytest
from analysis_rows import (
    BYTES,
    TOKENS,
    compare_cell,
    handoff_cells,
    paper_memory,
    quickstart,
    relay_cells,
    timing_cells,
    write,
)
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from analysis import catalog, published
from analysis.catalog import INCONCLUSIVE, NOT_MEASURED, NOT_REPRODUCED, REPRODUCED, equivalent
from analysis.counterpart import COMPUTED, EXACT, NEAR, OTHER
from analysis.load import load
from analysis.points import points
from analysis.statistics import Value
from polykv.config import CONF


def table(tmp_path, paper, cells):
    return catalog.pieces("TABLES")[f"published_{paper}"](load(write(tmp_path, cells)).rows)


def both(tmp_path, cells):
    rows = load(write(tmp_path, cells)).rows
    tables = [catalog.pieces("TABLES")[f"published_{paper}"](rows) for paper in catalog.PAPERS]
    return [line for table in tables for line in table.rows]


def published_rows():
    return pd.read_csv(files("analysis") / "published.csv", dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Both papers' lines beside cells of every study."""
    cells = quickstart(n_documents=2) + paper_memory() + handoff_cells()
    return both(tmp_path_factory.mktemp("results"), cells)


def test_every_published_row_stands_once_beside_a_value_or_a_reason(lines):
    said = published_rows()
    assert len(lines) == len(said) == 88
    shown = sorted(
        (line["metric"], line["unit"], line["policy"], line["published"].value) for line in lines
    )
    policies = said["policy"].replace("", "any")
    assert shown == sorted(
        zip(said["metric"], said["unit"], policies, said["value"].astype(float), strict=True)
    )
    for line in lines:
        assert line["match"] in (EXACT, NEAR, OTHER, COMPUTED, NOT_MEASURED)
        assert (line["ours"].value is None) == (line["match"] == NOT_MEASURED)
        if line["match"] == NOT_MEASURED:
            assert "run experiment=" in line["ours"].note, line
        else:
            assert "(" in line["on"] and line["at"]
    digest = sum("secondary digest" in line["published"].note for line in lines)
    assert digest == said["source"].str.contains("secondary digest").sum() > 0


def test_what_was_not_measured_has_a_reason(tmp_path):
    lines = both(tmp_path, timing_cells(contexts=(1024,)))
    missing = [line for line in lines if line["match"] == NOT_MEASURED]
    assert len(lines) == 88 and len(missing) > 40
    assert all("run experiment=" in line["ours"].note for line in missing)


def test_only_the_published_model_is_compared(lines):
    for line in lines:
        assert (line["against"].value is None) == (line["match"] in (OTHER, NOT_MEASURED)), line
    by_match = {
        match: [line for line in lines if line["match"] == match] for match in (COMPUTED, OTHER)
    }
    assert not any(line["match"] in (EXACT, NEAR) for line in lines)
    assert all(line["on"].startswith("reference") for line in by_match[OTHER])
    memory = [line for line in by_match[COMPUTED] if line["metric"] == "kv_memory"]
    assert len(memory) == 10 and all(abs(line["against"].value) < 0.0005 for line in memory)
    (saved,) = [line for line in by_match[COMPUTED] if line["metric"] == "memory_reduction"]
    assert saved["ours"].value == pytest.approx(100 * (1 - 11 / 32 / 15))
    (ratio,) = [line for line in by_match[COMPUTED] if line["metric"] == "compression_ratio"]
    assert ratio["ours"].value == pytest.approx(32 / 11)


def test_arithmetic_is_never_counted_as_measured(tmp_path):
    caption = table(tmp_path, "polykv", paper_memory()).caption
    assert "0 measured on the published model, 12 computed" in caption
    assert "Computed for llama-3-8b" in caption and "Measured on" not in caption


def test_the_published_model_in_its_setting_is_exact_and_elsewhere_near(tmp_path):
    cells = handoff_cells(model="llama-3.1-8b", weights="hub", document="gsm8k")
    lines = table(tmp_path, "qkvshare", cells).rows
    accuracy = {
        (line["policy"], line["setting"]): line
        for line in lines
        if line["metric"] == "gsm8k_accuracy"
    }
    exact = accuracy["topology_q4", "gsm8k, 3 hops"]
    assert exact["match"] == EXACT and exact["against"].value == pytest.approx(90 - 80.67)
    near = accuracy["topology_q4", "gsm8k, 4 hops"]
    assert near["match"] == NEAR and near["ours"].note
    assert accuracy["topology_q8", "gsm8k, 3 hops"]["match"] == NOT_MEASURED
    slow = next(line for line in lines if (line["policy"], line["setting"]) == ("reprefill", "8K"))
    assert slow["match"] == NEAR and slow["against"].value == pytest.approx(9 * 81.92 / 1029.7)
    counts = [line for line in lines if line["metric"] == "n_problems"]
    assert [line["ours"].value for line in counts] == [80, 80]
    assert not any(math.isnan(line["ours"].value or 0) for line in lines)


def test_paired_problems_are_counted_on_the_same_problems(tmp_path):
    cells = relay_cells(model="llama-3.1-8b", weights="hub", document="gsm8k", loss=3)
    net = [li for li in table(tmp_path, "qkvshare", cells).rows if li["metric"] == "net_right"]
    local, uniform = net
    assert local["match"] == NOT_MEASURED and "topology and local" in local["ours"].note
    assert (uniform["match"], uniform["ours"].value, uniform["ours"].n) == (NEAR, -3, 80)
    assert uniform["published"].value == -1 and uniform["against"].value == -2


@pytest.mark.parametrize("last", [0, 1])
def test_a_problem_of_several_seeds_counts_once_in_a_pair(tmp_path, last):
    about = {"model": "llama-3.1-8b", "weights": "hub", "document": "gsm8k"}
    of_seeds = []
    for seed, loss in enumerate((3, 5)):
        rows = load(write(tmp_path / f"{seed}", relay_cells(**about, loss=loss))).rows
        day = "2026-01-02" if seed == last else "2026-01-01"
        cells = rows["cell"] + f"-{seed}"
        of_seeds.append(rows.assign(seed=seed, cell=cells, created_at=f"{day}T00:00:00+00:00"))
    made = catalog.pieces("TABLES")["published_qkvshare"](pd.concat(of_seeds, ignore_index=True))
    (net,) = [li for li in made.rows if li["policy"] == "topology_vs_uniform_q4"]
    assert (net["ours"].value, net["ours"].n) == (-(3, 5)[last], 80)
    assert f"of 80 problems of seed {last} alone" in net["ours"].note
    (alone,) = [
        li
        for li in table(tmp_path / "one", "qkvshare", relay_cells(**about, loss=3)).rows
        if li["policy"] == "topology_vs_uniform_q4"
    ]
    assert "seed" not in alone["ours"].note


def test_policies_of_different_seeds_are_no_pair(tmp_path):
    about = {"model": "llama-3.1-8b", "weights": "hub", "document": "gsm8k"}
    rows = load(write(tmp_path, relay_cells(**about))).rows
    rows["seed"] = (rows["policy"] == "topology").astype(int)
    made = catalog.pieces("TABLES")["published_qkvshare"](rows)
    (net,) = [li for li in made.rows if li["policy"] == "topology_vs_uniform_q4"]
    assert net["match"] == NOT_MEASURED and "not run on the same problems" in net["ours"].note


def commands(lines):
    """(metric, arguments) of each command that is named instead of a value."""
    found = {
        (line["metric"], line["ours"].note.split("; run ")[1])
        for line in lines
        if line["match"] == NOT_MEASURED
    }
    return [(metric, command.split()) for metric, command in sorted(found)]


def composed(arguments):
    """The configurations that Hydra makes of a command, one for each value of a sweep."""
    overrides = [argument for argument in arguments if argument != "--multirun"]
    parsed = OverridesParser.create().parse_overrides(overrides)
    assert any(one.is_sweep_override() for one in parsed) == ("--multirun" in arguments)
    each = [
        [f"{one.key_or_group}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [one.input_line]
        for one in parsed
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return [compose("config", list(chosen)) for chosen in product(*each)]


@pytest.mark.parametrize("policies", [(), ("fp16",), ("fp16", "uniform"), ("topology",)])
def test_the_command_for_a_figure_of_qkvshare_is_one_that_runs(tmp_path, policies):
    cells = relay_cells(model="llama-3.1-8b", weights="hub", document="gsm8k")
    cells = [one for one in cells if one[1].removeprefix("5-") in policies]
    lines = table(tmp_path, "qkvshare", cells or timing_cells(contexts=(1024,))).rows
    seen = set()
    for metric, arguments in commands(lines):
        accuracy = metric in ("gsm8k_accuracy", "n_problems", "net_right")
        for cfg in composed(arguments):
            assert cfg.model.name == "llama-3.1-8b"
            # The default, relay=reference, is refused for any other model.
            assert not accuracy or (cfg.study, cfg.relay.name) == ("handoff_accuracy", "gsm8k")
            seen |= {cfg.policy.name} if metric == "gsm8k_accuracy" else set()
        if metric == "net_right":
            names = {cfg.policy.name for cfg in composed(arguments)}
            assert names in ({"topology", "local"}, {"topology", "uniform"})
    # uniform and topology are also published at 8 bits, which these cells lack
    assert seen == {"fp16", "uniform", "local", "topology"} - ({"fp16"} & {*policies})


def test_the_caption_counts_problems_and_repeats(tmp_path):
    about = {"model": "llama-3.1-8b", "weights": "hub"}
    relays = relay_cells(**about, document="gsm8k", n_problems=150)
    assert "; n = 150; " in table(tmp_path / "relays", "qkvshare", relays).caption
    timed = table(tmp_path / "timed", "qkvshare", timing_cells(**about)).caption
    assert "; n = 10; " in timed
    # The rows of PolyKV's scores state their tokens.
    scored = table(tmp_path / "scored", "polykv", [nf4(delta=0.5)]).caption
    assert f"; n = 1 to {TOKENS}; " in scored


def test_a_pair_is_found_beside_deeper_relays_of_one_policy(tmp_path):
    about = {"model": "llama-3.1-8b", "weights": "hub", "document": "gsm8k"}
    alone = [
        one for one in relay_cells(**about, hops=(7,), n_problems=150) if one[1] == "7-uniform"
    ]
    cells = relay_cells(**about, loss=3, n_problems=300) + alone
    lines = [li for li in table(tmp_path, "qkvshare", cells).rows if li["unit"] == "problems"]
    assert [line["ours"].value for line in lines if line["metric"] == "n_problems"] == [150, 300]
    uniform = next(line for line in lines if line["policy"] == "topology_vs_uniform_q4")
    assert (uniform["ours"].value, uniform["ours"].n) == (-3, 300)


def test_a_published_stage_is_the_sum_of_ours_in_each_repeat(tmp_path):
    lines = table(tmp_path, "qkvshare", timing_cells("llama-3.1-8b", "hub")).rows
    (inject,) = [
        li for li in lines if (li["metric"], li["setting"]) == ("inject", "8K, 3,877 tokens")
    ]
    assert inject["ours"].value == pytest.approx(0.2 * 3 * 81.92)
    assert inject["ours"].low < inject["ours"].value < inject["ours"].high


def nf4(context=7194, n_agents=15, **more):
    about = {"model": "llama-3-8b", "weights": "hub", "document": "wikitext2", "device": "cuda",
             "dtype": "bfloat16, weights nf4", "quantization": "nf4", "scorer": "roberta-large"}  # fmt: skip
    return compare_cell(context, n_agents, "polykv", **(about | more))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({}, EXACT),
        ({"quantization": "", "dtype": "bfloat16"}, NEAR),
        ({"context": 7000}, NEAR),
        ({"n_agents": 3}, NEAR),
        ({"context": 3000}, NOT_MEASURED),
        ({"document": "moon_landing"}, NOT_MEASURED),
        ({"scorer": "minilm"}, EXACT),
    ],
)
def test_a_perplexity_delta_is_held_against_the_published_one_of_its_setting(
    tmp_path, monkeypatch, more, match
):
    lines = table(tmp_path, "polykv", [nf4(delta=0.5, **more)]).rows
    (line,) = [li for li in lines if li["metric"] == "perplexity_delta" and li["published"].value == 0.57
               and "15 agents" in li["setting"]]  # fmt: skip
    assert line["match"] == match
    if match != NOT_MEASURED:
        assert line["against"].value == pytest.approx(line["ours"].value - 0.57)


def test_a_bertscore_needs_the_published_scorer_and_agents(tmp_path):
    wanted = [({}, EXACT), ({"scorer": "minilm"}, NOT_MEASURED), ({"n_agents": 3}, NOT_MEASURED)]
    for place, (more, match) in enumerate(wanted):
        lines = table(tmp_path / str(place), "polykv", [nf4(f1=0.92, **more)]).rows
        (line,) = [li for li in lines if li["published"].value == 0.9279]
        assert line["match"] == match, more


def test_of_two_formats_of_weights_the_authors_own_answers(tmp_path):
    plain = nf4(delta=5.5, quantization="", dtype="bfloat16", name="plain")
    lines = table(tmp_path, "polykv", [nf4(delta=0.5), plain]).rows
    (line,) = [li for li in lines if li["metric"] == "perplexity_delta" and li["published"].value == 0.57
               and "15 agents" in li["setting"]]  # fmt: skip
    assert line["ours"].value == pytest.approx(0.5, abs=0.01)


def test_another_models_text_of_the_same_kind_comes_before_its_number_of_agents(tmp_path):
    """Perplexity reads a pool once, however many agents there are."""
    near = compare_cell(7000, 15, "polykv", document="moon_landing", delta=9)
    alike = compare_cell(5000, 3, "polykv", document="wikitext2", delta=0.5)
    lines = table(tmp_path, "polykv", [near, alike]).rows
    (line,) = [li for li in lines if li["metric"] == "perplexity_delta" and li["published"].value == 0.57
               and "15 agents" in li["setting"]]  # fmt: skip
    assert line["match"] == OTHER and line["ours"].value == pytest.approx(0.5, abs=0.1)


def test_secondary_digest_is_marked():
    figures = published.load("qkvshare")
    marked = [f for f in figures if f.value.note]
    assert 0 < len(marked) < len(figures)
    assert all("secondary digest" in f.source for f in marked)


def test_figures_of_a_model_are_counted_and_of_another_are_not():
    assert len(published.of_models("polykv", ["smollm2-1.7b"])) == 11
    assert not published.of_models("polykv", ["smollm2-1.7b+revision=main", "reference"])


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.0, 2.0, REPRODUCED),
        (1.5, 1.5, REPRODUCED),
        (0.999, 2.0, INCONCLUSIVE),
        (1.0, 2.001, INCONCLUSIVE),
        (-9.0, 9.0, INCONCLUSIVE),
        (0.5, 1.0, INCONCLUSIVE),
        (2.0, 2.5, INCONCLUSIVE),
        (0.5, 0.999, NOT_REPRODUCED),
        (2.001, 2.5, NOT_REPRODUCED),
        (None, 1.5, INCONCLUSIVE),
        (1.5, None, INCONCLUSIVE),
    ],
)
def test_the_same_is_all_of_the_interval_within_the_margin(low, high, verdict):
    assert equivalent(Value(1.5, low, high), 1.0, 2.0) == verdict


def test_the_newest_measurement_counts_and_seeds_are_averaged(tmp_path, monkeypatch):
    monkeypatch.setitem(BYTES, "m", 8192)
    stamps = iter(f"2026-01-0{day}T00:00:00+00:00" for day in range(1, 9))
    monkeypatch.setattr("polykv.results.provenance", lambda: {"created_at": next(stamps), "commit": "c"})  # fmt: skip
    about = {"model": "m", "weights": "hub"}
    cells = [compare_cell(512, 3, "polykv", name=f"{place}", seed=seed, delta=delta, **about)
             for place, (seed, delta) in enumerate([(0, 99.0), (0, 1.0), (1, 2.0)])]  # fmt: skip
    (point,) = points(load(write(tmp_path, cells)).rows)
    alone = [points(load(write(tmp_path / c[1], [c])).rows)[0] for c in cells]
    found, (_, first, second) = point["perplexity_delta"], [p["perplexity_delta"] for p in alone]
    assert found.value == pytest.approx((first.value + second.value) / 2)
    assert (found.low, found.high) == (first.low, second.high) and "2 seeds" in found.note
