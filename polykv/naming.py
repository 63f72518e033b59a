"""What rows call a cell's model, document, recipe and policy: the YAML's name, and what was overridden. Torch-free.

`recipe=polykv recipe.value.bits=4` is `polykv+value.bits=4`, and `document=file document.path=/my/a.txt`, whose YAML
leaves the path open, is `file a.txt`: a row never says the name alone of what is not that YAML.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import PurePath
from typing import Any

from omegaconf import DictConfig, OmegaConf

from polykv import config

GROUPS = ("model", "document", "recipe", "relay", "policy", "hardware")
UNSET = "unset"  # what a setting is that only others have
OPEN = "???"  # what a YAML holds where the user has to choose
COPY = ("path", None)  # where a YAML asks for no path, one is that of a copy: GSM8K's, say
# How a model is run and not which it is, or a column of its own; how many windows of a text are read. Where cells
# differ in nothing else, the analysis tells them apart (analysis/apart.py).
UNTOLD = {
    "model": (
        "dtype",
        "answer_dtype",
        "quantization",
        "device_map",
        "attn_implementation",
        "threads",
    ),
    "document": ("n_documents",),
}
PLAIN = re.compile(r"[\w .,+=&'\[\](){}-]{1,60}")


def labels(cfg: DictConfig) -> dict[str, str]:
    """Group -> label, of the groups of a composed config that are not their YAML."""
    found = {}
    for group in GROUPS:
        if group in cfg:
            named = label(group, cfg[group])
            if named != cfg[group].name:
                found[group] = named
    return found


def label(group: str, chosen: DictConfig) -> str:
    """The name of `chosen`, with what differs from the YAML of that name.

    Where there is none, as of a recipe that an experiment composes (k8v4), with what is exempt.
    """
    bare = {"exempt": dict.fromkeys(chosen.exempt, 0)} if "exempt" in chosen else {}
    base = _yaml(group, chosen.name) or OmegaConf.merge(chosen, bare)
    mine, theirs = flat(OmegaConf.to_container(chosen)), flat(OmegaConf.to_container(base))
    told: list[str] = []
    for name in sorted(mine.keys() | theirs.keys()):
        ours, before = mine.get(name, UNSET), theirs.get(name, UNSET)
        if ours == before or name in UNTOLD.get(group, ()):
            continue
        if before == OPEN:
            told.insert(0, f" {text(ours)}")
        elif (name, before) != COPY:
            told.append(f"+{name}={text(ours)}")
    return chosen.name + "".join(told)


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`{"value": {"bits": 3}}` as `{"value.bits": 3}`."""
    found, left = {}, [("", settings)]
    while left:  # no recursion: a damaged file may nest as deep as it likes
        before, inner = left.pop()
        for name, value in inner.items():
            if isinstance(value, Mapping) and value:
                left.append((f"{before}{name}.", value))
            else:
                found[before + name] = value
    return found


def text(value: Any) -> str:
    """A setting's value in a few plain characters: of a path its end, of what is long or odd a digest."""
    written = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    written = PurePath(written).name if "/" in written else written.replace('"', "")
    return written if PLAIN.fullmatch(written) else mark(value)


def mark(value: Any) -> str:
    """What tells a value from others and does not say it."""
    return f"#{hashlib.sha256(json.dumps(value).encode()).hexdigest()[:6]}"


@cache
def _yaml(group: str, name: str) -> DictConfig | None:
    """The YAML that bears a name: mostly its file's, but relay=reference is `word_problems`."""
    stems = sorted(config.available(group), key=lambda stem: stem != name)
    found = (config.load_group(group, stem) for stem in stems)
    return next((cfg for cfg in found if cfg.get("name") == name), None)
