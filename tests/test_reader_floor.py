"""Both sides of a difference are read alike: what a recipe costs does not hold what its reader costs.

In bfloat16 the two attentions round differently by as much as a recipe of 8 bits costs.
"""

import pytest
import torch
from conftest import TEXT, checked_cell, rows_of, tiny_model

from experiments.rows import SCORES, add_readings
from experiments.session import Session
from polykv import load_recipe
from polykv.documents import Document
from polykv.evaluation.card_quality import score_cards
from polykv.evaluation.readings import Reading
from polykv.handoff.policy import load_policy
from polykv.pool import SharedKVPool, prefill
from polykv.results import Rows

FLOORS = {"reader_floor_kl", "reader_floor_nll_delta"}


@pytest.fixture(scope="module")
def rounded():
    """A model in bfloat16."""
    return tiny_model("llama").to(torch.bfloat16)


@pytest.fixture(scope="module")
def injected(rounded, tokenizer):
    ids_BT = tokenizer(TEXT[:380], return_tensors="pt").input_ids
    document = Document("text", ids_BT, int(0.7 * ids_BT.shape[1]), questions=())
    pool = SharedKVPool.from_cache(
        prefill(rounded, document.prefix_BT), load_recipe("full"), backend="torch"
    )
    return Reading(rounded, document, pool)


def means(rows):
    """Metric -> the rows of whole documents."""
    found = {}
    for row in rows:
        if row.get("block") is None and row.get("statistic") is None:
            found.setdefault(row["metric"], []).append(row)
    return found


def scored(reading):
    rows = Rows(SCORES)
    add_readings(rows, [reading])
    return means(rows)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("study", ["polykv_quality", "recipe_frontier", "agent_scaling"])
def test_the_uncompressed_cache_costs_nothing_in_place_and_the_floor_is_said(study, backend):
    rows = rows_of(
        f"experiment={study}", "model=reference", "document=generated", "context=128", "n_documents=2",
        "n_agents=1", "model.dtype=bfloat16", "recipe=full", "reader=in_place", f"backend={backend}", "device=cpu",
        *(["answers=0"] if study == "polykv_quality" else []),
    )  # fmt: skip
    found = means(rows)
    # agent_scaling scores with a mask of its own, which may round otherwise.
    least = 0 if study != "agent_scaling" else 1e-6
    for row in (*found["kl"], *found["nll_delta"]):
        assert abs(row["value"]) <= least
    for row in found["reader_floor_kl"]:
        assert row["value"] > 1e-6 and row["reader"] == "in_place"  # of two attentions in bfloat16
    floors = [row for row in rows if row["metric"] == "reader_floor_nll_delta"]
    assert any(row.get("block") is not None for row in floors)  # what its interval rests on


def test_a_recipes_delta_is_that_to_the_baseline_of_its_own_reader(injected):
    in_place = injected.in_mode("in_place", "torch")
    found = {
        reader: base.under(load_recipe("int8_token"), "torch")
        for reader, base in (("dequantize", injected), ("in_place", in_place))
    }
    for reader, base in (("dequantize", injected), ("in_place", in_place)):
        nll = -base.log_probs_TV.gather(1, base.document.rest_BT[0, 1:, None]).squeeze(1)
        assert (found[reader].comparison.nll_full == nll.numpy()).all()
    apart = abs(found["dequantize"].comparison.nll_full - found["in_place"].comparison.nll_full)
    assert apart.max() > 0
    (floor,) = scored(found["in_place"])["reader_floor_kl"]
    assert (
        floor["value"] == pytest.approx(in_place.reader_floor.kl.astype(float).mean())
        and floor["value"] > 0
    )
    assert not FLOORS & scored(found["dequantize"]).keys()


def test_answers_are_held_to_answers_by_the_same_reader(monkeypatch):
    _, cfg = checked_cell(
        "experiment=polykv_quality", "context=128", "n_documents=1", "max_new_tokens=2", "n_agents=2",
        "reader=in_place", "recipe=fp16", "device=cpu",
    )  # fmt: skip
    read, ask = [], SharedKVPool.ask

    def told(self, model, tokenizer, queries, max_new_tokens, reader):
        read.append((self.recipe.name, reader, self.backend))
        return ask(self, model, tokenizer, queries, max_new_tokens, reader)

    monkeypatch.setattr(SharedKVPool, "ask", told)
    session = Session()
    session.answers(cfg, 1)
    session.answers(cfg, 1, load_recipe("full"))
    assert read == [(name, "in_place", cfg.backend) for name in ("fp16", "full")]


@torch.no_grad()
def test_a_card_read_in_place_is_held_to_the_uncompressed_cache_read_in_place(rounded, tokenizer):
    ids_T = tokenizer(TEXT[:380], return_tensors="pt").input_ids[0]
    policies, both = [load_policy("full"), load_policy("uniform")], ["dequantize", "in_place"]
    found = score_cards(rounded, tokenizer, ids_T, 100, 40, policies, both, 8.0, "torch")
    floor = found[None, "in_place"].kl.mean()
    assert found["full", "dequantize"].kl.max() == 0
    assert found["full", "in_place"].kl.mean() < 0.1 * floor
    assert (found[None, "in_place"].nll == found["uniform", "in_place"].nll_full).all()
    assert (found[None, "in_place"].nll_full == found["uniform", "dequantize"].nll_full).all()
    assert (None, "dequantize") not in found
