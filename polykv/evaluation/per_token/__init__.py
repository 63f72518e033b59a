"""Metrics per scored token besides nll and kl (evaluation/continuation.py): one module each, discovered here.

A module has the metric's name. It defines `UNIT`, `VERSION` (raised when its numbers change) and
`of(full_TV, other_TV, labels_T1)`, which returns a tensor (scored tokens,) from the fp32 log-probabilities (scored
tokens, vocabulary) of the uncompressed run and of the run compared with it, and the true tokens (scored tokens, 1).
"""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

METRICS: Mapping[str, ModuleType] = {
    module.name: import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)
}
