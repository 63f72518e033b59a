"""Windows of tokens for documents: consecutive ones of a plain text, or one per article of WikiText.

Every window is a sequence of its own. If the tokenizer adds BOS, each window begins with it and includes it in its
length: `context` tokens are BOS and `context` - 1 tokens of the text.
"""

import re
from typing import Any

import torch
from torch import Tensor

from polykv.errors import PolyKVError
from polykv.tokens import encode, opened, opening

# An article's title is a line between blank lines. Titles of sections have more than one `=`; lines of formulas may
# look like a title but are not between blank lines.
TITLE = re.compile(r"(?:\A|^ *\n) = (?!= )[^\n]+(?<! =) = *\n *$", re.MULTILINE)
CHARACTERS = 8  # per token, in the first attempt
MARGIN = 64  # tokens between the last one needed and a cut of the text
# Characters between two cuts of a text. More than the longest word that tokenizers split (100 characters), and prime,
# since some group digits from the end of a number.
APART = 509


def first_tokens(tokenizer: Any, text: str, n_tokens: int) -> Tensor:
    """The first `n_tokens` ids (1, tokens) of a text, or all if it has fewer, without tokenising all of a long text.

    A cut can change the tokens before it: those of the word that it splits, and in texts without spaces many more. So
    two beginnings of different lengths have to agree on all tokens but the last MARGIN of the shorter one; otherwise
    more text is tokenised.
    """
    n_characters = CHARACTERS * (n_tokens + MARGIN)
    while n_characters + APART < len(text):
        short_BT = encode(tokenizer, text[:n_characters])
        n_kept = short_BT.shape[1] - MARGIN
        if n_kept >= n_tokens:
            long_BT = encode(tokenizer, text[: n_characters + APART])
            if torch.equal(short_BT[:, :n_kept], long_BT[:, :n_kept]):
                return short_BT[:, :n_tokens]
        n_characters *= 2
    return encode(tokenizer, text)[:, :n_tokens]


def consecutive(tokenizer: Any, text: str, context: int | None, limit: int) -> list[Tensor]:
    """Up to `limit` consecutive windows (1, context) of a text; with context None one window, the whole text.

    Raises:
        PolyKVError: a context without room for text.
    """
    if context is None:
        return [encode(tokenizer, text, begins=True)]
    n_own = own_tokens(tokenizer, context)
    ids_BT = first_tokens(tokenizer, text, n_own * limit)
    pieces = ids_BT.split(n_own, dim=1)[: ids_BT.shape[1] // n_own]
    return [opened(tokenizer, piece_BT) for piece_BT in pieces]


def own_tokens(tokenizer: Any, context: int) -> int:
    """Tokens of the text in a window of `context` tokens.

    Raises:
        PolyKVError: there is no room for any.
    """
    n_own = context - len(opening(tokenizer))
    if n_own < 1:
        raise PolyKVError(
            f"context={context} has no room for text after the tokens that this tokenizer adds; raise it"
        )
    return n_own


def of_articles(tokenizer: Any, text: str, context: int, limit: int, skip: int = 0) -> list[Tensor]:
    """Up to `limit` windows (1, context), each starting at an article of WikiText; the first `skip` are left out.

    If at least `limit` articles are long enough, each window lies within one article. Otherwise windows continue into
    the following articles, which are then not used again.

    Raises:
        PolyKVError: a text without a title, fewer than `skip` articles, or a context without room for text.
    """
    starts = [found.start() for found in TITLE.finditer(text)]
    if not starts:
        raise PolyKVError(
            "the text is not in WikiText's format: it has no line ' = Title = ' between blank lines; "
            "use document=file"
        )
    if not 0 <= skip < len(starts):
        raise PolyKVError(
            f"document.skip_articles={skip} of {len(starts)} articles; give 0 to {len(starts) - 1}"
        )
    starts = starts[skip:]
    n_own, ends = own_tokens(tokenizer, context), [*starts[1:], len(text)]
    for run_on in (False, True):
        windows, start = [], starts[0]
        for own, end in zip(starts, ends, strict=True):
            start = start if run_on else own
            ids_BT = first_tokens(tokenizer, text[start:end].strip(), n_own)
            if ids_BT.shape[1] == n_own:
                windows.append(opened(tokenizer, ids_BT))
                start = end
            if len(windows) == limit:
                return windows
    return windows
