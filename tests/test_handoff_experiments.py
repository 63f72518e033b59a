"""The four experiments on the embedded model, small, from config to tables and figures."""

import importlib

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from analysis.handoff_figures import HANDOFF_FIGURES
from analysis.handoff_reduce import EXPERIMENTS, warned
from analysis.handoff_tables import HANDOFF_TABLES
from analysis.reduce import Value
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from analysis import render
from analysis.load import load
from experiments import handoff_ttft
from polykv import kernels
from polykv.config import CONF, load_group
from polykv.errors import PolyKVError
from polykv.evaluation import card_quality, ttft
from polykv.evaluation.card_quality import score_cards
from polykv.evaluation.ttft import Route
from polykv.handoff.card import CacheCard
from polykv.handoff.policy import load_policy
from polykv.models import load_weights
from polykv.pool import prefill
from polykv.reference.documents import generate_document
from polykv.results import Rows, Store, cell_id

SMALL = ("n_problems=3", "relay.n_facts=8", "relay.max_new_tokens=12", "budget_bits=3")
TIMED = (
    "context=256",
    "policies=[full,uniform]",
    "repeats=10",
    "n_documents=2",
    "scored_tokens=64",
)


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
        measured(root, experiment, *TIMED)
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


def test_the_stages_of_a_route_add_up_to_its_total(rows):
    for key, route in metric(rows, "stage_total").groupby(["policy", "protocol"]):
        mine = rows[(rows["policy"] == key[0]) & (rows["protocol"] == key[1])]
        # Shares are of means: medians of parts need not add up.
        shares = mine[mine["metric"].str.startswith("share_")]["value"].sum()
        assert shares - 100 == pytest.approx(100, rel=0.05)
        assert (route["ci_low"] <= route["value"]).all()
        assert (route["value"] <= route["ci_high"]).all()


def test_quality_stands_beside_every_time(rows):
    mine = rows[rows["experiment"] == "handoff_ttft"]
    kl = metric(mine, "kl_mean")
    assert set(zip(kl["policy"], kl["reader"], strict=True)) == {
        (policy, reader) for policy in ("full", "uniform") for reader in ("inject", "cascade")
    }
    assert set(kl["n"]) == {128} and set(kl["dtype"]) == {"float32"}
    # The same numbers, copied; in place they are added up in another order.
    assert metric(kl, "kl_mean", policy="full", reader="inject")["value"].item() == 0
    assert metric(kl, "kl_mean", policy="full", reader="cascade")["value"].item() < 1e-6
    uniform = metric(kl, "kl_mean", policy="uniform")
    assert (uniform["value"] > 1e-5).all() and (uniform["ci_low"] <= uniform["value"]).all()
    assert len(metric(mine, "perplexity_delta")) == 4
    bits = metric(mine, "mean_bits")
    assert (bits[bits["policy"] == "full"]["value"] > 32).all()
    table = HANDOFF_TABLES["handoff_ttft"](rows)
    shown = {(r["policy"], r["route"]): r["kl_mean"] for r in table.rows}
    assert (
        shown["reprefill", "text"].value is None
        and "text itself" in shown["reprefill", "text"].note
    )
    for transport in ("memory", "file"):
        for how, reader in (("", "inject"), (", in place", "cascade")):
            said = metric(uniform, "kl_mean", reader=reader)["value"].item()
            assert shown["uniform", transport + how].value == said


@torch.no_grad()
def test_the_divergence_is_that_of_plain_transformers():
    cfg = load_group("model", "reference")
    cfg.weights = "reference"
    model, tokenizer = load_weights(cfg, "cpu")
    ids_T = random_text(tokenizer, 96)
    policy = load_policy("uniform")
    found = score_cards(model, tokenizer, ids_T, 60, 20, [policy], ["inject"], 4.0)
    cache = model(ids_T[None, :60], use_cache=True).past_key_values
    decoded = CacheCard.seal(cache, ids_T[:60], model, tokenizer, policy, 4.0).inject()
    whole = model(ids_T[None]).logits[0, 75:-1].log_softmax(-1)
    after = model(ids_T[None, 60:], past_key_values=decoded).logits[0, 15:-1].log_softmax(-1)
    kl_T = (whole.exp() * (whole - after)).sum(-1)
    assert len(kl_T) == 20 and kl_T.mean() > 1e-5
    np.testing.assert_allclose(found["uniform", "inject"].kl, kl_T.numpy(), rtol=0, atol=1e-5)
    own = -after.gather(1, ids_T[76:, None]).squeeze(1)
    np.testing.assert_allclose(found["uniform", "inject"].nll, own.numpy(), rtol=0, atol=1e-4)
    with pytest.raises(PolyKVError, match="too few to score 36"):
        score_cards(model, tokenizer, ids_T, 60, 36, [policy], ["inject"], 4.0)


