"""The packed form of a results folder: rows of all cells in `rows.csv.gz`, their other content in `cells.json.gz`.

A sweep writes one file per cell; these two are what is committed. They contain the same cells. Torch-free.
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
# What damaged or edited files raise, in gzip, csv, json, or on the way from text to cells.
UNREADABLE = (
    OSError, EOFError, zlib.error, csv.Error, RecursionError, ValueError, KeyError, TypeError, AttributeError,
)  # fmt: skip


def pack(root: Path) -> tuple[int, tuple[str, ...]]:
    """Pack all cells of a folder; returns their number, and the names of damaged files.

    Files of cells stay, and cells packed before are packed again. The output is deterministic.

    Raises:
        PolyKVError: there are no cells, or the folder is not writable.
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
            f"cannot write into {root} ({error.strerror or error}); give a writable folder"
        ) from error
    return len(cells), tuple(damaged)


def all_cells(root: str | Path, study: str = "") -> tuple[list[Cell], list[str]]:
    """The cells of a folder (of one study), and the names of damaged files.

    A cell's own file takes precedence over its packed form.

    Raises:
        PolyKVError: the packed files are damaged.
    """
    cells, damaged = read_cells(root, study or "*")
    own = {_place(cell) for cell in cells}
    packed = [cell for cell in unpack(Path(root)) if study in ("", cell.study["name"])]
    return [*cells, *(cell for cell in packed if _place(cell) not in own)], damaged


def unpack(root: Path) -> Sequence[Cell]:
    """The packed cells of a folder, if it has any.

    Raises:
        PolyKVError: one of the two files is missing, damaged, edited, or of another version.
    """
    if not (root / ROWS).exists() and not (root / CELLS).exists():
        return []
    try:
        text = gzip.decompress((root / ROWS).read_bytes()).decode()
        content = json.loads(gzip.decompress((root / CELLS).read_bytes()))
        if content["format"] != FORMAT:
            raise ValueError("another version of the format")
        if content["digest"] != digest(content):
            raise ValueError(f"{CELLS} was changed since it was written")
        if content["rows"] != hashlib.sha256(text.encode()).hexdigest():
            raise ValueError(f"{ROWS} does not belong to {CELLS}")
        return _cells(text, content)
    except UNREADABLE as error:
        raise PolyKVError(
            f"the packed rows of {root} cannot be read ({reason(error)}); restore {ROWS} and {CELLS} "
            "as they were committed"
        ) from error


def _csv(cells: Sequence[Cell]) -> str:
    """The rows of all cells as one table, with the columns of all their studies."""
    names = dict.fromkeys([*COLUMNS, *(name for cell in cells for name in types_of(cell.study))])
    out = io.StringIO()
    writer = csv.DictWriter(out, names)  # with CRLF line ends it quotes CR and LF in texts
    writer.writeheader()
    for cell in cells:
        stamp = {"study": cell.study["name"], "cell": cell.name}
        stamp |= {name: cell.provenance[name] for name in STAMPED if name not in stamp}
        for values in zip(*cell.rows.values(), strict=True):
            writer.writerow(stamp | dict(zip(cell.rows, values, strict=True)))
    return out.getvalue()


def _cells(text: str, content: dict[str, Any]) -> list[Cell]:
    """The checked cells of the two files' content.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: damaged or edited content.
    """
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
    """A value of the CSV in its column's type; None if empty."""
    if not text:
        return None
    return {"True": True, "False": False}[text] if kind is bool else kind(text)


def _place(cell: Cell) -> tuple[str, str]:
    """What a cell is found by: its study, and its identity."""
    return cell.study["name"], cell.name
