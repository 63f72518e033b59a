"""The committed form of a results folder: all rows in `rows.csv.gz`, what else its cells hold in `cells.json.gz`.

A sweep writes a file for each cell; a repository keeps these two. Reading them gives the same cells. Torch-free.
"""

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polykv.cellfile import (
    COLUMNS,
    FORMAT,
    STAMPED,
    Cell,
    check,
    digest,
    read_cells,
    reason,
    types_of,
    write_atomically,
)
from polykv.errors import PolyKVError

ROWS, CELLS = "rows.csv.gz", "cells.json.gz"


def pack(root: Path) -> tuple[int, tuple[str, ...]]:
    """Write the two files for all that is in the folder; how many cells they hold, and the names of damaged ones.

    The cells' own files stay. What was packed before is packed again. The same cells give the same bytes.

    Raises:
        PolyKVError: there is no cell, or the folder cannot be written.
    """
    cells, damaged = all_cells(root)
    if not cells:
        raise PolyKVError(f"no cells in {root} to pack")
    cells.sort(key=_place)
    text = _csv(cells)
    content = {
        "format": FORMAT,
        "rows": hashlib.sha256(text.encode()).hexdigest(),
        "cells": [
            {
                "study": cell.study,
                "cell": cell.name,
                "config": cell.config,
                "provenance": cell.provenance,
                "answers": list(cell.answers),
            }
            for cell in cells
        ],
    }
    content |= {"digest": digest(content)}
    try:
        write_atomically(root / ROWS, gzip.compress(text.encode(), mtime=0))
        write_atomically(root / CELLS, gzip.compress(json.dumps(content).encode(), mtime=0))
    except OSError as error:
        raise PolyKVError(
            f"cannot write into {root} ({error.strerror or error}); give a folder that can be written"
        ) from error
    return len(cells), tuple(damaged)


def all_cells(root: str | Path, study: str = "") -> tuple[list[Cell], list[str]]:
    """The cells of a folder, and the names of damaged files; of a cell that is packed too its own file counts.

    `study`: of this one only.

    Raises:
        PolyKVError: the packed rows are not what was packed.
    """
    cells, damaged = read_cells(root, study or "*")
    own = {_place(cell) for cell in cells}
    packed = [cell for cell in unpack(Path(root)) if study in ("", cell.study["name"])]
    return [*cells, *(cell for cell in packed if _place(cell) not in own)], damaged


def unpack(root: Path) -> Sequence[Cell]:
    """The packed cells of a folder; none where it has none.

    Raises:
        PolyKVError: one of the files is missing, damaged, of another version, or was edited.
    """
    if not (root / ROWS).exists() and not (root / CELLS).exists():
        return []
    try:
        text = gzip.decompress((root / ROWS).read_bytes()).decode()
        content = json.loads(gzip.decompress((root / CELLS).read_bytes()))
        if content["format"] != FORMAT:
            raise ValueError("its format is another version's")
        if content["digest"] != digest(content):
            raise ValueError(f"{CELLS} was changed since it was written")
        if content["rows"] != hashlib.sha256(text.encode()).hexdigest():
            raise ValueError(f"{ROWS} is not what {CELLS} was written with")
        return _cells(text, content)
    except (
        *(OSError, EOFError, zlib.error, csv.Error, RecursionError),
        *(ValueError, KeyError, TypeError, AttributeError),
    ) as error:
        raise PolyKVError(
            f"the packed rows of {root} cannot be read ({reason(error)}); restore {ROWS} and {CELLS} "
            "as they were committed"
        ) from error


def _csv(cells: Sequence[Cell]) -> str:
    names = dict.fromkeys([*COLUMNS, *(name for cell in cells for name in types_of(cell.study))])
    out = io.StringIO()
    writer = csv.DictWriter(out, names)  # its CRLF is what makes it quote both characters in texts
    writer.writeheader()
    for cell in cells:
        stamp = {"study": cell.study["name"], "cell": cell.name}
        stamp |= {name: cell.provenance[name] for name in STAMPED if name not in stamp}
        for values in zip(*cell.rows.values(), strict=True):
            writer.writerow(stamp | dict(zip(cell.rows, values, strict=True)))
    return out.getvalue()


def _cells(text: str, content: dict[str, Any]) -> list[Cell]:
    lines: dict[tuple[str, str], list[dict[str, str]]] = {}
    for line in csv.DictReader(io.StringIO(text, newline="")):
        lines.setdefault((line["study"], line["cell"]), []).append(line)
    found = []
    for about in content["cells"]:
        study, name = about["study"], about["cell"]
        mine = lines.pop((study["name"], name), [])
        rows = {
            column: [_read(line[column], kind) for line in mine]
            for column, kind in types_of(study).items()
            if column not in STAMPED
        }
        cell = Cell(study, name, about["config"], about["provenance"], rows, about["answers"])
        check(cell)
        found.append(cell)
    if lines or len({_place(cell) for cell in found}) < len(found):
        raise ValueError(f"{ROWS} and {CELLS} do not list the same cells, each once")
    return found


def _read(text: str, kind: type) -> Any:
    """A value of a cell's row; what is empty is none."""
    if not text:
        return None
    return {"True": True, "False": False}[text] if kind is bool else kind(text)


def _place(cell: Cell) -> tuple[str, str]:
    return cell.study["name"], cell.name
