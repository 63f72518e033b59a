"""GGUF models: read by transformers, and converted once into a safetensors checkpoint in the user's cache folder.

The folder is $POLYKV_CACHE, or the platform's. A converted model holds the dequantized weights in float32, which is
exact for every `model.dtype`, and takes 4 bytes per parameter.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from polykv import cache_folder, checkpoint, gguf_header
from polykv.errors import PolyKVError
from polykv.gguf_header import Header
from polykv.supported import check_attends, check_model

VERSION = 1  # of the conversion's output: files are converted again when it is raised
CHECKPOINT = "use model=local with the original checkpoint"
# How a byte-level tokenizer splits text before merges apply (tokenizer.ggml.pre; llama.cpp, src/llama-vocab.cpp).
# transformers 5.23 splits unknown kinds as GPT-2 did, which is wrong for those that separate digits.
AS_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion")
SEPARATES_DIGITS = (
    "smollm",
    "starcoder",
    "refact",
    "command-r",
    "codeshell",
    "exaone",
    "minerva-7b",
)
# Of these, a piece in the vocabulary is one token regardless of merges, and a text begins with BOS unless the file says
# otherwise. transformers 5.23 implements neither.
AS_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")
# Llama 3.1 and later: the only scaling of rotary frequencies that files store as factors (`factor` is the largest).
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def load_config(path: Path) -> PretrainedConfig:
    """The architecture of a GGUF file, without converting it.

    Raises:
        PolyKVError: as `gguf_header.read`, or a model that transformers cannot read.
    """
    return deepcopy(_read(AutoConfig, gguf_header.read(path)))


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a GGUF file, with its chat template, without converting the file.

    Raises:
        PolyKVError: as `load_config`, or an unknown way of splitting text.
    """
    return deepcopy(_read(AutoTokenizer, gguf_header.read(path)))


def converted(path: Path) -> Path:
    """The folder of a GGUF file's converted model (config, tokenizer, safetensors), made on first use.

    It is renamed into place; any number of processes may call this at the same time.

    Raises:
        PolyKVError: as `load_tokenizer`, an unsupported architecture, or no disk space.
    """
    header = gguf_header.read(path)
    place = _place(header)
    if place.is_dir():
        return place
    config, tokenizer = load_config(path), load_tokenizer(path)
    check_model(config)
    check_attends(config, "model=gguf")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            if not place.is_dir():
                _convert(header, config, tokenizer, place)
    except OSError as error:
        raise PolyKVError(
            f"{path} cannot be converted into {place.parent} ({error.strerror or error}); set POLYKV_CACHE "
            f"to a folder with {4 * header.n_values / 1e9:.1f} GB of free space"
        ) from error
    return place


def _place(header: Header) -> Path:
    return cache_folder.find() / f"gguf-{VERSION}" / header.sha256


@lru_cache(maxsize=8)
def _read(auto: Any, header: Header) -> Any:
    """Config (AutoConfig) or tokenizer (AutoTokenizer), from the converted model if there is one."""
    if (place := _place(header)).is_dir():
        return auto.from_pretrained(place, trust_remote_code=False)
    with _read_alone(header) as options:
        part = auto.from_pretrained(**options, trust_remote_code=False)
    if auto is AutoConfig:
        _set_rope(header, part)
    else:
        part.name_or_path = str(header.path)
        _set_split(header, part)
    return part


@contextmanager
def _read_alone(header: Header) -> Iterator[dict[str, str]]:
    """Arguments of `from_pretrained` for this file alone: a tokenizer.json beside it would take precedence.

    Raises:
        PolyKVError: transformers cannot read it.
    """
    with TemporaryDirectory() as folder:
        link = Path(folder) / "model.gguf"
        link.symlink_to(header.path.absolute())
        try:
            yield {"pretrained_model_name_or_path": folder, "gguf_file": str(link)}
        except Exception as error:  # transformers raises KeyError, ValueError, TypeError, ...
            why = " ".join(str(error).split()) or type(error).__name__
            raise PolyKVError(
                f"{header.path} holds a {header.architecture!r} model that transformers cannot read ({why}); "
                f"{CHECKPOINT}"
            ) from error


def _set_rope(header: Header, config: PretrainedConfig) -> None:
    """Set the scaling of rotary frequencies in the config, which transformers' reader ignores.

    Raises:
        PolyKVError: another scaling than Llama 3's.
    """
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    if scaling == "none" and not header.rope:
        return
    factors = header.rope.get("rope_freqs.weight")
    if scaling == "none" and len(header.rope) == 1 and factors is not None:
        plain = dict(config.rope_parameters)
        config.rope_parameters = plain | LLAMA3 | {"factor": float(factors.max())}
        scaled = ROPE_INIT_FUNCTIONS["llama3"](config)[0].double().numpy()
        unscaled = plain["rope_theta"] ** -(np.arange(len(scaled)) / len(scaled))
        if factors.shape == scaled.shape and np.allclose(unscaled / scaled, factors, rtol=1e-4):
            return
    raise PolyKVError(
        f"{header.path} scales its rotary frequencies in an unsupported way; {CHECKPOINT}"
    )


def _set_split(header: Header, tokenizer: Any) -> None:
    """Make a byte-level tokenizer split text as in the training of its vocabulary.

    Raises:
        PolyKVError: the file does not say how, or names an unknown way.
    """
    if header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return
    split, backend = header.metadata.get("tokenizer.ggml.pre", "unset"), tokenizer.backend_tokenizer
    if split in SEPARATES_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, as_gpt2])
    elif split in AS_LLAMA3:
        backend.model.ignore_merges = True
        tokenizer.add_bos_token = header.metadata.get("tokenizer.ggml.add_bos_token", True)
    elif split not in AS_GPT2 and split not in GGUF_PRE_TOKENIZER_SPLITS:
        raise PolyKVError(
            f"{header.path} has a tokenizer that splits text in an unknown way "
            f"(tokenizer.ggml.pre={split}); {CHECKPOINT}"
        )


def _convert(header: Header, config: PretrainedConfig, tokenizer: Any, place: Path) -> None:
    """Write the converted model into a temporary folder, then rename it to `place`."""
    print(f"converting {header.path} once, into {place}", file=sys.stderr, flush=True)
    partial = place.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    try:
        for part in (_dequantized(header, config), tokenizer):
            part.save_pretrained(partial)
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _dequantized(header: Header, config: PretrainedConfig) -> PreTrainedModel:
    """The model in float32, without the attributes of quantization that keep transformers from saving it.

    Raises:
        PolyKVError: the tensors of model and file do not match.
    """
    with _read_alone(header) as options, checkpoint.report_as_refusal():
        model, found = AutoModelForCausalLM.from_pretrained(
            **options,
            **checkpoint.REPORTED,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
        )
    checkpoint.check_whole(found, header.path, CHECKPOINT)
    # transformers does not report tensors of the file whose names it does not know.
    n_values = sum(parameter.numel() for parameter in model.parameters())
    if n_values != header.n_values:
        raise PolyKVError(
            f"{header.path} holds {header.n_values:,} numbers and its architecture {n_values:,}; {CHECKPOINT}"
        )
    model.hf_quantizer = None
    del model.config.quantization_config
    return model
