"""Loading of models: from the hub, a folder, a GGUF file, the embedded reference model, or with random weights.

Functions that take a `cfg` take a model config: the settings of a YAML of conf/model (`config.load_group`), with
`weights` set to its `trained_weights` or to "random". `name` and `dtype` are always there; `geometry`, `path`,
`revision`, `packaged` and the settings of polykv/loading.py where they apply.
"""

import json
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from polykv import checkpoint, config, digests, gguf, gguf_header, hub, loading, packaged, said_once
from polykv.errors import PolyKVError
from polykv.linear import with_onednn
from polykv.reference import WEIGHTS_DIR

logging.disable_progress_bar()  # polykv/progress.py reports progress
said_once.deduplicate("transformers")
KINDS = ("hub", "local", "gguf", "reference", "random")
# Files of a local model on which its numbers depend.
PARTS = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "merges.txt", "vocab.txt")


def pick_device(device: str) -> torch.device:
    """The device of a name; `auto` is CUDA if available, else the CPU. A named device may be absent.

    Raises:
        PolyKVError: a name that torch does not know.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise _no_device(device, error) from error


def check_device(device: str) -> torch.device:
    """`pick_device`, for a device that has to be available.

    Raises:
        PolyKVError: names the device.
    """
    place = pick_device(device)
    try:
        return torch.empty(0, device=place).device
    except (RuntimeError, AssertionError) as error:
        raise _no_device(device, error) from error


def _no_device(device: str, error: Exception) -> PolyKVError:
    first = str(error).splitlines()[0]
    return PolyKVError(f"device={device} cannot be used ({first}); use device=cpu or auto")


def pick_dtype(name: str) -> torch.dtype:
    """A torch dtype by name.

    Raises:
        PolyKVError: not one of float32, bfloat16, float16.
    """
    if name not in ("float32", "bfloat16", "float16"):
        raise PolyKVError(f"no dtype named {name!r}; there are: float32, bfloat16, float16")
    return getattr(torch, name)


def load_config(cfg: DictConfig) -> PretrainedConfig:
    """The model's architecture: from the config's `geometry` if it has one, else from the checkpoint.

    Raises:
        PolyKVError: no such folder, or the hub cannot be reached.
    """
    if cfg.get("geometry"):
        geometry = OmegaConf.to_container(cfg.geometry, resolve=True)
        return AutoConfig.for_model(geometry.pop("model_type"), **geometry)
    if cfg.trained_weights == "gguf":
        return gguf.load_config(gguf_file(cfg))
    return _from_pretrained(AutoConfig, cfg)


def settle(cfg: DictConfig) -> None:
    """Resolve in a model config, in place, which weights it means on this machine, with their digest.

    Raises:
        PolyKVError: a folder or file that is missing or holds no model.
    """
    packaged.settle(cfg)
    if cfg.weights == "reference":
        cfg.digest = reference_digest()
    elif cfg.trained_weights == "local":
        cfg.digest = local_digest(cfg)
    elif cfg.trained_weights == "gguf":
        header = gguf_header.read(gguf_file(cfg))
        cfg.digest, cfg.file_type = header.sha256, header.file_type


def weights_label(cfg: DictConfig) -> str:
    """The column `weights` of rows, for a settled model config: kind and digest or commit of the weights."""
    if cfg.weights == "random":
        return "random"
    if cfg.weights == "hub":
        return f"hub@{hub.commit(cfg.path, cfg.revision)[:12]}"
    kind = f"gguf:{cfg.file_type}" if cfg.weights == "gguf" else cfg.weights
    return f"{kind}@{cfg.digest[:12]}"


def gguf_file(cfg: DictConfig) -> Path:
    """The file of a model config with GGUF weights.

    Raises:
        PolyKVError: no path, or no such file.
    """
    if "packaged" in cfg:
        return packaged.file_of(cfg.packaged)
    return gguf_header.find(_place(cfg))


@cache
def reference_digest() -> str:
    """Digest of the embedded weights."""
    return digests.of_file(WEIGHTS_DIR / "model.safetensors", "model=reference")


def local_digest(cfg: DictConfig) -> str:
    """Digest of a local model's config, tokenizer and weights; with random weights, of its config alone.

    Raises:
        PolyKVError: no path, a folder without a model, or an unreadable file.
    """
    folder = Path(_place(cfg))
    parts = ("config.json",) if cfg.weights == "random" else PARTS
    files = {path for part in parts for path in folder.glob(part)}
    return digests.of_files(files, "model.path")


def load_weights(cfg: DictConfig, device: str = "auto") -> tuple[PreTrainedModel, Any]:
    """Model (in evaluation mode, without gradients) and tokenizer of a model config.

    With random weights the tokenizer is the reference model's, whose ids are valid for every model.

    Raises:
        PolyKVError: an unreachable hub, a missing or incomplete checkpoint, an adapter, a tokenizer that does not fit,
            an unknown kind of weights or dtype, or settings of loading that are not available.
    """
    check_weights(cfg)
    dtype, place = pick_dtype(cfg.dtype), check_device(device)
    loading.check(cfg, place)
    options = {"dtype": dtype, **loading.options(cfg, place, dtype)}
    if cfg.get("threads") and place.type == "cpu":
        torch.set_num_threads(cfg.threads)
    if cfg.weights == "random":
        torch.manual_seed(0)
        with torch.device(place):
            model = AutoModelForCausalLM.from_config(
                load_config(cfg), trust_remote_code=False, **options
            )
    else:
        model = _whole(cfg, **options)
        model = model if "device_map" in options else model.to(place)
        _warn_of_branch(cfg, model)
    tokenizer = load_tokenizer(cfg)
    if cfg.weights != "random":
        checkpoint.check_rows(model, tokenizer, cfg.name)
    with_onednn(model)
    return model.eval().requires_grad_(False), tokenizer


@dataclass(frozen=True)
class ModelSource:
    """A model that is not loaded yet: hashable, and picklable for a process that loads it itself.

    `settings`: a settled model config (`settle`), as JSON.
    """

    settings: str

    @classmethod
    def of(cls, cfg: DictConfig) -> "ModelSource":
        """The source that a model config describes."""
        return cls(json.dumps(OmegaConf.to_container(cfg, resolve=True)))

    @property
    def _cfg(self) -> DictConfig:
        return OmegaConf.create(json.loads(self.settings))

    @property
    def name(self) -> str:
        return self._cfg.name

    @property
    def dtype(self) -> str:
        return self._cfg.dtype

    def config(self) -> PretrainedConfig:
        """The architecture; raises as `load_config`."""
        return load_config(self._cfg)

    def load(self, device: str = "auto") -> tuple[PreTrainedModel, Any]:
        """Model and tokenizer; raises as `load_weights`."""
        return load_weights(self._cfg, device)

    def n_parameters(self) -> int:
        """Counted on the meta device, once per process."""
        return _n_parameters(self)


@lru_cache(maxsize=8)
def _n_parameters(source: ModelSource) -> int:
    with torch.device("meta"):
        config = source.config()
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()


def check_folder(cfg: DictConfig) -> None:
    """Validate weights and tokenizer of a local model; only names and shapes of weights are read.

    Raises:
        PolyKVError: as `load_weights`.
    """
    _check_folder(cfg.path, local_digest(cfg))


@cache
def _check_folder(path: str, _of_version: str) -> None:
    cfg = config.load_group("model", "local")
    cfg.path, cfg.weights = path, "local"
    tokenizer = load_tokenizer(cfg)
    # Quantized checkpoints may need their device: they are validated on loading.
    if getattr(load_config(cfg), "quantization_config", None) is None:
        checkpoint.check_rows(_whole(cfg, device_map="meta"), tokenizer, path)


def _whole(cfg: DictConfig, **options: Any) -> PreTrainedModel:
    """The model of a checkpoint, after checking that the checkpoint has all of its weights."""
    with checkpoint.report_as_refusal():
        model, found = _from_pretrained(
            AutoModelForCausalLM, cfg, use_safetensors=True, **checkpoint.REPORTED, **options
        )
    checkpoint.check_whole(found, _holder(cfg), _remedy(cfg, checkpoint.WHOLE))
    return model


def _warn_of_branch(cfg: DictConfig, model: PreTrainedModel) -> None:
    """Warn of a hub revision that is not a commit and may change."""
    if cfg.trained_weights == "hub" and not hub.COMMIT.fullmatch(cfg.revision):
        commit = getattr(model.config, "_commit_hash", None)
        warnings.warn(
            f"model {cfg.name}: revision={cfg.revision} is a branch, which may change; to pin these weights, add "
            f"model.revision={commit or 'COMMIT'}",
            stacklevel=3,
        )


def load_tokenizer(cfg: DictConfig) -> Any:
    """The tokenizer of a model config.

    Raises:
        PolyKVError: as `load_weights`, or there is none.
    """
    if cfg.weights == "random":
        return AutoTokenizer.from_pretrained(WEIGHTS_DIR, trust_remote_code=False)
    if cfg.trained_weights == "gguf":
        return gguf.load_tokenizer(gguf_file(cfg))
    tokenizer = _from_pretrained(AutoTokenizer, cfg)
    checkpoint.check_vocabulary(tokenizer, _holder(cfg))
    return tokenizer


def check_weights(cfg: DictConfig) -> None:
    """Check that the model has the kind of weights requested.

    Raises:
        PolyKVError: an unknown kind, or another kind than the model's trained weights.
    """
    if cfg.weights not in KINDS:
        raise PolyKVError(
            f"weights={cfg.weights} is not known{config.did_you_mean(cfg.weights, list(KINDS))}"
        )
    if cfg.weights != "random" and cfg.weights != cfg.trained_weights:
        raise PolyKVError(
            f"model {cfg.name!r} has {cfg.trained_weights} weights, not {cfg.weights}; "
            f"leave weights out or use weights=random"
        )


def load_model(
    name_or_path: str, device: str = "auto", dtype: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer by a name in conf/model, or from a local folder or GGUF file.

    Args:
        dtype: of the weights, such as "bfloat16"; None: that of the model's config.

    Raises:
        PolyKVError: neither a known name nor a path, an unknown dtype, or loading fails.
    """
    cfg = config_of(name_or_path)
    cfg.dtype = dtype or cfg.dtype
    return load_weights(cfg, device)


