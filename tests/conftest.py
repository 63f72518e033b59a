"""Tiny random models of every supported architecture, and a tokenizer trained on the spot."""

import gc
import io
import os
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

# The tests prove that no hub is needed, on machines that have one too.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
# Triton reads it when it loads, which torch or transformers may make it do.
os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from experiments import sweep
from polykv.config import CONF, REPO

torch.set_num_threads(1)
# A loaded machine is no failure of a test: hypothesis' deadline is in wall time.
hypothesis.settings.register_profile("polykv", deadline=None)
hypothesis.settings.load_profile("polykv")
# Started in the background by a script, they would ignore Ctrl-C, and so would all processes that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

TEXT = (
    "The pool is written once and read by many agents . Each agent asks a question of its own . "
    "A quantized cache is smaller than a full cache , and its answers are nearly the same . "
) * 12

COMMON = {
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
LLAMA_LIKE = {**COMMON, **TOKENS, "intermediate_size": 64, "num_key_value_heads": 2}
ARCHITECTURES = {
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 16},
    "mistral": {**LLAMA_LIKE, "sliding_window": None},
    "smollm3": {**LLAMA_LIKE, "no_rope_layer_interval": 4},
    "phi3": LLAMA_LIKE,
    "gpt2": {"vocab_size": 300, "n_positions": 256, "n_embd": 32, "n_layer": 4, "n_head": 4}
    | TOKENS,
    "gpt_neox": {**COMMON, **TOKENS, "intermediate_size": 64},
}


def pytest_collection_finish():
    """Take what is imported out of garbage collection: full collections would look through all of it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or nanobind complains of leaks at exit


def tiny_model(architecture: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **(ARCHITECTURES[architecture] | changes))
    # Random weights of the usual scale give nearly flat logits; a larger scale makes greedy choices clear.
    config.initializer_range = 0.3
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="session")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, llama, tokenizer) -> Path:
    """A local model folder as save_pretrained makes it, and a text beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def run_py(*overrides: str) -> subprocess.CompletedProcess:
    """`python run.py OVERRIDES`, called in this process: it costs nothing to import again."""
    from experiments import processes
    from experiments.session import of_process

    command = [str(REPO / "run.py"), *overrides]
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
    ):
        patch.chdir(REPO)
        patch.setattr(sys, "argv", command)
        patch.setattr(of_process(), "storage_failed", "")
        patch.setenv("HYDRA_FULL_ERROR", "1")  # run.py sets it: what was there comes back
        patch.setattr(sweep, "ended", None)
        patch.setattr(processes, "settle_signals", lambda: None)  # for good, in this process
        with pytest.raises(SystemExit) as end:
            runpy.run_path(command[0], run_name="__main__")
    return subprocess.CompletedProcess(command, end.value.code or 0, out.getvalue(), err.getvalue())


def run_process(*overrides: str) -> subprocess.CompletedProcess:
    """`python run.py OVERRIDES` as a user starts it."""
    command = [sys.executable, str(REPO / "run.py"), *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=REPO)


@pytest.fixture(params=["called", pytest.param("process", marks=pytest.mark.slow)])
def run_either(request):
    """Runs run.py: called in this process, and, where slow tests are run, as a process of its own too."""
    return run_py if request.param == "called" else run_process


def first_cell(overrides):
    """The overrides of a sweep's first cell."""
    found = []
    for override in OverridesParser.create().parse_overrides(overrides):
        value = (
            next(override.sweep_string_iterator())
            if override.is_sweep_override()
            else override.get_value_element_as_str()
        )
        found.append(f"{override.get_key_element()}={value}")
    return found


def checked_cell(*overrides):
    """(study, settled config) of one cell, which refuses as a run does."""
    from experiments.session import of_process

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cell = sweep.prepare(compose("config", list(overrides)))
    cell.study.check(cell.settled, of_process())
    return cell.study, cell.settled


def rows_of(*overrides):
    """The rows of one cell."""
    from experiments.session import of_process

    study, settled = checked_cell(*overrides)
    return study.run(settled, of_process())


def wide_model(**geometry):
    """The config of a model with random weights whose cache, not its weights, takes the memory."""
    common = {"model_type": "llama", "vocab_size": 1200, "intermediate_size": 256}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    settings = {"name": "wide", "weights": "random", "dtype": "float32"}
    return OmegaConf.create({**settings, "geometry": {**common, **heads, **geometry}})
