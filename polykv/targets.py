"""Import of the classes and functions that a YAML names as `_target_`. Torch-free."""

from importlib import import_module
from typing import Any

from polykv.errors import PolyKVError


def find(name: str) -> Any:
    """The class or function of a dotted name, such as polykv.codecs.uniform.Uniform or a user's own on PYTHONPATH.

    Raises:
        PolyKVError: no such name, or a module that cannot be imported.
    """
    module, _, attribute = str(name).rpartition(".")
    if not module:
        raise PolyKVError(f"_target_: {name} names no module; give package.module.Name")
    try:
        return getattr(import_module(module), attribute)
    except Exception as error:  # importing runs a user's code, which may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PolyKVError(f"_target_: {name} cannot be imported: {reason}") from error
