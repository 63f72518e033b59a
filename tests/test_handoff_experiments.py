"""The four experiments on the embedded model, small, from config to tables and figures."""

import importlib

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from analysis.handoff_figures import HANDOFF_FIGURES
from analysis.handoff_reduce import EXPERIMENTS
from analysis.handoff_tables import HANDOFF_TABLES
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from analysis import render
from analysis.load import load
from polykv.config import CONF
from polykv.errors import PolyKVError
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
    # A budget of 3 is nominal; scales, maps, channels and the exact sinks of a short text come on top.
    bits = metric(rows, "mean_bits", policy="topology")["value"]
    assert (bits > 3.5).all() and (bits < 5).all()
    assert metric(rows, "relay_kl", policy="fp16")["value"].max() == 0
    assert (metric(rows, "relay_kl", policy="uniform")["value"] > 0).all()
    assert (metric(rows, "kl_depth_passing")["value"] == 0).all()  # reseal=append


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
    for right in ("so 9 + 9. #### 18", "#### 18", " 18", "$18", 18, 18.0):
        metric = GSM8K().compute(predictions=["#### 18.00", "18"], references=[right] * 2)
        assert metric == {"strict": 50, "flexible": 100}
    with pytest.raises(PolyKVError, match="eighteen"):
        GSM8K().compute(predictions=["#### 18"], references=["eighteen"])
