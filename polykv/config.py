"""Reading of single YAML files of `conf/` for the library's own use (run.py composes them with Hydra)."""

import difflib
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from polykv.errors import PolyKVError

PACKAGE = Path(__file__).resolve().parent
REPO = PACKAGE.parent
# A wheel carries conf/ inside the package (pyproject.toml); in a checkout it lies beside it.
CONF = next(path for path in (REPO / "conf", PACKAGE / "conf") if (path / "recipe").is_dir())


def available(group: str) -> list[str]:
    """The names of a group: its YAML files in conf/GROUP, sorted."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def load_group(group: str, name: str) -> DictConfig:
    """One YAML file of `conf/`, merged with the files of its group that its `defaults` list.

    Raises:
        PolyKVError: an unknown name; lists the known ones.
    """
    if name not in available(group):
        raise PolyKVError(f"no {group} named {name!r}{did_you_mean(name, available(group))}")
    found = OmegaConf.load(CONF / group / f"{name}.yaml")
    for base in found.pop("defaults", ()):
        found = OmegaConf.merge(load_group(group, base), found)
    return found


def did_you_mean(name: str, names: list[str]) -> str:
    """The end of an error message about an unknown name: the nearest one, and all of them."""
    near = difflib.get_close_matches(name, names, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{guess} there are: {', '.join(names)}"
