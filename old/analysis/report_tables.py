"""A Table as what a page shows of it: sections of cells, each with the key that it sorts by, and notes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.reduce import Value

from analysis.render import DIGITS, MISSING, Column, Row, Section, Table, sections

INTERVAL = re.compile(r"(.*?) (\[[^\]]*\])")
MARK = re.compile(f"[{DIGITS}]+$")
NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?(e[-+]?\d+)?")
PROSE = 40  # characters; a longer text may break into lines
CLAUSE = re.compile(r"(.{12,}?)([.:;,])(?: (.*)|$)", re.DOTALL)  # a word or two are no title


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

    A kind is `number` (at least one cell is one), `words` or `prose` (at least one is long). `same`: the
    keys that all lines share, which are said once and are no columns. `pinned`: the column that stays in
    sight while the others scroll.
    """

    title: str
    same: list[tuple[str, str]]
    headers: list[str]
    kinds: list[str]
    pinned: int
    lines: list[list[Cell]]


@dataclass(frozen=True)
class Shown:
    """`notes`: number ("" for what concerns a whole section) and text."""

    name: str
    title: str
    caption: str
    blocks: list[Block]
    notes: list[tuple[str, str]]

    @property
    def size(self) -> str:
        """Lines and columns, for who is about to unfold it."""
        n_lines = sum(len(block.lines) for block in self.blocks)
        n_columns = max(len(block.headers) for block in self.blocks)
        return f"{n_lines:,} {'line' if n_lines == 1 else 'lines'} of {n_columns} columns"


def titled(caption: str) -> tuple[str, str]:
    """A caption's first clause as a title, and what is left to say below it.

    A clause that ends in a comma does not stand alone: then the whole caption is left.
    """
    found = CLAUSE.match(caption)
    if not found:
        return caption.rstrip("."), ""
    title, mark, rest = found.groups(default="")
    return title, caption if mark == "," else rest[:1].upper() + rest[1:]


def shown(table: Table) -> Shown:
    """The table with the texts, sections and footnotes that its Markdown has."""
    found, notes = sections(table)
    blocks = [
        _block(section, [row for row in table.rows if row.get("section", "") == section.title])
        for section in found
    ]
    return Shown(table.name, *titled(table.caption), blocks, [_note(note) for note in notes])


def _block(section: Section, rows: Sequence[Row]) -> Block:
    lines = [
        _line(section.columns, row, texts) for row, texts in zip(rows, section.lines, strict=True)
    ]
    every = list(zip(section.columns, zip(*lines, strict=True), strict=True))
    kept = [pair for pair in every if not _same(*pair)] or every
    kinds = [_kind(cells) for _, cells in kept]
    return Block(
        section.title,
        [(column.header, cells[0].text) for column, cells in every if _same(column, cells)],
        [column.header for column, _ in kept],
        kinds,
        _pinned(kept, kinds),
        [list(line) for line in zip(*(cells for _, cells in kept), strict=True)],
    )


def _same(column: Column, cells: Sequence[Cell]) -> bool:
    """A key that is the same in all of several lines tells none of them apart."""
    return column.key and len(cells) > 1 and len(set(cells)) == 1 and not cells[0].note


def _pinned(kept: Sequence[tuple[Column, Sequence[Cell]]], kinds: Sequence[str]) -> int:
    """The key in words that tells most lines apart, else the first column."""
    words = [i for i, (column, _) in enumerate(kept) if column.key and kinds[i] == "words"]
    return max(words, key=lambda place: len(set(kept[place][1])), default=0)


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
