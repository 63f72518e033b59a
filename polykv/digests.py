"""Digests of local files, so that a cell's identity knows what they hold and not only where they lie. Torch-free.

Every byte is read. That of a large file is kept in the user's cache folder (polykv/cache_folder.py), for as long as the
file's path, size, inode and times of change are the same.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from polykv import cache_folder
from polykv.errors import PolyKVError
from polykv.progress import phase

LARGE = 1 << 26  # bytes from which reading takes long enough to be kept and shown
CHUNK = 1 << 24
# A file system may give two changes within a tick of its clock the same time: what changed so recently is not kept.
SETTLED_NS = 2 * 10**9
SHA256 = re.compile("[0-9a-f]{64}")

Version = tuple[int, ...]  # what changes when a file does: size, inode, times of change
_known: dict[tuple[Path, Version], str] = {}


def of_file(path: Path, setting: str) -> str:
    """`sha256`, shortened to what a cell's identity needs. Raises as `sha256`."""
    return sha256(path, setting)[:12]


def of_files(paths: Iterable[Path], setting: str) -> str:
    """Of several files of one folder, by name. Raises as `sha256`."""
    named = [f"{path.name} {of_file(path, setting)}" for path in sorted(paths)]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()[:12]


def sha256(path: Path, setting: str) -> str:
    """SHA-256 of all of a file; read once, unless it changes.

    Raises:
        PolyKVError: it cannot be read; names the `setting` that holds its path.
    """
    try:
        place = path.resolve()
        version = _version(place)
        return _known.get((place, version)) or _of_version(place, version)
    except OSError as error:
        raise PolyKVError(
            f"cannot read {setting}={path} ({error.strerror}); give the path of a file that can be read"
        ) from error


def _version(path: Path) -> Version:
    status = path.stat()
    # The inode's time of change tells also where the file's own was set back.
    return status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _of_version(path: Path, version: Version) -> str:
    is_large = version[0] >= LARGE
    name = hashlib.sha256(repr((str(path), version)).encode()).hexdigest()
    kept = cache_folder.find() / "sha256" / name
    digest = (is_large and _kept(kept)) or _read(path, is_large)
    if time.time_ns() - max(version[2:]) > SETTLED_NS and _version(path) == version:
        _known[path, version] = digest
        if is_large:
            _keep(kept, digest)
    return digest


def _read(path: Path, shown: bool) -> str:
    sha, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            sha.update(chunk)
            done += len(chunk)
            if shown:
                phase(f"reading {path.name}, MB", done // 10**6, total // 10**6)
    return sha.hexdigest()


def _kept(place: Path) -> str | None:
    """What `_keep` wrote, if it did and the file is whole."""
    try:
        digest = place.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return digest if SHA256.fullmatch(digest) else None


def _keep(place: Path, digest: str) -> None:
    """Whole or not at all; where the folder takes nothing, the next process reads the file again."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f"{place.name}.{os.getpid()}")
        part.write_text(digest, encoding="ascii")
        part.replace(place)
