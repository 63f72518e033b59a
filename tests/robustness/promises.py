"""What the readers of cards and results promise for any bytes: a one-line refusal, or something that works.

Both within bounded memory and time. The fuzzers and the tests check the same functions.
"""

import math
import resource
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from polykv.cellfile import COLUMNS
from polykv.errors import PolyKVError
from polykv.handoff import fingerprint
from polykv.handoff.card import CacheCard
from polykv.handoff.cardfile import CardError
from polykv.handoff.signing import SigningKey
from polykv.results import load_rows

MAX_TOKENS, VOCABULARY = 64, 300  # of the model that the committed cards belong to
KEY = SigningKey(bytes(range(32)))  # signs the committed card named "signed", and nothing else
CORPUS = Path(__file__).parent / "corpus"
EXPERIMENT, CELL = "quickstart", "abc"  # the cell that the committed result files are of
FOUND = "found-"  # prefix of committed files that once broke a reader, and must be refused

MULTIPLE = 4  # times the file's size: bytes that the interpreter may allocate
FLOOR = 4 << 20  # bytes that are always granted: parsing the largest header that is accepted
RESIDENT = 64 << 20  # bytes that the process may grow by, native memory included
SECONDS = 2.0  # of processor time

# Fingerprints change with the versions of torch and transformers; the committed cards must outlive them.
# Inside this context every model and tokenizer passes for the one that sealed the cards.
any_model = patch.multiple(
    fingerprint, of_model=lambda model: "0" * 64, of_tokenizer=lambda tokenizer: "1" * 64
)


def tiny_model() -> LlamaForCausalLM:
    """Two layers, two heads of 8, random weights that are the same at every call."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    limits = {"vocab_size": VOCABULARY, "max_position_embeddings": MAX_TOKENS}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **limits))
    return model.eval().requires_grad_(False)


def committed(kind: str, found: bool = False) -> dict[str, bytes]:
    """The committed valid files of a kind, `card` or `cell`; with `found`, those that must be refused."""
    files = sorted((CORPUS / kind).iterdir())
    return {f.name: f.read_bytes() for f in files if f.name.startswith(FOUND) == found}


SIGNED = committed("card")["signed"]


class OverLimit(Exception):
    """One run took more memory or time than the limits grant."""


@contextmanager
def bounded(n_bytes: int) -> Iterator[None]:
    """Everything inside must stay within the limits for a file of `n_bytes`.

    Raises:
        OverLimit: it did not.
    """
    traced = tracemalloc.is_tracing()
    tracemalloc.start()
    tracemalloc.reset_peak()
    held, resident, began = tracemalloc.get_traced_memory()[0], _resident(), time.process_time()
    try:
        yield
        taken, grown = tracemalloc.get_traced_memory()[1] - held, _resident() - resident
        seconds = time.process_time() - began
    finally:
        if not traced:  # it slows everything that comes after
            tracemalloc.stop()
    if taken > MULTIPLE * n_bytes + FLOOR or grown > RESIDENT or seconds > SECONDS:
        raise OverLimit(f"{n_bytes} bytes: {taken} allocated, {grown} resident, {seconds:.1f} s")


def check_card(content: bytes, model: PreTrainedModel) -> str | None:
    """Open a card inside `any_model`: the refusal, or None.

    Raises:
        AssertionError: the reader breaks its promise.
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
        model(input_ids=card.ids_T[None, -1:], past_key_values=card.dequantize())
    again = CacheCard.from_bytes(card.to_bytes(), model, None)
    assert again.about == card.about, "saved again, it says something else"
    try:
        CacheCard.from_bytes(bytearray(content), model, None, KEY)
    except CardError:
        return None
    assert content == SIGNED, "a signature was forged"
    return None


def check_cell(content: bytes, root: Path) -> str | None:
    """Load the rows of one cell's file below `root`: the line that names it as damaged, or None.

    Raises:
        AssertionError: the reader breaks its promise.
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
            assert isinstance(number, int | float) and math.isfinite(number), column
    rows.to_csv()
    return None


def _resident() -> int:
    """The most bytes that the process ever held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _one_line(error: PolyKVError) -> str:
    line = str(error)
    assert line.isprintable() and len(line) < 1000, "not one printable line"
    return line
