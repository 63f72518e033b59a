"""The user's cache folder: what is made once from a user's files, and can be made again. Torch-free."""

import os
from pathlib import Path

import platformdirs


def find() -> Path:
    """$POLYKV_CACHE, or else the platform's cache folder; it need not be there yet."""
    return Path(
        os.environ.get("POLYKV_CACHE") or platformdirs.user_cache_dir("polykv")
    ).expanduser()
