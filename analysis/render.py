"""One Table as Markdown, LaTeX (booktabs), CSV or plain text. A missing value is `–` with a footnote."""

import csv
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from analysis.latex import Part, environment
from analysis.statistics import Value

MISSING = "–"
DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """`form(number, row)` writes a number; `key` columns say what a line is about."""

    name: str
    header: str
    form: Callable[[float, Row], str] = lambda number, row: f"{number:,}"
    key: bool = False
    interval: bool = False


# What the command line calls the columns that are named otherwise here.
SETTINGS = {
    "context_tokens": "context",
    "agents": "n_agents",
    "hops": "n_hops",
    "budget": "budget_bits",
    "problems": "n_problems",
}


def keys(*names: str) -> list[Column]:
    """Columns that say what a line is about, headed by their names or, of settings, the settings'."""
    return [Column(name, SETTINGS.get(name, name), key=True) for name in names]


@dataclass(frozen=True)
class Table:
    """Rows map column names to Value, int, str or None, and `section` to the heading they are under.

    `caption` says what was measured on what, `legend` what the columns mean.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    legend: str = ""

    @property
    def about(self) -> str:
        """Caption and legend in one."""
        return ". ".join(filter(None, [self.caption, self.legend]))


@dataclass(frozen=True)
class Section:
    """A heading ("" for none), the columns in which it has values, and the texts of its lines."""

    title: str
    columns: list[Column]
    lines: list[list[str]]


def fixed(digits: int, sign: str = "") -> Callable[[float, Row], str]:
    """`digits` decimals; what would become 0 keeps two significant digits."""

    def form(number: float, row: Row) -> str:
        # half a unit itself is rounded to even, which is 0
        if 0 < abs(number) <= 0.5 * 10**-digits:
            return f"{number:{sign}.2g}"
        return f"{number:{sign},.{digits}f}"

    return form


def significant(number: float, row: Row) -> str:
    """Three significant digits, for numbers that span decades."""
    return f"{number:.3g}"


def compact(number: float, row: Row) -> str:
    """Two significant digits, plain from 0.0001 up: 0.0052, 4.5e-05."""
    return f"{number:.2g}"


def memory(number: float, row: Row) -> str:
    """Three decimals as published; below 0.1 three significant digits."""
    return f"{number:,.3f}" if number >= 0.1 or not number else f"{number:#.3g}"


def measured(table: Table) -> Table:
    """Without the lines that only say what was published, for the terminal."""

    def any_value(row: Row) -> bool:
        return any(
            isinstance(v, Value) and v.value is not None
            for name, v in row.items()
            if name != "published"
        )

    return replace(table, rows=[row for row in table.rows if any_value(row)])


def sections(table: Table) -> tuple[list[Section], list[str]]:
    """The table's sections, and the footnotes of all; a text ends in its footnote's superscript.

    A column without any value in a section is left out of it and its reason stands in the last
    footnote. Reasons that differ in their numbers only share a footnote; the CSV has each in full.
    """
    notes: dict[str, dict[str, None]] = {}  # by what they have in common
    found, left_out = [], []
    for title in dict.fromkeys(row.get("section", "") for row in table.rows):
        rows = [row for row in table.rows if row.get("section", "") == title]
        columns, absent = [], {}
        for column in table.columns:
            if not any(column.name in row for row in rows):
                continue  # it belongs to another section
            texts = [_text(column, row) for row in rows]
            if {text for text, _ in texts} == {MISSING}:
                absent.setdefault(_reasons(note for _, note in texts), []).append(column.header)
            else:
                columns.append(column)
        lines = [[_marked(column, row, notes) for column in columns] for row in rows]
        found.append(Section(title, columns, lines))
        where = f"{title}: " if title else ""
        for reason, headers in absent.items():
            left_out.append(f"{MISSING} {where}no {', '.join(headers)}: {reason}")
    marked = [f"{_superscript(i)} {_shared_note(n)}" for i, n in enumerate(notes.values(), 1)]
    return found, marked + left_out


def _marked(column: Column, row: Row, notes: dict[str, dict[str, None]]) -> str:
    text, note = _text(column, row)
    if not note:
        return text
    notes.setdefault(_alike(note), {})[note] = None
    return text + _superscript(list(notes).index(_alike(note)) + 1)


def _reasons(notes: Iterable[str]) -> str:
    alike: dict[str, dict[str, None]] = {}
    for note in notes:
        alike.setdefault(_alike(note), {})[note] = None
    return "; or: ".join(map(_shared_note, alike.values()))


def _shared_note(alike: Mapping[str, None]) -> str:
    return next(iter(alike)) + (" (elsewhere with other numbers)" if len(alike) > 1 else "")


def _alike(note: str) -> str:
    return re.sub(r"\d[\d.,]*", "#", note)


def _text(column: Column, row: Row) -> tuple[str, str]:
    """A cell and its footnote."""
    cell = row.get(column.name)
    if not isinstance(cell, Value):
        if cell is None or cell == "":
            return MISSING, "does not apply, or not stated"
        return (cell, "") if isinstance(cell, str) else (column.form(cell, row), "")
    if cell.value is None:
        return MISSING, cell.note
    text = column.form(cell.value, row)
    if column.interval and cell.low is not None and cell.high is not None:
        text += f" [{column.form(cell.low, row)}, {column.form(cell.high, row)}]"
    return text, cell.note


def markdown(table: Table) -> str:
    """A pipe table (one per section) with caption and footnotes."""
    found, notes = sections(table)
    parts = [table.about]
    for section in found:
        head = [column.header for column in section.columns]
        rule = [":--" if column.key else "--:" for column in section.columns]
        parts += [f"**{section.title}**"] if section.title else []
        lines = [head, rule, *section.lines]
        lines = [[text.replace("|", r"\|") for text in line] for line in lines]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    parts.append("  \n".join(notes))
    return "\n\n".join(filter(None, parts)) + "\n"


def latex(table: Table) -> str:
    """A `table` or `longtable` for booktabs, plain ASCII; one tabular per section (analysis/latex.py)."""
    found, notes = sections(table)
    parts = [
        Part(s.title, [c.header for c in s.columns], [c.key for c in s.columns], s.lines)
        for s in found
    ]
    return environment(table.name, table.about, parts, notes)


def to_csv(table: Table) -> str:
    """Full precision, missing values empty, reasons in the last column, the caption a `#` line on top."""
    out = io.StringIO()
    out.write(f"# {table.about}\n")
    sections = any(row.get("section") for row in table.rows)
    head = ["section"] * sections
    for column in table.columns:
        ends = [f"{column.name}_low", f"{column.name}_high"] if column.interval else []
        head += [column.name, *ends]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*head, "note"])
    for row in table.rows:
        cells, notes = [row.get("section", "")] * sections, []
        for column in table.columns:
            cell = row.get(column.name)
            value = cell if isinstance(cell, Value) else Value(cell)
            numbers = [value.value, *([value.low, value.high] if column.interval else [])]
            cells += [f"{x:.9g}" if isinstance(x, float) else x for x in numbers]
            notes += [f"{column.name}: {value.note}"] if value.note else []
        writer.writerow([*cells, "; ".join(notes)])
    return out.getvalue()


def plain(table: Table, width: int) -> str:
    """Aligned text no wider than `width`: the columns furthest right are left out, and named, where they do not fit.

    The columns that say what a line is about and the first of the others always stay.
    """
    found, notes = sections(table)
    parts = [textwrap.fill(table.caption, width)]
    left_out: dict[str, None] = {}
    for section in found:
        rows = [[column.header for column in section.columns], *section.lines]
        widths = [max(map(len, texts)) + 2 for texts in zip(*rows, strict=True)]
        left = [i for i, column in enumerate(section.columns) if column.key]
        others = [i for i, column in enumerate(section.columns) if not column.key]
        while len(others) > 1 and sum(widths[i] for i in [*left, *others]) > width + 2:
            left_out[section.columns[others.pop()].header] = None
        shown = [_aligned(row, left, others, widths) for row in rows]
        shown.insert(1, "-" * max(map(len, shown)))
        parts += [section.title] if section.title else []
        parts.append("\n".join(shown))
    if left_out:
        notes.append(
            f"Left out for want of width: {', '.join(left_out)} (the table's file has all)"
        )
    notes = [*notes, *filter(None, [table.legend])]
    parts.append("\n".join(textwrap.fill(note, width, subsequent_indent="  ") for note in notes))
    return "\n\n".join(filter(None, parts)) + "\n"


def _aligned(row: Sequence[str], left: list[int], block: list[int], widths: list[int]) -> str:
    named = [row[i].ljust(widths[i] - 2) for i in left]
    return "  ".join([*named, *(row[i].rjust(widths[i] - 2) for i in block)]).rstrip()


def _superscript(number: int) -> str:
    return "".join(DIGITS[int(digit)] for digit in str(number))


def describe(rows: pd.DataFrame, how: str = "Measured on") -> str:
    """What the rows are, for a caption: model (weights), n, device, dtype, commit, dates."""
    if rows.empty:
        return "Nothing of this was run here."
    models = sorted(set(zip(rows["model"], rows["weights"], strict=True)))
    ends = list(
        dict.fromkeys(f"{n:,}" for n in (rows["n"].min(), rows["n"].max()) if n is not pd.NA)
    )
    n = f"n = {' to '.join(ends)}" if ends else "n not stated"
    dates = sorted({text[:10] for text in rows["created_at"] if text})
    return (
        f"{how} {', '.join(f'{model} ({weights} weights)' for model, weights in models)}; "
        f"{n}; {listed(rows['device'])}, {listed(rows['dtype'])}; commit {listed(rows['commit'])}; "
        f"{' to '.join(dict.fromkeys([dates[0], dates[-1]])) if dates else 'undated'}."
    )


def listed(column: pd.Series) -> str:
    """The different texts of a column, for a sentence."""
    return " and ".join(sorted(set(column) - {""})) or "not stated"
