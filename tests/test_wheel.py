"""The wheel: the library at work in an empty folder, with neither the checkout nor the harness's packages."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from textwrap import dedent

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from polykv.config import REPO

PACKAGES = ("polykv", "experiments", "analysis", "hydra_plugins")
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "conf", *PACKAGES)
# Of the extra `bench`: the library works where none of them is installed.
ABSENT = ("hydra", "wandb", "pandas", "matplotlib", "datasets", "evaluate", "bert_score", "joblib")
PROGRAM = """
    import sys

    sys.modules.update(dict.fromkeys({absent}))  # import then fails, as if it were not installed
    import torch
    import polykv
    from polykv.evaluation.capacity import Architecture, pool_bytes
    from polykv.handoff.policy import load_policy
    from polykv.pool import generate, prefill
    from polykv.reference.documents import generate_document
    from polykv.tokens import encode

    for name in polykv.available_recipes():
        polykv.load_recipe(name)
    recipe = polykv.load_recipe("polykv")
    model, tokenizer = polykv.load_model("reference")
    text = generate_document(tokenizer, 128, seed=0).text
    pool = polykv.SharedKVPool.from_text(model, tokenizer, text, recipe, backend="torch")
    ids_BT = encode(tokenizer, text, begins=True)
    cache = prefill(model, ids_BT)
    full = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert len(polykv.available_recipes()) >= {recipes}, polykv.available_recipes()
    assert 0 < pool.stored_bytes < full, (pool.stored_bytes, full)
    architecture = Architecture.of(model.config, "float32")
    assert pool_bytes(recipe, architecture, pool.n_tokens) == pool.stored_bytes
    policy = load_policy("uniform")
    card = polykv.CacheCard.seal(cache, ids_BT[0], model, tokenizer, policy=policy, budget_bits=4.0)
    card.save("card.safetensors")
    opened = polykv.CacheCard.open("card.safetensors", model, tokenizer)
    assert opened.digest == card.digest
    own = [m.__file__ for name, m in sys.modules.items() if name.startswith("polykv")]
    assert all(path.startswith({wheel!r}) for path in own), own
    assert len(generate(model, tokenizer, opened.dequantize(), [encode(tokenizer, " Q:")[0]], 2)) == 1
    print(polykv.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the checkout, built without a network, unpacked."""
    pytest.importorskip("setuptools", reason="building a wheel offline needs setuptools")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        place = REPO / name
        if place.is_dir():
            shutil.copytree(place, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(place, source)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "wheel", ".", *offline, "-q", "-w", folder]
    subprocess.run(command, cwd=source, check=True, timeout=300)
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_folder(wheel, tmp_path):
    recipes = len(list((REPO / "conf" / "recipe").glob("*.yaml")))
    program = PROGRAM.format(absent=ABSENT, recipes=recipes, wheel=str(wheel))
    # Without `site`, an editable install's finder is not there to supply what the wheel lacks.
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    path = os.pathsep.join([str(wheel), *installed])
    run = subprocess.run(
        [sys.executable, "-S", "-c", dedent(program)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == str(wheel / "polykv" / "__init__.py")


@pytest.mark.slow
def test_the_wheel_carries_every_file_of_the_library(wheel):
    def files(folder, pattern):
        return {path.relative_to(folder) for path in folder.rglob(pattern)}

    for name in PACKAGES:
        assert files(REPO / name, "*.py") <= files(wheel / name, "*.py")
    assert files(REPO / "conf", "*.yaml") == files(wheel / "polykv" / "conf", "*.yaml")
    assert files(REPO / "polykv" / "texts", "*.gz") == files(wheel / "polykv" / "texts", "*.gz")


@pytest.mark.parametrize("name", ["attention", "codecs", "evaluation", "handoff", "kernels"])
def test_evaluators_take_plain_values(name):
    for path in (REPO / "polykv" / name).rglob("*.py"):
        assert "omegaconf" not in path.read_text(encoding="utf-8"), path


def test_every_declared_dependency_is_pinned():
    lines = (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line}
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in ("bench", "offline", "search", "lm-eval", "dev"):
        wanted += project["optional-dependencies"][extra]
    assert {canonicalize_name(Requirement(one).name) for one in wanted} <= pins
