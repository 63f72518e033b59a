"""Paths and templates with characters of Hydra's grammar: taken as quoted, or refused with the quotes that work."""

import shlex

import pytest
from conftest import run_py
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from experiments import command_line
from polykv.errors import PolyKVError

PARSER = OverridesParser.create()


@given(
    st.text(st.characters(categories=["L", "N", "P", "S"], exclude_characters="$\\"), min_size=1)
)
def test_a_quoted_value_is_what_it_was(value):
    (typed,) = shlex.split(command_line.quoted(f"model.path={value}"))
    parsed = PARSER.parse_override(typed)
    assert parsed.value() == value and not parsed.is_sweep_override()


@pytest.mark.parametrize("name", ["a=b", "a,b", "a(b", "a{b}"])
def test_a_path_with_such_a_character_is_refused_with_quotes_that_work(name, tmp_path):
    (tmp_path / name).mkdir()
    plain = f"model.path={tmp_path / name}"
    arguments = ["experiment=polykv_quality", "model=local", "document=moon_landing", "context=100",
                 f"results_dir={tmp_path}/results"]  # fmt: skip
    done = run_py(*arguments, plain)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ")
    (quoted,) = [
        word for word in shlex.split(last) if word.startswith("model.path=") and '"' in word
    ]
    again = run_py(*arguments, quoted).stderr.strip().splitlines()[-1]
    assert f"no model in {tmp_path / name}" in again


@pytest.mark.parametrize(
    ("override", "is_refused"),
    [
        ("model.path={}/a,b", True),  # one folder, which is there
        ("document.path={}/none,b", True),  # no file of that name
        ("document.questions=/nowhere/x,y", True),
        ("results_dir={}/x,y", True),
        ("model.path={}/a,{}/a", False),  # two that are there
        ("model.path=org/one,org/two", False),  # names on the hub
        ("n_agents=3,15", False),
    ],
)
def test_paths_that_a_comma_parts(override, is_refused, tmp_path):
    for name in ("a", "a,b"):
        (tmp_path / name).mkdir()
    parsed = PARSER.parse_overrides([override.replace("{}", str(tmp_path))])
    if is_refused:
        with pytest.raises(PolyKVError, match='="'):
            command_line.check_paths(parsed)
    else:
        command_line.check_paths(parsed)
