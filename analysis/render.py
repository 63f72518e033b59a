"""One Table as Markdown, LaTeX (booktabs), HTML, CSV or plain text. A missing value is `–` with a footnote."""

import csv
import io
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from markupsafe import Markup, escape
from pandas.io.formats.style import Styler

from analysis.load import SETTING as SET
from analysis.load import swept
from analysis.statistics import Value, whole_samples

MISSING = "–"
DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
PORTRAIT, LANDSCAPE = 105, 155  # characters of 7 points across a page with margins of an inch
FEW = 3  # reasons of a column without any value that its footnote lists
WRAPPED = 26  # characters; a longer key breaks its lines in LaTeX
TEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {digit: rf"\textsuperscript{{{place}}}" for place, digit in enumerate(DIGITS)}
    | {"⁻": r"\textsuperscript{-}", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"}
    | {"[": "{[}", "]": "{]}"}  # a bracket after \\ would be its argument
    | {"–": "--", "—": "---", "’": "'", "…": r"\ldots{}", "µ": r"$\mu$", "½": r"$\frac{1}{2}$"}
    | {"×": r"$\times$", "±": r"$\pm$", "Δ": r"$\Delta$", "≤": r"$\leq$", "≥": r"$\geq$"}
    | {"→": r"$\rightarrow$", "·": r"$\cdot$", "−": "$-$"}
)  # fmt: skip
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
    "problems": "relay",
}


def keys(*names: str) -> list[Column]:
    """Key columns; those of settings are headed by the setting's name."""
    return [Column(name, SETTINGS.get(name, name), key=True) for name in names]


def settings_columns(rows: pd.DataFrame) -> list[Column]:
    """Key columns of the `set.` settings in which these rows differ."""
    return [Column(name, name.removeprefix(SET), key=True) for name in swept(rows)]


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
        return ". ".join(filter(None, [self.caption.rstrip("."), self.legend]))


@dataclass(frozen=True)
class Section:
    """A heading ("" for none), the columns in which it has values, and the texts of its lines."""

    title: str
    columns: list[Column]
    lines: list[list[str]]


def fixed(digits: int, sign: str = "") -> Callable[[float, Row], str]:
    """`digits` decimals; what they would leave with less than one significant digit keeps two."""

    def form(number: float, row: Row) -> str:
        if 0 < abs(number) < 10**-digits:
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
    """The table without lines that hold published values only, for the terminal."""

    def any_value(row: Row) -> bool:
        return any(
            isinstance(v, Value) and v.value is not None
            for name, v in row.items()
            if name != "published"
        )

    return replace(table, rows=[row for row in table.rows if any_value(row)])


def sections(table: Table) -> tuple[list[Section], list[str]]:
    """The table's sections and all footnotes; a cell's text ends in its footnote's number.

    A column without any value in a section is left out of it and its reason stands in the last footnote.
    """
    notes: dict[str, int] = {}
    found, left_out = [], []
    for title in dict.fromkeys(row.get("section", "") for row in table.rows):
        rows = [row for row in table.rows if row.get("section", "") == title]
        columns, absent = [], {}
        for column in table.columns:
            if not any(column.name in row for row in rows):
                continue  # it belongs to another section
            texts = [_text(column, row) for row in rows]
            if {text for text, _ in texts} == {MISSING}:
                reasons = list(dict.fromkeys(note for _, note in texts))
                more = f"; or {len(reasons) - FEW} others, which the CSV has" * (len(reasons) > FEW)
                absent.setdefault("; or: ".join(reasons[:FEW]) + more, []).append(column.header)
            else:
                columns.append(column)
        lines = [[_marked(column, row, notes) for column in columns] for row in rows]
        found.append(Section(title, columns, lines))
        where = f"{title}: " if title else ""
        for reason, headers in absent.items():
            left_out.append(f"{MISSING} {where}no {', '.join(headers)}: {reason}")
    return found, [f"{_superscript(place)} {note}" for note, place in notes.items()] + left_out


def _marked(column: Column, row: Row, notes: dict[str, int]) -> str:
    text, note = _text(column, row)
    return text + _superscript(notes.setdefault(note, len(notes) + 1)) if note else text


def _text(column: Column, row: Row) -> tuple[str, str]:
    """A cell's text and its footnote."""
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
    """A longtable for booktabs (one for each section), plain ASCII, on a landscape page where it is wide.

    What is wider still is set in several tables, each with the columns that say what a line is about.
    """
    found, notes = sections(table)
    blocks = [block for section in found for block in _blocks(section, LANDSCAPE)]
    wide = any(_width(block.columns, block.lines) > PORTRAIT for block in blocks)
    out = [r"\begin{landscape}"] if wide else []
    out += [r"\begingroup\scriptsize\setlength{\tabcolsep}{3pt}\setlength{\LTcapwidth}{\linewidth}"]
    for place, block in enumerate(blocks):
        out += [rf"\noindent\textit{{{tex(block.title)}}}"] if block.title else []
        of_table = {"caption": tex(table.about), "label": f"tab:{table.name}"}
        headers = [tex(column.header) for column in block.columns]
        styled = _styler(headers, [list(map(tex, line)) for line in block.lines]).to_latex(
            environment="longtable",
            hrules=True,
            column_format="".join(map(_alignment, block.columns, zip(*block.lines, strict=True))),
            **({} if place else of_table),
        )
        out.append(styled.rstrip())
        out += [r"\addtocounter{table}{-1}"] * bool(place)  # of one table there is one number
    out += [r"{\footnotesize\raggedright", *(f"{tex(note)}\\par" for note in notes), "}"]
    out += [r"\endgroup", *[r"\end{landscape}"] * wide]
    return "\n".join(out) + "\n"


