"""What a YAML names as `_target_`: found by import, refused by name where it is not what is wanted."""

import re
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from polykv import targets
from polykv.errors import PolyKVError
from polykv.recipe import Recipe

UNIFORM = {"_target_": "polykv.codecs.uniform.Uniform", "bits": 4}


@pytest.mark.parametrize(
    "name", ["nothing.Codec", "polykv.codecs.uniform.Nothing", "Uniform", "broken_module.Codec"]
)
def test_a_target_that_cannot_be_had_is_named(name, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PolyKVError, match=re.escape(name)):
        targets.find(name)


@pytest.mark.parametrize("target", ["builtins.dict", "os.getcwd", "polykv.recipe.Recipe"])
def test_a_codec_that_is_none_is_refused_before_it_is_called(target):
    for cfg in (
        {"key": {"_target_": target}, "value": UNIFORM},
        {"key": UNIFORM, "value": {"_target_": "polykv.codecs.rotated.Rotated", "codec": {"_target_": target}}},
    ):  # fmt: skip
        with pytest.raises(PolyKVError, match=re.escape(target)):
            Recipe.from_config(OmegaConf.create({"name": "mine", **cfg}))


@pytest.mark.slow
def test_the_library_imports_neither_hydra_nor_wandb():
    code = (
        "import pkgutil, sys, importlib, polykv\n"
        "for m in pkgutil.walk_packages(polykv.__path__, 'polykv.'):\n"
        "    if 'triton' not in m.name and 'lm_eval' not in m.name: importlib.import_module(m.name)\n"
        "sys.exit(any(name in sys.modules for name in ('hydra', 'wandb')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
