"""polykv: shared and handed-off KV caches, measured.

The names below load on first use, so that `import polykv` (and `run.py --help`) need not wait for torch.
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
