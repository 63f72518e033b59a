"""What is no whole model is refused by name however it is loaded, what is whole is not, and no warning is muted."""

import logging
import shutil

import pytest
from conftest import ARCHITECTURES, LLAMA_LIKE, TEXT, checked_cell, tiny_model
from gguf_files import tensors_of, write
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM

import polykv
from polykv import config, models, said_once
from polykv.config import CONF
from polykv.errors import PolyKVError

LAYER = "model.layers.2."
# How a checkpoint is damaged, and what a refusal names of it.
DAMAGES = {
    "an adapter's names": (
        lambda w: {f"base_model.model.{name}": x for name, x in w.items()},
        ["39 missing", "39 unexpected", "base_model.model.lm_head.weight"],
    ),
    "a compiled model's names": (
        lambda w: {f"_orig_mod.{name}": x for name, x in w.items()},
        ["39 missing", "39 unexpected", "_orig_mod.lm_head.weight"],
    ),
    "a layer missing": (
        lambda w: {name: x for name, x in w.items() if not name.startswith(LAYER)},
        ["9 missing", f"{LAYER}input_layernorm.weight"],
    ),
    "a head that is neither tied nor stored": (
        lambda w: {name: x for name, x in w.items() if name != "lm_head.weight"},
        ["1 missing", "lm_head.weight"],
    ),
    "a tensor too many": (
        lambda w: w | {f"{LAYER}self_attn.q_proj.bias": w["model.norm.weight"].clone()},
        ["1 unexpected", f"{LAYER}self_attn.q_proj.bias"],
    ),
    "a norm of another length": (
        lambda w: w | {"model.norm.weight": w["model.norm.weight"][:8].clone()},
        ["1 of another shape", "model.norm.weight", "(8,)", "(32,)"],
    ),
}


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the tiny model's folder, to damage."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def refused(act, *words):
    """That it is refused in one line that has these words."""
    with pytest.raises(PolyKVError) as caught:
        act()
    said = str(caught.value)
    assert "\n" not in said and [word for word in words if word not in said] == [], said


