"""polykv: shared and handed-off KV caches, measured.

`load_model` and `load_recipe` give a model with its tokenizer, and how its cache is to be compressed. A `SharedKVPool`
holds a document's cache, compressed once, for many agents: each rebuilds an unshared cache from it, or all attend to
the one copy (`CascadeCache`, within `attend_in_place`). A `CacheCard` is a cache sealed into a file and handed on.

What the caller can mend is a `PolyKVError` of one line that says how; a card that cannot be trusted or read is a
`CardError`. Tensors are (batch, kv_heads, tokens, head_dim); sizes are bytes, ratios are to fp16, a cache's own dtype
is the model's. The folder examples/ shows each of them at work.

The names load on first use, so that `import polykv` (and `run.py --help`) need not wait for torch.
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
