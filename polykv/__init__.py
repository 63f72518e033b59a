"""polykv: compressed KV caches that agents share (pools) or hand on (cards), and their evaluation.

`load_model` returns a model with its tokenizer, `load_recipe` says how its KV cache is compressed. A `SharedKVPool`
holds a document's cache, compressed once, for many agents: each decompresses an unshared copy, or all attend to the
compressed one (`CascadeCache`, within `attend_in_place`). A `CacheCard` is a cache sealed into a file, to hand on.

Errors that the caller can fix are a `PolyKVError`, with a one-line message that says how; for cards that cannot be read
or trusted it is a `CardError`. Tensors are (batch, kv_heads, tokens, head_dim), sizes are in bytes, and compression
ratios are relative to fp16. The folder examples/ has a program for each use.

Names are imported on first use, so that `import polykv` (and `run.py --help`) does not import torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "CacheCard": "polykv.handoff.card",
    "CardError": "polykv.handoff.cardfile",
    "CascadeCache": "polykv.attention.cache",
    "PolyKVError": "polykv.errors",
    "Recipe": "polykv.recipe",
    "SharedKVPool": "polykv.pool",
    "SigningKey": "polykv.handoff.signing",
    "attend_in_place": "polykv.attention.cascade",
    "available_recipes": "polykv.recipe",
    "load_model": "polykv.models",
    "load_recipe": "polykv.recipe",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'polykv' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
