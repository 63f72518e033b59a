"""Errors in typed settings: one line that says what is wrong and how to quote a path."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from polykv.config import did_you_mean
from polykv.errors import PolyKVError

# The settings that give an axis a path.
AT_PATH = {
    "model": "model=local model.path={0} (or model=gguf for a GGUF file)",
    "document": "document=file document.path={0}",
    "relay": "relay=gsm8k relay.path={0}",
}
PATHS = ("path", "questions", "results_dir")  # last parts of settings that are paths


def quoted(override: str) -> str:
    """The override quoted for both a shell and Hydra."""
    key, _, value = override.partition("=")
    value = value.replace('"', '\\"')
    return shlex.quote(f'{key}="{value}"')


def check_paths(overrides: Sequence[Override]) -> None:
    """Check that no path was split at its commas.

    Several paths are allowed if each exists; a name of a model on a hub (no leading `/`) is not looked for.
    """
    for override in overrides:
        key, _, typed = override.input_line.partition("=")
        if key.rpartition(".")[2] not in PATHS or not override.is_sweep_override():
            continue
        parts = [part.strip() for part in typed.split(",")]
        is_one = key == "results_dir" or Path(typed).exists()
        if is_one or any(part.startswith("/") and not Path(part).exists() for part in parts):
            raise PolyKVError(
                f"{override.input_line} is {len(parts)} settings, split at its commas; where it is one path, "
                f"quote it: {quoted(override.input_line)}"
            )


def explained(error: Exception) -> str:
    """Hydra's error in one line, with its cause and, where there is one, what to do."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    said = " ".join(f"{error} {cause or ''}".split())
    if isinstance(error, OverrideParseException):
        mend = "where the value is plain text, quote it: " + quoted(error.override)
        return f"cannot read {error.override} ({said}); {mend}"
    return _no_such_name(error, said) if isinstance(error, MissingConfigException) else said


def _no_such_name(error: MissingConfigException, said: str) -> str:
    """The message for an unknown name on an axis; for a path, how to give one."""
    group, _, name = (error.missing_cfg_file or "").partition("/")
    if "/" in name and group in AT_PATH:
        return (
            f"{group}={name} is a path, and {group} takes a name; use {AT_PATH[group].format(name)}"
        )
    known = list(error.options or ())
    return f"no {group} named {name!r}{did_you_mean(name, known)}" if known else said
