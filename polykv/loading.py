"""Settings of how a model is loaded: quantization of weights, placement on devices, attention, threads.

Functions that take a `cfg` take a model config (polykv/models.py), from which each of these settings may be absent.
They are part of a cell's identity unless they equal transformers' defaults.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import BitsAndBytesConfig

from polykv.errors import PolyKVError

# Setting `quantization` -> name of the format in rows.
QUANTIZED = {"bnb_4bit": "nf4", "bnb_8bit": "int8"}
FLASH = {"flash_attention_3": "flash-attn-3", "flash_attention_2": "flash-attn"}  # best first
ATTENTIONS = ("sdpa", "eager", *FLASH)
DEFAULTS = {
    "quantization": None,
    "device_map": None,
    "attn_implementation": "sdpa",
    "threads": None,
    "answer_dtype": None,
}
HOPPER = (9, 0)  # compute capability; FlashAttention 3 needs it


def settle(cfg: DictConfig, device: torch.device) -> None:
    """Resolve `auto` for this machine in a model config, in place, and remove settings that are defaults.

    Cells then keep the identity they had before a setting existed.
    """
    if "attn_implementation" in cfg:
        cfg.attn_implementation = attention(cfg, device)
    for name, default in DEFAULTS.items():
        if name in cfg and cfg[name] == default:
            del cfg[name]


def check(cfg: DictConfig, device: torch.device) -> None:
    """Validate the settings before anything is loaded.

    Raises:
        PolyKVError: an unknown value, a missing package, or settings that cannot be combined.
    """
    _check_quantization(cfg, device)
    _check_device_map(cfg, device)
    chosen = attention(cfg, device)
    if chosen not in ATTENTIONS:
        raise PolyKVError(
            f"model.attn_implementation={chosen} is not known; there are: auto, {', '.join(ATTENTIONS)}"
        )
    if chosen in FLASH:
        _check_flash(cfg, chosen, device)


def options(cfg: DictConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The settings as arguments of `from_pretrained`, which places the model itself if they have a `device_map`."""
    chosen: dict[str, Any] = {}
    if (name := attention(cfg, device)) != DEFAULTS["attn_implementation"]:
        chosen["attn_implementation"] = name
    if cfg.get("quantization") == "bnb_4bit":
        chosen["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    elif cfg.get("quantization") == "bnb_8bit":
        chosen["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if cfg.get("device_map"):
        # With device=cpu the whole model stays there, even on a machine with GPUs.
        chosen["device_map"] = "auto" if device.type == "cuda" else device.type
    elif cfg.get("quantization"):
        chosen["device_map"] = {"": device}
    return chosen


def dtype_label(cfg: DictConfig) -> str:
    """The column `dtype` of rows: dtype of computation and cache, and the format of quantized weights."""
    weights = quantized(cfg)
    return f"{cfg.dtype}, weights {weights}" if weights else cfg.dtype


def quantized(cfg: DictConfig) -> str:
    """The format of weights that are quantized on loading, as named in rows; else an empty string."""
    return QUANTIZED[cfg.quantization] if cfg.get("quantization") else ""


def attention(cfg: DictConfig, device: torch.device) -> str:
    """The attention implementation of a model config; `auto` is FlashAttention if it can run, else sdpa."""
    named = cfg.get("attn_implementation") or DEFAULTS["attn_implementation"]
    if named != "auto":
        return named
    if device.type == "cuda" and cfg.dtype != "float32":
        for name, package in FLASH.items():
            if installed(package) and (name != "flash_attention_3" or is_hopper(device)):
                return name
    return DEFAULTS["attn_implementation"]


def installed(package: str) -> bool:
    """Whether a distribution of this name is installed."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def is_hopper(device: torch.device) -> bool:
    """Whether the GPU is of the Hopper generation or newer, which FlashAttention 3 needs."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= HOPPER


def _check_quantization(cfg: DictConfig, device: torch.device) -> None:
    name = cfg.get("quantization")
    if name is None:
        return
    what = f"model.quantization={name}"
    if name not in QUANTIZED:
        raise PolyKVError(f"{what} is not known; there are: null, {', '.join(QUANTIZED)}")
    if cfg.weights == "random":
        raise PolyKVError(
            f"{what} is for trained weights; leave weights=random or quantization out"
        )
    if device.type != "cuda":
        raise PolyKVError(f"{what} needs a CUDA GPU, not device={device}; use quantization=null")
    if not installed("bitsandbytes"):
        raise PolyKVError(f"{what} needs bitsandbytes; run: pip install bitsandbytes")


def _check_device_map(cfg: DictConfig, device: torch.device) -> None:
    name = cfg.get("device_map")
    if name is None:
        return
    if name != "auto":
        raise PolyKVError(f"model.device_map={name} is not known; there are: null, auto")
    if cfg.weights == "random":
        raise PolyKVError("model.device_map=auto is for trained weights; leave one of them out")
    if device.index is not None:
        raise PolyKVError(
            f"device={device} names one GPU and model.device_map=auto takes all; use device={device.type}"
        )


def _check_flash(cfg: DictConfig, name: str, device: torch.device) -> None:
    what = f"model.attn_implementation={name}"
    if device.type != "cuda":
        raise PolyKVError(f"{what} needs a CUDA GPU, not device={device}; use auto or sdpa")
    if cfg.dtype == "float32":
        raise PolyKVError(f"{what} takes bfloat16 or float16, not model.dtype=float32; use sdpa")
    if not installed(FLASH[name]):
        raise PolyKVError(f"{what} needs {FLASH[name]}; install it, or use auto or sdpa")