def test_a_cache_of_another_text_shows_in_the_divergence():
    cfg = load_group("model", "reference")
    cfg.weights = "reference"
    model, tokenizer = load_weights(cfg, "cpu")
    one, other = random_text(tokenizer, 128, 0), random_text(tokenizer, 128, 1)
    card = ttft.seal

    def stolen(model, tokenizer, cache, known_T, policy, *rest):
        return card(model, tokenizer, prefill(model, other[None, :64]), other[:64], policy, *rest)

    setting = (model, tokenizer, one, 64, 32, [load_policy("fp16")], ["inject"], 4.0)
    right = score_cards(*setting)["fp16", "inject"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(card_quality, "seal", stolen)
        wrong = score_cards(*setting)["fp16", "inject"]
    assert right.kl.mean() < 1e-5 and wrong.kl.mean() > 1e-2


def random_text(tokenizer, n_tokens, seed=0):
    text = generate_document(
        tokenizer, n_tokens, seed=seed, n_questions=1, prefix_fraction=0.7
    ).text
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]


def test_random_weights_are_timed_and_their_quality_is_left_out_with_a_reason():
    heads = ("num_attention_heads=4", "num_key_value_heads=2", "num_hidden_layers=1")
    small = (*heads, "hidden_size=64", "intermediate_size=64", "vocab_size=90")
    geometry = [f"model.geometry.{setting}" for setting in small]
    module, cfg = settled("handoff_ttft", *TIMED, "model=llama-3.1-8b", "weights=random", *geometry)
    module.check(cfg)
    found = module.run(cfg)
    assert all(row["document"] is None for row in found)
    left_out = [row for row in found if row["metric"] in card_quality.METRICS]
    assert len(left_out) == 8 and all(row["value"] is None for row in left_out)
    assert all("random weights" in row["note"] for row in left_out)
    assert all(row["value"] > 0 for row in found if row not in left_out)


def test_quality_takes_the_positions_that_a_context_leaves():
    for context, n_scored in ((1024, 256), (4000, 96), (4096, 0)):
        assert (
            handoff_ttft.n_scored_of(settled("handoff_ttft", f"context={context}")[1]) == n_scored
        )
    scored, why = handoff_ttft.score(settled("handoff_ttft", "context=4096")[1])
    assert not scored and "no position to score" in why


@pytest.mark.parametrize(("spread", "warns"), [(1.9, False), (2.1, True)])
def test_a_timing_whose_quartiles_are_far_apart_carries_a_warning(spread, warns):
    rows = Rows()
    handoff_ttft.add_time(rows, "ttft", np.array([1.0, 1.0, spread, spread]), "ms", "median", {})
    assert ("warning" in rows[0]["note"]) == warns
    shown = warned(Value(rows[0]["value"], rows[0]["ci_low"], rows[0]["ci_high"]))
    assert ("warning" in shown.note) == warns


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
        ("handoff_ttft", "scored_tokens=0", "scored_tokens=0"),
        ("handoff_ttft", "document=moon_landing", "lower context"),
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
    for right in ("so 9 + 9. #### 18", "#### 18", " 18", "$18", 18, 18.0):
        metric = GSM8K().compute(predictions=["#### 18.00", "18"], references=[right] * 2)
        assert metric == {"strict": 50, "flexible": 100}
    with pytest.raises(PolyKVError, match="eighteen"):
        GSM8K().compute(predictions=["#### 18"], references=["eighteen"])


def test_a_backend_that_was_asked_for_by_name_is_a_route_of_its_own(monkeypatch):
    monkeypatch.setattr(kernels, "pick_backend", lambda name, device: "cpu")
    cfg = OmegaConf.create({"device": "cpu", "budget_bits": 4.0})
    uniform = load_policy("uniform")
    routes = [Route(uniform, "memory", "cascade", backend) for backend in ("cpu", "torch")]
    told = handoff_ttft.columns(cfg, [(route, None) for route in routes])
    assert [one["protocol"] for one in told] == ["memory, in place", "memory, in place, torch"]
    assert [one["backend"] for one in told] == ["cpu", "torch"]
