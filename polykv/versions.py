"""What a cell's numbers depend on beside its settings: which code makes them.

In this package a class of codecs declares `version`, and a module that makes numbers VERSION: integers that are raised
when other numbers come out (tests/outputs.py tells when). Of a user's own code, the source itself tells.
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
from polykv.results import NOT_IDENTITY

PACKAGE = __name__.partition(".")[0]


def of(settings: Mapping[str, Any], made_by: Iterable[ModuleType]) -> dict[str, int | str]:
    """What belongs to the identity of a cell with these resolved settings, made by these modules of its study.

    Integers are versions, under the name of their class or module; strings are digests of source, under its module's.

    Raises:
        PolyKVError: source that cannot be read.
    """
    modules = [*made_by, *([gguf] if settings.get("weights") == "gguf" else [])]
    found: dict[str, int | str] = {_short(module.__name__): module.VERSION for module in modules}
    for target in _targets({k: v for k, v in settings.items() if k not in NOT_IDENTITY}):
        found |= _of_target(target)
    return dict(sorted(found.items()))


def _short(name: str) -> str:
    return name.removeprefix(f"{PACKAGE}.")


def _targets(node: Any) -> Iterator[str]:
    """Every `_target_`, however deep."""
    if isinstance(node, Mapping):
        if isinstance(target := node.get("_target_"), str):
            yield target
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _targets(child)


# Once a process: what it has imported goes on running, though its file be edited.
@cache
def _of_target(target: str) -> dict[str, int | str]:
    """Versions of a class of ours and of those that it inherits, or of a function's module; of a user's own code, a
    digest of its source.
    """
    try:
        made = targets.find(target)
    except PolyKVError:  # refused with a better message where it is instantiated
        return {}
    found: dict[str, int | str] = {}
    for part in getattr(made, "__mro__", (made,)):
        module = getattr(part, "__module__", "builtins")
        if module.partition(".")[0] == PACKAGE:
            if "version" in vars(part):
                found[part.__name__] = part.version
            elif part is made and hasattr(sys.modules[module], "VERSION"):
                found[_short(module)] = sys.modules[module].VERSION
        elif part is made:  # what it inherits of a user's own, its source imports
            found[module] = _source(module)
    return found


def _source(name: str) -> str:
    """Digest of a user's module, of those beside it that it imports, and of the versions of ours that these use."""
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
    """The source of `other`, if it is of the same package as `name` or lies in the same folder of a user's."""
    installed = home.name in ("site-packages", "dist-packages")
    if installed and other.partition(".")[0] != name.partition(".")[0]:
        return None
    place = home.joinpath(*other.split("."))
    return next(
        (p for p in (place.with_name(f"{place.name}.py"), place / "__init__.py") if p.is_file()),
        None,
    )


def _imports(name: str, path: Path) -> Iterator[str]:
    """What a module's source imports, wherever in it: modules, and what may be one (`from a import b` is a and a.b)."""
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
    """The versions of one of our modules and of its classes; none where the name is no module's."""
    members = vars(sys.modules.get(name, object)).items()
    classes = [
        (key, vars(one)["version"])
        for key, one in members
        if "version" in getattr(one, "__dict__", ())
    ]
    return sorted([*classes, *((key, number) for key, number in members if key == "VERSION")])
