"""What a cell is: the content of local files and of policies counts, and a label says what is not its YAML."""

import json
import os
import shutil

import pytest
from hydra import compose, initialize_config_dir

from experiments import common, sweep
from polykv import config, digests, models, naming, shipped
from polykv.config import CONF
from polykv.errors import PolyKVError
from polykv.evaluation import gsm8k


def prepared(*overrides):
    """(settled config, identity) of one cell."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["device=cpu", *overrides])
    return sweep.prepare(cfg)[1:]


def identity(*overrides):
    return prepared(*overrides)[1]


def labels(*overrides):
    return dict(prepared(*overrides)[0].get("labels", {}))


@pytest.fixture
def own_model(checkpoint, tmp_path):
    """A copy of the tiny model that a test may change."""
    return shutil.copytree(checkpoint, tmp_path / "own-llama")


def test_a_file_that_says_something_else_is_another_cell(tmp_path):
    text, asked = tmp_path / "a.txt", tmp_path / "q.txt"
    text.write_text("one text")
    asked.write_text("why?\n")
    cell = ("experiment=polykv_quality", "document=file", f"document.path={text}",
            f"document.questions={asked}")  # fmt: skip
    first = identity(*cell)
    os.utime(text, (1, 1))
    assert identity(*cell) == first
    text.write_text("another text")
    second = identity(*cell)
    asked.write_text("what for?\n")
    assert len({first, second, identity(*cell)}) == 3
    text.write_text("one text")
    asked.write_text("why?\n")
    assert identity(*cell) == first


@pytest.mark.parametrize("part", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_local_model_that_changed_is_another_cell(own_model, part):
    cell = ("experiment=polykv_quality", "model=local", f"model.path={own_model}")
    first, bare = identity(*cell), identity(*cell, "weights=random")
    (own_model / "notes.md").write_text("no part of the model")
    assert identity(*cell) == first
    content = bytearray((own_model / part).read_bytes())
    content[-2:] = b"  " if part == "model.safetensors" else content[-2:] + b" "
    (own_model / part).write_bytes(content)
    assert identity(*cell) != first
    # Random weights take the architecture alone from the folder.
    assert (identity(*cell, "weights=random") != bare) == (part == "config.json")


def test_problems_that_changed_are_another_cell(tmp_path):
    problems = tmp_path / "test.jsonl"
    line = {"question": "1 + 1?", "answer": "#### 2"}
    problems.write_text(json.dumps(line))
    cell = ("experiment=handoff_accuracy", "relay=gsm8k", f"relay.path={problems}")
    first = identity(*cell)
    assert gsm8k.load(str(problems), 1, 0)[0].answer == "2"
    problems.write_text(json.dumps(line | {"question": "1 + 1 = ?"}))
    assert identity(*cell) != first


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["document=file", "document.path=/no/a.txt"], "cannot read document.path=/no/a.txt"),
        (["model=local"], "model=local needs a folder"),
        (["model=local", "model.path=/no/model"], "no model in /no/model"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(overrides, message):
    with pytest.raises(PolyKVError, match=message) as refused:
        identity("experiment=polykv_quality", *overrides)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("experiment", ["handoff_ttft", "handoff_stages", "controller_ablation"])
def test_a_policy_that_became_another_is_another_cell(experiment, tmp_path, monkeypatch):
    first = identity(f"experiment={experiment}")
    shutil.copytree(CONF, tmp_path / "conf")
    uniform = tmp_path / "conf" / "policy" / "uniform.yaml"
    uniform.write_text(uniform.read_text().replace("[2, 4, 8, 16]", "[4, 8]\nalpha: 0.5", 1))
    monkeypatch.setattr(config, "CONF", tmp_path / "conf")
    uniform.write_text(
        uniform.read_text().replace("alpha: 1.0 # weight of importance; the rest goes to demand\n", "")
    )  # fmt: skip
    assert identity(f"experiment={experiment}") != first


def test_the_shipped_texts_are_part_of_a_cells_identity(tmp_path, monkeypatch):
    cells = {
        "wikitext2": ("experiment=polykv_quality", "document=wikitext2"),
        "moon_landing": ("experiment=polykv_quality", "document=moon_landing"),
        "gsm8k": ("experiment=handoff_accuracy", "relay=gsm8k"),
    }
    first = {name: identity(*cell) for name, cell in cells.items()}
    shutil.copytree(shipped.TEXTS, tmp_path / "texts")
    monkeypatch.setattr(shipped, "TEXTS", tmp_path / "texts")
    assert {name: identity(*cell) for name, cell in cells.items()} == first
    for name, cell in cells.items():
        path = tmp_path / "texts" / shipped.FILES[name]
        path.write_bytes(path.read_bytes() + b"\n")
        assert identity(*cell) != first[name], name


def test_raw_and_shipped_wikitext2_are_two_documents(tmp_path):
    shipped_one, raw = (
        prepared("experiment=polykv_quality", f"document={name}")
        for name in ("wikitext2", "wikitext2_raw")
    )
    assert shipped_one[1] != raw[1]
    assert [common.label(cfg, "document") for cfg, _ in (shipped_one, raw)] == [
        "wikitext2", "wikitext2_raw"
    ]  # fmt: skip
    assert len(raw[0].document.revision) == 40


def test_how_questions_are_asked_is_part_of_a_cells_identity():
    cell = ("experiment=polykv_quality", "model=smollm2-135m", "document=wikitext2")
    assert identity(*cell) == identity(*cell, "model.question_style=chat")
    assert identity(*cell) != identity(*cell, "model.question_style=plain")
    assert labels(*cell, "model.question_style=plain") == {
        "model": "smollm2-135m+question_style=plain"
    }
    # Nothing is asked of random weights.
    assert "question_style" not in prepared(*cell, "weights=random")[0].model


def test_a_large_file_is_sampled_and_a_small_one_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "WHOLE", 3 << 20)
    path = tmp_path / "weights"

    def digest(content):
        path.write_bytes(content)
        digests._of_content.cache_clear()
        return digests.of_file(path, "model.path")

    small = bytes(2 << 20)
    assert len({digest(small), digest(small[:-1] + b"x"), digest(small + b"\0")}) == 3
    # Of 64 MiB no two places are further apart than 32 KiB: what is longer cannot hide.
    large = bytearray(64 << 20)
    found = {digest(large), digest(large + b"\0")}
    for start in (0, 5_000_000, len(large) - 40_000):
        changed = large.copy()
        changed[start : start + 40_000] = b"x" * 40_000
        found.add(digest(changed))
    assert len(found) == 5


def test_the_reference_models_digest_is_the_one_in_committed_cells():
    assert models.reference_digest() == "c63a44a6fa77"


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["recipe=polykv"], {}),
        (["recipe.value.bits=3"], {}),  # as the YAML has it
        (["recipe.value.bits=4"], {"recipe": "polykv+value.bits=4"}),
        (["recipe.value.bits=4", "recipe.exempt.sinks=2"],
         {"recipe": "polykv+exempt.sinks=2+value.bits=4"}),
        (["~recipe.value.signs"], {"recipe": "polykv+value.signs=unset"}),
        (["+recipe.layer_bits=[[8,4],[4,2]]", "recipe=uniform"],
         {"recipe": "uniform+layer_bits=[[8,4],[4,2]]"}),
        (["recipe=vllm_k8v4"], {}),
        (["model=smollm2-135m", "model.revision=main"], {"model": "smollm2-135m+revision=main"}),
        # Columns of their own, or how it is run.
        (["model.dtype=bfloat16", "model.threads=2", "document.n_documents=3", "n_documents=5"], {}),
        (["model=llama-3.1-8b", "model.device_map=auto", "model.quantization=bnb_4bit"], {}),
        (["experiment=handoff_accuracy", "policy=topology", "policy.alpha=0.3", "relay.n_facts=8"],
         {"policy": "topology+alpha=0.3", "relay": "word_problems+n_facts=8"}),
        (["experiment=controller_ablation", "policy.alpha=0.3"], {}),
        (["experiment=capacity", "hardware=h200-2x8"], {}),
        (["experiment=capacity", "hardware=h200-2x8", "hardware.memory_gb=96"],
         {"hardware": "h200-2x8+memory_gb=96"}),
        (["experiment=outside_references"], {}),
        (["experiment=kv_asymmetry"], {}),
        (["experiment=context_scaling", "recipe=vllm_k8v4"], {}),
    ],
)  # fmt: skip
def test_a_label_says_what_is_not_the_yaml(overrides, found):
    assert labels(*overrides) == found


def test_files_are_named_in_labels_and_rows(checkpoint, tmp_path):
    text = tmp_path / "my report.txt"
    text.write_text("a text")
    settled, _ = prepared("experiment=polykv_quality", "model=local", f"model.path={checkpoint}",
                          "document=file", f"document.path={text}",
                          f"document.questions={text}")  # fmt: skip
    rows = common.new_rows(settled)
    rows.add("perplexity", 1.0, "ppl")
    (row,) = rows
    assert row["model"] == f"local {checkpoint.name}"
    assert row["document"] == "file my report.txt+questions=my report.txt"
    assert row["recipe"] == "polykv"


def test_a_value_is_a_few_characters_that_a_file_name_may_hold():
    assert naming.text(0.5) == "0.5" and naming.text(None) == "null" and naming.text(True) == "true"
    assert naming.text("/my/models/llama") == "llama"
    assert naming.text(["a", "b"]) == "[a,b]"
    odd = [naming.text(value) for value in ("a\nb", "<b>", "x" * 61, "\ud800", "a:b")]
    assert len(set(odd)) == 5 and all(value.startswith("#") and len(value) == 7 for value in odd)
