"""Versions of the code that produces a cell's numbers, for its identity.

In this package each codec declares `version`, and each module that produces numbers VERSION: integers that are raised
when the numbers change (tests/outputs.py checks that). For a user's code, a digest of its source is used, and for the
weights of a trained controller, which a user can train anew, that of their file.
"""

import ast
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from polykv import digests, gguf, targets
from polykv.errors import PolyKVError
from polykv.handoff import controller
from polykv.results import NOT_IDENTITY

PACKAGE = __name__.partition(".")[0]


def of(settings: Mapping[str, Any], made_by: Iterable[ModuleType]) -> dict[str, int | str]:
    """Versions on which a cell with these resolved settings depends; `made_by` are the modules that its study names.

    Integers are versions, by name of the class or module; strings are digests of source, by name of the module, or of
    weights, by name of the controller.

    Raises:
        PolyKVError: source that cannot be read.
    """
    modules = [*made_by, *([gguf] if settings.get("weights") == "gguf" else [])]
    found: dict[str, int | str] = {_short(module.__name__): module.VERSION for module in modules}
    for target in _targets({k: v for k, v in settings.items() if k not in NOT_IDENTITY}):
        found |= _of_target(target)
    for policy in (settings.get("policy"), *(settings.get("policies") or {}).values()):
        found |= _of_controllers(policy or {})
    return dict(sorted(found.items()))


def _of_controllers(policy: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the weights of the controllers among a policy's signals."""
    signals = {*policy.get("importance", ()), *policy.get("demand", ())}
    return {
        f"controller {name}": digests.of_file(controller.DATA / f"{name}.json", "policy")
        for name in sorted(signals & controller.FEATURES.keys())
    }


def _short(name: str) -> str:
    return name.removeprefix(f"{PACKAGE}.")


def _targets(node: Any) -> Iterator[str]:
    """All `_target_` of nested settings."""
    if isinstance(node, Mapping):
        if isinstance(target := node.get("_target_"), str):
            yield target
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _targets(child)


def _of_target(target: str) -> dict[str, int | str]:
    """Versions of our classes, with those that they inherit, or of a function's module; digest of a user's source."""
    try:
        made = targets.find(target)
    except PolyKVError:  # instantiating it raises a better message
        return {}
    found: dict[str, int | str] = {}
    for part in getattr(made, "__mro__", (made,)):
        module = getattr(part, "__module__", "builtins")
        if module.partition(".")[0] == PACKAGE:
            if "version" in vars(part):
                found[part.__name__] = part.version
            elif part is made and hasattr(sys.modules[module], "VERSION"):
                found[_short(module)] = sys.modules[module].VERSION
        elif part is made:  # a user's base classes are imported by its source
            found[module] = _source(module)
    return found


# Cached: an imported module keeps running as it is, even if its file is edited.
@cache
def _source(name: str) -> str:
    """Digest of a user's module, of the user's modules that it imports, and of the versions of ours among them."""
    path = Path(sys.modules[name].__file__ or "")
    home = path.parents[name.count(".") + (path.name == "__init__.py")]
    lines, seen, left = [], set(), [name]
    while left:
        module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        if module.partition(".")[0] == PACKAGE:
            lines.append(f"{module} {_declared(module)}")
        elif own := path if module == name else _beside(home, name, module):
            lines.append(f"{module} {digests.of_file(own, '_target_')}")
            left += _imports(module, own)
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:12]


def _beside(home: Path, name: str, other: str) -> Path | None:
    """The source file of `other`, if it belongs to the same package or user's folder as `name`."""
    installed = home.name in ("site-packages", "dist-packages")
    if installed and other.partition(".")[0] != name.partition(".")[0]:
        return None
    place = home.joinpath(*other.split("."))
    return next(
        (p for p in (place.with_name(f"{place.name}.py"), place / "__init__.py") if p.is_file()),
        None,
    )


def _imports(name: str, path: Path) -> Iterator[str]:
    """Names that a module's source imports anywhere in it; `from a import b` gives a and a.b, which may be a module."""
    if path.suffix != ".py":  # compiled
        return
    parents = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _declared(name: str) -> list[tuple[str, int]]:
    """The versions of one of our modules and its classes; empty if the name is not a module."""
    members = vars(sys.modules.get(name, object)).items()
    classes = [
        (key, vars(one)["version"])
        for key, one in members
        if "version" in getattr(one, "__dict__", ())
    ]
    return sorted([*classes, *((key, number) for key, number in members if key == "VERSION")])
