"""The presets of compare on a tiny local model: what they set, what they measure, what they refuse."""

import pytest
import torch
from conftest import checked_cell, rows_of
from hydra import compose, initialize_config_dir

from experiments import settings, sweep
from experiments.session import of_process
from polykv.attention import cascade
from polykv.attention.suffix import attend_suffix
from polykv.config import CONF, available, load_group
from polykv.errors import PolyKVError
from polykv.evaluation import outside
from polykv.pool import READERS
from polykv.segment import Segment


def local(checkpoint, experiment, *overrides):
    return [f"experiment={experiment}", "model=local", f"model.path={checkpoint}", "document=file",
            f"document.path={checkpoint}/text.txt", "context=60", "n_documents=8", *overrides]  # fmt: skip


def cell(*arguments):
    return checked_cell(*local(*arguments))[1]


def of(rows, metric, **columns):
    """The values of one metric's documents, or of what has none."""
    return [
        row["value"]
        for row in rows
        if row["metric"] == metric
        and not row.get("statistic")
        and all(row.get(name) == value for name, value in columns.items())
    ]


def ratio(rows, accounting):
    return of(rows, "compression_ratio", accounting=accounting)[0]


def test_frontier_counts_bits_and_keeps_each_document(checkpoint):
    rows = rows_of(*local(checkpoint, "recipe_frontier", "recipe=q4_0"))
    # head_dim 8: a block of 32 per vector is 18 bytes for 8 values.
    assert ratio(rows, "stored") == 16 / 18 and ratio(rows, "nominal") == 4
    assert len(of(rows, "kl")) == 8


def test_the_seed_draws_the_rotation_too(checkpoint):
    zero, seven = (
        cell(checkpoint, "recipe_frontier", "recipe=q4_0_rotated", f"seed={n}") for n in (0, 7)
    )
    assert (zero.recipe.key.seed, seven.recipe.key.seed) == (0, 7)
    own = cell(
        checkpoint, "recipe_frontier", "recipe=turboquant_3bit", "+recipe.key.seed=3", "seed=7"
    )
    assert (own.recipe.key.seed, own.recipe.value.seed) == (3, 7)


def test_every_sample_names_its_text_which_is_the_same_under_every_seed(checkpoint):
    def texts(seed):
        rows = rows_of(*local(checkpoint, "recipe_frontier", "recipe=q4_0_rotated", f"seed={seed}"))
        samples = [row for row in rows if row.get("sample") is not None]
        return {row["sample"]: row["text"] for row in samples}

    assert texts(0) == texts(7) and len(set(texts(0).values())) == 8


@pytest.mark.slow
def test_added_exemptions_are_named_and_the_recipes_own_are_not(checkpoint):
    def name(*overrides):
        return settings.label(cell(checkpoint, "recipe_frontier", *overrides), "recipe")

    assert name("recipe=q4_0") == "q4_0"
    assert name("recipe=q4_0", "recipe.exempt.sinks=4", "recipe.exempt.recent=8") == (
        "q4_0+exempt.recent=8+exempt.sinks=4"
    )
    assert name("recipe=kivi_2bit") == "kivi_2bit"
    assert name("recipe=vllm_k8v4_no_exemptions") == "vllm_k8v4_no_exemptions"
    assert name("recipe=vllm_k8v4_no_exemptions", "recipe.exempt.last_layers=2") == (
        "vllm_k8v4_no_exemptions+exempt.last_layers=2"
    )
    assert name("recipe=vllm_k8v4") == "vllm_k8v4"  # chosen by name, called by its name


