"""Refuses settings that the study does not declare, since nothing would read them. Torch-free.

A study declares the settings in conf/config.yaml and in its own YAML in conf/experiment, and composes the groups in
their `defaults`. A group in CHECKED_GROUPS declares the settings in the YAML files of its folder; any other group, such
as `recipe` or `policy`, is checked by the code that reads it. Settings have dotted names, such as `model.path`.
"""

import re
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from polykv import config
from polykv.errors import PolyKVError
from polykv.naming import flat

CHECKED_GROUPS = ("model", "document", "relay", "hardware", "scorer")
# Mappings in these groups whose keys the user or another library chooses.
OPEN_PREFIXES = (
    "model.geometry.",
    "model.packaged.",
    "hardware.tflops.",
    "hardware.sources.",
    "references.",
)
GROUP_OF_DEFAULT = re.compile(r"(?:override )?/?(\w+)")  # `override /model` -> model
OUR_CODE = "polykv."  # start of a `_target_` in this package
# Settings of conf/config.yaml that say where a sweep runs and what becomes of its cells. A study need not read them.
OF_SWEEPS = (
    "study", "experiment", "hydra", "launcher", "logger", "results_dir", "render", "device",
)  # fmt: skip
INTERPOLATED = re.compile(r"\$\{(\w+)")  # `${key_bits}` -> key_bits


class _Declared(NamedTuple):
    """What a study declares: dotted names of settings, and groups that it composes."""

    settings: frozenset[str]
    groups: frozenset[str]

    def top_level(self) -> set[str]:
        """The groups, and the first part of each setting's name."""
        return {_top(name) for name in self.settings} | self.groups


def check(cfg: DictConfig) -> None:
    """Check that the study of a composed config declares every setting in it."""
    given = OmegaConf.to_container(cfg)
    declared = _declared_by(cfg.study)
    settings = set(declared.settings)
    # A user may add a setting that others interpolate: `+width=4 recipe.value.bits=${width}`.
    added = set(INTERPOLATED.findall(str(given))) - declared.top_level()
    open_prefixes = [*OPEN_PREFIXES, *(f"{name}." for name in added)]
    for group in declared.groups:
        target = (given.get(group) or {}).get("_target_", OUR_CODE)
        # A `_target_` of the user's own may read any setting of its group.
        if group in CHECKED_GROUPS and target.startswith(OUR_CODE):
            settings |= {f"{group}.{name}" for name in _settings_of_group(group, target)}
        else:
            open_prefixes.append(f"{group}.")
    for name in flat(given):
        if name not in settings and not f"{name}.".startswith(tuple(open_prefixes)):
            raise _undeclared(name, cfg.study, settings)


def check_given(given: Iterable[str], preset: str, cfg: DictConfig, read: Iterable[str]) -> None:
    """Check that the study of a composed config reads the settings of conf/config.yaml given on the command line.

    `check` cannot tell, since every config has them. `given`: dotted names. `preset`: the YAML of conf/experiment.
    `read`: what the study reads.

    Raises:
        PolyKVError: names the first that it does not read.
    """
    root = _declared_in("config.yaml").top_level()
    known = {*read} & root | _declared_in(f"experiment/{cfg.study}.yaml").top_level()
    for name in given:
        top = _top(name)
        if top in root - known and top not in OF_SWEEPS:
            nested = flat(OmegaConf.to_container(OmegaConf.masked_copy(cfg, [*known & {*cfg}])))
            alike = [one for one in nested if one.endswith(f".{name}")]  # relay.max_new_tokens
            hint = config.did_you_mean(top, sorted(known - {"study"}))
            mend = f", or set {alike[0]}" if alike else hint
            raise PolyKVError(f"experiment={preset} does not read {name}; leave it out{mend}")


def _undeclared(name: str, study: str, settings: set[str]) -> PolyKVError:
    """The error for setting `name`; `settings` are those that the study and its groups declare."""
    top = _top(name)
    if top not in _declared_by(study).top_level():
        studies = config.available("experiment")
        if others := [other for other in studies if top in _declared_by(other).top_level()]:
            return PolyKVError(
                f"experiment={study} does not read {name}; leave it out, "
                f"or use experiment={' or '.join(others)}"
            )
    # Suggest among the settings of the same group; of an unknown group, among all top-level names.
    same_group = sorted(one for one in settings if _top(one) == top)
    known = same_group or sorted({_top(one) for one in settings} - {"study"})
    hint = config.did_you_mean(name, known)
    return PolyKVError(f"experiment={study} has no setting {name}{hint}")


def _top(name: str) -> str:
    """The first part of a dotted name: `model` of `model.path`."""
    return name.partition(".")[0]


def _declared_by(study: str) -> _Declared:
    """What conf/config.yaml and the study's own YAML declare."""
    root, own = _declared_in("config.yaml"), _declared_in(f"experiment/{study}.yaml")
    return _Declared(root.settings | own.settings, root.groups | own.groups)


@cache
def _declared_in(file: str) -> _Declared:
    """What one YAML of conf/ declares."""
    content: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(config.CONF / file))
    # Entries that choose a file of a group are mappings; the others (`_self_`) are strings.
    choices = [one for one in content.pop("defaults", ()) if isinstance(one, dict)]
    groups = frozenset(GROUP_OF_DEFAULT.match(key)[1] for choice in choices for key in choice)
    content.pop("hydra", None)
    return _Declared(frozenset(flat(content).keys()), groups)


@cache
def _settings_of_group(group: str, target: str) -> frozenset[str]:
    """Names of settings, without the group, in the group's YAML files whose `_target_` is `target` or absent."""
    files = [config.load_group(group, name) for name in config.available(group)]
    return frozenset(
        name
        for file in files
        if file.get("_target_", target) == target
        for name in flat(OmegaConf.to_container(file))
    )
