"""PolyKV's claims on both sides of every edge, on made-up rows."""

from itertools import product

import pytest
from analysis_rows import BYTES, compare_cell, paper_memory, quickstart, write

from analysis import catalog
from analysis.catalog import AGREES, INCONCLUSIVE, NOT_MEASURED, NOT_REPRODUCED, REPRODUCED
from analysis.load import load
from analysis.published import (
    load as figures,
)

ABSTRACT = {"model": "llama-3-8b", "weights": "hub", "document": "wikitext2", "device": "cuda",
            "dtype": "bfloat16, weights nf4", "quantization": "nf4", "scorer": "roberta-large"}  # fmt: skip
PERPLEXITY, BERTSCORE = "perplexity +0.57 %", "BERTScore F1 0.9279"


def judged(tmp_path, cells, about):
    """The claims that say `about`, from these cells."""
    return [c for c in catalog.claims(load(write(tmp_path, cells)).rows) if about in c.claim]


def as_published(**more):
    return [compare_cell(7194, 15, "polykv", **(ABSTRACT | more))]


def test_arithmetic_agrees_and_is_never_counted_as_reproduced(tmp_path):
    found = judged(tmp_path, paper_memory(), "")
    mine = [c for c in found if " GB for " in c.claim or "times smaller" in c.claim]
    assert [claim.verdict for claim in mine] == [AGREES] * 3
    assert not any(claim.verdict == REPRODUCED for claim in found)


def test_arithmetic_that_does_not_agree_is_not_reproduced(tmp_path, monkeypatch):
    monkeypatch.setitem(BYTES, "llama-3-8b", 270000)
    found = judged(tmp_path, paper_memory(), " GB for ")
    assert [claim.verdict for claim in found] == [NOT_REPRODUCED] * 2


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.5, REPRODUCED), (0.97, NOT_REPRODUCED), (1.1, NOT_REPRODUCED)]
)
def test_memory_is_judged_by_what_published_readers_take(tmp_path, share, verdict):
    cells = []
    for context, n_agents in product((256, 512), (3, 15)):
        for recipe, of in (("full", 1), ("polykv", share)):
            cells.append(compare_cell(context, n_agents, recipe, n_documents=1,
                                      resident=of * context * n_agents / 1e6))  # fmt: skip
    (claim,) = judged(tmp_path, cells, "agents that read one pool")
    assert claim.verdict == verdict
    assert "15 agents decode after 512 tokens on cpu" in claim.said
    assert f"{512 * 15 / 1e3:.3g} MB" in claim.said


@pytest.mark.parametrize(
    ("more", "verdict"),
    [
        ({"delta": 0.57}, REPRODUCED),
        ({"delta": 0.3}, REPRODUCED),  # narrow, and the same for all that matters
        ({"delta": 0.57, "spread": 20}, INCONCLUSIVE),  # wide
        ({"delta": 3.0}, NOT_REPRODUCED),
        ({"delta": -1.0}, NOT_REPRODUCED),
        ({"delta": 0.57, "quantization": "", "dtype": "bfloat16"}, INCONCLUSIVE),
        ({"delta": 0.57, "quantization": "int8"}, INCONCLUSIVE),
        ({"delta": 0.57, "n_documents": 7}, INCONCLUSIVE),
        ({"delta": 0.57, "document": "moon_landing"}, NOT_MEASURED),
        ({"delta": 0.57, "weights": "random"}, NOT_MEASURED),
    ],
)
def test_perplexity_is_the_same_within_a_margin(tmp_path, more, verdict):
    (claim,) = judged(tmp_path, as_published(**more), PERPLEXITY)
    assert claim.verdict == verdict, claim
    if verdict in (INCONCLUSIVE, NOT_MEASURED) and "spread" not in more:
        assert "model.quantization=bnb_4bit" in claim.said and "n_documents=8" in claim.said


@pytest.mark.parametrize(
    ("more", "verdict"),
    [
        ({"f1": 0.9279}, REPRODUCED),
        ({"f1": 0.95}, NOT_REPRODUCED),
        ({"f1": 0.90}, NOT_REPRODUCED),
        ({"f1": 0.9279, "n_documents": 7}, INCONCLUSIVE),
        ({"f1": 0.9279, "scorer": "minilm"}, NOT_MEASURED),
    ],
)
def test_bertscore_is_the_same_within_a_margin_by_the_papers_scorer(tmp_path, more, verdict):
    (claim,) = judged(tmp_path, as_published(**more), BERTSCORE)
    assert claim.verdict == verdict, claim
    if verdict == NOT_MEASURED:
        assert "scorer=roberta-large" in claim.said and "scored by minilm" in claim.said


def test_what_was_not_run_names_the_command_and_every_claim_its_published_rows(tmp_path):
    cells = quickstart((512,), (3,), ("polykv_q8_0",), n_documents=1)
    found = [c for c in judged(tmp_path, cells, "") if c.paper == "polykv"]
    tables = {figure.table for figure in figures("polykv")}
    for claim in found:
        assert claim.table in tables, claim
        if claim.verdict == NOT_MEASURED:
            assert "run experiment=" in claim.said, claim
    assert {claim.verdict for claim in found} == {NOT_MEASURED}


def test_a_second_backend_does_not_lose_the_claim_on_memory(tmp_path):
    about = {"n_documents": 1}
    cells = [compare_cell(512, 3, "full", resident=1.0, **about),
             compare_cell(512, 3, "polykv", resident=0.5, **about)]  # fmt: skip
    for backend, gb in (("torch", 0.2), ("cpu", 0.1)):
        cells.append(compare_cell(512, 3, "polykv", name=backend, reader="in_place", backend=backend,
                                  resident=gb, **about))  # fmt: skip
    (claim,) = judged(tmp_path, cells, "agents that read one pool")
    assert claim.verdict == REPRODUCED and "100 MB" in claim.said and "200 MB" not in claim.said
