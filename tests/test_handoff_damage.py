"""Damaged and hostile card files: refused with CardError, or opened bit-identical; never more.

`python tests/test_handoff_damage.py 10000` runs as many damages as it is told.
"""

import json
import random
import sys
import tracemalloc

import pytest
import torch
from conftest import TEXT, tiny_model

from polykv.errors import PolyKVError
from polykv.handoff import cardfile
from polykv.handoff.card import CacheCard
from polykv.handoff.cardfile import CardError
from polykv.pool import prefill

N_DAMAGED = 2000
# What an interpreter allocates for a header of a few kB, whatever the file's size.
INTERPRETER = 1 << 16


def make_card(tokenizer, n_tokens=40, head_dim=8):
    model = tiny_model("llama", head_dim=head_dim, max_position_embeddings=4096)
    found = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    ids = found.repeat(1 + n_tokens // len(found))[:n_tokens]
    cache = prefill(model, ids[None])
    return CacheCard.seal(cache, ids, model, tokenizer, "local", 6.0), model


def damaged(content: bytes, rng: random.Random) -> bytearray:
    """One of: bits flipped, bytes overwritten, cut, extended, a piece moved, removed, repeated, zeroed."""
    out = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    # Half of the damages hit the header, which is the part that is parsed.
    end = header if rng.random() < 0.5 else len(out)
    at, n = rng.randrange(end), rng.choice((1, 1, 2, 8, 64))
    kind = rng.randrange(8)
    if kind == 0:
        for _ in range(n):
            out[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        out[at : at + n] = rng.randbytes(len(out[at : at + n]))
    elif kind == 2:
        del out[rng.randrange(len(out)) :]
    elif kind == 3:
        out += rng.randbytes(n)
    elif kind == 4:
        to = rng.randrange(len(out))
        piece = bytes(out[at : at + n])
        out[to : to + len(piece)] = piece
    elif kind == 5:
        del out[at : at + n]
    elif kind == 6:
        out[at:at] = out[at : at + n]
    else:
        out[at : at + n] = rng.choice(b'\x00\xff09"{}[],:').to_bytes(1, "little") * n
    return out


def damage_many(card: CacheCard, model, tokenizer, n: int) -> tuple[int, int, float]:
    """(refused, opened bit-identical, most allocated over the file's size); anything else raises.

    Allocated by the interpreter: a refusal comes before any tensor, and tensors are views of the file.
    """
    content, rng = bytes(card.to_bytes()), random.Random(0)
    refused = identical = 0
    most = 0.0
    tracemalloc.start()
    for _ in range(n):
        changed = damaged(content, rng)
        before = bytes(changed)
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        try:
            opened = CacheCard.from_bytes(changed, model, tokenizer)
        except CardError as error:
            taken = tracemalloc.get_traced_memory()[1] - held
            assert "\n" not in str(error)
            refused += 1
        else:
            taken = tracemalloc.get_traced_memory()[1] - held
            assert before == content and opened.to_bytes() == content
            identical += 1
        most = max(most, taken / max(len(before), INTERPRETER))
    tracemalloc.stop()
    return refused, identical, most


def test_damaged_cards_are_refused_or_opened_bit_identical(tokenizer):
    card, model = make_card(tokenizer, n_tokens=400)
    refused, identical, most = damage_many(card, model, tokenizer, N_DAMAGED)
    # Some damages change nothing (a zero written over a zero).
    assert refused + identical == N_DAMAGED and refused > 0.9 * N_DAMAGED
    assert most <= 2


def test_every_single_bit_of_the_header_counts(tokenizer):
    card, model = make_card(tokenizer)
    content = bytes(card.to_bytes())
    for at in range(8 + int.from_bytes(content[:8], "little")):
        changed = bytearray(content)
        changed[at] ^= 1
        with pytest.raises(CardError):
            CacheCard.from_bytes(changed, model, tokenizer)


@pytest.fixture(scope="module")
def large(tokenizer):
    return make_card(tokenizer, n_tokens=2000, head_dim=64)


def peak(content: bytearray, model, tokenizer) -> int:
    tracemalloc.start()
    try:
        cardfile.loads(content)
    except CardError:
        pass
    finally:
        allocated = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return allocated


def forged(content: bytes, change) -> bytearray:
    """A file with another header and a digest that is right: damage on purpose."""
    n_header = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n_header])
    inner = json.loads(header["__metadata__"][cardfile.KEY])
    payload = change(header, inner, bytes(content[8 + n_header :]))
    inner["digest"] = "0" * 64
    header["__metadata__"][cardfile.KEY] = json.dumps(inner, sort_keys=True, separators=(",", ":"))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out = bytearray(len(text).to_bytes(8, "little") + text + payload)
    place = cardfile._DIGEST.search(out).start(1)
    import hashlib

    out[place : place + 64] = hashlib.sha256(out).hexdigest().encode()
    return out


