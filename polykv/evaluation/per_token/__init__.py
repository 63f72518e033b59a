"""Metrics of each scored token beside nll and kl (evaluation/continuation.py): one module each, found by its name.

The module's name is the metric's. It has `UNIT`, `VERSION` (raised when its numbers change) and
`of(full_TV, other_TV, labels_T1)`: from fp32 log-probabilities (scored tokens, vocabulary) of the uncompressed run and
of the run compared with it, and the true tokens (scored tokens, 1), a tensor (scored tokens,).
"""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

METRICS: Mapping[str, ModuleType] = {
    module.name: import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)
}
