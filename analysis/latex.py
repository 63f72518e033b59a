"""A table as LaTeX for booktabs, array, longtable and pdflscape, in plain ASCII, never wider than its page.

What fits a portrait page is a `table`; what does not becomes a `longtable`, on a landscape page where it is
wide, in several blocks that repeat their keys where it is wider still. Text is never below 7 points.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-", strict=True))
TEX = {character: f"\\{character}" for character in "&%$#_{}"}
TEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
TEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"}
TEX |= {"–": "--", "—": "---", "’": "'", "…": r"\ldots{}", "µ": r"$\mu$", "½": r"$\frac{1}{2}$"}
TEX |= {"×": r"$\times$", "±": r"$\pm$", "Δ": r"$\Delta$", "≤": r"$\leq$", "≥": r"$\geq$"}
TEX |= {"→": r"$\rightarrow$", "·": r"$\cdot$", "−": "$-$"}
SIZES = {"small": 9.0, "footnotesize": 8.0, "scriptsize": 7.0}  # points, in a document of 10
PORTRAIT, LANDSCAPE = 440, 630  # points of text across A4 and Letter with margins of an inch
LINES = 45  # of a portrait page
CHARACTER = 0.53  # of the size, about, in Computer Modern
GAP = 6  # points between two columns
WRAPPED = 26  # characters; a longer key breaks its lines


@dataclass(frozen=True)
class Part:
    """One tabular: its heading, the headers of its columns, which are keys, and its lines."""

    title: str
    headers: list[str]
    keys: list[bool]
    lines: list[list[str]]

    def width(self, size: float) -> float:
        """Points across."""
        return sum(size * CHARACTER * w + GAP for w in _widths(self))

    def only(self, columns: Sequence[int]) -> "Part":
        """With these columns alone."""
        headers, keys = ([of[i] for i in columns] for of in (self.headers, self.keys))
        return Part(self.title, headers, keys, [[line[i] for i in columns] for line in self.lines])


def tex(text: str) -> str:
    """The text with every special character as LaTeX writes it.

    Raises:
        ValueError: a character that is not known here: add it to TEX.
    """
    run = "".join(SUPERSCRIPTS)
    found = re.sub(f"[{re.escape(''.join(TEX))}]|[{run}]+", _spelled, text)
    if not found.isascii():
        raise ValueError(
            f"no LaTeX is known for a character of {text!r}; add it to analysis.latex.TEX"
        )
    return found


def _spelled(match: re.Match) -> str:
    run = match[0]
    if run in TEX:
        return TEX[run]
    return rf"\textsuperscript{{{''.join(SUPERSCRIPTS[c] for c in run)}}}"


def environment(name: str, caption: str, parts: Sequence[Part], notes: Sequence[str]) -> str:
    """The whole table with caption, label and footnotes."""
    n_lines = sum(len(part.lines) + 4 for part in parts) + len(notes)
    for size, points in SIZES.items():
        if n_lines <= LINES and all(part.width(points) <= PORTRAIT for part in parts):
            return _floating(name, caption, parts, notes, size)
    wide = any(part.width(SIZES["scriptsize"]) > PORTRAIT for part in parts)
    return _breaking(name, caption, parts, notes, wide)


def _floating(
    name: str, caption: str, parts: Sequence[Part], notes: Sequence[str], size: str
) -> str:
    out = [r"\begin{table}[t]", rf"\centering\{size}\setlength{{\tabcolsep}}{{{GAP / 2:g}pt}}"]
    out += [rf"\caption{{{tex(caption)}}}", rf"\label{{tab:{name}}}"]
    for part in parts:
        if part.title:
            out.append(rf"\par\medskip\textit{{{tex(part.title)}}}\par\smallskip")
        out += [rf"\begin{{tabular}}{{{_columns(part)}}}", r"\toprule", _head(part), r"\midrule"]
        out += [*map(_line, part.lines), r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*out, *_notes(notes), r"\end{table}"]) + "\n"


def _breaking(
    name: str, caption: str, parts: Sequence[Part], notes: Sequence[str], wide: bool
) -> str:
    out = [r"\begin{landscape}"] if wide else []
    out += [r"\begingroup", rf"\scriptsize\setlength{{\tabcolsep}}{{{GAP / 2:g}pt}}"]
    out.append(r"\setlength{\LTcapwidth}{\linewidth}")
    room = LANDSCAPE if wide else PORTRAIT
    for place, part in enumerate(block for whole in parts for block in _blocks(whole, room)):
        out.append(rf"\begin{{longtable}}{{{_columns(part)}}}")
        if place == 0:
            out += [
                rf"\caption{{{tex(caption)}}}\label{{tab:{name}}}\\",
                *_top(part),
                r"\endfirsthead",
            ]
        out += [
            *_top(part),
            r"\endhead",
            *map(_line, part.lines),
            r"\bottomrule",
            r"\end{longtable}",
        ]
        if place > 0:  # of one table there is one number
            out.append(r"\addtocounter{table}{-1}")
    out += [*_notes(notes), r"\par\endgroup"]
    return "\n".join([*out, *[r"\end{landscape}"] * wide]) + "\n"


def _top(part: Part) -> list[str]:
    span = rf"\multicolumn{{{len(part.headers)}}}{{l}}"
    title = [rf"{span}{{\textit{{{tex(part.title)}}}}} \\"] if part.title else []
    return [*title, r"\toprule", _head(part), r"\midrule"]


def _blocks(part: Part, room: float) -> Iterator[Part]:
    """The columns in order, in as few blocks as fit the room, each with the keys at the left."""
    keys = [i for i, key in enumerate(part.keys) if key]
    block: list[int] = []
    for column in (i for i, key in enumerate(part.keys) if not key):
        wanted = part.only([*keys, *block, column])
        if block and wanted.width(SIZES["scriptsize"]) > room:
            yield part.only([*keys, *block])
            block = []
        block.append(column)
    whole = len(keys) + len(block) == len(part.keys)
    yield part if whole else part.only([*keys, *block])


def _widths(part: Part) -> list[int]:
    """Characters across each column: headers break their lines, and so do long keys."""
    found = []
    for i, (header, key) in enumerate(zip(part.headers, part.keys, strict=True)):
        cells = max((len(line[i]) for line in part.lines), default=0)
        cells = min(cells, WRAPPED) if key else cells
        found.append(max([cells, *map(len, _wrapped(header, cells))]))
    return found


def _columns(part: Part) -> str:
    found = []
    for i, key in enumerate(part.keys):
        long = key and max((len(line[i]) for line in part.lines), default=0) > WRAPPED
        wrap = rf">{{\raggedright\arraybackslash}}p{{{WRAPPED * CHARACTER:.1f}em}}"
        found.append(wrap if long else "l" if key else "r")
    return "".join(found)


def _head(part: Part) -> str:
    cells = []
    for header, key, width in zip(part.headers, part.keys, _widths(part), strict=True):
        lines = r"\\".join(f"{{{tex(line)}}}" for line in _wrapped(header, width))
        cells.append(rf"\shortstack[{'l' if key else 'r'}]{{{lines}}}")
    return f"{' & '.join(cells)} \\\\"


def _wrapped(header: str, width: int) -> list[str]:
    return textwrap.wrap(header, max(width, 8), break_long_words=False) or [""]


def _line(cells: Sequence[str]) -> str:
    text = " & ".join(map(tex, cells))
    return f"{'{}' * text.startswith('[')}{text} \\\\"  # a bracket after \\ would be its argument


def _notes(notes: Sequence[str]) -> list[str]:
    if not notes:
        return []
    return [r"\par\smallskip{\footnotesize\raggedright", " \\\\\n".join(map(tex, notes)), r"\par}"]