def entry(header, name="token_ids"):
    return header[name]


def huge_shape(header, inner, payload):
    entry(header)["shape"] = [1 << 40]
    return payload


def huge_offsets(header, inner, payload):
    entry(header)["shape"], entry(header)["data_offsets"] = [1 << 40], [0, 1 << 42]
    return payload


def overlapping(header, inner, payload):
    # Two tensors of one size in one place: the second one's bytes are covered by none.
    header["value.map"]["data_offsets"] = header["key.map"]["data_offsets"]
    return payload


def many_tokens(header, inner, payload):
    inner["n_tokens"] = 1 << 40
    return payload


def wrong_dtype(header, inner, payload):
    entry(header)["dtype"] = "F32"
    return payload


def wrong_bits(header, inner, payload):
    inner["mean_bits"] = 1.5
    return payload


def no_hop(header, inner, payload):
    del inner["hop"]
    return payload


def text_hop(header, inner, payload):
    inner["hop"] = "1"
    return payload


def zero_heads(header, inner, payload):
    inner["n_kv_heads"] = 0
    return payload


def more_heads(header, inner, payload):
    inner["n_kv_heads"], inner["head_dim"] = inner["n_kv_heads"] * 2, inner["head_dim"] // 2
    return payload


def extra_tensor(header, inner, payload):
    end = len(payload)
    header["else"] = {"dtype": "U8", "shape": [8], "data_offsets": [end, end + 8]}
    return payload + bytes(8)


def untouched(header, inner, payload):
    return payload


HOSTILE = (huge_shape, huge_offsets, overlapping, many_tokens, wrong_dtype, wrong_bits)
HOSTILE += (no_hop, text_hop, zero_heads, more_heads, extra_tensor)


def test_a_forged_file_that_changes_nothing_is_a_card(large, tokenizer):
    card, model = large
    again = CacheCard.from_bytes(forged(bytes(card.to_bytes()), untouched), model, tokenizer)
    assert torch.equal(again.ids_T, card.ids_T)


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: change.__name__)
def test_forged_headers_with_a_right_digest_are_refused(change, large, tokenizer):
    card, model = large
    with pytest.raises(CardError):
        CacheCard.from_bytes(forged(bytes(card.to_bytes()), change), model, tokenizer)


HEADERS = {
    "claims 2^63 bytes": lambda c: (1 << 63).to_bytes(8, "little") + c[8:],
    "no JSON": lambda c: c[:8] + b"x" + c[9:],
    "deep": lambda c: (1 << 16).to_bytes(8, "little") + b"[" * (1 << 16) + c[8:],
    "a list": lambda c: (8).to_bytes(8, "little") + b"[1, 2]  " + c[8:],
    "empty": lambda c: b"",
    "seven bytes": lambda c: c[:7],
    "header only": lambda c: c[: 8 + int.from_bytes(c[:8], "little")],
    "foreign": lambda c: (2).to_bytes(8, "little") + b"{}",
    "long number": lambda c: (8192).to_bytes(8, "little") + b'{"a":' + b"9" * 8186 + b"}" + c[8:],
}


@pytest.mark.parametrize("name", HEADERS)
def test_broken_headers_are_refused_within_twice_the_files_size(name, large, tokenizer):
    card, model = large
    content = bytearray(HEADERS[name](bytes(card.to_bytes())))
    with pytest.raises(CardError):
        CacheCard.from_bytes(content, model, tokenizer)
    assert peak(content, model, tokenizer) <= 2 * len(content) + INTERPRETER


def test_reading_a_good_card_allocates_little_beyond_the_file(large, tokenizer):
    card, model = large
    content = card.to_bytes()
    assert peak(content, model, tokenizer) <= len(content) // 4 + INTERPRETER


def test_card_errors_are_polykv_errors():
    assert issubclass(CardError, PolyKVError)


if __name__ == "__main__":
    from conftest import tokenizer as fixture

    bpe = fixture.__wrapped__()
    card_, model_ = make_card(bpe, n_tokens=400)
    print("refused {}, opened bit-identical {}, most allocated {:.2f} x the file".format(
        *damage_many(card_, model_, bpe, int(sys.argv[1]))
    ))  # fmt: skip
