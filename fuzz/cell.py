"""The fuzz target of the results reader, `polykv.results.load_rows` on one cell's file."""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["polykv", "json"]):
    from fuzz.promises import check_cell

from fuzz.mutate import mutate_cell

ROOT = Path(tempfile.mkdtemp(prefix="polykv-fuzz-cells-"))


def read(content: bytes) -> None:
    check_cell(content, ROOT)


def mutate(content: bytes, size: int, seed: int) -> bytes:
    return mutate_cell(content, size, seed, atheris.Mutate)


if __name__ == "__main__":
    atheris.Setup(sys.argv, read, custom_mutator=mutate)
    atheris.Fuzz()
