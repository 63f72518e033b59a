"""Compilation of csrc/ for this machine, on first use, into the user's cache folder.

Plain C++17 without torch's headers: a build takes seconds and works with every version of torch and Python.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from uuid import uuid4

from filelock import FileLock

from polykv import cache_folder

SOURCES = Path(__file__).parent / "csrc"
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fPIC", "-shared", "-pthread"),
)
# Not every compiler supports -march=native.
ARCHITECTURES = (("-march=native",), ())


class BuildError(Exception):
    """There is no compiler, or compilation failed; the message is one line."""


def library() -> Path:
    """Path of this machine's shared library, compiled if necessary.

    Its name is a digest of sources, compiler, flags and processor, and it is renamed into place: any number of
    processes may call this at the same time.

    Raises:
        BuildError: no compiler, a compilation that fails, or a cache folder that is not writable.
    """
    compiler, folder = _compiler(), cache_folder.find()
    try:
        identity = [_version(compiler), _processor(), *(f.read_text() for f in _sources())]
        folder.mkdir(parents=True, exist_ok=True)
        for architecture in ARCHITECTURES:
            command = [*compiler, *FLAGS, *architecture]
            digest = hashlib.sha256("\0".join([*command, *identity]).encode()).hexdigest()
            path = folder / f"cpu-{digest[:16]}.so"
            with FileLock(path.with_suffix(".lock")):
                failed = "" if path.is_file() else _compile(command, path)
            if not failed:
                return path
    except OSError as error:
        raise BuildError(f"{error.filename or folder}: {error.strerror or error}") from error
    raise BuildError(f"{compiler[0]} failed: {failed}")


def _sources() -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp"))


def _compiler() -> list[str]:
    """$CXX, which may contain options, or the system's C++ compiler."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        program, *options = shlex.split(name)
        if found := shutil.which(program):
            return [found, *options]
    if asked:
        raise BuildError(f"CXX={asked} is not a program")
    raise BuildError("no C++ compiler (c++, g++ or clang++) on the PATH")


def _version(compiler: list[str]) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout


def _processor() -> str:
    """What -march=native depends on: several machines may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({x for x in lines if x.startswith(names)}))


def _compile(command: list[str], path: Path) -> str:
    """Compile into `path`; returns the first error line, or an empty string."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        source = str(SOURCES / "kernels.cpp")
        done = subprocess.run([*command, source, "-o", temporary], capture_output=True, text=True)
        if done.returncode == 0:
            os.replace(temporary, path)
            return ""
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        return (errors or done.stderr.splitlines() or [f"status {done.returncode}"])[0].strip()
    finally:
        temporary.unlink(missing_ok=True)