def test_the_frontier_takes_vllms_recipes_without_exemptions():
    """On a model of four layers a preset of vLLM would keep all of them exact."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        swept = compose("config", ["experiment=recipe_frontier"], return_hydra_config=True)
    names = swept.hydra.sweeper.params.recipe.replace(" ", "").split(",")
    assert {"vllm_4bit_nc_no_exemptions", "vllm_k8v4_no_exemptions"} <= set(names)
    for name in names:
        exempt = load_group("recipe", name).exempt
        assert exempt.first_layers == exempt.last_layers == 0, name


def test_recipes_without_exemptions_are_their_namesakes_otherwise():
    names = [name for name in available("recipe") if name.endswith("_no_exemptions")]
    assert len(names) > 4
    for name in names:
        mine, whole = (load_group("recipe", n) for n in (name, name.removesuffix("_no_exemptions")))
        assert (mine.key, mine.value) == (whole.key, whole.value), name
        assert not any(mine.exempt.values()) and any(whole.exempt.values()), name


def test_asymmetry_sets_the_bits_of_keys_and_values(checkpoint):
    bits = ("key_bits=8", "value_bits=2")
    exempt = cell(checkpoint, "kv_asymmetry", *bits, "recipe.exempt.sinks=4")
    assert settings.label(exempt, "recipe") == "k8v2+exempt.sinks=4"
    rows = rows_of(*local(checkpoint, "kv_asymmetry", *bits))
    assert {(row["recipe"], row["key_bits"], row["value_bits"]) for row in rows} == {("k8v2", 8, 2)}
    assert 16 / ratio(rows, "nominal") == 5
    # Codes of 8 and 2 bytes and an fp16 step each, for 8 values.
    assert 16 / ratio(rows, "stored") == (8 * (8 + 2) + 8 * (2 + 2)) / 16


def test_auto_document_follows_the_weights():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        reference = compose("config", ["experiment=recipe_frontier", "model=reference"])
        hub = compose("config", ["experiment=recipe_frontier", "model=qwen2.5-0.5b"])
    assert sweep.prepare(reference).settled.document.name == "generated"
    prepared = sweep.prepare(hub)
    assert prepared.settled.document.name == "wikitext2" and prepared.settled.document.digest
    with pytest.raises(PolyKVError, match="hub"):  # which has the weights
        prepared.study.check(prepared.settled, of_process())


def test_cells_of_two_presets_that_measure_the_same_are_one(checkpoint):
    def identity(experiment):
        study, settled = checked_cell(*local(checkpoint, experiment, "recipe=q4_0"))
        return study.identity(settled)

    assert identity("recipe_frontier") == identity("context_scaling")
    assert identity("recipe_frontier") != identity("agent_scaling")


def agents(checkpoint, reader, n_agents=4):
    options = (f"reader={reader}", f"n_agents={n_agents}", "recipe=polykv", "backend=torch")
    rows = rows_of(*local(checkpoint, "agent_scaling", *options))
    return max(of(rows, "agent_spread")), sum(of(rows, "kl")) / 8


@pytest.mark.parametrize("reader", READERS)
def test_agents_in_a_batch_read_what_one_reads_alone(reader, checkpoint):
    (spread_alone, alone), (spread, crowd) = (agents(checkpoint, reader, n) for n in (1, 4))
    assert spread_alone < 1e-4 and spread < 1e-4
    assert 0 < crowd == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("fault", ["mask", "agent"])
def test_agents_that_disturb_each_other_show(fault, checkpoint, monkeypatch):
    def disturbed(q, own, mask, *how):
        if fault == "mask":
            return attend_suffix(q, own, torch.ones_like(mask).tril(), *how)
        rolled = (packed.tensors["values"].roll(1, 0) for packed in (own.key, own.value))
        return attend_suffix(q, Segment.uncompressed(*rolled), mask, *how)

    monkeypatch.setattr(cascade, "attend_suffix", disturbed)
    assert agents(checkpoint, "in_place")[0] > 0.01


def test_transformers_own_fp8_cache_is_an_outside_reference(checkpoint):
    ours = rows_of(*local(checkpoint, "recipe_frontier", "recipe=fp8_e4m3"))
    theirs = rows_of(*local(checkpoint, "outside_references"))
    assert ratio(theirs, "stored") == ratio(ours, "stored")
    assert {row["recipe"] for row in theirs} == {"transformers_fp8"}
    # The prefix is the same to the bit (test_frontier_codecs.py), but theirs also quantizes what is read
    # after it.
    own, other = (sum(of(rows, "kl")) for rows in (ours, theirs))
    assert other > own > 0 and other == pytest.approx(own, rel=0.5)


@pytest.mark.parametrize(
    ("override", "said"),
    [("outside=gguf", "gguf"), ("reader=in_place", "in_place"), ("answers=1", "answers"),
     ("resident=true", "resident"), ("+together=true", "together")],
)  # fmt: skip
def test_an_outside_reference_refuses_what_it_is_not_asked(override, said, checkpoint):
    with pytest.raises(PolyKVError, match=said):
        cell(checkpoint, "outside_references", override)


def test_a_missing_backend_is_one_clear_line(llama):
    try:
        import optimum.quanto  # noqa: F401
    except ImportError:
        with pytest.raises(PolyKVError, match="optimum-quanto"):
            outside.new_cache(llama.config, {"backend": "quanto", "nbits": 4})
    with pytest.raises(PolyKVError, match="Unknown quantization backend"):
        outside.new_cache(llama.config, {"backend": "abacus"})


def test_shared_readings_are_made_once(checkpoint):
    first, second = (
        cell(checkpoint, "recipe_frontier", f"recipe={recipe}") for recipe in ("q4_0", "q8_0")
    )
    session = of_process()
    assert session.full_readings(first) is session.full_readings(second)
