"""Damaged and hostile cards: whatever the bytes say, a one-line refusal within bounded memory and time.

The digest of every forged card is right (forge.py): what is tested lies behind it.
"""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from conftest import TEXT
from conftest import tiny_model as model_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polykv.config import REPO
from polykv.errors import PolyKVError
from polykv.handoff import cardfile
from polykv.handoff.card import CacheCard
from polykv.handoff.cardfile import CardError
from polykv.pool import prefill
from polykv.tokens import encode
from robustness import forge
from robustness.promises import (
    CARDS,
    MAX_TOKENS,
    SEEDS,
    VOCABULARY,
    any_model,
    bounded,
    check_card,
    tiny_model,
)
from robustness.stage import first

SEED = SEEDS["topology-9"]
TENSORS = [name for name in forge.take_apart(SEED).header if name != "__metadata__"]
FIELDS = forge.take_apart(SEED).fields
FAST = settings(  # the same examples every time: the fuzzers look further
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Fields whose value may be any of its type ("exact": of a card that keeps no token exactly).
FREE = {"hop", "sender", "policy", "position_offset", "budget_bits", "parent", "digest", "exact"}
TRICKS = ("../x", "a/b", "a\\b", "..", ".hidden", "a\x00", "a\nb", "\x1b[3m", "\u202egnp", "\ud800")


@pytest.fixture(scope="module")
def model():
    with any_model:
        yield tiny_model()


def test_the_committed_cards_are_valid_and_as_the_forge_writes_them(model):
    for name, content in SEEDS.items():
        assert check_card(content, model) is None, name
        assert forge.put_together(forge.take_apart(content)) == content, name
        fields, _, stamp = cardfile.loads(bytearray(content))
        assert json.loads(json.dumps(fields)) == fields
        assert stamp.digest == forge.take_apart(content).fields["digest"]
    assert sum(file.stat().st_size for file in CARDS.iterdir()) < 100_000


@pytest.mark.parametrize("every", first(1, [False, True]))
def test_every_named_kind_is_refused(every, model):
    for number, damage in enumerate(forge.CARDS.values()):
        seeds = list(SEEDS.values())
        for content in seeds if every else [seeds[number % len(seeds)]]:
            changed = damage(content)
            assert changed != content and check_card(changed, model)


@FAST
@given(
    name=st.sampled_from(TENSORS),
    part=st.sampled_from(["dtype", "shape", "data_offsets", "else"]),
    value=forge.JSON | st.lists(forge.SIZES, max_size=6),
)
def test_any_value_in_any_entry_of_the_header_is_refused(model, name, part, value):
    changed = forge.entry(name, **{part: value})(SEED)
    assert forge.take_apart(SEED).header[name].get(part) == value or check_card(changed, model)


@FAST
@given(name=st.sampled_from(sorted(FIELDS)), value=forge.JSON)
def test_any_value_in_any_field_is_refused_or_a_card_that_works(model, name, value):
    answer = check_card(forge.card_field(name, value)(SEED), model)
    one_group = name == "group_size" and type(value) is int and value >= 8  # head_dim is 8
    assert answer or name in FREE or value == FIELDS[name] or one_group


def test_a_scale_below_zero_is_refused(model):
    name = next(name for name in TENSORS if name.endswith(".scale"))
    assert check_card(forge.forged(lambda parts: parts.poke(name, -1.0))(SEED), model)


def test_what_open_refuses_seal_refuses(model):
    ids = list(range(8))
    cache = prefill(model, torch.tensor([ids]))
    with pytest.raises(PolyKVError, match=str(VOCABULARY)):
        CacheCard.seal(cache, [*ids[:-1], VOCABULARY], model, None, "full")
    with pytest.raises(PolyKVError, match=str(MAX_TOKENS + 1)):
        CacheCard.seal(cache, ids, model, None, "full", position_offset=MAX_TOKENS - 7)


@FAST
@given(label=st.sampled_from(TRICKS) | st.text(max_size=140))
def test_a_label_is_refused_alike_by_seal_and_open(model, label):
    refused = check_card(forge.card_field("sender", label)(SEED), model)
    cache = prefill(model, torch.tensor([[1, 2, 3]]))
    try:
        CacheCard.seal(cache, [1, 2, 3], model, None, "full", sender=label)
    except PolyKVError:
        assert refused
    else:
        assert not refused and os.path.basename(label) == label and label.isprintable()
    assert refused or label not in TRICKS


@FAST
@given(parent=st.text("0123456789abcdefABCDEF./\x00\n", min_size=60, max_size=66))
def test_a_parent_is_a_digest_or_nothing(model, parent):
    line = check_card(forge.card_field("parent", parent)(SEED), model)
    assert (line is None) == (re.fullmatch("[0-9a-f]{64}", parent) is not None)


@pytest.mark.slow
def test_edited_cards_are_refused_or_work_behind_the_digest(model):
    lines = []

    @settings(FAST, max_examples=200)
    @given(forge.cards())
    def check(content):
        lines.append(check_card(content, model))

    check()
    # A card that still works shows that digests are right: by flipped bytes alone none would.
    assert lines.count(None) > 10


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
    hostile = [*SEEDS.values(), *(damage(SEED) for damage in forge.CARDS.values())]
    for content in hostile:
        check_card(content, model)  # what polykv itself imports on first use
    modules, seen, watching = set(sys.modules), [], [True]
    # Python's own audit: files opened, modules imported, code compiled or run. A hook cannot be removed.
    sys.addaudithook(lambda *event: seen.append(event) if watching else None)
    for content in hostile:
        with suppress(CardError):
            CacheCard.from_bytes(bytearray(content), model, None).dequantize()
    assert [event for event in seen if event[0].startswith(FORBIDDEN)] == []
    assert set(sys.modules) == modules
    open(os.devnull).close()
    eval("1 + 1")
    watching.clear()
    assert {"open", "compile", "exec"} <= {name for name, _ in seen}


@pytest.fixture(scope="module")
def large(tokenizer):
    """A card of 2 MB and its model."""
    model = model_of("llama", head_dim=64, max_position_embeddings=4096)
    found = encode(tokenizer, TEXT, begins=True)[0]
    ids = found.repeat(1 + 2000 // len(found))[:2000]
    return CacheCard.seal(prefill(model, ids[None]), ids, model, tokenizer, "local", 6.0), model


def test_reading_a_card_allocates_a_quarter_of_its_size_and_refusing_one_twice_its_size(large):
    whole = bytes(large[0].to_bytes())
    content = bytearray(whole)
    with bounded(len(content) // 4, multiple=1, floor=1 << 16):
        cardfile.loads(content)
    for damage in forge.CARDS.values():
        content = bytearray(damage(whole))
        with bounded(len(content), multiple=2, floor=1 << 16), suppress(CardError):
            cardfile.loads(content)


@pytest.mark.parametrize("n", first(1, [200, 3000]))
def test_damaged_bytes_are_refused_or_open_bit_identical(n, model):
    refused = []

    @settings(FAST, max_examples=n)
    @given(forge.splices(SEED))
    def check(content):
        with bounded(len(content), multiple=2, floor=1 << 16):
            try:
                card = CacheCard.from_bytes(bytearray(content), model, None)
            except CardError as error:
                assert "\n" not in str(error)
                refused.append(content)
                return
        assert content == SEED and card.to_bytes() == SEED

    check()
    assert len(refused) > 0.6 * n  # some damage changes nothing: a zero written over a zero


@pytest.mark.faults
@pytest.mark.parametrize("target", ["card", "cell"])
def test_fuzzing_finds_nothing(target, tmp_path):
    pytest.importorskip("atheris")
    seconds = os.environ.get("FUZZ_SECONDS", "120")
    done = subprocess.run(
        [sys.executable, "-m", "robustness.fuzz", target, seconds, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=REPO / "tests",
        env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    executed, features = (
        int(re.findall(rf"{name} +(\d+)", done.stdout)[-1]) for name in ("executed_units:", "ft:")
    )
    assert executed > len(SEEDS) and features > 20  # it ran, and its coverage was measured
