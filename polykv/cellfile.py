"""The file of a finished cell: written atomically, protected by a digest, renamed if it is damaged.

JSON with the study's declaration, the resolved config, the provenance, the rows by column, and the agents' answers.
Torch-free, since the analysis reads through this module.
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

# The columns of every row. Studies add their own, of the same types.
COLUMNS: Mapping[str, type] = {
    "study": str, "cell": str, "model": str, "weights": str, "document": str, "context_tokens": int,
    "n_agents": int, "recipe": str, "policy": str, "budget_bits": float, "reader": str, "metric": str,
    "value": float, "unit": str, "sample": int, "n": int, "seed": int, "dtype": str, "device": str,
    "backend": str, "bos": bool, "commit": str, "created_at": str, "note": str,
}  # fmt: skip
STAMPED = ("study", "cell", "commit", "created_at")  # stored once in the file, for all of its rows
TYPES = {kind.__name__: kind for kind in (str, int, float, bool)}
# The keys that readers rely on, of a cell, its study's declaration and its provenance, which may have others too.
_CELL = {"name": str, "config": dict, "rows": dict, "answers": list}
_STUDY = {
    "name": str,
    "title": str,
    "question": str,
    "answers": list,
    "settings": list,
    "columns": dict,
}
_PROVENANCE = {"commit": str, "created_at": str}
FORMAT = 2  # version of the format; 1 had the columns `protocol`, `ci_low` and `ci_high`

MAX_BYTES = 1 << 25  # of a cell's file; the largest that any study writes has 2 MB
MAX_REASON = 300  # characters of a message about a damaged file
# JSON can contain lone surrogates, which cannot be written to any other file.
_SURROGATES = re.compile("[\ud800-\udfff]")


class DamagedCell(Exception):
    """The file does not hold what was written; the message says why."""


def reason(error: Exception) -> str:
    """An error as one printable line, even if it quotes text of a damaged file."""
    return ascii(f"{type(error).__name__}: {error}")[1:-1][:MAX_REASON]


@dataclass(frozen=True)
class Cell:
    """The content of a cell's file.

    Attributes:
        study: the declaration: `name`, `title`, `question`, `answers` and `columns` (name -> name of the type).
        name: the cell's identity.
        rows: column -> values, one per row, or None; without the STAMPED columns. If there are rows, `metric` is one.
        answers: agents' questions and answers, a dict each.
    """

    study: Mapping[str, Any]
    name: str
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    rows: Mapping[str, list[Any]]
    answers: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @property
    def columns(self) -> dict[str, type]:
        """Column -> type, of all columns that this cell may have."""
        return types_of(self.study)


def types_of(study: Mapping[str, Any]) -> dict[str, type]:
    """Column -> type, of a declared study: the common columns and its own."""
    return {**COLUMNS, **{name: TYPES[kind] for name, kind in study["columns"].items()}}


def check(cell: Cell) -> None:
    """Check the types of a cell's parts, on which readers rely.

    Raises:
        ValueError, KeyError: names what is missing or of the wrong type.
    """
    for part, kinds in ((vars(cell), _CELL), (cell.study, _STUDY), (cell.provenance, _PROVENANCE)):
        for key, needed in kinds.items():
            if not isinstance(part[key], needed):
                raise ValueError(f"its {key} is not a {needed.__name__}")
    for column in cell.study["columns"]:
        if column in COLUMNS or not column.isidentifier():
            raise ValueError(f"its study declares a column {ascii(column)[:40]}")
    if not all(isinstance(said, dict) for said in cell.answers):
        raise ValueError("its answers are not a list of objects")
    about = [cell.study, cell.name, cell.config, cell.provenance, cell.answers]
    if _SURROGATES.search(json.dumps(about, ensure_ascii=False)):
        raise ValueError("a text in it cannot be written as UTF-8")
    types, n_rows = cell.columns, len(cell.rows["metric"]) if cell.rows else 0
    for column, values in cell.rows.items():
        kind = types[column]
        if column in STAMPED:
            raise ValueError(f"{column} is stored once, not in every row")
        if len(values) != n_rows:
            raise ValueError(f"{column} has {len(values)} values for {n_rows} rows")
        for value in values:
            check_type(column, value, kind)
    if None in cell.rows.get("metric", ()):
        raise ValueError("a row of it has no metric")


def compose(cell: Cell) -> str:
    """The text of a cell's file.

    Raises:
        ValueError, KeyError: an invalid cell (`check`).
    """
    check(cell)
    content = {"format": FORMAT, "study": cell.study, "cell": cell.name}
    content |= {"config": cell.config, "provenance": cell.provenance}
    content |= {"rows": {name: _folded(name, values) for name, values in cell.rows.items()}}
    content |= {"answers": list(cell.answers)} if cell.answers else {}
    return json.dumps(content | {"digest": digest(content)}, allow_nan=False)


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the content of a cell's file without the digest itself, independent of its layout."""
    kept = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(kept, allow_nan=False).encode()).hexdigest()


