"""Digests of local files, so that a cell's identity depends on their content and not only on their path. Torch-free.

Files are read completely. The digest of a large file is kept in the user's cache folder (polykv/cache_folder.py) and
used while the file's path, size, inode and modification times stay the same.
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

LARGE = 1 << 26  # bytes from which a digest is kept on disk and progress is shown
CHUNK = 1 << 24
# Two changes within a tick of the file system's clock have the same time: digests of files changed just now are not
# kept.
SETTLED_NS = 2 * 10**9
SHA256 = re.compile("[0-9a-f]{64}")

Version = tuple[int, ...]  # size, inode and modification times
_known: dict[tuple[Path, Version], str] = {}


def of_file(path: Path, setting: str) -> str:
    """`sha256` shortened to 12 digits, for a cell's identity. Raises as `sha256`."""
    return sha256(path, setting)[:12]


def of_files(paths: Iterable[Path], setting: str) -> str:
    """A short digest of several files of one folder and their names. Raises as `sha256`."""
    named = [f"{path.name} {of_file(path, setting)}" for path in sorted(paths)]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()[:12]


def sha256(path: Path, setting: str) -> str:
    """SHA-256 of a file, which is read again only if it changes.

    Raises:
        PolyKVError: it cannot be read; names the `setting` with its path.
    """
    try:
        place = path.resolve()
        version = _version(place)
        return _known.get((place, version)) or _of_version(place, version)
    except OSError as error:
        raise PolyKVError(
            f"cannot read {setting}={path} ({error.strerror}); give the path of a readable file"
        ) from error


def _version(path: Path) -> Version:
    status = path.stat()
    # ctime also changes when mtime is set back.
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
    """The digest written by `_keep`, or None if there is no valid one."""
    try:
        digest = place.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return digest if SHA256.fullmatch(digest) else None


def _keep(place: Path, digest: str) -> None:
    """Write a digest atomically. If the folder is not writable, the next process reads the file again."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f"{place.name}.{os.getpid()}")
        part.write_text(digest, encoding="ascii")
        part.replace(place)
