"""The user's cache folder, for files that can be made again: converted models, compiled kernels. Torch-free."""

import os
from pathlib import Path

import platformdirs


def find() -> Path:
    """$POLYKV_CACHE, or the platform's cache folder; it may not exist yet."""
    return Path(
        os.environ.get("POLYKV_CACHE") or platformdirs.user_cache_dir("polykv")
    ).expanduser()
