"""Settings as they are typed: paths with characters of Hydra's grammar, and how to quote them."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override

from polykv.errors import PolyKVError

PATHS = ("path", "questions", "results_dir")  # last names of the settings that are paths


def quoted(override: str) -> str:
    """The override as a shell and Hydra take it literally: in both their quotes."""
    key, _, value = override.partition("=")
    value = value.replace('"', '\\"')
    return shlex.quote(f'{key}="{value}"')


def check_paths(overrides: Sequence[Override]) -> None:
    """Refuse a path that its commas make several.

    Several paths are taken where each is there, and names of models (no `/` in front) are not looked for.

    Raises:
        PolyKVError: with the path in quotes.
    """
    for override in overrides:
        key, _, typed = override.input_line.partition("=")
        if key.rpartition(".")[2] not in PATHS or not override.is_sweep_override():
            continue
        parts = [part.strip() for part in typed.split(",")]
        is_one = key == "results_dir" or Path(typed).exists()
        if is_one or any(part.startswith("/") and not Path(part).exists() for part in parts):
            raise PolyKVError(
                f"{override.input_line} is {len(parts)} settings, parted at its commas; where it is one path, "
                f"quote it: {quoted(override.input_line)}"
            )
