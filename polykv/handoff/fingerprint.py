"""Fingerprints of models and tokenizers, by which a card identifies those that made it.

A fingerprint is computed once per object: weights changed in place afterwards go unnoticed.
"""

import hashlib
import json
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

SAMPLED = 1 << 18  # bytes read of a larger tensor, at equal strides
# Settings of how a model is loaded or run.
_NOT_IDENTITY = ("transformers_version", "name_or_path", "use_cache", "output_attentions")

_models: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
_tokenizers: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def of_model(model: PreTrainedModel) -> str:
    """SHA-256 of the config and of every tensor's name, dtype, shape and bytes.

    Of tensors larger than SAMPLED bytes only a sample of that size is read: large models that differ in a few other
    weights only have the same fingerprint.
    """
    if model not in _models:
        config = model.config.to_dict()
        kept = {k: v for k, v in config.items() if k not in _NOT_IDENTITY and not k.startswith("_")}
        sha = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
        # keep_vars: packed weights (polykv/linear.py) are made dense one by one.
        for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(_bytes(tensor))
        _models[model] = sha.hexdigest()
    return _models[model]


def of_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of the tokenizer's serialization, or of its vocabulary if it has none."""
    if tokenizer not in _tokenizers:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # Padding and truncation are set per call and do not change the meaning of ids.
        content = json.loads(backend.to_str()) if backend else tokenizer.get_vocab()
        for setting in ("padding", "truncation") if backend else ():
            content.pop(setting, None)
        text = json.dumps([content, tokenizer.special_tokens_map], sort_keys=True, default=str)
        _tokenizers[tokenizer] = hashlib.sha256(text.encode()).hexdigest()
    return _tokenizers[tokenizer]


def _bytes(tensor: Tensor) -> bytes:
    dense = tensor.detach().to_dense() if tensor.is_mkldnn else tensor.detach()
    flat = dense.reshape(-1)
    if flat.nbytes > SAMPLED:
        flat = flat[:: -(-flat.nbytes // SAMPLED)]
    return flat.contiguous().view(torch.uint8).cpu().numpy().tobytes()
