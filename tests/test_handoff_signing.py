"""Signed cards, the keys that sign them, and the places that cards are read from."""

import hashlib
import hmac
import io
import os
import re
from dataclasses import fields

import pytest
import torch
from conftest import checked_cell, rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from robustness import forge
from robustness.promises import KEY, SEEDS, any_model, bounded, check_card, tiny_model

from polykv.errors import PolyKVError
from polykv.handoff import stores, verify
from polykv.handoff.about import CardMetadata
from polykv.handoff.card import CacheCard
from polykv.handoff.cardfile import CardError
from polykv.handoff.signing import SigningKey
from polykv.pool import prefill

SEED = SEEDS["topology-9"]


@pytest.fixture(scope="module")
def model():
    with any_model:
        yield tiny_model()


def signed_and_not(model):
    card = CacheCard.from_bytes(bytearray(SEED), model, None)
    return card, card.to_bytes(KEY)


def test_a_signature_is_an_hmac_of_the_file_without_it(model):
    _, content = signed_and_not(model)
    inner = forge.take_apart(bytes(content)).fields
    blank = content
    for name in ("digest", "signature"):
        blank = blank.replace(inner[name].encode(), b"0" * 64)
    plain = hashlib.sha256(blank).digest()
    expected = hmac.new(KEY.secret, b"polykv card 1\0" + plain, hashlib.sha256).hexdigest()
    assert inner["signature"] == expected
    assert inner["digest"] == hashlib.sha256(plain + expected.encode()).hexdigest()


def test_a_signed_card_says_what_is_known_of_it(model):
    card, content = signed_and_not(model)
    for key, verified in ((None, False), (KEY, True)):
        again = CacheCard.from_bytes(bytearray(content), model, None, key)
        assert again.signed and again.verified is verified and again.metadata == card.metadata
        assert again.to_bytes() == content  # it keeps its signature
    assert not card.signed and not card.verified and card.to_bytes() == SEED
    assert 64 < len(content) - len(SEED) < 100  # in the file's bytes, and counted


def test_what_is_not_signed_with_the_key_is_refused(model):
    card, content = signed_and_not(model)
    with pytest.raises(CardError, match="not signed and a key is required"):
        CacheCard.from_bytes(card.to_bytes(), model, None, KEY)
    for other in (SigningKey(bytes(32)), SigningKey(KEY.secret + b"\n")):
        with pytest.raises(CardError, match="not by this key"):
            CacheCard.from_bytes(bytearray(content), model, None, other)
    for changed in forge.unsigned(bytes(content)):
        with pytest.raises(CardError):
            CacheCard.from_bytes(bytearray(changed), model, None, KEY)
        assert check_card(changed, model) is None  # without a key they are cards like any other


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_every_bit_of_a_signed_card_counts_with_and_without_the_key(model, data):
    content = SEEDS["signed"]
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    for key in (None, KEY):
        with pytest.raises(CardError):
            CacheCard.from_bytes(bytearray(changed), model, None, key)
    mended = bytearray(forge.with_digest(bytes(changed)))
    if mended != content:  # a bit of the digest itself
        with pytest.raises(CardError):
            CacheCard.from_bytes(mended, model, None, KEY)


def test_the_signature_is_checked_before_the_fields_and_tensors_are_looked_at(model):
    content = forge.CARDS["a NaN among scales or values"](SEEDS["signed"])
    with pytest.raises(CardError, match="not by this key"):
        CacheCard.from_bytes(bytearray(content), model, None, KEY)


# Another valid value for every field that a signature has to cover.
BOUND = {
    "session": "run-8",
    "receiver": "solver",
    "sender": "agent-2",
    "parent": "b" * 64,
    "hop": 3,
}
BOUND |= {"policy": "local", "budget_bits": 8.0, "position_offset": 1, "dtype": "float16"}
BOUND |= {"model": "2" * 64, "tokenizer": "2" * 64, "n_tokens": 19, "mean_bits": 4.0}
BOUND |= {"n_layers": 4, "n_kv_heads": 1, "head_dim": 16, "group_size": 32, "exact": None}
# What is not written if it is "mixed", None and 0.
OPTIONAL = {"payload": "waterfill", "windows": [8, 8, 8], "n_left": 1, "states": [0]}
BOUND |= OPTIONAL


