"""The file of one finished cell: written whole, sealed with a digest, and set aside when it is damaged.

Torch-free: the analysis reads through this module.
"""

import hashlib
import json
import os
import re
import stat
import sys
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

COLUMNS = (
    "experiment", "cell", "model", "weights", "document", "context_tokens", "n_agents", "n_hops",
    "recipe", "policy", "budget_bits", "reader", "backend", "metric", "value", "unit", "ci_low", "ci_high",
    "n", "sample", "seed", "protocol", "device", "dtype", "bos", "commit", "created_at", "note",
)  # fmt: skip

MAX_BYTES = 1 << 23  # of a cell's file; the largest that any experiment writes has 53 kB
_COUNTS = ("context_tokens", "n_agents", "n_hops", "n", "sample", "seed")
_NUMBERS = ("budget_bits", "value", "ci_low", "ci_high")
_FLAGS = ("bos",)  # whether what the model read begins with BOS (polykv/tokens.py)
# Half characters: JSON can hold them, and no table could be written.
_HALVES = re.compile("[\ud800-\udfff]")
# Older results lack these.
_ADDED = ("backend", "sample", "bos")


class DamagedCell(Exception):
    """The file is not what was written; the message says how it shows."""


@dataclass(frozen=True)
class Cell:
    """What a whole file holds.

    Attributes:
        rows: one dict of COLUMNS for each observation.
        sealed: a digest vouches for it; cells written before there were digests have none.
        config: its settings; empty where the file does not say.
        answers: what agents were asked and said, a dict each.
    """

    rows: list[dict[str, Any]]
    sealed: bool
    config: dict[str, Any]
    answers: list[dict[str, Any]] = field(default_factory=list)


def compose(
    experiment: str,
    cell: str,
    config: dict[str, Any],
    provenance: dict[str, Any],
    rows: list[dict[str, Any]],
    answers: list[dict[str, Any]] | None = None,
) -> str:
    """The text of a cell's file.

    Raises:
        ValueError: a number that is not finite.
    """
    content: dict[str, Any] = {"experiment": experiment, "cell": cell}
    content |= {"config": config, "provenance": provenance, "rows": rows}
    content |= {"answers": answers} if answers else {}
    return json.dumps(content | {"digest": digest(content)}, indent=1, allow_nan=False)


def digest(content: dict[str, Any]) -> str:
    """SHA-256 of everything in a cell's file but the digest itself; layout does not count."""
    kept = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(kept, allow_nan=False).encode()).hexdigest()


def read(path: Path) -> Cell:
    """A cell's file `.../EXPERIMENT/CELL.json`.

    Raises:
        DamagedCell: half-written, edited by hand, or another cell's.
        OSError: it cannot be read.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
        raise DamagedCell("a pipe or a device, not a file")
    if info.st_size > MAX_BYTES:
        raise DamagedCell(f"it has {info.st_size} bytes, and no cell more than {MAX_BYTES}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_number)
        rows = [_row(row) for row in content["rows"]]
        sealed = "digest" in content
        whole = not sealed or content["digest"] == digest(content)
        config, answers = content.get("config"), content.get("answers", [])
    except IsADirectoryError as error:
        raise DamagedCell("a folder, not a file") from error
    except KeyError as error:
        raise DamagedCell(f"it has no {error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCell(f"{type(error).__name__}: {error}") from error
    if not whole:
        raise DamagedCell("changed since it was written: its digest does not match")
    if sealed and (content.get("experiment"), content.get("cell")) != (path.parent.name, path.stem):
        other = f"{content.get('cell')} of {content.get('experiment')}"
        raise DamagedCell(f"it is cell {ascii(other[:80])[1:-1]}")
    if not isinstance(answers, list) or not all(isinstance(said, dict) for said in answers):
        raise DamagedCell("its answers are no list of objects")
    return Cell(rows, sealed, config if isinstance(config, dict) else {}, answers)


def read_cells(root: str | Path) -> tuple[list[Cell], list[str]]:
    """Every whole cell below ROOT, in a stable order, and the names of the files that are damaged."""
    cells, damaged = [], []
    for path in sorted(Path(root).glob("cells/*/*.json")):
        try:
            cells.append(read(path))
        except FileNotFoundError:
            continue  # set aside by a sweep that is running
        except (DamagedCell, OSError) as error:
            damaged.append(f"{path} ({error})")
    return cells, damaged


def write_atomically(path: Path, text: str) -> None:
    """Temporary file, fsync, rename: another process sees the whole file or none.

    Raises:
        OSError: the folder cannot be written or its disk is full; nothing is left behind.
    """
    # Not tempfile's: its files can be read by their owner only, and results are shared.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Temporary files of a process that was killed while it wrote `path`. Only for who holds its claim."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged file to `CELL.json.damaged` (`.damaged2` and on, if taken); where it is now."""
    names = (f"{path.name}.damaged{number if number > 1 else ''}" for number in count(1))
    aside = next(place for name in names if not (place := path.with_name(name)).exists())
    return path.rename(aside)


def _row(row: dict[str, Any]) -> dict[str, Any]:
    complete = {column: (dict.fromkeys(_ADDED) | row)[column] for column in COLUMNS}
    for column, value in complete.items():
        if value is None:
            continue
        if column in _COUNTS:
            fits = type(value) is int and 0 <= value < 1 << 63
        elif column in _NUMBERS:  # 1e999 is JSON, and infinite
            fits = type(value) in (int, float) and abs(value) <= sys.float_info.max
        elif column in _FLAGS:
            fits = type(value) is bool
        else:
            fits = isinstance(value, str) and not _HALVES.search(value)
        if not fits:
            raise ValueError(f"{column} cannot be {ascii(value)[:40]}")
    return complete


def _refuse_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that a cell holds")
