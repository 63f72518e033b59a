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
# What readers rely on, in the whole cell, in its study's declaration and in its provenance; these may hold more.
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
FORMAT = 2  # of the file; 1 had rows with columns `protocol`, `ci_low` and `ci_high`

MAX_BYTES = 1 << 25  # of a cell's file; the largest that any study writes has 2 MB
MAX_REASON = 300  # characters of what is said of a damaged file
# Half characters: JSON can hold them, and no table could be written.
_HALVES = re.compile("[\ud800-\udfff]")


class DamagedCell(Exception):
    """The file is not what was written; the message says how it shows."""


def reason(error: Exception) -> str:
    """An error in one printable line, whatever text of a damaged file it quotes."""
    return ascii(f"{type(error).__name__}: {error}")[1:-1][:MAX_REASON]


@dataclass(frozen=True)
class Cell:
    """What a whole file holds.

    Attributes:
        study: the declaration: `name`, `title`, `question`, `answers` and `columns` (name -> type's name).
        name: the cell's identity.
        rows: column -> values, equally many in each; None where a row has none. Without the STAMPED ones. `metric` is
            among them, unless there is no row.
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


def check(cell: Cell) -> None:
    """Refuse a cell whose parts are not of the types that every reader relies on.

    Raises:
        ValueError, KeyError: names what is missing or of another type.
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
    if _HALVES.search(json.dumps(about, ensure_ascii=False)):
        raise ValueError("a text in it cannot be written as UTF-8")
    types, n_rows = cell.columns, len(cell.rows["metric"]) if cell.rows else 0
    for column, values in cell.rows.items():
        kind = types[column]
        if column in STAMPED:
            raise ValueError(f"{column} is told once, not in every row")
        if len(values) != n_rows:
            raise ValueError(f"{column} has {len(values)} values for {n_rows} rows")
        for value in values:
            check_type(column, value, kind)
    if None in cell.rows.get("metric", ()):
        raise ValueError("a row of it has no metric")


def compose(cell: Cell) -> str:
    """The text of a cell's file.

    Raises:
        ValueError, KeyError: it is not a cell that could be read again.
    """
    check(cell)
    content = {"format": FORMAT, "study": cell.study, "cell": cell.name}
    content |= {"config": cell.config, "provenance": cell.provenance}
    content |= {"rows": {name: _folded(name, values) for name, values in cell.rows.items()}}
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
        raise DamagedCell(reason(error)) from error
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


def _folded(column: str, values: list[Any]) -> Any:
    """One value for all rows where they agree, as in most columns; `metric` stays a list and says how many rows."""
    agree = column != "metric" and all(value == values[0] for value in values)
    return values[0] if values and agree else values


def _refuse_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that a cell holds")