@pytest.fixture(scope="module")
def bound(model):
    """A signed card with all labels."""
    ids_T = torch.arange(20)
    return CacheCard.seal(
        prefill(model, ids_T[None]), ids_T, model, None, "uniform", 6.0,
        sender="agent-1", receiver="checker", session="run-7",
    ).to_bytes(KEY)  # fmt: skip


def test_every_field_of_a_card_is_tried(bound):
    names = {field.name for field in fields(CardMetadata)} | {"mean_bits"}
    written = set(forge.take_apart(bytes(bound)).fields) - {"digest", "signature", "version"}
    assert set(BOUND) == names == written | set(OPTIONAL)


@pytest.mark.parametrize("name", BOUND)
def test_a_field_cannot_be_changed_after_signing(name, bound, model):
    changed = forge.card_field(name, BOUND[name])(bytes(bound))
    assert forge.take_apart(changed).fields != forge.take_apart(bytes(bound)).fields
    with pytest.raises(CardError, match="signature is not by this key, or the card was altered"):
        CacheCard.from_bytes(bytearray(changed), model, None, KEY)


def test_no_tensor_can_be_changed_after_signing(bound, model):
    parts = forge.take_apart(bytes(bound))
    for name in set(parts.header) - {"__metadata__"}:
        changed = forge.take_apart(bytes(bound))
        changed.payload[changed.header[name]["data_offsets"][0]] ^= 1
        with pytest.raises(CardError, match="altered"):
            CacheCard.from_bytes(bytearray(forge.put_together(changed)), model, None, KEY)


@pytest.mark.parametrize("name", sorted(set(BOUND) - {"model", "tokenizer", "mean_bits"}))
def test_a_rightly_signed_card_with_another_value_than_expected_is_refused_by_name(
    name, bound, model
):
    card = CacheCard.from_bytes(bytearray(bound), model, None, KEY)
    own = getattr(card.metadata, name)
    again = CacheCard.from_bytes(bytearray(bound), model, None, KEY, **{name: own})
    assert again.verified and again.metadata == card.metadata
    with pytest.raises(
        CardError, match=f"the card's {name} is {own!r}, .* expects {re.escape(repr(BOUND[name]))}"
    ):
        CacheCard.from_bytes(bytearray(bound), model, None, KEY, **{name: BOUND[name]})


def test_a_card_is_replayed_neither_in_another_session_nor_in_its_own(bound, model, tmp_path):
    card = CacheCard.from_bytes(bytearray(bound), model, None, KEY, session="run-7")
    ids_T, names = torch.arange(24), {"session": "run-7", "receiver": "solver"}
    cache = prefill(model, ids_T[None])
    child = card.append(cache, ids_T, model, None, "uniform", 6.0, **names)
    child.save(tmp_path / "child.card", KEY)
    expected = {**names, "parent": card.digest, "hop": 2}
    assert CacheCard.open(tmp_path / "child.card", model, None, KEY, **expected).verified
    for other in ({"session": "run-8"}, {"receiver": "checker"}, {"parent": child.digest}):
        with pytest.raises(CardError, match=next(iter(other))):
            CacheCard.open(tmp_path / "child.card", model, None, KEY, **expected | other)
    with pytest.raises(CardError, match="the card's parent is None"):  # the first card once more
        CacheCard.from_bytes(bytearray(bound), model, None, KEY, parent=card.digest)
    # What names no session fits none.
    with pytest.raises(CardError, match="session is ''"):
        CacheCard.from_bytes(bytearray(SEEDS["signed"]), model, None, KEY, session="run-7")
    with pytest.raises(PolyKVError, match="no field 'sesion'; did you mean 'session'"):
        CacheCard.from_bytes(bytearray(bound), model, None, KEY, sesion="run-7")


