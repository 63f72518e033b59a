"""Parsing of numbers in text into exact decimals, for gold answers, references and replies alike. Torch-free.

A number may have a sign, grouped thousands (`1,080`, `1 080`, `1'080`, `10,80,000`), decimals and an exponent, or be a
fraction (`3/4`, `1 3/4`, `\\frac{3}{4}`). It is parsed as a whole or not at all: times (12:30), dates (1/2/2024),
versions (1.2.3), powers (10^3) and decimal commas (3,5) are not numbers, and neither are their parts.
"""

import re
import unicodedata
from decimal import Decimal

from polykv.errors import PolyKVError

# Typographic hyphens, spaces, slashes and apostrophes, and fractions such as ½, in plain ASCII.
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

JOINS = r"[.,:/^'_]"  # joins two digits into one token
_GROUPS = r"\d{1,3}(?:,\d{2,3})*,\d{3}|\d{1,3}(?: \d{3})+|\d{1,3}(?:'\d{3})+"
_UNSIGNED = rf"(?:(?:{_GROUPS}|\d+)(?:\.\d+)?|(?<!\.)\.\d+)(?:[eE][+-]?\d+)?"
NUMBER = (
    r"(?:(?<![\w)\]}])(?P<sign>[+-]))?[$€£¥₹]?"  # after a word or a bracket, a sign is an operator
    rf"(?<![^\W_])(?<!\d{JOINS})"
    rf"(?:(?P<whole>\d+) (?=\d+/\d))?(?P<top>{_UNSIGNED})(?: ?/ ?(?P<bottom>{_UNSIGNED}))?"
    rf"(?!\d|{JOINS}\d| ?/ ?\d|[⁰¹²³⁴-⁹])"
)
LARGEST = 10_000  # largest decimal exponent; numbers beyond it are not parsed
MARK = r"#{4,}"
_OPENING, _CLOSING = r"[\s*_`{(\[$€£¥₹]*", r"[\s*_`})\]$€£¥₹%.]*"
_ANY = re.compile(NUMBER)
_MARKED = re.compile(rf"{MARK}{_OPENING}{NUMBER}")
_WHOLE = re.compile(rf"{_OPENING}{NUMBER}{_CLOSING}")


def normalized(text: str) -> str:
    """The text with typographic and LaTeX notation rewritten to what `NUMBER` matches."""
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def all_numbers(text: str) -> list[Decimal]:
    """All numbers in a text, in order."""
    return _values(_ANY, text)


def marked_numbers(text: str) -> list[Decimal]:
    """The numbers directly after a `####`, in order, past currency signs and Markdown or LaTeX marks."""
    return _values(_MARKED, text)


def n_marks(text: str) -> int:
    """How many `####` a text has."""
    return len(re.findall(MARK, text))


def gold(answer: object) -> Decimal:
    """The number of a gold answer: a number, its text, or a text that ends in `####` and the number.

    Raises:
        PolyKVError: it cannot be parsed as a whole; names the answer.
    """
    text = normalized(str(answer))
    _, mark, behind = text.partition("####")
    found = _WHOLE.fullmatch(behind if mark else text)
    value = value_of(found) if found else None
    if value is None:
        raise PolyKVError(
            f"cannot parse a number from the answer {str(answer)[-60:]!r}; write it as 18, or end it with '#### 18'"
        )
    return value


def canonical(value: Decimal) -> str:
    """A number in canonical notation: no exponent, no leading or trailing zeros."""
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def value_of(found: re.Match) -> Decimal | None:
    """The value of a match of `NUMBER`; None for a division by zero or an exponent beyond LARGEST."""
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
    values = (value_of(found) for found in pattern.finditer(normalized(text)))
    return [value for value in values if value is not None]
