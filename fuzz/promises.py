"""What the readers promise of any bytes at all: a refusal in one line, or something that can be worked with.

The fuzzers, the tests and the reliability report all ask here.
"""

import math
from pathlib import Path

from transformers import PreTrainedModel

from fuzz.limits import bounded
from fuzz.seeds import CELL, CORPUS, EXPERIMENT
from fuzz.tiny import KEY, MAX_TOKENS
from polykv.cellfile import COLUMNS
from polykv.errors import PolyKVError
from polykv.handoff.card import CacheCard
from polykv.handoff.cardfile import CardError
from polykv.results import load_rows

LONGEST_LINE = 1000
SIGNED = {path.read_bytes() for path in (CORPUS / "card").glob("signed*")}


def check_card(content: bytes, model: PreTrainedModel) -> str | None:
    """Open a card inside `any_model`: the line it is refused with, or None.

    Raises:
        AssertionError: the reader does not keep its word.
        OverLimit: it takes too much memory or time.
    """
    with bounded(len(content)):
        try:
            card = CacheCard.from_bytes(bytearray(content), model, None)
        except CardError as error:
            return _one_line(error)
        layers = card.decode()
    g = model.config
    shape = (1, g.num_key_value_heads, card.n_tokens, g.head_dim)
    assert len(layers) == g.num_hidden_layers, "another model's layers"
    for side in (side for layer in layers for side in layer):
        assert side.shape == shape, "another model's cache"
        assert side.isfinite().all(), "not finite"
    if layers[0][0].dtype == model.dtype and card.n_tokens < MAX_TOKENS:
        model(input_ids=card.ids_T[None, -1:], past_key_values=card.inject())
    again = CacheCard.from_bytes(card.to_bytes(), model, None)
    assert again.about == card.about, "saved again, it says something else"
    try:
        CacheCard.from_bytes(bytearray(content), model, None, KEY)
    except CardError:
        return None
    assert content in SIGNED, "a signature was forged"
    return None


def check_cell(content: bytes, root: Path) -> str | None:
    """Load the rows of one cell's file below `root`: the line that names it as damaged, or None.

    Raises:
        AssertionError: the reader does not keep its word.
        OverLimit: it takes too much memory or time.
    """
    file = root / "cells" / EXPERIMENT / f"{CELL}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    with bounded(len(content)):
        try:
            rows, damaged = load_rows(root)
        except PolyKVError as error:
            return _one_line(error)
    assert not damaged and list(rows.columns) == list(COLUMNS), "neither read nor damaged"
    for column in ("value", "ci_low", "ci_high", "budget_bits"):
        for number in rows[column].dropna():
            assert isinstance(number, int | float) and math.isfinite(number), (
                f"{column} is no number"
            )
    rows.to_csv()
    return None


def _one_line(error: PolyKVError) -> str:
    line = str(error)
    assert line.isprintable() and len(line) < LONGEST_LINE, "not one printable line"
    return line
