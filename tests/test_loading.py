"""How large models are loaded: quantized weights, several devices, attention; what cannot be had is one clear line."""

import re
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from conftest import checked_cell, tiny_model
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict
from transformers import AutoModelForCausalLM

from experiments import compare, sweep
from experiments.session import Session
from polykv import config, loading, models
from polykv.config import CONF
from polykv.errors import PolyKVError
from polykv.evaluation.continuation import score_rest
from polykv.pool import SharedKVPool, prefill
from polykv.recipe import load_recipe

WHOLE = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
AS_SHIPPED = {
    "quantization": None,
    "device_map": None,
    "attn_implementation": "auto",
    "threads": None,
}


def settings(**changes):
    base = {"name": "m", "weights": "local", "trained_weights": "local", "dtype": "bfloat16"}
    return OmegaConf.create({**base, **AS_SHIPPED, **changes})


@pytest.fixture
def nothing_installed(monkeypatch):
    def version(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(loading, "version", version)


@pytest.fixture
def all_installed(monkeypatch):
    monkeypatch.setattr(loading, "version", lambda package: "9.9")


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"quantization": "int3"}, CUDA, "quantization=int3 is not known; there are: null, bnb_4bit"),
        ({"quantization": "bnb_4bit"}, CPU, "bnb_4bit needs a CUDA GPU, not device=cpu"),
        ({"quantization": "bnb_8bit", "weights": "random"}, CUDA, "is for trained weights"),
        ({"device_map": "balanced"}, CUDA, "device_map=balanced is not known"),
        ({"device_map": "auto", "weights": "random"}, CUDA, "is for trained weights"),
        ({"device_map": "auto"}, torch.device("cuda:1"), "device=cuda:1 names one GPU"),
        ({"attn_implementation": "flashy"}, CUDA, "flashy is not known; there are: auto, sdpa"),
        ({"attn_implementation": "flash_attention_2"}, CPU, "needs a CUDA GPU, not device=cpu"),
        ({"attn_implementation": "flash_attention_2", "dtype": "float32"}, CUDA,
         "not model.dtype=float32"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(changes, device, message, all_installed):
    with pytest.raises(PolyKVError, match=message):
        loading.check(settings(**changes), device)


@pytest.mark.parametrize(
    ("changes", "package"),
    [
        ({"quantization": "bnb_4bit"}, "bitsandbytes"),
        ({"attn_implementation": "flash_attention_2"}, "flash-attn"),
        ({"attn_implementation": "flash_attention_3"}, "flash-attn-3"),
    ],
)
def test_a_missing_package_is_named(changes, package, nothing_installed):
    with pytest.raises(PolyKVError, match=f"needs {package};"):
        loading.check(settings(**changes), CUDA)


def test_what_can_be_had_is_not_refused(all_installed):
    for quantization in (None, *loading.QUANTIZED):
        for attention in ("auto", *loading.ATTENTIONS):
            cfg = settings(
                quantization=quantization, attn_implementation=attention, device_map="auto"
            )
            loading.check(cfg, CUDA)


def test_auto_attention_is_the_best_that_can_run(monkeypatch, all_installed):
    def auto(device, **changes):
        return loading.attention(settings(**changes), device)

    monkeypatch.setattr(loading, "is_hopper", lambda device: True)
    assert auto(CUDA) == "flash_attention_3"
    monkeypatch.setattr(loading, "is_hopper", lambda device: False)
    assert auto(CUDA) == "flash_attention_2"
    assert auto(CUDA, dtype="float32") == auto(CPU) == "sdpa"
    assert auto(CUDA, attn_implementation="eager") == "eager"
    monkeypatch.setattr(loading, "installed", lambda package: False)
    assert auto(CUDA) == "sdpa"


def test_options_are_those_of_from_pretrained(monkeypatch, all_installed):
    given = loading.options(settings(quantization="bnb_4bit"), CUDA, torch.bfloat16)
    nf4 = given["quantization_config"]
    assert nf4.load_in_4bit and nf4.bnb_4bit_quant_type == "nf4"
    assert nf4.bnb_4bit_compute_dtype == torch.bfloat16 and given["device_map"] == {"": CUDA}
    given = loading.options(
        settings(quantization="bnb_8bit", device_map="auto"), CUDA, torch.float16
    )
    assert given["quantization_config"].load_in_8bit and given["device_map"] == "auto"
    # device=cpu is kept on a machine with GPUs, where `auto` would take them.
    given = loading.options(settings(device_map="auto"), CPU, torch.float32)
    assert given == {"device_map": "cpu"}
    assert loading.options(settings(), CPU, torch.float32) == {}


def test_the_dtype_of_a_row_tells_quantized_weights():
    assert loading.dtype_label(settings()) == "bfloat16"
    assert loading.dtype_label(settings(quantization="bnb_4bit")) == "bfloat16, weights nf4"
    assert loading.dtype_label(settings(quantization="bnb_8bit")) == "bfloat16, weights int8"


def cell_of(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return sweep.prepare(compose("config", ["experiment=polykv_ratio", *overrides])).identity


def test_settings_are_identity_and_defaults_are_not():
    model = ["model=llama-3-8b", "weights=random"]
    changed = ["quantization=bnb_4bit", "quantization=bnb_8bit", "device_map=auto", "threads=2",
               "attn_implementation=eager", "dtype=float16"]  # fmt: skip
    cells = [cell_of(*model), *(cell_of(*model, f"model.{change}") for change in changed)]
    assert len(set(cells)) == len(cells)
    assert cell_of(*model, "model.attn_implementation=sdpa") == cells[0]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        before = compose("config", ["experiment=polykv_ratio", *model])
    with open_dict(before):  # as it was before these settings existed
        for name in loading.DEFAULTS:
            before.model.pop(name, None)
    assert sweep.prepare(before).identity == cells[0]


def test_a_model_of_several_devices_is_refused_where_one_is_measured(checkpoint):
    model = ["model=local", f"model.path={checkpoint}", "model.device_map=auto", "document=file",
             f"document.path={checkpoint}/text.txt", "context=100"]  # fmt: skip
    checked_cell("experiment=polykv_quality", *model)
    for name in ("polykv_memory", "concurrency", "handoff_ttft"):
        with pytest.raises(PolyKVError, match=f"over devices, and {name} "):
            checked_cell(f"experiment={name}", *model, "weights=local")
    with pytest.raises(PolyKVError, match="over devices, and compare with reader=in_place"):
        checked_cell("experiment=polykv_quality", *model, "reader=in_place")


def test_accelerate_places_a_model_that_answers_the_same(checkpoint, tokenizer, tmp_path):
    """Plain, loaded by accelerate, and with layers that accelerate fetches from the disk at every step."""
    cfg = config.load_group("model", "local")
    cfg.path, cfg.weights = str(checkpoint), "local"
    plain, _ = models.load_weights(cfg, "cpu")
    cfg.device_map = "auto"
    placed, _ = models.load_weights(cfg, "cpu")
    assert {p.device for p in placed.parameters()} == {CPU}
    places = {f"model.layers.{index}": "disk" if index in (1, 2) else "cpu" for index in range(4)}
    places |= dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    hooked = AutoModelForCausalLM.from_pretrained(
        checkpoint, device_map=places, offload_folder=str(tmp_path)
    ).eval()
    assert {p.device.type for p in hooked.parameters()} == {"cpu", "meta"}

    ids_BT = tokenizer("The pool is written once and read", return_tensors="pt").input_ids
    recipe = load_recipe("polykv")
    answers, logits = [], []
    for model in (plain, placed, hooked):
        pool = SharedKVPool.from_cache(prefill(model, ids_BT), recipe)
        answers.append(pool.ask(model, tokenizer, [" by", " many agents"], max_new_tokens=12))
        logits.append(score_rest(model, pool.dequantize(), ids_BT))
    assert answers[0] == answers[1] == answers[2] and all(answers[0])
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_a_local_models_cell_says_the_dtype_of_its_weights(checkpoint, monkeypatch):
    study, cfg = checked_cell(
        "experiment=polykv_quality", "model=local", f"model.path={checkpoint}", "document=file",
        f"document.path={checkpoint}/text.txt", "context=100", "n_agents=1", "max_new_tokens=2",
        "model.device_map=auto", "scorer=minilm",
    )  # fmt: skip
    assert study is compare.STUDY
    assert {row["dtype"] for row in study.run(cfg, Session())} == {"float32"}


@pytest.mark.parametrize("name", config.available("model"))
def test_every_hub_yaml_pins_a_commit_and_a_branch_is_told(name, monkeypatch, recwarn, tokenizer):
    cfg = config.load_group("model", name)
    if cfg.trained_weights != "hub":
        return
    cfg.weights = "hub"
    model = tiny_model("llama")
    model.config._commit_hash = "a" * 40
    asked = []

    def from_pretrained(path, **options):
        asked.append(options)
        return (model, WHOLE) if "output_loading_info" in options else tokenizer

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", from_pretrained)
    models.load_weights(cfg, "cpu")
    assert not recwarn.list
    assert re.fullmatch("[0-9a-f]{40}", cfg.revision)
    assert {options["revision"] for options in asked} == {cfg.revision}
    assert not any(options["trust_remote_code"] for options in asked)
    assert asked[0]["use_safetensors"]
    cfg.revision = "main"
    with pytest.warns(UserWarning, match=f"{name}: revision=main is a branch.*{'a' * 40}"):
        models.load_weights(cfg, "cpu")
