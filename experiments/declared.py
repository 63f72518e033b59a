"""Settings that a study declares; any other is refused, since nothing would read it. Torch-free.

A study declares those in conf/config.yaml and in its own YAML of conf/experiment. A model, document or other of GROUPS
declares what the YAML files of its group hold. Recipes and policies check their own settings.
"""

import re
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from polykv import config
from polykv.errors import PolyKVError
from polykv.naming import flat

GROUPS = ("model", "document", "relay", "hardware", "scorer")
# Prefixes of settings whose names a user or another library chooses.
FREE = (
    "model.geometry.",
    "model.packaged.",
    "hardware.tflops.",
    "hardware.sources.",
    "references.",
)
IN_DEFAULTS = re.compile(r"(?:override )?/?(\w+)")
OURS = "polykv."
USED = re.compile(r"\$\{(\w+)")  # ${key_bits}: a setting that others interpolate


def check(cfg: DictConfig) -> None:
    """Check that the study of a composed config declares every setting.

    Raises:
        PolyKVError: names one that it does not, and the nearest declared name or the studies that declare it.
    """
    study, given = cfg.study, OmegaConf.to_container(cfg)
    known, groups = _of_study(study)
    free = [*FREE, *(f"{name}." for name in set(USED.findall(str(given))) - _names(study))]
    for group in groups:
        target = (given.get(group) or {}).get("_target_", OURS)
        if group in GROUPS and target.startswith(OURS):
            known |= {f"{group}.{name}" for name in _of_group(group, target)}
        else:  # a user's own code may read anything
            free.append(f"{group}.")
    for name in flat(given):
        if name not in known and not f"{name}.".startswith(tuple(free)):
            raise _unknown(name, study, known)


def _unknown(name: str, study: str, known: frozenset[str]) -> PolyKVError:
    top = name.partition(".")[0]
    others = [other for other in config.available("experiment") if top in _names(other)]
    if others and top not in _names(study):
        said = f"experiment={study} does not read {name}; leave it out"
        return PolyKVError(f"{said}, or use experiment={' or '.join(others)}")
    beside = [one for one in sorted(known) if one.partition(".")[0] == top]
    near = beside or sorted({one.partition(".")[0] for one in known} - {"study"})
    return PolyKVError(f"experiment={study} has no setting {name}{config.did_you_mean(name, near)}")


def _names(study: str) -> set[str]:
    """First parts of the names of a study's settings, and its groups."""
    declared, groups = _of_study(study)
    return {name.partition(".")[0] for name in declared} | groups


@cache
def _of_study(study: str) -> tuple[frozenset[str], frozenset[str]]:
    """Settings that a study declares, and groups that it composes."""
    names: set[str] = set()
    groups: set[str] = set()
    for path in (config.CONF / "config.yaml", config.CONF / "experiment" / f"{study}.yaml"):
        declared: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(path))
        chosen = [one for one in declared.pop("defaults", ()) if isinstance(one, dict)]
        groups |= {IN_DEFAULTS.match(group)[1] for one in chosen for group in one}
        declared.pop("hydra", None)
        names |= flat(declared).keys()
    return frozenset(names), frozenset(groups)


@cache
def _of_group(group: str, target: str) -> frozenset[str]:
    """Settings in the group's YAML files, of those files that have no `_target_` or this one."""
    files = [config.load_group(group, name) for name in config.available(group)]
    return frozenset(
        name
        for one in files
        if one.get("_target_", target) == target
        for name in flat(OmegaConf.to_container(one))
    )