def _alignment(column: Column, texts: Sequence[str]) -> str:
    if column.key and max(map(len, texts)) > WRAPPED:
        return rf">{{\raggedright\arraybackslash}}p{{{WRAPPED / 2}em}}"
    return "l" if column.key else "r"


def _blocks(section: Section, room: int) -> Iterator[Section]:
    """The columns in order, in as few sections as fit `room` characters, each with all key columns."""
    keys = [i for i, column in enumerate(section.columns) if column.key]
    block: list[int] = []
    for place in (i for i, column in enumerate(section.columns) if not column.key):
        if block and _width(*_only(section, [*keys, *block, place])) > room:
            yield Section(section.title, *_only(section, [*keys, *block]))
            block = []
        block.append(place)
    yield Section(section.title, *_only(section, [*keys, *block]))


def _only(section: Section, places: Sequence[int]) -> tuple[list[Column], list[list[str]]]:
    lines = [[line[i] for i in places] for line in section.lines]
    return [section.columns[i] for i in places], lines


def _width(columns: Sequence[Column], lines: Sequence[Sequence[str]]) -> int:
    """Width in characters, with two between columns."""
    across = 0
    for column, texts in zip(columns, zip(*lines, strict=True), strict=True):
        longest = max(map(len, texts))
        across += 2 + max(min(longest, WRAPPED) if column.key else longest, len(column.header))
    return across


def tex(text: str) -> str:
    """The text with every special character as LaTeX writes it, in ASCII.

    Raises:
        ValueError: a character that is not known here: add it to TEX.
    """
    found = text.translate(TEX)
    if not found.isascii():
        raise ValueError(f"no LaTeX is known for a character of {text!r}; add it to TEX")
    return found


def html(section: Section) -> Markup:
    """The lines of a section as a `<table>`; the cells that say what a line is about hold a `<span>`."""

    def written(texts: Iterable[str]) -> list[str]:
        pairs = zip(section.columns, map(escape, texts), strict=True)
        return [f"<span>{text}</span>" if column.key else str(text) for column, text in pairs]

    headers = written(column.header for column in section.columns)
    shown = [written(line) for line in section.lines]
    return Markup(_styler(headers, shown).to_html(exclude_styles=True))


def _styler(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> Styler:
    return pd.DataFrame(lines).style.hide(axis="index").format_index(headers.__getitem__, axis=1)


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


def plain(table: Table, width: int, whole: bool = False) -> str:
    """Aligned text no wider than `width`: the columns furthest right are left out, and named, where they do not fit.

    The columns that say what a line is about and the first of the others always stay. `whole`: all columns stay, and
    only sentences are kept within the width.
    """
    found, notes = sections(table)
    parts = [textwrap.fill(table.caption, width)]
    left_out: dict[str, None] = {}
    for section in found:
        rows = [[column.header for column in section.columns], *section.lines]
        widths = [max(map(len, texts)) + 2 for texts in zip(*rows, strict=True)]
        left = [i for i, column in enumerate(section.columns) if column.key]
        others = [i for i, column in enumerate(section.columns) if not column.key]
        while (
            not whole and len(others) > 1 and sum(widths[i] for i in [*left, *others]) > width + 2
        ):
            left_out[section.columns[others.pop()].header] = None
        shown = [_aligned(row, left, others, widths) for row in rows]
        shown.insert(1, "-" * max(map(len, shown)))
        parts += [section.title] if section.title else []
        parts.append("\n".join(shown))
    if left_out:
        notes.append(
            f"Too wide for this terminal: {', '.join(left_out)} (the table's file has all)"
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
    """What the rows are, for a caption: model (weights), n (of a document or repeat), device, dtype, commit, dates."""
    if rows.empty:
        return "Nothing of this was run here."
    models = sorted(set(zip(rows["model"], rows["weights"], strict=True)))
    counts = whole_samples(rows)["n"].dropna()
    n = f"n = {span(counts, ',')}" if len(counts) else "n not stated"
    dates = [text[:10] for text in rows["created_at"] if text]
    return (
        f"{how} {', '.join(f'{model} ({weights} weights)' for model, weights in models)}; "
        f"{n}; {listed(rows['device'])}, {listed(rows['dtype'])}; commit {listed(rows['commit'])}; "
        f"{span(dates) or 'undated'}."
    )


def span(values: Iterable[Any], form: str = "") -> str:
    """The least and the greatest, once if they read alike; "" of none."""
    found = sorted(set(values))
    ends = dict.fromkeys(f"{value:{form}}" for value in (found[0], found[-1])) if found else ()
    return " to ".join(ends)


def listed(column: pd.Series) -> str:
    """The different texts of a column, for a sentence."""
    return " and ".join(sorted(set(column) - {""})) or "not stated"
