"""Numbers in text: one grammar for gold answers, references and replies, read as exact decimals. Torch-free.

A number has a sign, thousands in groups (`1,080`, `1 080`, `1'080`, `10,80,000`), decimals and an exponent, or is a
fraction (`3/4`, `1 3/4`, `\\frac{3}{4}`). It is read whole or not at all: a time (12:30), a date (1/2/2024), a version
(1.2.3), a power (10^3) or a decimal comma (3,5) is no number, and no part of it is one.
"""

import re
import unicodedata
from decimal import Decimal

from polykv.errors import PolyKVError

# What typesetters write for a hyphen, a space, a slash and an apostrophe; of the fractions such as ½, their digits.
_CHARACTERS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-")
    | dict.fromkeys("\xa0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f", " ")
    | {"\u2044": "/", "\u2019": "'"}
    | {
        half: f" {unicodedata.normalize('NFKC', half)}".replace("\u2044", "/")
        for half in "¼½¾⅓⅔⅕⅛⅜⅝⅞"
    }
)
_FRACTION = r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"
_LATEX = (
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?=[$%])|\\!"), ""),
    (re.compile(r"\\[,;: ()\[\]]"), " "),
    (re.compile(rf"(?<=\d)\s*{_FRACTION}"), r" \1/\2"),
    (re.compile(_FRACTION), r"\1/\2"),
    (re.compile(r"\\[A-Za-z]+"), " "),  # \boxed, \text, \times
)

JOINS = r"[.,:/^'_]"  # between two digits, it makes one thing of them
_GROUPS = r"\d{1,3}(?:,\d{2,3})*,\d{3}|\d{1,3}(?: \d{3})+|\d{1,3}(?:'\d{3})+"
_UNSIGNED = rf"(?:(?:{_GROUPS}|\d+)(?:\.\d+)?|(?<!\.)\.\d+)(?:[eE][+-]?\d+)?"
NUMBER = (
    r"(?:(?<![\w)\]}])(?P<sign>[+-]))?[$€£¥₹]?"  # behind a word or a bracket, a sign is an operator
    rf"(?<![^\W_])(?<!\d{JOINS})"
    rf"(?:(?P<whole>\d+) (?=\d+/\d))?(?P<top>{_UNSIGNED})(?: ?/ ?(?P<bottom>{_UNSIGNED}))?"
    rf"(?!\d|{JOINS}\d| ?/ ?\d|[⁰¹²³⁴-⁹])"
)
LARGEST = 10_000  # power of ten: beyond it a number could not be written out
MARK = r"#{4,}"
_OPENING, _CLOSING = r"[\s*_`{(\[$€£¥₹]*", r"[\s*_`})\]$€£¥₹%.]*"
_ANY = re.compile(NUMBER)
_MARKED = re.compile(rf"{MARK}{_OPENING}{NUMBER}")
_WHOLE = re.compile(rf"{_OPENING}{NUMBER}{_CLOSING}")


def plain(text: str) -> str:
    """The text with the signs, spaces and fractions of typesetting and LaTeX as `NUMBER` knows them."""
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def everywhere(text: str) -> list[Decimal]:
    """All numbers of a text, in order."""
    return _values(_ANY, text)


def marked(text: str) -> list[Decimal]:
    """The numbers that stand directly after a `####`, in order; currency and Markdown's or LaTeX's marks may come
    between.
    """
    return _values(_MARKED, text)


def n_marks(text: str) -> int:
    """How many `####` a text has, whatever follows them."""
    return len(re.findall(MARK, text))


def gold(answer: object) -> Decimal:
    """The number that a right answer is: a number, its text, or a text that ends in `####` and its text.

    Raises:
        PolyKVError: it is not read whole; names the answer.
    """
    _, mark, behind = plain(str(answer)).partition("####")
    found = _WHOLE.fullmatch(behind if mark else plain(str(answer)))
    value = value_of(found) if found else None
    if value is None:
        raise PolyKVError(
            f"no number can be read from the answer {str(answer)[-60:]!r}; write it as 18, or '#### 18' at its end"
        )
    return value


def spelled(value: Decimal) -> str:
    """A number in one spelling: no exponent, no zeros at either end."""
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def value_of(found: re.Match) -> Decimal | None:
    """What a match of `NUMBER` is; None for a division by zero, and an exponent beyond LARGEST."""
    try:
        top, bottom = (_unsigned(found[name] or "1") for name in ("top", "bottom"))
        value = _unsigned(found["whole"] or "0") + top / bottom if found["bottom"] else top
    except ArithmeticError:
        return None
    if value and abs(value.adjusted()) > LARGEST:
        return None
    return value.copy_negate() if found["sign"] == "-" else value


def _unsigned(text: str) -> Decimal:
    return Decimal(re.sub(r"[, ']", "", text))


def _values(pattern: re.Pattern, text: str) -> list[Decimal]:
    values = (value_of(found) for found in pattern.finditer(plain(text)))
    return [value for value in values if value is not None]
