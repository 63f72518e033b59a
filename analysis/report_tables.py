"""A Table as what a page shows of it: sections of cells, each with the key that it sorts by, and notes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.reduce import Value
from analysis.render import DIGITS, MISSING, Column, Row, Table, sections

INTERVAL = re.compile(r"(.*?) (\[[^\]]*\])")
MARK = re.compile(f"[{DIGITS}]+$")
NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?(e[-+]?\d+)?")
PROSE = 40  # characters; a longer text may break into lines


@dataclass(frozen=True)
class Cell:
    """`key`: the number that it sorts by ("": it sorts as text, after numbers); `missing` stands last."""

    text: str
    interval: str = ""
    note: str = ""
    key: str = ""
    missing: bool = False


@dataclass(frozen=True)
class Block:
    """One section: its heading ("" for none), its columns' headers and kinds, and its lines.

    A kind is `number` (at least one cell is one), `words` or `prose` (at least one is long).
    """

    title: str
    headers: list[str]
    kinds: list[str]
    lines: list[list[Cell]]


@dataclass(frozen=True)
class Shown:
    """`notes`: number ("" for what concerns a whole section) and text."""

    name: str
    caption: str
    blocks: list[Block]
    notes: list[tuple[str, str]]


def shown(table: Table) -> Shown:
    """The table with the texts, sections and footnotes that its Markdown has."""
    found, notes = sections(table)
    blocks = []
    for section in found:
        rows = [row for row in table.rows if row.get("section", "") == section.title]
        lines = [
            _line(section.columns, row, texts)
            for row, texts in zip(rows, section.lines, strict=True)
        ]
        kinds = [_kind(cells) for cells in zip(*lines, strict=True)]
        headers = [column.header for column in section.columns]
        blocks.append(Block(section.title, headers, kinds, lines))
    return Shown(table.name, table.caption, blocks, [_note(note) for note in notes])


def _kind(cells: Sequence[Cell]) -> str:
    if any(cell.key for cell in cells):
        return "number"
    return "prose" if max(len(cell.text) for cell in cells) > PROSE else "words"


def _line(columns: Sequence[Column], row: Row, texts: list[str]) -> list[Cell]:
    return [
        _cell(column, row.get(column.name), text)
        for column, text in zip(columns, texts, strict=True)
    ]


def _cell(column: Column, raw: object, text: str) -> Cell:
    if isinstance(raw, str) and raw:  # has no footnote
        return Cell(text, key=raw.replace(",", "") if NUMBER.fullmatch(raw) else "")
    mark = MARK.search(text)
    note = _plain(mark[0]) if mark else ""
    text = MARK.sub("", text)
    if text == MISSING:
        return Cell(text, note=note, missing=True)
    number = raw.value if isinstance(raw, Value) else raw
    split = INTERVAL.fullmatch(text) if column.interval else None
    text, interval = split.groups() if split else (text, "")
    return Cell(text, interval, note, f"{number:.9g}")


def _note(text: str) -> tuple[str, str]:
    mark, _, said = text.partition(" ")
    return _plain(mark.removeprefix(MISSING)), said


def _plain(mark: str) -> str:
    return "".join(str(DIGITS.index(digit)) for digit in mark)
