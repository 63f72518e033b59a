"""What a cell is: the content of local files and of policies counts, and a label says what is not its YAML."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pairwise import slow

from experiments import settings, sweep
from polykv import config, digests, models, naming, shipped
from polykv.codecs.base import Codec
from polykv.codecs.int8 import Int8
from polykv.codecs.uniform import Uniform
from polykv.config import CONF
from polykv.errors import PolyKVError
from polykv.evaluation import capacity, continuation, gsm8k
from polykv.handoff import allocate, controller


def prepared(*overrides):
    """(settled config, identity) of one cell."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["device=cpu", *overrides])
    cell = sweep.prepare(cfg)
    return cell.settled, cell.identity


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


def test_a_chat_template_of_a_local_model_is_part_of_it(own_model):
    cell = ("experiment=polykv_quality", "model=local", f"model.path={own_model}")
    first = identity(*cell)
    (own_model / "chat_template.jinja").write_text("{{ messages }}")
    assert identity(*cell) != first


OWN_CODEC = """
from polykv.codecs.uniform import Uniform
from own_levels import SHIFT


class Shifted(Uniform):
    shift = SHIFT
"""


@pytest.fixture
def own_codec(tmp_path):
    """A folder as --config-dir takes it: a quantizer of a user's own, what it imports, and a recipe."""
    folder = tmp_path / "mine"
    (folder / "recipe").mkdir(parents=True)
    (folder / "own_codec.py").write_text(OWN_CODEC)
    (folder / "own_levels.py").write_text("SHIFT = 1\n")
    codec = "{_target_: own_codec.Shifted, bits: 4}"
    (folder / "recipe" / "mine.yaml").write_text(f"name: mine\nkey: {codec}\nvalue: {codec}\n")
    return folder


def planned(folder, results):
    """What run.py says of the cells, in a process of its own."""
    cells = [f"results_dir={results}", "experiment=polykv_ratio", "recipe=mine,uniform", "context=64",
             "model=reference", "hydra.sweeper.params=null"]  # fmt: skip
    paths = os.pathsep.join([str(folder), str(config.REPO)])
    done = subprocess.run(
        [sys.executable, str(config.REPO / "run.py"), "--config-dir", str(folder), *cells],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, cwd=config.REPO,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return next(line for line in done.stdout.splitlines() if "cells:" in line)


@pytest.mark.slow
def test_a_quantizer_of_ones_own_is_measured_again_when_its_source_changes(own_codec, tmp_path):
    assert "2 to run" in planned(own_codec, tmp_path / "results")
    assert "0 to run" in planned(own_codec, tmp_path / "results")
    (own_codec / "own_codec.py").write_text(f"{OWN_CODEC}    group = 1\n")
    assert "1 to run" in planned(own_codec, tmp_path / "results")
    (own_codec / "own_levels.py").write_text("SHIFT = 2\n")  # which it imports
    assert "1 to run" in planned(own_codec, tmp_path / "results")


@pytest.mark.parametrize(
    ("cell", "thing", "name"),
    [
        (["recipe=uniform_rotated"], Uniform, "version"),  # within another
        (["recipe=uniform_rotated"], Codec, "version"),  # what all share
        (["document=wikitext2"], continuation, "VERSION"),
        *slow(
            (["recipe=polykv"], Int8, "version"),
            (["experiment=handoff_accuracy"], allocate, "VERSION"),
            (["experiment=capacity", "model=reference"], capacity, "VERSION"),
        ),
    ],
)
def test_a_raised_version_is_another_cell_where_it_is_used(cell, thing, name, monkeypatch):
    cell = ["model=reference", *cell]
    first, other = identity(*cell), identity("experiment=polykv_ratio", "recipe=fp16")
    monkeypatch.setattr(thing, name, 99)
    assert identity(*cell) != first
    assert (identity("experiment=polykv_ratio", "recipe=fp16") != other) == (thing is Codec)


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
    "uses",
    [
        ["experiment=handoff_accuracy", "policy=qkvshare"],
        ["experiment=handoff_ttft", "policies=[fp16,qkvshare]"],
        ["experiment=controller_ablation", "policy.demand=[]", "policy.importance=[qkvshare]"],
    ],
)
def test_a_controller_that_was_trained_anew_is_another_cell(uses, tmp_path, monkeypatch):
    other = identity("experiment=handoff_accuracy", "policy=topology")
    first = identity(*uses)
    shutil.copytree(controller.DATA, tmp_path / "data")
    monkeypatch.setattr(controller, "DATA", tmp_path / "data")
    assert identity(*uses) == first
    weights = tmp_path / "data" / "qkvshare.json"
    weights.write_text(weights.read_text().replace("1", "2", 1))
    assert identity(*uses) != first
    assert identity("experiment=handoff_accuracy", "policy=topology") == other


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