def read(path: Path) -> Cell:
    """Read a cell's file `.../STUDY/CELL.json`.

    Raises:
        DamagedCell: truncated, edited by hand, of another cell, or of another version of the format.
        OSError: the file cannot be read.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
        raise DamagedCell("a pipe or a device, not a file")
    if info.st_size > MAX_BYTES:
        raise DamagedCell(f"it has {info.st_size} bytes, more than the {MAX_BYTES} of any cell")
    try:
        cell = parse(json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_number))
    except IsADirectoryError as error:
        raise DamagedCell("a folder, not a file") from error
    except (ValueError, RecursionError) as error:
        raise DamagedCell(reason(error)) from error
    if (cell.study["name"], cell.name) != (path.parent.name, path.stem):
        other = f"{cell.name} of {cell.study['name']}"
        raise DamagedCell(f"it is cell {ascii(other[:80])[1:-1]}")
    return cell


def parse(content: Any) -> Cell:
    """The cell of a file's parsed JSON.

    Raises:
        DamagedCell: it was not written by `compose`.
    """
    try:
        if content.get("format") != FORMAT:
            raise DamagedCell("another version of the format; measure it again")
        if content["digest"] != digest(content):
            raise DamagedCell("changed since it was written: its digest does not match")
        rows = content["rows"]
        metrics = rows["metric"] if rows else []
        if not isinstance(metrics, list):
            raise DamagedCell("its metrics are not a list")
        rows = {
            name: values if isinstance(values, list) else [values] * len(metrics)
            for name, values in rows.items()
        }
        study, name, config = content["study"], content["cell"], content["config"]
        cell = Cell(study, name, config, content["provenance"], rows, content.get("answers", []))
        check(cell)
        return cell
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCell(reason(error)) from error


def read_cells(root: str | Path, study: str = "*") -> tuple[list[Cell], list[str]]:
    """All undamaged cells of a study (`*`: of all studies) below ROOT, sorted, and the names of damaged files."""
    cells, damaged = [], []
    for path in sorted(Path(root).glob(f"cells/{study}/*.json")):
        try:
            cells.append(read(path))
        except FileNotFoundError:
            continue  # renamed meanwhile by a running sweep
        except (DamagedCell, OSError) as error:
            damaged.append(f"{path} ({error})")
    return cells, damaged


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write through a temporary file, fsync and rename: other processes see the whole file or none.

    Raises:
        OSError: the folder is not writable or the disk is full; no temporary file is left.
    """
    # Not the tempfile module: its files are readable by their owner only, and results are shared.
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
    """Remove temporary files of processes killed while writing `path`. Call it only while holding the cell's claim."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged file to `CELL.json.damaged` (`.damaged2`, ... if that exists); returns the new path."""
    names = (f"{path.name}.damaged{number if number > 1 else ''}" for number in count(1))
    aside = next(place for name in names if not (place := path.with_name(name)).exists())
    return path.rename(aside)


def check_type(column: str, value: Any, kind: type) -> None:
    """Check a value against its column's type; None is allowed in every column.

    Raises:
        ValueError: names the column.
    """
    if value is None:
        return
    if kind is float:  # 1e999 is valid JSON, and infinite
        fits = type(value) in (int, float) and abs(value) <= sys.float_info.max
    elif kind is int:
        fits = type(value) is int and 0 <= value < 1 << 63
    else:
        fits = type(value) is kind and not (isinstance(value, str) and _SURROGATES.search(value))
    if not fits:
        raise ValueError(
            f"{column} cannot be {ascii(value)[:40]}; it is a column of type {kind.__name__}"
        )


def _folded(column: str, values: list[Any]) -> Any:
    """A single value if all rows have the same, as in most columns; `metric` stays a list, which gives their number."""
    agree = column != "metric" and all(value == values[0] for value in values)
    return values[0] if values and agree else values


def _refuse_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed as a number")
