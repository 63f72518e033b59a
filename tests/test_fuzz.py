"""Hostile cards and keys: whatever the bytes say, a refusal in one line within bounded memory and time.

The digest of every forged card is right (fuzz/forge.py): what is tested lies behind it.
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

from fuzz import damage, forge
from fuzz.mutate import mutate_card, mutate_cell
from fuzz.promises import check_card, check_cell
from fuzz.run import fuzz
from fuzz.seeds import CORPUS
from fuzz.tiny import MAX_TOKENS, VOCABULARY, any_model, tiny_model
from polykv.errors import PolyKVError
from polykv.handoff import cardfile
from polykv.handoff.card import CacheCard
from polykv.handoff.cardfile import CardError
from polykv.pool import prefill
from reliability import hostile

SEEDS = hostile.seeds()
SEED = SEEDS["topology-9"]
FAST = settings(  # the same examples every time: the fuzzers are there to look further
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SIZES = st.one_of(st.integers(-3, 100), st.integers(-(1 << 70), 1 << 70), st.just(1 << 62))
JSON = st.recursive(
    st.none() | st.booleans() | SIZES | st.floats() | st.text(max_size=200),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def model():
    with any_model:
        yield tiny_model()


def forged(change, content=SEED):
    parts = forge.take_apart(content)
    change(parts)
    return forge.put_together(parts)


# A card may say anything there that its kind allows ("exact": of a card that keeps no token exactly).
FREE = {"hop", "sender", "policy", "position_offset", "budget_bits", "parent", "digest", "exact"}

# What a header declares ------------------------------------------------------------------------------------


@FAST
@given(data=st.data(), shape=st.lists(SIZES, max_size=6), offsets=st.lists(SIZES, max_size=3))
def test_declared_sizes_are_refused_before_anything_is_allocated(model, data, shape, offsets):
    name = data.draw(st.sampled_from([n for n in forge.take_apart(SEED).header if "__" not in n]))
    content = forged(lambda parts: parts.header[name].update(shape=shape, data_offsets=offsets))
    assert check_card(content, model)


@FAST
@given(data=st.data(), value=JSON)
def test_any_value_in_any_place_of_the_table_is_refused(model, data, value):
    header = forge.take_apart(SEED).header
    name = data.draw(st.sampled_from([n for n in header if "__" not in n]))
    part = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "else"]))
    if header[name].get(part) != value:
        assert check_card(forged(lambda parts: parts.header[name].update({part: value})), model)


@FAST
@given(data=st.data(), value=JSON)
def test_any_value_in_any_field_is_refused_or_a_card_that_works(model, data, value):
    fields = forge.take_apart(SEED).fields
    name = data.draw(st.sampled_from(sorted(fields)))
    answer = check_card(forged(lambda parts: parts.fields.update({name: value})), model)
    if name not in FREE:
        if name == "group_size" and type(value) is int and value >= 8:
            return  # one group either way: head_dim is 8
        assert answer or value == fields[name]


@FAST
@given(begin=st.integers(0, 3000), end=st.integers(0, 3000))
def test_overlaps_and_gaps_are_refused(model, begin, end):
    def move(parts):
        entry = parts.header["key.map"]
        wanted = [begin, end]
        parts.header["key.map"] = {"dtype": "U8", "shape": [end - begin], "data_offsets": wanted}
        same.append(entry["data_offsets"] == wanted)

    same = []
    assert (check_card(forged(move), model) is None) == same[0]


@pytest.mark.parametrize("claimed", (0, 8, 1 << 14, 1 << 15, (1 << 15) + 8, 1 << 31, 1 << 64))
def test_a_length_that_lies_is_refused(claimed, model):
    content = min(claimed, (1 << 64) - 1).to_bytes(8, "little") + SEED[8:]
    assert check_card(content, model)
    assert check_card(content + bytes(1 << 16), model)


@FAST
@given(tail=st.binary(min_size=1, max_size=64))
def test_trailing_bytes_are_refused(model, tail):
    line = check_card(forge.with_digest(SEED + tail), model)
    assert f"{len(tail)} bytes follow its tensors" in line


@FAST
@given(version=st.integers(3, 1 << 15))
def test_a_version_from_the_future_says_so(model, version):
    line = check_card(forged(lambda parts: parts.fields.update(version=version)), model)
    assert f"format version {version}" in line and line.endswith("update polykv")


@FAST
@given(content=st.binary(max_size=300))
def test_bytes_that_are_no_card_are_refused(model, content):
    assert check_card(content, model)
    head = len(content).to_bytes(8, "little")
    assert check_card(head + content, model)


@FAST
@given(depth=st.integers(2, 12_000), opening=st.sampled_from(("[", '{"a":')), inside=st.booleans())
def test_deep_json_is_refused(model, depth, opening, inside):
    deep = opening * depth
    if inside:
        content = forged(lambda parts: parts.header["__metadata__"].update(x=deep))
    else:
        content = forge.with_header(deep, b"")
    assert check_card(content, model)


# What a payload holds --------------------------------------------------------------------------------------


@FAST
@given(data=st.data(), value=st.sampled_from((float("nan"), float("inf"), -float("inf"))))
def test_numbers_that_no_encoder_writes_are_refused(model, data, value):
    parts = forge.take_apart(SEEDS[data.draw(st.sampled_from(sorted(SEEDS)))])
    name = data.draw(st.sampled_from(damage.floats(parts)))
    begin, end = parts.header[name]["data_offsets"]
    size = 2 if parts.header[name]["dtype"] == "F16" else 4
    index = data.draw(st.integers(0, (end - begin) // size - 1))
    damage.poke(parts, name, value, index)
    line = check_card(forge.put_together(parts), model)
    assert line.startswith(f"the card contradicts itself: tensor {name} holds NaN or infinite")


def test_a_scale_below_zero_is_refused(model):
    name = next(name for name in forge.take_apart(SEED).header if name.endswith(".scale"))
    line = check_card(forged(lambda parts: damage.poke(parts, name, -1.0)), model)
    assert f"tensor {name} holds scales below zero" in line


@FAST
@given(index=st.integers(0, 19), value=st.integers(-(1 << 31), (1 << 31) - 1))
def test_ids_outside_the_vocabulary_are_refused(model, index, value):
    line = check_card(forged(lambda parts: damage.poke(parts, "token_ids", value, index)), model)
    assert (line is None) == (0 <= value < VOCABULARY)


def test_what_seal_would_write_and_open_refuse_is_not_sealed(model):
    ids = list(range(8))
    cache = prefill(model, torch.tensor([ids]))
    with pytest.raises(PolyKVError, match="token ids reach from 0 to 300"):
        CacheCard.seal(cache, [*ids[:-1], VOCABULARY], model, None, "full")
    with pytest.raises(PolyKVError, match=f"needs {MAX_TOKENS + 1} positions"):
        CacheCard.seal(cache, ids, model, None, "full", position_offset=MAX_TOKENS - 7)


# Names -----------------------------------------------------------------------------------------------------

TRICKS = (
    "../x",
    "a/b",
    "a\\b",
    "..",
    ".hidden",
    "a\x00",
    "a\nb",
    "\x1b[31m",
    "\u202egnp",
    "\ud800",
)


@FAST
@given(label=st.one_of(st.sampled_from(TRICKS), st.text(max_size=140)))
def test_a_label_is_refused_alike_by_who_writes_and_who_reads(model, label):
    content = forged(lambda parts: parts.fields.update(sender=label))
    refused = check_card(content, model)
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
    line = check_card(forged(lambda parts: parts.fields.update(parent=parent)), model)
    assert (line is None) == (re.fullmatch("[0-9a-f]{64}", parent) is not None)


# Every kind that has a name, and what a reader never does ---------------------------------------------------


@pytest.mark.parametrize("kind", damage.CARDS)
def test_every_named_kind_is_refused_for_every_seed(kind, model):
    for content in SEEDS.values():
        changed = damage.CARDS[kind](content)
        assert changed != content and check_card(changed, model)


@pytest.mark.parametrize("kind", damage.CELLS)
def test_every_named_kind_of_results_is_named_as_damaged(kind, tmp_path):
    changed = damage.CELLS[kind]((CORPUS / "cell" / "sealed").read_bytes())
    assert "damaged" in check_cell(changed, tmp_path)


@contextmanager
def watched(events):
    """Everything that Python's own audit sees: files opened, modules imported, code compiled or run."""
    if not WATCHING:
        sys.addaudithook(
            lambda name, args: (
                WATCHING[-1].append((name, args)) if WATCHING[-1] is not None else None
            )
        )
    WATCHING.append(events)
    try:
        yield events
    finally:
        WATCHING.append(None)


