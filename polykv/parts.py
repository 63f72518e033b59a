"""Finished parts of a cell, saved in the results folder until the cell is written, so that a killed run resumes.

A part is a file of arrays (NAME.part) with the SHA-256 of its content and all that the arrays depend on. A part that is
damaged, or depends on something else, is named on stderr and made again.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polykv.cellfile import write_atomically
from polykv.results import StoreError, provenance, unwritable

Arrays = Mapping[str, np.ndarray]
NEEDS = "needs"  # the array with what the others depend on, as JSON
SECONDS = "seconds"  # the array with how long making the others took
SOURCE = (".py", ".h", ".cpp", ".json")  # code, and the trained weights of controllers
DIGEST_BYTES = 32  # at the beginning of the file


@dataclass(frozen=True)
class Parts:
    """The parts of one folder, `ROOT/parts/NAME`.

    Attributes:
        root: the results folder; None: nothing is saved or read.
        name: the cell's identity, or that of what several cells share.
        needs: what the parts depend on, as plain values; commit, machine and versions of packages are added.
    """

    root: Path | None = None
    name: str = ""
    needs: Mapping[str, Any] = field(default_factory=dict)

    def kept(self, part: str, make: Callable[[], Arrays]) -> Arrays:
        """The arrays of a part, and SECONDS: read if it was saved, else made and saved.

        Raises:
            StoreError: the part cannot be read, the folder is not writable, or the disk is full.
        """
        if self.root is None:
            return _timed(make)
        path = self._folder(self.root) / f"{part}.part"
        needs = {**self.needs, **_made_on()}
        try:
            return _read(path, needs)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StoreError(f"cannot read {path} ({error.strerror or error})") from error
        except ValueError as error:
            print(f"warning: {path} {error}; it is made again", file=sys.stderr, flush=True)
        found = _timed(make)
        _write(path, {**found, NEEDS: np.array(json.dumps(needs))})
        return found

    def shared(self, what: str, needs: Mapping[str, Any]) -> "Parts":
        """The parts of `what`, which all cells with equal needs share. They stay when a cell is written."""
        text = json.dumps(needs, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        return Parts(self.root, f"{what}-{key}", needs)

    def remove(self) -> None:
        """Remove the folder, if there is one."""
        if self.root is not None:
            shutil.rmtree(self._folder(self.root), ignore_errors=True)

    def _folder(self, root: Path) -> Path:
        return root / "parts" / self.name


def _timed(make: Callable[[], Arrays]) -> Arrays:
    began = time.perf_counter()
    found = make()
    return {**found, SECONDS: np.array(time.perf_counter() - began)}


def _made_on() -> dict[str, Any]:
    """The code, packages and machine of this process, on which rounding and with it greedy text depends."""
    made = {key: value for key, value in provenance().items() if key != "created_at"}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    processor = torch.backends.cpu.get_cpu_capability()
    return made | {"source": _source(), "processor": processor, "gpu": device}


@cache
def _source() -> str:
    """SHA-256 of the source files: the commit does not tell one uncommitted edit from another."""
    here, digest = Path(__file__).parent, hashlib.sha256()
    for folder in (here, here.parent / "experiments"):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in SOURCE):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path, needs: Mapping[str, Any]) -> Arrays:
    """The arrays of a saved part.

    Raises:
        ValueError: the part is damaged, or was made from other needs; says which.
        OSError: there is no such file, or it cannot be read.
    """
    content = path.read_bytes()
    digest, packed = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(packed).digest() != digest:
        raise ValueError("is damaged")
    with np.load(BytesIO(packed), allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    made = json.loads(str(found.pop(NEEDS)))
    wanted = json.loads(json.dumps(needs))
    if others := sorted(key for key in {*made, *wanted} if made.get(key) != wanted.get(key)):
        raise ValueError(f"was made with another {', '.join(others)}")
    return found


def _write(path: Path, arrays: Mapping[str, Any]) -> None:
    file = BytesIO()
    np.savez(file, **arrays)
    packed = file.getvalue()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, hashlib.sha256(packed).digest() + packed)
    except OSError as error:
        raise unwritable(path.parent, error) from error
