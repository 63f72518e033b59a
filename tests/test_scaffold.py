"""`make new-recipe` and `make new-study` write files that pass their tests and the linter as written."""

import os
import shutil
import subprocess
import sys

import pytest

from experiments.scaffold import KINDS, files, write
from polykv.config import REPO
from polykv.errors import PolyKVError

TESTED_BY = {
    "recipe": [
        f"tests/test_{name}.py" for name in ("codecs", "frontier_codecs", "versions", "capacity")
    ],
    "study": [f"tests/test_{name}.py" for name in ("new_thing", "schema", "damage")],
}
COPIED = ("tests", "conf", "polykv", "experiments", "analysis")
ASKED = {"recipe": "NewThing or new_thing", "study": "new_thing or every_study"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_skeleton_passes_its_tests_and_the_linter_as_written(kind, tmp_path):
    for name in COPIED:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / name, tmp_path / name, ignore=ignore)
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    written = write(kind, "new_thing", tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    sources = [path for path in written if path.endswith(".py")]
    for command in (
        ["ruff", "check", *sources],
        ["ruff", "format", "--check", *sources],
        ["pytest", "-p", "no:cacheprovider", "-k", ASKED[kind], *TESTED_BY[kind]],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    with pytest.raises(PolyKVError, match="exists already"):
        write(kind, "new_thing", tmp_path)


@pytest.mark.parametrize("name", ["", "two words", "a-b", "3d", "class", "Upper", "../up", "a.b"])
def test_a_name_that_cannot_be_a_modules_is_refused(name):
    with pytest.raises(PolyKVError, match="identifier"):
        files("study", name)


def test_a_name_that_is_taken_is_refused():
    for kind, name in (("recipe", "uniform"), ("recipe", "polykv"), ("study", "compare")):
        with pytest.raises(PolyKVError, match="exists already"):
            write(kind, name)
