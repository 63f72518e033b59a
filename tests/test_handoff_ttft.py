"""experiment=handoff_ttft: times, stages and losses of cards, from a cell to tables, figures and claims."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from analysis_rows import cell, timing_cells, write
from conftest import checked_cell
from figure_checks import assert_readable

from analysis import catalog, handoff_ttft, published, render
from analysis.catalog import INCONCLUSIVE, NOT_MEASURED, NOT_REPRODUCED, REPRODUCED
from analysis.handoff_ttft import FACTOR, STAGES
from analysis.load import load
from experiments import handoff_ttft as study
from experiments.session import Session
from polykv.config import load_group
from polykv.errors import PolyKVError
from polykv.evaluation import card_quality, ttft
from polykv.evaluation.card_quality import score_cards
from polykv.handoff.card import CacheCard
from polykv.handoff.policy import load_policy
from polykv.models import load_weights
from polykv.pool import prefill
from polykv.reference.documents import generate_document
from polykv.results import Store

SMALL = (
    "context=256",
    "policies=[full,uniform]",
    "n_documents=2",
    "scored_tokens=64",
    "device=cpu",
)
NAMES = ("handoff_ttft", "handoff_stages")


@pytest.fixture(scope="module")
def made():
    """The rows of one small cell, as the study makes them."""
    _, cfg = checked_cell("experiment=handoff_ttft", *SMALL)
    return study.run(cfg, Session())


@pytest.fixture(scope="module")
def rows(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    Store(root).write(study.STUDY.declaration(), "a", {}, made)
    return load(root).rows


def table(name, rows):
    return catalog.pieces("TABLES")[name](rows)


def figure(name, rows):
    return catalog.pieces("FIGURES")[name](rows)


def of(rows, metric, **where):
    found = rows[rows["metric"] == metric]
    for column, wanted in where.items():
        found = found[found[column] == wanted]
    return found


def lines(rows, name="handoff_ttft"):
    """What the table says of what was measured, by policy and route."""
    measured = (r for r in table(name, rows).rows if r["section"].startswith("measured"))
    return {(r["policy"], r["route"]): r for r in measured}


def test_every_repeat_has_its_stages_which_add_up_to_its_total(rows):
    times = of(rows, "time")
    routes = times.groupby(["policy", "transport", "reader"])
    assert len(routes) == 1 + 2 * 2 * 2
    for _, route in routes:
        wide = route.pivot(index="sample", columns="stage", values="value")
        assert len(wide) == 10 and (wide > 0).all().all()
        total = wide.pop("total")
        assert (wide.sum(axis=1) <= total).all()
        assert wide.sum(axis=1).median() == pytest.approx(total.median(), rel=0.05)
        assert set(wide) <= {*STAGES}
    assert {*STAGES, "total"} == set(times["stage"]) == {*ttft.STAGES, "total"}


def test_a_speedup_is_the_median_of_paired_repeats(rows):
    total = of(rows, "time", stage="total")
    text = total[total["transport"] == "text"].set_index("sample")["value"]
    card = of(total, "time", policy="uniform", transport="file", reader="dequantize")
    card = card.set_index("sample")["value"]
    shown = lines(rows)["uniform", "file"]
    ratios = (text / card).to_numpy()
    got = shown["speedup"]
    assert (got.low, got.value, got.high) == pytest.approx(np.percentile(ratios, (25, 50, 75)))
    got = shown["ttft"]
    assert (got.low, got.value, got.high) == pytest.approx(np.percentile(card, (25, 50, 75)))
    stages = lines(rows, "handoff_stages")["uniform", "file"]
    summed = sum(stages[name].value for name in STAGES)
    assert stages["adds_up"].value == pytest.approx(100 * summed / got.value)


def test_quality_stands_beside_every_time(rows):
    kl = of(rows[rows["block"].isna() & rows["sample"].notna()], "kl")
    assert {*zip(kl["policy"], kl["reader"], strict=True)} == {
        (policy, reader) for policy in ("full", "uniform") for reader in ("dequantize", "in_place")
    }
    assert set(kl["n"]) == {64} and set(kl["dtype"]) == {"float32"}
    # The same numbers, copied; in place they are added up in another order.
    assert of(kl, "kl", policy="full", reader="dequantize")["value"].max() == 0
    assert of(kl, "kl", policy="full", reader="in_place")["value"].max() < 1e-6
    assert (of(kl, "kl", policy="uniform")["value"] > 1e-5).all()
    assert (of(rows, "mean_bits", policy="full")["value"] > 32).all()
    shown = lines(rows)
    assert shown["reprefill", "text"]["kl_mean"].value is None
    for route, reader in (("memory", "dequantize"), ("file, in place", "in_place")):
        mine = of(kl, "kl", policy="uniform", reader=reader)["value"]
        assert shown["uniform", route]["kl_mean"].value == pytest.approx(mine.mean(), rel=1e-12)
        assert shown["uniform", route]["perplexity_delta"].low is not None
    floors = of(rows, "reader_floor_kl")
    assert set(floors["reader"]) == {"in_place"} and set(floors["policy"]) == {""}


@torch.no_grad()
def test_the_divergence_is_that_of_plain_transformers():
    cfg = load_group("model", "reference")
    cfg.weights = "reference"
    model, tokenizer = load_weights(cfg, "cpu")
    ids_T = random_text(tokenizer, 96)
    policy = load_policy("uniform")
    found = score_cards(model, tokenizer, ids_T, 60, 20, [policy], ["dequantize"], 4.0)
    cache = model(ids_T[None, :60], use_cache=True).past_key_values
    decoded = CacheCard.seal(cache, ids_T[:60], model, tokenizer, policy, 4.0).dequantize()
    whole = model(ids_T[None]).logits[0, 75:-1].log_softmax(-1)
    after = model(ids_T[None, 60:], past_key_values=decoded).logits[0, 15:-1].log_softmax(-1)
    kl_T = (whole.exp() * (whole - after)).sum(-1)
    assert len(kl_T) == 20 and kl_T.mean() > 1e-5
    np.testing.assert_allclose(found["uniform", "dequantize"].kl, kl_T.numpy(), rtol=0, atol=1e-5)
    own = -after.gather(1, ids_T[76:, None]).squeeze(1)
    np.testing.assert_allclose(found["uniform", "dequantize"].nll, own.numpy(), rtol=0, atol=1e-4)
    with pytest.raises(PolyKVError, match="36"):
        score_cards(model, tokenizer, ids_T, 60, 36, [policy], ["dequantize"], 4.0)


def test_a_cache_of_another_text_shows_in_the_divergence(monkeypatch):
    cfg = load_group("model", "reference")
    cfg.weights = "reference"
    model, tokenizer = load_weights(cfg, "cpu")
    one, other = random_text(tokenizer, 128, 0), random_text(tokenizer, 128, 1)
    card = ttft.seal

    def stolen(model, tokenizer, cache, known_T, policy, *rest):
        return card(model, tokenizer, prefill(model, other[None, :64]), other[:64], policy, *rest)

    setting = (model, tokenizer, one, 64, 32, [load_policy("fp16")], ["dequantize"], 4.0)
    right = score_cards(*setting)["fp16", "dequantize"]
    monkeypatch.setattr(card_quality, "seal", stolen)
    wrong = score_cards(*setting)["fp16", "dequantize"]
    assert right.kl.mean() < 1e-5 and wrong.kl.mean() > 1e-2


def random_text(tokenizer, n_tokens, seed=0):
    text = generate_document(
        tokenizer, n_tokens, seed=seed, n_questions=1, prefix_fraction=0.7
    ).text
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]


def test_random_weights_are_timed_and_their_quality_is_left_out_with_a_reason():
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1,
             "hidden_size": 64, "intermediate_size": 64, "vocab_size": 1000}  # fmt: skip
    geometry = [f"model.geometry.{name}={size}" for name, size in sizes.items()]
    model = ("model=llama-3.1-8b", "weights=random", *geometry)
    _, cfg = checked_cell("experiment=handoff_ttft", *SMALL, *model)
    found = study.run(cfg, Session())
    assert all(row.get("document") is None for row in found)
    left_out = [row for row in found if row["metric"] in study.COSTS]
    assert len(left_out) == 8 and all(row["value"] is None for row in left_out)
    assert all("random weights" in row["note"] for row in left_out)
    assert all(row["value"] > 0 for row in found if row not in left_out)


@pytest.mark.slow
def test_quality_takes_the_positions_that_a_context_leaves():
    for context, n_scored in ((1024, 256), (4000, 96), (4096, 0)):
        _, cfg = checked_cell("experiment=handoff_ttft", f"context={context}", "n_documents=1")
        assert study.n_scored_of(cfg) == n_scored
    scored, why = study.score(cfg, Session())
    assert not scored and "position" in why


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("context=8192", "8192 positions"),
        ("context=16", "turn_tokens=16"),
        ("repeats=9", "repeats=9"),
        ("policies=[]", r"policies=\[\]"),
        ("scored_tokens=0", "scored_tokens=0"),
        ("budget_bits=-1", "budget_bits=-1"),
        ("document=moon_landing", "lower context"),
        ("transports=[post]", "'post'"),
        ("policies=[none]", "'none'"),
        ("policies=[reprefill]", "makes no card"),
        ("policies=[other_card]", "control of relays"),
        ("readers=[none]", "none"),
    ],
)
def test_bad_input_is_one_clear_line_before_any_work(override, message):
    with pytest.raises(PolyKVError, match=message) as refused:
        checked_cell("experiment=handoff_ttft", override)
    assert "\n" not in str(refused.value)


def test_both_names_are_of_one_cell():
    names = [checked_cell(f"experiment={name}", *SMALL)[1] for name in NAMES]
    assert study.STUDY.identity(names[0]) == study.STUDY.identity(names[1])


def made_up(name, text, card, about=None, config=None, **shared):
    """A cell of totals: of re-prefill, and of cards with the columns `about` (uniform in memory, injected)."""
    shared = {"model": "m", "weights": "random", "context_tokens": 1024} | shared
    one = cell("handoff_ttft", name, config, **shared)
    of_card = {
        "policy": "uniform",
        "budget_bits": 4.0,
        "transport": "memory",
        "reader": "dequantize",
    }
    for about_route, times in (
        ({"policy": "reprefill", "transport": "text"}, text),
        (of_card | (about or {}), card),
    ):
        for sample, ms in enumerate(times):
            one[3].add("time", float(ms), "ms", sample=sample, n=1, stage="total", **about_route)
    return one


@pytest.mark.parametrize(("spread", "warns"), [(1.9, False), (2.1, True)])
def test_a_timing_whose_quartiles_are_far_apart_carries_a_warning(tmp_path, spread, warns):
    times = [1.0, 1.0, spread, spread]
    rows = load(write(tmp_path, [made_up("a", [10.0] * 4, times)])).rows
    shown = lines(rows)["uniform", "memory"]
    assert ("warning" in shown["ttft"].note) == ("warning" in shown["speedup"].note) == warns


def test_a_card_is_held_to_the_re_prefill_of_its_own_cell(tmp_path):
    """Transports in cells of their own, the second on a machine that was twice as slow."""
    apart = [
        made_up("a", [10, 20, 30], [5, 10, 15], config={"transports": ["memory"]}),
        made_up("b", [40, 50, 60], [10, 12.5, 15], {"transport": "file"}, {"transports": ["file"]}),
    ]
    shown = lines(load(write(tmp_path, apart)).rows)
    assert set(shown) == {("reprefill", "text"), ("uniform", "memory"), ("uniform", "file")}
    assert shown["uniform", "memory"]["speedup"].value == pytest.approx(2)
    assert shown["uniform", "file"]["speedup"].value == pytest.approx(4)


def test_a_policy_that_became_another_is_a_line_of_its_own_and_company_is_none(tmp_path):
    def timed(name, policies):
        return made_up(name, [10] * 3, [5] * 3, config={"policies": policies})

    both = {"uniform": {"alpha": 0.5}, "topology": {"alpha": 1.0}}
    alone = [timed("a", {"uniform": {"alpha": 0.5}}), timed("b", both)]
    assert not [c for c in load(write(tmp_path, alone)).rows if c.startswith("set.")]
    other = [timed("c", {"uniform": {"alpha": 0.7}})]
    assert "set.policies.uniform.alpha" in load(write(tmp_path, other)).rows


def test_a_second_backend_is_a_route_of_its_own(tmp_path):
    cells = [made_up(name, [10] * 3, [ms] * 3, {"reader": "in_place", "backend": name}, backend=None)
             for name, ms in (("cpu", 5), ("torch", 20))]  # fmt: skip
    shown = lines(load(write(tmp_path, cells)).rows)
    assert shown["uniform", "memory, in place, cpu"]["speedup"].value == 2
    assert shown["uniform", "memory, in place, torch"]["speedup"].value == 0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_every_table_and_figure_renders_and_is_none_without_rows(name, rows):
    shown = table(name, rows)
    assert shown.name == name and shown.rows
    for text in (render.markdown(shown), render.latex(shown), render.to_csv(shown)):
        assert "nan" not in text.lower().replace("minan", "")
    render.plain(shown, 160)
    assert_readable(figure(name, rows).canvas)
    assert table(name, rows.iloc[:0]) is None and figure(name, rows.iloc[:0]) is None


def test_one_context_has_bars_of_the_routes_and_no_empty_transport(tmp_path):
    drawn = figure("handoff_ttft", load(write(tmp_path, timing_cells(contexts=(1024,)))).rows)
    (panel,) = drawn.canvas.axes
    assert [bar.get_width() for bar in panel.patches] == pytest.approx([92.16, 10.24, 30.72])
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert names == ["reprefill", "fp16", "uniform"] and panel.get_xlim()[0] == 0
    assert "Log" not in drawn.caption and "Error bars: quartiles." in drawn.caption
    assert "file" not in drawn.caption
    assert_readable(drawn.canvas)


def test_headings_say_which_document_and_setting_a_row_of_panels_is_of(tmp_path):
    cells = [
        made_up(f"{document}{tokens}", [10] * 3, [5] * 3, config=config, document=document)
        for document in ("a", "b")
        for tokens in (16, 32)
        for config in ({"scored_tokens": tokens},)
    ]
    rows = load(write(tmp_path, cells)).rows
    for name in NAMES:
        titles = [part.get_suptitle() for part in figure(name, rows).canvas.subfigs]
        assert len(titles) == len(set(titles)) == 4
        assert sum(", a, " in title and "scored_tokens=16" in title for title in titles) == 1


def test_each_budget_has_panels_of_its_own_with_the_re_prefill_of_its_cells(tmp_path):
    cells = [
        made_up(f"{bits}", [8 * bits] * 3, [bits] * 3, {"budget_bits": bits}) for bits in (3.0, 4.0)
    ]
    rows = load(write(tmp_path, cells)).rows
    parts = figure("handoff_ttft", rows).canvas.subfigs
    for part, bits in zip(parts, (3, 4), strict=True):
        assert f"cards of {bits} bits" in part.get_suptitle()
        assert [bar.get_width() for bar in part.axes[0].patches] == [8 * bits, bits]
    titles = [part.get_suptitle() for part in figure("handoff_stages", rows).canvas.subfigs]
    assert ["3 bits" in title for title in titles] == [True, False]


def test_claims_are_about_cards_of_the_published_budget(tmp_path):
    other = made_up("other", [9] * 3, [1] * 3, {"budget_bits": 8.0})
    text = "sooner than re-prefilling"
    assert judged(tmp_path / "other", [other], text).verdict == NOT_MEASURED
    theirs = made_up("theirs", [9] * 3, [10] * 3)
    assert judged(tmp_path / "both", [theirs, other], text).verdict == NOT_REPRODUCED


def test_published_times_are_drawn_among_those_of_their_own_model_only(tmp_path):
    for model, n_open in (("llama-3.1-8b", 4), ("reference", 0)):
        cells = timing_cells(model, "random")
        canvas = figure("handoff_ttft", load(write(tmp_path / model, cells)).rows).canvas
        open_ = [line for line in canvas.axes[0].lines if line.get_fillstyle() == "none"]
        assert len(open_) == n_open
        assert_readable(canvas)


def test_stages_are_stacked_with_the_quartiles_of_the_total(tmp_path):
    rows = load(write(tmp_path, timing_cells())).rows
    canvas = figure("handoff_stages", rows[rows["policy"] == "uniform"]).canvas
    for ax, tokens in zip(canvas.axes, (1024, 8192), strict=True):
        total = 3.0 * tokens / 100
        parts = [bar.get_width() for bar in ax.patches]
        assert parts == pytest.approx([share * total for share in (0.1, 0.1, 0.1, 0.7)])
        assert list(ax.lines[0].get_xdata()) == pytest.approx([0.975 * total, 1.025 * total])
    plt.close(canvas)


def claims(tmp_path, cells):
    return handoff_ttft.CLAIMS(load(write(tmp_path, cells)).rows)


def only(found, text):
    """The claim that says `text`."""
    (claim,) = [claim for claim in found if text in claim.claim]
    return claim


def judged(tmp_path, cells, text):
    return only(claims(tmp_path, cells), text)


def test_times_are_judged_by_quartiles(tmp_path):
    told = ("sooner than re-prefilling", "the longer the context", "the receiver's forward pass")
    cells = timing_cells()
    for one in cells:  # from 3 times at the shorter to 6 times at the longer
        for row in one[3]:
            if row["transport"] == "text" and one[1] == "8192":
                row["value"] *= 2
    found = claims(tmp_path, cells)
    assert [only(found, text).verdict for text in told] == [REPRODUCED] * 3
    for one in cells:
        for row in one[3]:
            row["value"] *= 0.1 if row["transport"] == "text" else 1
            row["value"] *= 10 if row["stage"] == "create" else 1
    found = claims(tmp_path / "slower", cells)
    slower = [only(found, text).verdict for text in told]
    assert slower == [NOT_REPRODUCED, REPRODUCED, NOT_REPRODUCED]
    where = only(found, told[0]).claim
    assert "reference weights of reference" in where and "cpu, float32" in where
    alike = judged(tmp_path / "alike", timing_cells(), told[1])
    assert alike.verdict == INCONCLUSIVE
    assert judged(tmp_path / "one", timing_cells(contexts=(1024,)), told[1]).verdict == NOT_MEASURED


RATIO = 1029.7 / 397.1


def times(device="cuda", tokens=3877, gain=RATIO, spread=0.1, n=100):
    """The published route, and others that gain far more and must not decide; quartiles `spread` apart."""
    gains = np.linspace(gain - spread, gain + spread, n)
    about = {"model": "llama-3.1-8b", "device": device, "context_tokens": tokens}
    others = ({}, {"reader": "in_place"}, {"transport": "file"}, {"budget_bits": 8.0})
    each = ((gains, others[0]), *(([9.0] * n, other) for other in others[1:]))
    return [
        made_up(f"{place}", [100.0] * n, [100 / x for x in gained], other, **about)
        for place, (gained, other) in enumerate(each)
    ]


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        (RATIO, REPRODUCED),
        (RATIO * FACTOR - 0.03, REPRODUCED),
        (RATIO * FACTOR, INCONCLUSIVE),
        (RATIO * FACTOR + 0.03, NOT_REPRODUCED),
        (RATIO / FACTOR + 0.03, REPRODUCED),
        (RATIO / FACTOR - 0.03, NOT_REPRODUCED),
    ],
)
def test_times_are_held_to_one_route_named_before_within_a_factor(tmp_path, gain, verdict):
    """Quartiles 0.1 apart of 100 repeats: the median is known to 0.018."""
    assert judged(tmp_path, times(gain=gain), "ms at 8K").verdict == verdict


def test_quartiles_are_spread_and_few_repeats_decide_nothing(tmp_path):
    few, many = times(spread=1.5, n=4), times(spread=1.5, n=400)
    assert judged(tmp_path / "few", few, "ms at 8K").verdict == INCONCLUSIVE
    assert judged(tmp_path / "many", many, "ms at 8K").verdict == REPRODUCED


def test_what_is_not_sooner_is_not_the_same_as_a_little_sooner(tmp_path):
    """Published 1.15 times at 1K: within the factor lies 0.92 too, which is later."""
    later, sooner = times(tokens=476, gain=0.95, spread=0.01), times(tokens=476, gain=1.1)
    assert judged(tmp_path / "later", later, "ms at 1K").verdict == NOT_REPRODUCED
    assert judged(tmp_path / "sooner", sooner, "ms at 1K").verdict == REPRODUCED


@pytest.mark.parametrize("more", [{"device": "cpu"}, {"tokens": 8192}])
def test_another_device_or_length_decides_nothing(tmp_path, more):
    claim = judged(tmp_path, times(**more), "ms at 8K")
    assert claim.verdict == INCONCLUSIVE and "experiment=handoff_ttft" in claim.said


def test_another_model_does_not_answer_the_published_times(tmp_path):
    claim = judged(tmp_path, timing_cells(), "ms at 8K")
    assert claim.verdict == NOT_MEASURED and "experiment=handoff_ttft" in claim.said
    assert "2.59 times" in claim.claim


def test_without_rows_every_claim_is_not_measured_and_says_what_would(rows):
    found = handoff_ttft.CLAIMS(rows.iloc[:0])
    assert len(found) == 5 and {claim.verdict for claim in found} == {NOT_MEASURED}
    assert all("run experiment=" in claim.said for claim in found)


def test_a_label_stands_for_the_tokens_that_the_file_states_for_it():
    figures = published.load("qkvshare")
    tokens = {f.at: f.label_tokens for f in figures if f.metric == "ttft"}
    assert tokens == {"1K": 476, "4K": 1939, "8K": 3877}
    stages = [f.value.value for f in figures if f.table == "stages" and f.at == "8K"]
    (whole,) = [f for f in figures if (f.metric, f.policy, f.at) == ("ttft", "qkvshare", "8K")]
    assert math.isclose(sum(stages), whole.value.value, abs_tol=0.2)