@pytest.mark.parametrize(
    "experiment", ["handoff_stages", *slow("handoff_ttft", "controller_ablation")]
)
def test_a_policy_that_became_another_is_another_cell(experiment, tmp_path, monkeypatch):
    first = identity(f"experiment={experiment}")
    shutil.copytree(CONF, tmp_path / "conf")
    uniform = tmp_path / "conf" / "policy" / "uniform.yaml"
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(uniform), {"alpha": 0.5}), uniform)
    monkeypatch.setattr(config, "CONF", tmp_path / "conf")
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
    assert [settings.label(cfg, "document") for cfg, _ in (shipped_one, raw)] == [
        "wikitext2", "wikitext2_raw"
    ]  # fmt: skip
    assert len(raw[0].document.revision) == 40


@pytest.mark.slow
def test_how_questions_are_asked_is_part_of_a_cells_identity():
    cell = ("experiment=polykv_quality", "model=smollm2-135m", "document=wikitext2")
    assert identity(*cell) == identity(*cell, "model.question_style=chat")
    assert identity(*cell) != identity(*cell, "model.question_style=plain")
    assert labels(*cell, "model.question_style=plain") == {
        "model": "smollm2-135m+question_style=plain"
    }
    # Nothing is asked of random weights.
    assert "question_style" not in prepared(*cell, "weights=random")[0].model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own; two changes count as apart, as if time had passed between them."""
    monkeypatch.setenv("POLYKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    return tmp_path / "cache"


def test_every_byte_of_a_large_file_counts(tmp_path, monkeypatch, cache):
    large = bytearray(65 << 20)
    path = tmp_path / "weights"
    path.write_bytes(large)
    found = {digests.of_file(path, "model.path")}
    for place in (0, 5_000_003, 33_333_333, len(large) - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        found.add(digests.of_file(path, "model.path"))
    assert len(found) == 5


def test_an_edit_that_sets_the_time_back_is_seen(tmp_path, cache):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    before, first = path.stat(), digests.of_file(path, "model.path")
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digests.of_file(path, "model.path") != first


DIGESTS = """
import sys
from pathlib import Path
from polykv import digests
digests.LARGE, digests.SETTLED_NS = 1 << 10, 0
print(*(digests.sha256(Path(path), "model.path") for path in sys.argv[1:]))
"""


def test_the_digest_of_a_large_file_is_read_once_by_all_processes(tmp_path, monkeypatch, cache):
    path, small = tmp_path / "weights", tmp_path / "small"
    path.write_bytes(bytes(1 << 11))
    small.write_bytes(b"small")

    def in_a_new_process():
        command = [sys.executable, "-c", DIGESTS, path, small]
        return subprocess.check_output(command, text=True, cwd=config.REPO).split()

    first = in_a_new_process()
    assert first == [hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, small)]
    [kept] = cache.rglob("*/*")  # of the large one alone
    assert kept.read_text() == first[0]
    kept.write_text("a" * 64)
    assert in_a_new_process() == ["a" * 64, first[1]]  # not read again
    kept.write_text("damaged")
    assert in_a_new_process() == first
    monkeypatch.setenv("POLYKV_CACHE", str(small / "no folder"))
    assert in_a_new_process() == first  # nowhere to keep it


def test_what_changed_this_very_moment_is_read_again(tmp_path, monkeypatch, cache):
    """A second change in the same tick of the clock leaves no trace in the times."""
    monkeypatch.setattr(digests, "SETTLED_NS", 10**15)
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    times = dict.fromkeys(("st_mtime_ns", "st_ctime_ns"), 2**62)
    same = SimpleNamespace(st_mode=path.stat().st_mode, st_size=1 << 27, st_ino=1, **times)
    monkeypatch.setattr(Path, "stat", lambda self, **options: same)
    first = digests.sha256(path, "model.path")
    path.write_bytes(b"two")
    assert digests.sha256(path, "model.path") != first


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
        (["experiment=handoff_accuracy", "relay=gsm8k", f"relay.path={shipped.TEXTS}/gsm8k_test_300.jsonl"],
         {"relay": "gsm8k+path=gsm8k_test_300.jsonl"}),
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


def test_a_file_with_the_name_of_a_model_is_that_name_and_the_file():
    cfg = config.load_group("model", "gguf")
    cfg.update(name="smollm2-135m", path="/a/q4.gguf", question_style="plain")
    assert naming.label("model", cfg) == "smollm2-135m q4.gguf+question_style=plain"


def test_files_are_named_in_labels_and_rows(checkpoint, tmp_path):
    text = tmp_path / "my report.txt"
    text.write_text("a text")
    settled, _ = prepared("experiment=polykv_quality", "model=local", f"model.path={checkpoint}",
                          "document=file", f"document.path={text}",
                          f"document.questions={text}")  # fmt: skip
    rows = settings.new_rows(settled)
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
