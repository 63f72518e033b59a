"""Text files of the user: UTF-8 with or without a byte order mark, lines that end in `\\n` or `\\r\\n`. Torch-free.

`str.splitlines` ends lines at U+2028, form feeds and more, which JSON and prose hold inside of a line.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from polykv.errors import PolyKVError

Record = TypeVar("Record")


def read(path: Path, setting: str) -> str:
    """The text of a file, with `\\n` at every line's end.

    Raises:
        PolyKVError: it cannot be read (names the `setting` that holds its path), is not UTF-8, or is empty.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PolyKVError(
            f"cannot read {setting}={path} ({error.strerror}); give the path of a text file"
        ) from error
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        # Where there is a mark, places are counted behind it.
        line = error.object[: error.start].count(b"\n") + 1
        raise PolyKVError(
            f"{path}, line {line}, is not UTF-8 text ({error.reason}); convert it first"
        ) from error
    if not text.strip():
        raise PolyKVError(f"{path} is empty; give a file with text")
    return text


def lines(text: str) -> list[str]:
    """The lines of a text that has `\\n` at their ends, without those that are blank."""
    return [line for line in text.split("\n") if line.strip()]


def read_jsonl(path: Path, setting: str, parse: Callable[[Mapping], Record]) -> list[Record]:
    """What `parse` makes of each line's JSON object; blank lines are passed over.

    Raises:
        PolyKVError: as `read`, or a line is no JSON object, or `parse` refuses it; names file and line.
    """
    records = []
    for number, line in enumerate(read(path, setting).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise PolyKVError("it is no JSON object")
            records.append(parse(record))
        except (ValueError, RecursionError, PolyKVError) as error:
            raise PolyKVError(f"{path}, line {number}: {error}") from error
    return records
