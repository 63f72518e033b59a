"""What the readers of cards and results promise for any bytes: a one-line refusal, or something that works.

Both within bounded memory and time. The fuzzers and the tests check the same functions. `python -m
robustness.promises`, in tests/, writes the committed cards anew.
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

from analysis.load import load
from polykv.cellfile import COLUMNS
from polykv.errors import PolyKVError
from polykv.handoff import fingerprint
from polykv.handoff.card import CacheCard
from polykv.handoff.cardfile import CardError
from polykv.handoff.signals import Topology
from polykv.handoff.signing import SigningKey
from polykv.pool import prefill

MAX_TOKENS, VOCABULARY = 64, 300  # of the model that the committed cards belong to
KEY = SigningKey(bytes(range(32)))  # signs the committed card named "signed", and nothing else
CARDS = Path(__file__).parent / "cards"
# Committed, so that cards of earlier versions are known to open.
SEEDS = {file.name: file.read_bytes() for file in sorted(CARDS.iterdir())}

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


class OverLimit(Exception):
    """One run took more memory or time than the limits grant."""


@contextmanager
def bounded(n_bytes: int, multiple: int = MULTIPLE, floor: int = FLOOR) -> Iterator[None]:
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
    finally:
        taken, grown = tracemalloc.get_traced_memory()[1] - held, _resident() - resident
        seconds = time.process_time() - began
        if not traced:  # it slows everything that comes after
            tracemalloc.stop()
    if taken > multiple * n_bytes + floor or grown > RESIDENT or seconds > SECONDS:
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
    assert again.metadata == card.metadata, "saved again, it says something else"
    try:
        CacheCard.from_bytes(bytearray(content), model, None, KEY)
    except CardError:
        return None
    assert content == SEEDS["signed"], "a signature was forged"
    return None


def check_cell(content: bytes, root: Path) -> str | None:
    """`check_results` of a folder with the file of cell abc of study compare."""
    file = root / "cells" / "compare" / "abc.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return check_results(root)


def check_results(root: Path) -> str | None:
    """Load a folder of one cell, or of packed ones: the line that names what is damaged, or None.

    Raises:
        AssertionError: the reader breaks its promise.
        OverLimit: it takes too much memory or time.
    """
    with bounded(sum(file.stat().st_size for file in root.rglob("*") if file.is_file())):
        try:
            results = load(root)
        except PolyKVError as error:
            assert str(root) in str(error), "what is damaged is not named"
            return _one_line(error)
    rows = results.rows
    assert not results.damaged and list(rows.columns[: len(COLUMNS)]) == list(COLUMNS)
    for number in (*rows["value"].dropna(), *rows["budget_bits"].dropna()):
        assert math.isfinite(number)
    assert (rows["metric"] != "").all() and results.studies
    rows.to_csv().encode()
    return None


def _resident() -> int:
    """The most bytes that the process ever held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _one_line(error: PolyKVError) -> str:
    line = str(error)
    assert line.isprintable() and len(line) < 1000, "not one printable line"
    return line


def main() -> None:
    """Seal one card of every policy and tier, one that was continued, and one that is signed."""
    budgets = {"full": (0.0,), "fp16": (0.0,), "uniform": (3.5, 6.0, 8.0, 12.0, 16.0)}
    budgets |= {"topology": (6.0, 9.0), "sinks_recent": (10.0,)}
    budgets |= {policy: (8.0,) for policy in ("local", "inverse", "random")}
    model = tiny_model()
    ids_T = torch.randint(VOCABULARY, (20,), generator=torch.Generator().manual_seed(0))
    cache, topology = prefill(model, ids_T[None]), Topology(10, 2)
    found = {}
    for policy, budget in ((policy, b) for policy, each in budgets.items() for b in each):
        card = CacheCard.seal(cache, ids_T, model, None, policy, budget, topology, "agent-1")
        found[f"{policy}-{budget:g}"] = card.to_bytes()
    first = CacheCard.seal(prefill(model, ids_T[None, :12]), ids_T[:12], model, None, "local", 9.0)
    found["appended"] = first.append(cache, ids_T, model, None, "local", 9.0).to_bytes()
    found["signed"] = first.to_bytes(KEY)
    for name, content in found.items():
        (CARDS / name).write_bytes(content)


if __name__ == "__main__":
    with any_model:
        main()
