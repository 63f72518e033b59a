"""Hostile cards and results: whatever the bytes say, a one-line refusal within bounded memory and time.

The digest of every forged card is right (forge.py): what is tested lies behind it.
"""

import json
import os
import re
import sys
from contextlib import contextmanager, suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polykv.errors import PolyKVError
from polykv.handoff import cardfile
from polykv.handoff.card import CacheCard
from polykv.handoff.cardfile import CardError
from polykv.pool import prefill
from robustness import fuzz, kinds
from robustness.forge import put_together, take_apart
from robustness.promises import (
    CORPUS,
    KEY,
    MAX_TOKENS,
    VOCABULARY,
    any_model,
    check_card,
    check_cell,
    committed,
    tiny_model,
)
from robustness.stage import first
from robustness.strategies import JSON, SIZES, cards, cells

SEEDS = committed("card")
SEED = SEEDS["topology-9"]
TENSORS = [name for name in take_apart(SEED).header if name != "__metadata__"]
FIELDS = take_apart(SEED).fields
FAST = settings(  # the same examples every time: the fuzzers look further
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Fields whose value may be any of its type ("exact": of a card that keeps no token exactly).
FREE = {"hop", "sender", "policy", "position_offset", "budget_bits", "parent", "digest", "exact"}


@pytest.fixture(scope="module")
def model():
    with any_model:
        yield tiny_model()


@pytest.mark.parametrize("kind", kinds.CARDS)
def test_every_named_kind_is_refused_for_every_seed(kind, model):
    for content in SEEDS.values():
        changed = kinds.CARDS[kind](content)
        assert changed != content and check_card(changed, model)


def test_cards_without_the_right_signature_are_refused_where_a_key_is_required(model):
    for content in SEEDS.values():
        for changed in kinds.unsigned_kinds(content).values():
            with pytest.raises(CardError):
                CacheCard.from_bytes(bytearray(changed), model, None, KEY)


@FAST
@given(
    name=st.sampled_from(TENSORS),
    part=st.sampled_from(["dtype", "shape", "data_offsets", "else"]),
    value=JSON | st.lists(SIZES, max_size=6),
)
def test_any_value_in_any_entry_of_the_header_is_refused(model, name, part, value):
    changed = kinds.entry(name, **{part: value})(SEED)
    assert take_apart(SEED).header[name].get(part) == value or check_card(changed, model)


@FAST
@given(name=st.sampled_from(sorted(FIELDS)), value=JSON)
def test_any_value_in_any_field_is_refused_or_a_card_that_works(model, name, value):
    answer = check_card(kinds.card_field(name, value)(SEED), model)
    one_group = name == "group_size" and type(value) is int and value >= 8  # head_dim is 8
    assert answer or name in FREE or value == FIELDS[name] or one_group


def test_a_scale_below_zero_is_refused(model):
    name = next(name for name in TENSORS if name.endswith(".scale"))
    assert check_card(kinds.forged(lambda p: kinds.poke(p, name, -1.0))(SEED), model)


def test_what_open_refuses_seal_refuses(model):
    ids = list(range(8))
    cache = prefill(model, torch.tensor([ids]))
    with pytest.raises(PolyKVError, match=str(VOCABULARY)):
        CacheCard.seal(cache, [*ids[:-1], VOCABULARY], model, None, "full")
    with pytest.raises(PolyKVError, match=str(MAX_TOKENS + 1)):
        CacheCard.seal(cache, ids, model, None, "full", position_offset=MAX_TOKENS - 7)


TRICKS = ("../x", "a/b", "a\\b", "..", ".hidden", "a\x00", "a\nb", "\x1b[3m", "\u202egnp", "\ud800")


@FAST
@given(label=st.one_of(st.sampled_from(TRICKS), st.text(max_size=140)))
def test_a_label_is_refused_alike_by_seal_and_open(model, label):
    refused = check_card(kinds.card_field("sender", label)(SEED), model)
    try:
        CacheCard.seal(
            prefill(model, torch.tensor([[1, 2, 3]])), [1, 2, 3], model, None, "full", sender=label
        )
    except PolyKVError:
        assert refused
    else:
        assert not refused and os.path.basename(label) == label and label.isprintable()
    assert refused or label not in TRICKS


@FAST
@given(parent=st.text("0123456789abcdefABCDEF./\x00\n", min_size=60, max_size=66))
def test_a_parent_is_a_digest_or_nothing(model, parent):
    line = check_card(kinds.card_field("parent", parent)(SEED), model)
    assert (line is None) == (re.fullmatch("[0-9a-f]{64}", parent) is not None)


@contextmanager
def watched(events):
    """Everything that Python's own audit sees: files opened, modules imported, code compiled or run."""
    if len(WATCHING) == 1:  # a hook cannot be removed
        sys.addaudithook(
            lambda *event: None if WATCHING[-1] is None else WATCHING[-1].append(event)
        )
    WATCHING.append(events)
    try:
        yield events
    finally:
        WATCHING.append(None)


WATCHING: list[list | None] = [None]
FORBIDDEN = (
    "open",
    "import",
    "compile",
    "exec",
    "os.",
    "subprocess.",
    "pickle.",
    "socket.",
    "ctypes.",
)


def test_a_card_never_executes_imports_or_opens_anything(model):
    hostile_cards = [damage(SEED) for damage in kinds.CARDS.values()]
    hostile_cards += committed("card", found=True).values()
    for content in (*SEEDS.values(), *hostile_cards):
        check_card(content, model)  # what polykv itself imports on first use
    modules = set(sys.modules)
    with watched([]) as events:
        for content in (*hostile_cards, *SEEDS.values()):
            with suppress(CardError):
                CacheCard.from_bytes(bytearray(content), model, None).dequantize()
    assert [event for event in events if event[0].startswith(FORBIDDEN)] == []
    assert set(sys.modules) == modules
    with watched([]) as events, open(os.devnull):  # the watch sees what it should
        eval("1 + 1")
    assert {"open", "compile", "exec"} <= {name for name, _ in events}


def test_the_committed_seeds_keep_the_promises(model, tmp_path):
    for found in (False, True):
        for name, content in committed("card", found).items():
            assert (check_card(content, model) is not None) == found, name
        for name, content in committed("cell", found).items():
            assert (check_cell(content, tmp_path) is not None) == found, name
    assert sum(file.stat().st_size for file in CORPUS.rglob("*") if file.is_file()) < 200_000


def test_edited_cards_keep_the_promises_behind_the_digest(model):
    lines = []

    @settings(FAST, max_examples=300)
    @given(cards())
    def check(content):
        lines.append(check_card(content, model))

    check()
    behind = [line for line in lines if line is None or "contradicts" in line or "geometry" in line]
    assert len(behind) > 60  # of 300; by flipped bytes alone it is none


@FAST
@given(content=cells())
def test_edited_results_keep_the_promises(content, tmp_path_factory):
    check_cell(content, tmp_path_factory.getbasetemp() / "edited")


def test_forge_is_the_format_that_cards_have():
    for name, content in SEEDS.items():
        assert put_together(take_apart(content)) == content, name
        fields, _, stamp = cardfile.loads(bytearray(content))
        assert json.loads(json.dumps(fields)) == fields
        assert stamp.digest == take_apart(content).fields["digest"]


LONG = int(os.environ.get("FUZZ_SECONDS", 120))


@pytest.mark.parametrize(
    ("seconds", "target"), first(1, [(2, "card"), *((LONG, target) for target in fuzz.TARGETS)])
)
def test_fuzzing_finds_nothing(seconds, target, tmp_path):
    pytest.importorskip("atheris")
    executions, features = fuzz.fuzz(target, seconds, tmp_path)
    assert executions > len(SEEDS) and features > 20  # it ran, and its coverage was measured
