"""Labels of a cell's model, document, recipe and policy in rows: the YAML's name plus overrides. Torch-free.

`recipe=polykv recipe.value.bits=4` is `polykv+value.bits=4`, and `document=file document.path=/my/a.txt`, whose YAML
leaves the path open, is `file a.txt`: a label without additions means exactly the settings of that YAML. Functions take
settings as composed from conf/ (DictConfig).
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
UNSET = "unset"  # placeholder for an absent key
OPEN = "???"  # a YAML's marker of a mandatory setting
# (group, setting, default): an optional path, that of a local copy of the same texts. A relay's is of other problems.
COPY = ("document", "path", None)
# Settings left out of labels: how a model is run, or what has a column of its own. The analysis shows settings in which
# cells differ as columns.
LEFT_OUT = {
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
    """Group -> label, for the groups of a composed config that differ from their YAML."""
    found = {}
    for group in GROUPS:
        if group in cfg:
            named = label(group, cfg[group])
            if named != cfg[group].name:
                found[group] = named
    return found


def label(group: str, chosen: DictConfig) -> str:
    """The name of `chosen`, with the settings that differ from the YAML of that name.

    A file or folder that is given the name of a model with other weights, as `model=gguf model.name=smollm2-135m`, is
    compared with the YAML of its kind, gguf: `smollm2-135m model.gguf`.
    Without such a YAML (for a recipe that an experiment composes, such as k8v4) it is the name with its exemptions.
    """
    no_exemptions = {"exempt": dict.fromkeys(chosen.exempt, 0)} if "exempt" in chosen else {}
    base = _yaml(group, chosen.name)
    if base is not None and base.get("trained_weights") != chosen.get("trained_weights"):
        base = _yaml(group, chosen.trained_weights)
    base = base or OmegaConf.merge(chosen, no_exemptions)
    settings, defaults = flat(OmegaConf.to_container(chosen)), flat(OmegaConf.to_container(base))
    additions: list[str] = []
    for name in sorted(settings.keys() | defaults.keys()):
        value, default = settings.get(name, UNSET), defaults.get(name, UNSET)
        if value == default or name in ("name", *LEFT_OUT.get(group, ())):
            continue
        if default == OPEN:
            additions.insert(0, f" {text(value)}")
        elif (group, name, default) != COPY:
            additions.append(f"+{name}={text(value)}")
    return chosen.name + "".join(additions)


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`{"value": {"bits": 3}}` as `{"value.bits": 3}`."""
    found, left = {}, [("", settings)]
    while left:  # no recursion: a damaged file may be nested arbitrarily deep
        prefix, inner = left.pop()
        for name, value in inner.items():
            if isinstance(value, Mapping) and value:
                left.append((f"{prefix}{name}.", value))
            else:
                found[prefix + name] = value
    return found


def text(value: Any) -> str:
    """A setting's value as a short plain text: of a path the last part; a digest of long or odd values."""
    written = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    written = PurePath(written).name if "/" in written else written.replace('"', "")
    return written if PLAIN.fullmatch(written) else mark(value)


def mark(value: Any) -> str:
    """A short digest that identifies a value."""
    return f"#{hashlib.sha256(json.dumps(value).encode()).hexdigest()[:6]}"


@cache
def _yaml(group: str, name: str) -> DictConfig | None:
    """The YAML with this `name`: usually the file of that name, but relay=reference is `word_problems`."""
    stems = sorted(config.available(group), key=lambda stem: stem != name)
    found = (config.load_group(group, stem) for stem in stems)
    return next((cfg for cfg in found if cfg.get("name") == name), None)
