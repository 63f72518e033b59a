"""Loads single YAML files from `conf/` without Hydra, for library use; run.py composes them with Hydra.

A group is a folder of conf/ (`model`, `recipe`, ...), and a name in it the stem of one of its YAML files.
"""

import difflib
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from polykv.errors import PolyKVError

PACKAGE = Path(__file__).resolve().parent
REPO = PACKAGE.parent
# In a checkout conf/ is beside the package; a wheel has it inside the package (pyproject.toml).
CONF = next(path for path in (REPO / "conf", PACKAGE / "conf") if (path / "recipe").is_dir())


def available(group: str) -> list[str]:
    """The names in a group, sorted; empty if there is no such group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def load_group(group: str, name: str) -> DictConfig:
    """The settings in conf/GROUP/NAME.yaml, on top of the files of the same group that its `defaults` list names.

    Raises:
        PolyKVError: an unknown name; lists the known ones.
    """
    names = available(group)
    if name not in names:
        raise PolyKVError(f"no {group} named {name!r}{did_you_mean(name, names)}")
    settings = OmegaConf.load(CONF / group / f"{name}.yaml")
    for base in settings.pop("defaults", ()):
        settings = OmegaConf.merge(load_group(group, base), settings)
    return settings


def did_you_mean(name: str, names: list[str]) -> str:
    """The end of an error message about an unknown name: the nearest known name, if one is similar, and all of them.

    For example "; did you mean 'polykv'? there are: full, polykv" or "; there are: full, polykv".
    """
    similar = difflib.get_close_matches(name, names, n=1)
    suggestion = f" did you mean {similar[0]!r}?" if similar else ""
    return f";{suggestion} there are: {', '.join(names)}"
