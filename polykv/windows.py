"""Windows of tokens that documents are cut from: consecutive ones of a plain text, or one an article of WikiText.

Every window is a sequence of its own. Where the tokenizer puts BOS before a text, each window begins with it, and it
counts: `context` tokens are BOS and `context` - 1 of the text, and the next window goes on with the token after them.
"""

import re
from typing import Any

import torch
from torch import Tensor

from polykv.errors import PolyKVError
from polykv.tokens import encode, opened, opening

# An article's title stands alone between blank lines. Sections have more than one `=`, and lines of formulas, which
# may look like a title, stand in the text.
TITLE = re.compile(r"(?:\A|^ *\n) = (?!= )[^\n]+(?<! =) = *\n *$", re.MULTILINE)
CHARACTERS = 8  # read a token, at first
MARGIN = 64  # tokens behind the last one that is needed, so that no cut is near it
# Between two cuts of a text. More than the longest word that tokenizers cut in pieces (100 characters), and prime, as
# some count digits in groups from the end of a number.
APART = 509


def first_tokens(tokenizer: Any, text: str, n_tokens: int) -> Tensor:
    """The text's first `n_tokens` ids (1, tokens), or all where it has fewer; of a long text no more is tokenised
    than that takes.

    What follows a cut can change the tokens before it: those of the word that it cuts, and of texts without spaces
    all that merge with their neighbours. So two beginnings of different lengths must agree on all tokens but the
    last MARGIN of the shorter one; where they do not, more is read.
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
    """As many windows (1, context) from the text's start as fit, up to `limit`. None: one window, the whole text.

    Raises:
        PolyKVError: a context that has no room for text.
    """
    if context is None:
        return [encode(tokenizer, text, begins=True)]
    n_own = own_tokens(tokenizer, context)
    ids_BT = first_tokens(tokenizer, text, n_own * limit)
    pieces = ids_BT.split(n_own, dim=1)[: ids_BT.shape[1] // n_own]
    return [opened(tokenizer, piece_BT) for piece_BT in pieces]


def own_tokens(tokenizer: Any, context: int) -> int:
    """Tokens of the text itself in a window of `context` tokens.

    Raises:
        PolyKVError: there is no room for any.
    """
    n_own = context - len(opening(tokenizer))
    if n_own < 1:
        raise PolyKVError(
            f"context={context} is no more than what this tokenizer puts before a text; raise it"
        )
    return n_own


def of_articles(tokenizer: Any, text: str, context: int, limit: int) -> list[Tensor]:
    """As many windows (1, context) as fit, up to `limit`, each the start of an article of WikiText.

    Where `limit` articles are long enough, a window holds one article. Where they are fewer, windows run on into
    the articles that follow, none of which is then used again.

    Raises:
        PolyKVError: a text without a title, or a context that has no room for text.
    """
    starts = [found.start() for found in TITLE.finditer(text)]
    if not starts:
        raise PolyKVError(
            "the text is not of WikiText's form: no line ' = Title = ' stands between blank lines; "
            "use document=file"
        )
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