WATCHING: list[list | None] = []
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
    hostile_cards = [damage.CARDS[kind](SEED) for kind in damage.CARDS]
    committed = [file.read_bytes() for file in (CORPUS / "card").iterdir()]
    for content in (*SEEDS.values(), *hostile_cards):
        check_card(content, model)  # what polykv itself imports on first use
    modules = set(sys.modules)
    with watched([]) as events:
        for content in (*hostile_cards, *committed):
            with suppress(CardError):
                CacheCard.from_bytes(bytearray(content), model, None).inject()
    assert [event for event in events if event[0].startswith(FORBIDDEN)] == []
    assert set(sys.modules) == modules
    with watched([]) as events, open(os.devnull):  # the watch sees what it should
        eval("1 + 1")
    assert {"open", "compile", "exec"} <= {name for name, _ in events}


# The fuzzers -----------------------------------------------------------------------------------------------


def test_the_committed_seeds_keep_the_promises(model, tmp_path):
    for file in sorted((CORPUS / "card").iterdir()):
        assert (check_card(file.read_bytes(), model) is None) == (
            not file.name.startswith("found-")
        )
    for file in sorted((CORPUS / "cell").iterdir()):
        refused = check_cell(file.read_bytes(), tmp_path)
        assert (refused is None) == (not file.name.startswith("found-")), file.name
    assert sum(file.stat().st_size for file in CORPUS.rglob("*") if file.is_file()) < 200_000


def test_mutated_cards_get_past_the_digest(model, tmp_path):
    lines = [
        check_card(mutate_card(SEED, 16384, n, lambda c, size: c[:size]), model) for n in range(300)
    ]
    behind = [line for line in lines if line is None or "contradicts" in line or "geometry" in line]
    assert len(behind) > 60  # of 300; by flipped bytes alone it is none
    for n in range(100):
        check_cell(
            mutate_cell((CORPUS / "cell" / "sealed").read_bytes(), 16384, n, lambda c, s: c),
            tmp_path,
        )


def test_forge_is_the_format_that_cards_have():
    for name, content in SEEDS.items():
        assert forge.put_together(forge.take_apart(content)) == content, name
        fields, _, stamp = cardfile.loads(bytearray(content))
        assert json.loads(json.dumps(fields)) == fields
        assert stamp.digest == forge.take_apart(content).fields["digest"]


def test_the_card_fuzzer_runs_and_finds_nothing():
    pytest.importorskip("atheris")
    run = fuzz("card", 2)
    assert run.trace is None and run.executions > len(SEEDS) and run.features > 100
    with pytest.raises(PolyKVError, match="no fuzz target 'crad'"):
        fuzz("crad", 1)