def test_keys_are_read_from_files_that_are_kept_secret(tmp_path, model):
    file = tmp_path / "card.key"
    with pytest.raises(PolyKVError, match="cannot read the signing key .*No such file"):
        SigningKey.read(file)
    for n_bytes in (0, 31, 5000):
        file.write_bytes(bytes(n_bytes))
        file.chmod(0o600)
        with pytest.raises(PolyKVError, match="not 32 to 4096.*head -c 32 /dev/urandom"):
            SigningKey.read(file)
    file.write_bytes(os.urandom(32))
    for mode in (0o604, 0o602, 0o660, 0o644):
        file.chmod(mode)
        with pytest.raises(PolyKVError, match="chmod 600"):
            SigningKey.read(file)
    for mode in (0o600, 0o400, 0o640):
        file.chmod(mode)
        key = SigningKey.read(file)
    assert key.secret.hex() not in repr(key) and str(key.secret) not in repr(key)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(PolyKVError, match="signing key"):
            SigningKey.read(place)
    card = CacheCard.from_bytes(bytearray(SEED), model, None)
    card.save(tmp_path / "a.card", key=key)
    assert CacheCard.open(tmp_path / "a.card", model, None, key=key).verified
    with pytest.raises(PolyKVError, match="32 to 4096 random bytes"):
        SigningKey(b"password")


def test_a_label_cannot_pose_as_a_digest_or_signature(model):
    for posed in ("digest", "signature"):
        sender = f'","{posed}":"{"0" * 64}'
        card = CacheCard.seal(
            prefill(model, torch.tensor([[1, 2]])),
            [1, 2],
            model,
            None,
            sender=sender,
            budget_bits=16,
        )
        again = CacheCard.from_bytes(card.to_bytes(KEY), model, None, KEY)
        assert again.metadata.sender == sender and again.verified


def test_a_file_larger_than_any_card_is_refused_before_it_is_read(model, tmp_path):
    sparse = tmp_path / "large.card"
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
    with bounded(0), pytest.raises(CardError, match="has 1099511627776 bytes"):
        CacheCard.open(sparse, model, None)
    assert max(len(content) for content in SEEDS.values()) < verify.largest(model)


def test_pipes_and_folders_are_no_cards(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(CardError, match="is not a file"):
            CacheCard.open(place, model, None)


def test_a_place_that_sends_less_than_it_says_gives_what_it_sent(monkeypatch):
    class Liar:
        def info(self, place):
            return {"size": 1 << 30, "type": "file"}

        def open(self, place, mode):
            return io.BytesIO(b"little")

    monkeypatch.setattr(stores.fsspec, "url_to_fs", lambda path: (Liar(), path))
    assert stores.read("liar://card", 1 << 31) == b"little"


# Experiments -----------------------------------------------------------------------------------------------

SMALL = (
    "n_problems=2",
    "relay.n_facts=8",
    "relay.max_new_tokens=8",
    "device=cpu",
    "policy=uniform",
)


@pytest.mark.slow
def test_a_key_makes_another_cell_and_its_path_does_not(tmp_path):
    for experiment in ("handoff_accuracy", "handoff_stages"):
        overrides = (f"experiment={experiment}", "device=cpu")
        files = [key_file(tmp_path / name) for name in ("a.key", "b.key")]
        cells = [identity(*overrides, f"card.key_file={file}") for file in (*files, "null")]
        assert cells[0] == cells[1] != cells[2], experiment
        assert identity(*overrides) == cells[2]


@pytest.mark.slow
def test_a_relay_of_signed_cards_says_the_same_in_longer_files(tmp_path):
    file, found = key_file(tmp_path / "card.key"), []
    for path in ("null", file):
        rows = rows_of("experiment=handoff_accuracy", *SMALL, f"card.key_file={path}")
        place = ("metric", "sample", "extraction")
        untimed = [row for row in rows if row["unit"] != "min"]
        found.append({tuple(r.get(name) for name in place): r["value"] for r in untimed})
        assert not any(str(file) in str(value) for row in rows for value in row.values())
    file_bits = [
        {k: values.pop(k) for k in list(values) if k[0] == "file_bits"} for values in found
    ]
    assert found[0] == found[1] and len(found[0]) > 5
    assert all(file_bits[0][k] < file_bits[1][k] for k in file_bits[0])


def test_a_bad_key_file_is_refused_before_any_work(tmp_path):
    file = key_file(tmp_path / "card.key")
    file.chmod(0o644)
    for experiment in ("handoff_accuracy", "handoff_stages"):
        with pytest.raises(PolyKVError, match="chmod 600"):
            checked_cell(f"experiment={experiment}", "device=cpu", f"card.key_file={file}")


def key_file(place):
    place.write_bytes(os.urandom(32))
    place.chmod(0o600)
    return place


def identity(*overrides):
    study, settled = checked_cell(*overrides)
    return study.identity(settled)