def config_of(name_or_path: str) -> DictConfig:
    """The settled model config of a name in conf/model, a local folder or a GGUF file.

    Raises:
        PolyKVError: neither a known name nor a path, or no model there.
    """
    place = Path(name_or_path)
    if name_or_path in config.available("model") or not (place.suffix == ".gguf" or place.is_dir()):
        cfg = config.load_group("model", name_or_path)
    else:
        plain = place.is_dir() and (
            (place / "config.json").is_file() or not any(place.glob("*.gguf"))
        )
        cfg = config.load_group("model", "local" if plain else "gguf")
        cfg.path = str(place)
    cfg.weights = cfg.trained_weights
    settle(cfg)
    return cfg


def _from_pretrained(auto: Any, cfg: DictConfig, **options: Any) -> Any:
    """`from_pretrained` of a model config's checkpoint, with a one-line error."""
    path = _holder(cfg)
    if cfg.trained_weights == "hub":
        options["revision"] = cfg.revision
        checkpoint.check_adapter(path, revision=cfg.revision)
    try:
        return auto.from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        first = str(error).strip().splitlines()[0].rstrip(": ")
        what = "the tokenizer of model" if auto is AutoTokenizer else "model"
        raise PolyKVError(
            f"{what} {cfg.name!r} cannot be loaded from {path} ({first}); {_remedy(cfg, _at_hand(cfg))}"
        ) from error


