"""Digests of local files, so that a cell's identity knows what they hold and not only where they lie. Torch-free."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from polykv.errors import PolyKVError

WHOLE = 1 << 26  # bytes up to which all of a file is read
SAMPLES = 2048  # places of a larger one, in equal strides
SAMPLE = 4096  # bytes that are read at each


def of_file(path: Path, setting: str) -> str:
    """SHA-256 of a file, shortened. Read once per process, unless its size or time of change is another.

    Of a file of more than WHOLE bytes its size, its first MiB (of safetensors: every tensor's name, dtype, shape
    and place) and SAMPLES places are read: two that differ in a few unread bytes only would look the same.

    Raises:
        PolyKVError: it cannot be read; names the `setting` that holds its path.
    """
    try:
        status = path.stat()
        return _of_content(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise _unreadable(path, setting, error) from error


def sha256(path: Path, setting: str) -> str:
    """SHA-256 of all of a file, whatever its size; read once per process, unless it changes. Raises as `of_file`."""
    try:
        status = path.stat()
        return _of_all(path, status.st_size, status.st_mtime_ns, status.st_ino)
    except OSError as error:
        raise _unreadable(path, setting, error) from error


def of_files(paths: Iterable[Path], setting: str) -> str:
    """Of several files of one folder, by name. Raises as `of_file`."""
    named = [f"{path.name} {of_file(path, setting)}" for path in sorted(paths)]
    return _short(hashlib.sha256("\n".join(named).encode()))


@lru_cache(maxsize=1024)
def _of_content(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        if size <= WHOLE:
            return _short(hashlib.file_digest(file, "sha256"))
        sha = hashlib.sha256(f"{size} ".encode() + file.read(1 << 20))
        for place in range(SAMPLES + 1):
            file.seek((size - SAMPLE) * place // SAMPLES)
            sha.update(file.read(SAMPLE))
        return _short(sha)


@lru_cache(maxsize=64)
def _of_all(path: Path, *_of_version: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreadable(path: Path, setting: str, error: OSError) -> PolyKVError:
    return PolyKVError(
        f"cannot read {setting}={path} ({error.strerror}); give the path of a file that can be read"
    )


def _short(sha: "hashlib._Hash") -> str:
    return sha.hexdigest()[:12]
