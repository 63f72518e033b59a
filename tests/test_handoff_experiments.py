"""The four experiments on the embedded model, small, from config to tables and figures."""

import importlib

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from analysis import render
from analysis.handoff_figures import HANDOFF_FIGURES
from analysis.handoff_reduce import EXPERIMENTS
from analysis.handoff_tables import HANDOFF_TABLES
from analysis.load import load
from experiments import handoff_ttft
from polykv import kernels
from polykv.config import CONF
from polykv.errors import PolyKVError
from polykv.evaluation.ttft import Route
from polykv.handoff.policy import load_policy
from polykv.results import Store, cell_id

SMALL = ("n_problems=3", "relay.n_facts=8", "relay.max_new_tokens=12", "budget_bits=3")


def settled(experiment, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [f"experiment={experiment}", "device=cpu", *overrides])
    module = importlib.import_module(f"experiments.{experiment}")
    OmegaConf.set_struct(cfg, False)
    return module, module.settle(cfg)


def measured(root, experiment, *overrides):
    module, cfg = settled(experiment, *overrides)
    module.check(cfg)
    container = OmegaConf.to_container(cfg, resolve=True)
    Store(root).write(experiment, cell_id(container), container, module.run(cfg))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    for policy in ("fp16", "uniform", "topology"):
        measured(root, "handoff_accuracy", *SMALL, f"policy={policy}", "n_hops=2")
    measured(root, "controller_ablation", *SMALL, "n_hops=1", "policy.alpha=0.5")
    for experiment in ("handoff_ttft", "handoff_stages"):
        measured(root, experiment, "context=256", "policies=[uniform]", "repeats=10")
    return load(root).rows


def metric(rows, name, **where):
    found = rows[rows["metric"] == name]
    for column, wanted in where.items():
        found = found[found[column] == wanted]
    return found


def test_accuracy_cells_carry_what_the_tables_need(rows):
    found = metric(rows, "accuracy")
    assert len(found) == 6 and set(found["n"]) == {3.0} and set(found["n_agents"]) == {3.0}
    assert (found["ci_low"] <= found["value"]).all() and (found["value"] <= found["ci_high"]).all()
    bits = metric(rows, "mean_bits", policy="topology")["value"]
    assert (bits <= 3).all() and (bits > 2.9).all()
    assert metric(rows, "relay_kl", policy="fp16")["value"].max() == 0
    assert (metric(rows, "relay_kl", policy="uniform")["value"] > 0).all()
    assert (metric(rows, "kl_depth_passing")["value"] == 0).all()  # reseal=append


def test_the_stages_of_a_route_add_up_to_its_total(rows):
    for key, route in metric(rows, "stage_total").groupby(["policy", "protocol"]):
        mine = rows[(rows["policy"] == key[0]) & (rows["protocol"] == key[1])]
        # Shares are of means: medians of parts need not add up.
        shares = mine[mine["metric"].str.startswith("share_")]["value"].sum()
        assert shares - 100 == pytest.approx(100, rel=0.05)
        assert (route["ci_low"] <= route["value"]).all()
        assert (route["value"] <= route["ci_high"]).all()


@pytest.mark.parametrize("name", HANDOFF_TABLES)
def test_every_table_renders_and_is_none_without_rows(name, rows):
    table = HANDOFF_TABLES[name](rows)
    assert table.name == name and table.rows
    for text in (render.markdown(table), render.latex(table), render.to_csv(table)):
        assert "nan" not in text.lower().replace("minan", "")
    render.plain(table, 160)
    assert HANDOFF_TABLES[name](rows.iloc[:0]) is None


@pytest.mark.parametrize("name", HANDOFF_FIGURES)
def test_every_figure_draws_and_is_none_without_rows(name, rows):
    canvas = HANDOFF_FIGURES[name](rows)
    assert canvas.axes
    plt.close(canvas)
    assert HANDOFF_FIGURES[name](rows.iloc[:0]) is None


def test_published_figures_meet_rows_of_their_own_model_only(rows):
    table = HANDOFF_TABLES["handoff_accuracy"]
    published = [r for r in table(rows).rows if r["section"].startswith("published")]
    assert len(published) == 28 and all(r["strict"].value is None for r in published)
    mine = rows[(rows["metric"] == "accuracy") & (rows["policy"] == "uniform")]
    moved = mine.assign(model="llama-3.1-8b", document="gsm8k", weights="hub", budget_bits=4.0)
    found = [
        r for r in table(pd.concat([rows, moved])).rows if r["section"].startswith("published")
    ]
    answered = [r for r in found if r["strict"].value is not None]
    assert [(r["policy"], r["hops"], r["budget"]) for r in answered] == [("uniform", 2, "4 bits")]
    assert answered[0]["published"].value == 82.0 and "digest" in answered[0]["published"].note


@pytest.mark.parametrize(
    ("experiment", "override", "message"),
    [
        ("handoff_accuracy", "n_hops=0", "n_hops=0"),
        ("handoff_accuracy", "reseal=again", "no reseal 'again'"),
        ("handoff_accuracy", "weights=random", "random weights"),
        ("handoff_accuracy", "budget_bits=-1", "budget_bits=-1"),
        ("handoff_accuracy", "relay=gsm8k n_problems=301", "openai/gsm8k.*n_problems=300 or fewer"),
        ("handoff_accuracy", "policy.importance=[luck]", "no signal 'luck'"),
        ("controller_ablation", "policy=fp16", "no budget to ablate"),
        ("handoff_ttft", "context=8192", "8192 positions"),
        ("handoff_ttft", "context=16", "turn_tokens=16"),
        ("handoff_ttft", "repeats=9", "repeats=9"),
        ("handoff_stages", "transports=[post]", "no transport 'post'"),
        ("handoff_stages", "policies=[none]", "no policy named 'none'"),
    ],
)
def test_bad_input_is_one_clear_line_before_any_work(experiment, override, message):
    with pytest.raises(PolyKVError, match=message) as refused:
        module, cfg = settled(experiment, *override.split())
        module.check(cfg)
    assert "\n" not in str(refused.value)


def test_policies_without_a_budget_are_one_cell_whatever_the_budget():
    cells = set()
    for budget, reseal in ((3, "append"), (4, "requantize")):
        _, cfg = settled(
            "handoff_accuracy", "policy=fp16", f"budget_bits={budget}", f"reseal={reseal}"
        )
        cells.add(cell_id(OmegaConf.to_container(cfg, resolve=True)))
    assert len(cells) == 1


def test_experiments_are_the_ones_with_a_yaml():
    assert all((CONF / "experiment" / f"{name}.yaml").is_file() for name in EXPERIMENTS)


def test_evaluate_module_agrees_with_the_rows():
    from polykv.evaluation.gsm8k_metric import GSM8K

    metric = GSM8K().compute(predictions=["#### 3", "it is 4", "no"], references=["3", "4", "5"])
    assert metric == {"strict": pytest.approx(100 / 3), "flexible": pytest.approx(200 / 3)}


def test_a_backend_that_was_asked_for_by_name_is_a_route_of_its_own(monkeypatch):
    monkeypatch.setattr(kernels, "pick_backend", lambda name, device: "cpu")
    cfg = OmegaConf.create({"device": "cpu", "budget_bits": 4.0})
    uniform = load_policy("uniform")
    routes = [Route(uniform, "memory", "cascade", backend) for backend in ("cpu", "torch")]
    told = handoff_ttft.columns(cfg, [(route, None) for route in routes])
    assert [one["protocol"] for one in told] == ["memory, in place", "memory, in place, torch"]
    assert [one["backend"] for one in told] == ["cpu", "torch"]
