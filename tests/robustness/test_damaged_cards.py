"""Cards with bytes flipped, cut, moved or repeated: refused with CardError, or opened bit-identical."""

import random
import tracemalloc

import pytest
from conftest import TEXT, tiny_model

from polykv.handoff import cardfile
from polykv.handoff.card import CacheCard
from polykv.handoff.cardfile import CardError
from polykv.pool import prefill
from polykv.tokens import encode
from robustness import kinds
from robustness.stage import first

# What an interpreter allocates for a header of a few kB, whatever the file's size.
INTERPRETER = 1 << 16


def make_card(tokenizer, n_tokens=40, head_dim=8):
    model = tiny_model("llama", head_dim=head_dim, max_position_embeddings=4096)
    found = encode(tokenizer, TEXT, begins=True)[0]
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


@pytest.mark.parametrize("n", first(1, [2000, 10_000]))
def test_damaged_cards_are_refused_or_opened_bit_identical(n, tokenizer):
    card, model = make_card(tokenizer, n_tokens=400)
    refused, identical, most = damage_many(card, model, tokenizer, n)
    # Some damages change nothing (a zero written over a zero).
    assert refused + identical == n and refused > 0.9 * n
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


def peak(content: bytearray) -> int:
    tracemalloc.start()
    try:
        cardfile.loads(content)
    except CardError:
        pass
    finally:
        allocated = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return allocated


@pytest.mark.parametrize("kind", kinds.CARDS)
def test_refusing_a_card_allocates_no_more_than_twice_its_size(kind, large):
    content = bytearray(kinds.CARDS[kind](bytes(large[0].to_bytes())))
    assert peak(content) <= 2 * len(content) + INTERPRETER


def test_reading_a_good_card_allocates_little_beyond_the_file(large):
    content = large[0].to_bytes()
    assert peak(content) <= len(content) // 4 + INTERPRETER
