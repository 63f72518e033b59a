"""The file of one finished cell: written whole, sealed with a digest, and set aside when it is damaged.

JSON: the study's declaration, the resolved config, the provenance, the rows column by column, and what agents said.
Torch-free: the analysis reads through this module.
"""

import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

# Every row has these. A study adds its own, of the same types.
COLUMNS: Mapping[str, type] = {
    "study": str, "cell": str, "model": str, "weights": str, "document": str, "context_tokens": int,
    "n_agents": int, "recipe": str, "policy": str, "budget_bits": float, "reader": str, "metric": str,
    "value": float, "unit": str, "sample": int, "n": int, "seed": int, "dtype": str, "device": str,
    "backend": str, "bos": bool, "commit": str, "created_at": str, "note": str,
}  # fmt: skip
STAMPED = ("study", "cell", "commit", "created_at")  # told once in the file, for all of its rows
TYPES = {kind.__name__: kind for kind in (str, int, float, bool)}
FORMAT = 2  # of the file; 1 had rows with columns `protocol`, `ci_low` and `ci_high`

MAX_BYTES = 1 << 25  # of a cell's file; the largest that any study writes has 2 MB
# Half characters: JSON can hold them, and no table could be written.
_HALVES = re.compile("[\ud800-\udfff]")


class DamagedCell(Exception):
    """The file is not what was written; the message says how it shows."""


@dataclass(frozen=True)
class Cell:
    """What a whole file holds.

    Attributes:
        study: the declaration: `name`, `title`, `question`, `answers` and `columns` (name -> type's name).
        name: the cell's identity.
        rows: column -> values, equally many in each; None where a row has none. Without the STAMPED ones.
        answers: what agents were asked and said, a dict each.
    """

    study: Mapping[str, Any]
    name: str
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    rows: Mapping[str, list[Any]]
    answers: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @property
    def columns(self) -> dict[str, type]:
        """The type of every column that a row of this cell may have."""
        return types_of(self.study)


def types_of(study: Mapping[str, Any]) -> dict[str, type]:
    """The columns of a declared study: those of every row, and its own."""
    return {**COLUMNS, **{name: TYPES[kind] for name, kind in study["columns"].items()}}


def compose(cell: Cell) -> str:
    """The text of a cell's file.

    Raises:
        ValueError: a number that is not finite.
    """
    content = {"format": FORMAT, "study": dict(cell.study), "cell": cell.name}
    content |= {"config": cell.config, "provenance": cell.provenance}
    content |= {"rows": {name: _folded(values) for name, values in cell.rows.items()}}
    content |= {"n_rows": len(next(iter(cell.rows.values()), ()))}
    content |= {"answers": list(cell.answers)} if cell.answers else {}
    return json.dumps(content | {"digest": digest(content)}, allow_nan=False)


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a cell's file but the digest itself; layout does not count."""
    kept = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(kept, allow_nan=False).encode()).hexdigest()


def read(path: Path) -> Cell:
    """A cell's file `.../STUDY/CELL.json`.

    Raises:
        DamagedCell: half-written, edited by hand, another cell's, or of an older format.
        OSError: it cannot be read.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
        raise DamagedCell("a pipe or a device, not a file")
    if info.st_size > MAX_BYTES:
        raise DamagedCell(f"it has {info.st_size} bytes, and no cell more than {MAX_BYTES}")
    try:
        cell = parse(json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_number))
    except IsADirectoryError as error:
        raise DamagedCell("a folder, not a file") from error
    except (ValueError, RecursionError) as error:
        raise DamagedCell(f"{type(error).__name__}: {error}") from error
    if (cell.study["name"], cell.name) != (path.parent.name, path.stem):
        other = f"{cell.name} of {cell.study['name']}"
        raise DamagedCell(f"it is cell {ascii(other[:80])[1:-1]}")
    return cell


def parse(content: Any) -> Cell:
    """The cell that a file's JSON holds.

    Raises:
        DamagedCell: it is not what `compose` wrote.
    """
    try:
        if content.get("format") != FORMAT:
            raise DamagedCell("its format is another version's; measure it again")
        if content["digest"] != digest(content):
            raise DamagedCell("changed since it was written: its digest does not match")
        types, n_rows = types_of(content["study"]), content["n_rows"]
        rows = {
            name: _unfolded(name, values, types[name], n_rows)
            for name, values in content["rows"].items()
        }
        answers = content.get("answers", [])
        if not all(isinstance(said, dict) for said in answers):
            raise DamagedCell("its answers are no list of objects")
        study, cell = content["study"], content["cell"]
        return Cell(study, cell, content["config"], content["provenance"], rows, answers)
    except KeyError as error:
        raise DamagedCell(f"it has no {error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCell(f"{type(error).__name__}: {error}") from error


def read_cells(root: str | Path, study: str = "*") -> tuple[list[Cell], list[str]]:
    """Every whole cell of the study (`*`: of all) below ROOT, in a stable order, and the names of damaged files."""
    cells, damaged = [], []
    for path in sorted(Path(root).glob(f"cells/{study}/*.json")):
        try:
            cells.append(read(path))
        except FileNotFoundError:
            continue  # set aside by a sweep that is running
        except (DamagedCell, OSError) as error:
            damaged.append(f"{path} ({error})")
    return cells, damaged


def write_atomically(path: Path, content: str | bytes) -> None:
    """Temporary file, fsync, rename: another process sees the whole file or none.

    Raises:
        OSError: the folder cannot be written or its disk is full; nothing is left behind.
    """
    # Not tempfile's: its files can be read by their owner only, and results are shared.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
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


def check_type(column: str, value: Any, kind: type) -> None:
    """Refuse what the column cannot hold; None is no value and fits everywhere.

    Raises:
        ValueError: names the column.
    """
    if value is None:
        return
    if kind is float:  # 1e999 is JSON, and infinite
        fits = type(value) in (int, float) and abs(value) <= sys.float_info.max
    elif kind is int:
        fits = type(value) is int and 0 <= value < 1 << 63
    else:
        fits = type(value) is kind and not (isinstance(value, str) and _HALVES.search(value))
    if not fits:
        raise ValueError(
            f"{column} cannot be {ascii(value)[:40]}; it is a column of {kind.__name__}"
        )


def _folded(values: list[Any]) -> Any:
    """One value for all rows where they agree: most columns are of this kind."""
    return values[0] if values and all(value == values[0] for value in values) else values


def _unfolded(column: str, values: Any, kind: type, n_rows: int) -> list[Any]:
    values = values if isinstance(values, list) else [values] * n_rows
    if len(values) != n_rows:
        raise ValueError(f"{column} has {len(values)} values for {n_rows} rows")
    for value in values:
        check_type(column, value, kind)
    return values


def _refuse_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that a cell holds")