def _holder(cfg: DictConfig) -> Path | str:
    """The folder or hub id of a model's checkpoint; a GGUF file is converted into one."""
    return gguf.converted(gguf_file(cfg)) if cfg.trained_weights == "gguf" else _place(cfg)


def _remedy(cfg: DictConfig, remedy: str) -> str:
    """What to do if a model cannot be loaded: `remedy`, unless it is a converted GGUF file."""
    if cfg.trained_weights == "gguf":
        return "remove that folder, and the file is converted again"
    return remedy


def _at_hand(cfg: DictConfig) -> str:
    """How to make a model's files available."""
    if cfg.trained_weights != "hub":
        return "check that the folder holds config.json, *.safetensors and the tokenizer"
    return (
        f"{packaged.remedy(cfg)}connect to the hub (or set HF_HOME to a filled cache), give a folder with "
        "model=local model.path=..., or use weights=random where only memory or time is measured"
    )


def _place(cfg: DictConfig) -> Path | str:
    """The folder, file or hub id of a model config; a local folder is checked to hold a model."""
    if cfg.trained_weights == "reference":
        return WEIGHTS_DIR
    if OmegaConf.is_missing(cfg, "path") or not cfg.path:
        what = "file" if cfg.trained_weights == "gguf" else "folder"
        raise PolyKVError(f"model={cfg.name} needs a {what}; add model.path=/path/to/the/model")
    if cfg.trained_weights == "local":
        if Path(cfg.path).is_dir():  # any other name is a hub id to transformers
            checkpoint.check_adapter(cfg.path)
        if not (Path(cfg.path) / "config.json").is_file():
            raise PolyKVError(
                f"no model in {cfg.path}: it holds no config.json; give a folder made by save_pretrained"
            )
    return cfg.path
