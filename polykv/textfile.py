"""Reading of users' text files: UTF-8 with or without byte order mark, lines ending in `\\n` or `\\r\\n`. Torch-free.

`str.splitlines` is not used: it also splits at U+2028, form feeds and others, which may occur within a line.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from polykv.errors import PolyKVError

Record = TypeVar("Record")


def read(path: Path, setting: str) -> str:
    """The text of a file, with lines ending in `\\n`.

    Raises:
        PolyKVError: it cannot be read (names the `setting` with its path), is not UTF-8, or is empty.
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
        # Offsets are counted after a byte order mark.
        line = error.object[: error.start].count(b"\n") + 1
        raise PolyKVError(
            f"{path}, line {line}, is not UTF-8 text ({error.reason}); convert it first"
        ) from error
    if not text.strip():
        raise PolyKVError(f"{path} is empty; give a file with text")
    return text


def lines(text: str) -> list[str]:
    """The lines of a text that are not blank."""
    return [line for line in text.split("\n") if line.strip()]


def read_jsonl(path: Path, setting: str, parse: Callable[[Mapping], Record]) -> list[Record]:
    """The records that `parse` makes of the JSON object on each line; blank lines are skipped.

    Raises:
        PolyKVError: as `read`, a line that is not a JSON object, or one that `parse` rejects; names file and line.
    """
    records = []
    for number, line in enumerate(read(path, setting).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise PolyKVError("not a JSON object")
            records.append(parse(record))
        except json.JSONDecodeError as error:
            raise PolyKVError(
                f"{path}, line {number}: not JSON ({error.msg}, character {error.pos + 1}); give one object per line"
            ) from error
        except (ValueError, RecursionError, PolyKVError) as error:
            raise PolyKVError(f"{path}, line {number}: {error}") from error
    return records