def quality_of(folder, **settings):
    given = {"context": 100, "n_agents": 1, "max_new_tokens": 2, "scorer": "minilm"} | settings
    return checked_cell(
        "experiment=polykv_quality", "model=local", f"model.path={folder}", "document=file",
        f"document.path={folder}/text.txt", *(f"{name}={value}" for name, value in given.items()),
    )  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_are_not_the_models_are_refused_by_name(folder, damage, capfd):
    change, words = DAMAGES[damage]
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    cfg = config.load_group("model", "local")
    cfg.path, cfg.weights = str(folder), "local"
    for device_map in (None, "auto"):
        cfg.device_map = device_map
        refused(lambda: models.load_weights(cfg, "cpu"), str(folder), *words)
    # Before any cell is run, and without the library's table beside the one line.
    refused(lambda: quality_of(folder), str(folder), *words)
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_weights_of_the_hub_are_no_exception(folder, monkeypatch):
    path = folder / "model.safetensors"
    save_file(DAMAGES["a layer missing"][0](load_file(path)), path, metadata={"format": "pt"})
    cfg = config.load_group("model", "qwen2.5-0.5b")
    cfg.weights, cfg.path, cfg.revision = "hub", str(folder), "a" * 40
    refused(lambda: models.load_weights(cfg, "cpu"), "9 missing", LAYER)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_gguf_weights_are_no_exception(change, llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("POLYKV_CACHE", str(tmp_path / "cache"))
    name = "blk.2.attn_q.weight" if change == "missing" else "blk.9.attn_q.weight"
    values = None if change == "missing" else tensors_of(llama)["blk.2.attn_q.weight"]
    path = write(tmp_path / "m.gguf", llama, tokenizer, tensors={name: values})
    refused(lambda: polykv.load_model(str(path), "cpu"), str(path))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_damaged_conversion_is_refused_and_says_how_to_have_it_anew(
    llama, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("POLYKV_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "m.gguf", llama, tokenizer)
    polykv.load_model(str(path), "cpu")
    (kept,) = (tmp_path / "cache").rglob("model.safetensors")
    save_file(DAMAGES["a layer missing"][0](load_file(kept)), kept, metadata={"format": "pt"})
    refused(lambda: polykv.load_model(str(path), "cpu"), str(kept.parent), LAYER, "remove")


OTHERS = {
    "gemma": LLAMA_LIKE | {"head_dim": 8},
    "falcon": {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mixtral": LLAMA_LIKE | {"num_local_experts": 4},
    "olmo2": LLAMA_LIKE,
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [
        pytest.param(architecture, tied, marks=() if place % 2 == tied else pytest.mark.slow)
        for place, architecture in enumerate((*ARCHITECTURES, *OTHERS))
        for tied in (False, True)
    ],
)
def test_tied_heads_and_buffers_that_are_not_stored_are_no_fault(
    architecture, tied, tokenizer, tmp_path
):
    settings = (ARCHITECTURES | OTHERS)[architecture] | {"tie_word_embeddings": tied}
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **settings)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = polykv.load_model(str(tmp_path), "cpu")
    cfg = OmegaConf.create({"path": str(tmp_path), "weights": "local", "trained_weights": "local"})
    models.check_folder(cfg)
    assert model.num_parameters() > 0


# Adapters and tokenizers


@pytest.mark.parametrize("base", ["beside its base model", "alone"])
def test_an_adapter_is_refused_by_name(folder, base):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if base == "alone":
        (folder / "config.json").unlink()
        (folder / "model.safetensors").unlink()
    cfg = config.load_group("model", "local")
    cfg.path, cfg.weights = str(folder), "local"
    refused(lambda: models.load_weights(cfg, "cpu"), "adapter_config.json", str(folder))
    refused(lambda: quality_of(folder), "adapter_config.json", str(folder))


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "gpt_neox", "llama"])
def test_a_folder_without_a_tokenizer_is_refused(architecture, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    refused(lambda: polykv.load_model(str(tmp_path), "cpu"), "tokenizer", str(tmp_path))
    refused(lambda: quality_of(tmp_path), "tokenizer", str(tmp_path))


@pytest.mark.parametrize("needed_by", ["every text", "chat", "nothing"])
def test_tokens_beyond_the_embedding_are_refused_where_a_text_can_have_them(
    folder, tokenizer, needed_by, tmp_path
):
    extended = type(tokenizer).from_pretrained(folder)
    first = tiny_model("llama").config.vocab_size
    n_free = first - len(extended)
    extended.add_tokens([AddedToken(f"<free {n}>", special=True) for n in range(n_free)])
    extended.add_tokens([AddedToken("<beyond>", special=True)])
    assert extended.convert_tokens_to_ids("<beyond>") == first
    if needed_by == "every text":
        extended.backend_tokenizer.post_processor = TemplateProcessing(
            single="<beyond> $A", special_tokens=[("<beyond>", first)]
        )
    elif needed_by == "chat":
        extended.chat_template = "<beyond>{{ messages[0].content }}"
    extended.save_pretrained(folder)
    if needed_by == "nothing":  # as the tokens for images of a text model
        polykv.load_model(str(folder), "cpu")
    else:
        refused(
            lambda: polykv.load_model(str(folder), "cpu"), f"<beyond> ({first})", f"{first} rows"
        )
        refused(lambda: quality_of(folder), f"<beyond> ({first})")


def test_ordinary_tokens_beyond_the_embedding_are_refused(folder):
    small = tiny_model("llama", vocab_size=200)
    small.save_pretrained(folder)
    refused(lambda: polykv.load_model(str(folder), "cpu"), "200 rows", "(200)")


# Warnings


def test_hydra_leaves_the_libraries_loggers_alone():
    """A logger that is there when a cell starts still says its warnings."""
    logger = logging.getLogger("transformers.of_a_test")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", return_hydra_config=True)
    from hydra.core.utils import configure_log

    level = logging.getLogger().level
    for name in ("hydra_logging", "job_logging"):
        configure_log(cfg.hydra[name], False)
    assert not logger.disabled and logging.getLogger().level == level


def test_a_warning_is_printed_once_and_another_one_too(capfd):
    logger = logging.getLogger("library_of_a_test")
    logger.addHandler(logging.StreamHandler())
    said_once.deduplicate("library_of_a_test")
    child = logging.getLogger("library_of_a_test.part")
    for text in ("one", "one", "two", "one"):
        child.warning("part %s", text)
    assert capfd.readouterr().err.split("\n") == ["part one", "part two", ""]
