"""A result file that is not what was written: it is named, set aside whole, and its cell is measured again."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from analysis.load import load
from reliability import stage
from reliability.again import outcome, resumed
from reliability.finding import Finding

AT_ONCE = stage.N_CELLS - 1  # kinds of damage in one folder, each to a cell of its own


def run(quick: bool) -> list[Finding]:
    """A finding for each kind of damage."""
    kinds = list(DAMAGES)[:: 7 if quick else 1]
    with TemporaryDirectory(prefix="polykv-damage-") as folder:
        root = Path(folder) / "results"
        stage.run(stage.in_folder(root))
        batches = [kinds[first : first + AT_ONCE] for first in range(0, len(kinds), AT_ONCE)]
        return [finding for batch in batches for finding in damaged(root, batch)]


def damaged(root: Path, kinds: Sequence[str]) -> list[Finding]:
    """Damage a cell in each of these ways, look at the folder, and run the sweep again."""
    start = time.monotonic()
    paths = list(stage.finished(root))
    struck = dict(zip(kinds, paths, strict=False))
    for kind, path in struck.items():
        path.write_bytes(DAMAGES[kind](path.read_bytes(), paths[-1].read_bytes()))
    wrong = {path: path.read_bytes() for path in struck.values()}
    named = load(root).damaged
    for path in wrong:
        path.with_name(f"{path.name}.damaged").unlink(missing_ok=True)  # of an earlier round
    again = stage.run(stage.in_folder(root))
    after = resumed(root, "once more")
    taken = (time.monotonic() - start) / len(struck)
    findings = []
    for kind, path in struck.items():
        aside = path.with_name(f"{path.name}.damaged")
        said = [line for line in again.err.splitlines() if str(path) in line]
        failures = list(after)
        if again.code != 0 or len(said) != 1 or aside.name not in said[0]:
            failures.append(f"exit {again.code}, said {again.err.strip()[-300:]}")
        if not aside.exists() or aside.read_bytes() != wrong[path]:
            failures.append(f"{aside.name} is not the damaged file")
        if not any(str(path) in line for line in named):
            failures.append("the analysis did not name it")
        reason = said[0].partition("is damaged ")[2] if said else ""
        findings.append(
            Finding(
                area="damaged result file",
                tried=kind,
                times=1,
                answered=outcome(f"named {reason.replace(path.stem, 'CELL')}", failures),
                survived=not failures,
                seconds=taken,
            )
        )
    return findings


def _edited(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes, bytes], bytes]:
    """As by hand: the file's JSON, changed and saved."""

    def damage(content: bytes, other: bytes) -> bytes:
        cell = json.loads(content)
        change(cell)
        return json.dumps(cell, indent=1).encode()

    return damage


# What a cell's file becomes: its own bytes, those of another cell -> damaged bytes.
DAMAGES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "half-written": lambda content, other: content[: len(content) // 2],
    "empty": lambda content, other: b"",
    "a value changed by hand": _edited(lambda cell: cell["rows"][0].update(value=1.0)),
    "a column deleted": _edited(lambda cell: cell["rows"][0].pop("metric")),
    "a number become text": _edited(lambda cell: cell["rows"][0].update(value="plenty")),
    "a value become NaN": _edited(lambda cell: cell["rows"][0].update(value=float("nan"))),
    "another cell's file, copied": lambda content, other: other,
    "its last byte missing": lambda content, other: content[:-1],
    "zeros, as after a power cut": lambda content, other: bytes(len(content)),
    "an interval widened": _edited(lambda cell: cell["rows"][2].update(ci_low=-9.0)),
    "a row deleted": _edited(lambda cell: cell["rows"].pop()),
    "a row there twice": _edited(lambda cell: cell["rows"].append(cell["rows"][0])),
    "its settings changed": _edited(lambda cell: cell["config"].update(seed=1)),
    "its date changed": _edited(lambda cell: cell["provenance"].update(created_at="2020-01-01")),
    "a value become a list": _edited(lambda cell: cell["rows"][0].update(value=[1, 2])),
    "rows that are no list": _edited(lambda cell: cell.update(rows={"a": 1})),
    "JSON, but nothing of ours": lambda content, other: b'{"hello": "world"}',
    "JSON 100,000 lists deep": lambda content, other: b"[" * 100_000,
    "one bit flipped": lambda content, other: _flipped(content),
    "not UTF-8": lambda content, other: b"\xff\xfe" + content,
    "its digest replaced": _edited(lambda cell: cell.update(digest="0" * 64)),
}


def _flipped(content: bytes) -> bytes:
    middle = content.index(b'"value"') + len(b'"value": ')
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
