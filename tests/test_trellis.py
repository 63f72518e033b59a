"""Trellis codes: against an independent decoder, an exhaustive search, and the bounds of rate-distortion theory."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polykv import kernels
from polykv.codecs import trellis
from polykv.codecs.codebook import lloyd_max
from polykv.codecs.trellis import LEVELS, SCALE, WIDEST, TrellisKey, TrellisValue
from polykv.codecs.trellis_training import trained
from polykv.codecs.turboquant_log import TurboQuantLog
from polykv.codecs.waterfill import WaterfillKey
from polykv.errors import PolyKVError

STATED = {2: 0.76, 3: 0.66, 4: 0.62}  # of Lloyd-Max's error, in TrellisKey's docstring


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(y, bits):
    return (trellis.decode(trellis.encode(y, bits), bits) - y).square().mean(-1)


def decoded(codes, bits):
    """The levels of one block, from the file and the definition."""
    half = json.loads(LEVELS.read_text())[str(bits)]
    levels = [level / SCALE for level in (*half, *(-level for level in reversed(half)))]
    stream = sum(code << bits * place for place, code in enumerate(codes))
    ring = stream | stream << bits * len(codes)
    return [levels[(ring >> bits * place) % len(levels)] for place in range(len(codes))]


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, WIDEST), st.sampled_from([8, 16, 20]))
def test_a_level_is_looked_up_by_the_bits_from_its_own_code_on(data, bits, n_codes):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=n_codes, max_size=n_codes))
    found = trellis.decode(torch.tensor([codes], dtype=torch.uint8), bits)
    torch.testing.assert_close(found[0], torch.tensor(decoded(codes, bits)))


@pytest.mark.parametrize("bits", range(1, WIDEST + 1))
def test_the_error_is_between_the_rate_distortion_bound_and_lloyd_max(bits):
    book = lloyd_max(bits)
    y = gaussian(2000 if bits < 5 else 200, 16)
    nearest = torch.tensor(book.levels)[torch.bucketize(y, torch.tensor(book.boundaries))].float()
    scalar, found = (nearest - y).square().mean(), error(y, bits).mean()
    assert 4.0**-bits < found < scalar
    if bits in STATED:
        assert found / scalar == pytest.approx(STATED[bits], abs=0.015)


def test_the_search_comes_near_the_best_of_all_blocks():
    codes = torch.arange(1 << 16).unsqueeze(1) >> torch.arange(16) & 1
    levels = trellis.decode(codes.to(torch.uint8), 1)
    y = gaussian(60, 16, seed=3)
    best = torch.stack([(levels - one).square().mean(1).min() for one in y])
    found = error(y, 1)
    assert (found >= best - 1e-6).all()
    assert found.mean() < 1.15 * best.mean()


def test_inverted_codes_are_the_negative():
    codes = torch.randint(0, 8, (20, 16), dtype=torch.uint8)
    assert torch.equal(trellis.decode(7 - codes, 3), -trellis.decode(codes, 3))


def test_levels_are_the_means_of_what_they_code():
    y = gaussian(40_000, 16, seed=1)
    windows = trellis.windows(trellis.encode(y, 3), 3).flatten()
    counts = windows.bincount(minlength=256)
    means = torch.zeros(256).index_add_(0, windows, y.flatten()) / counts
    assert (means - trellis.levels_of(3)).abs().mean() < 0.01


def test_training_lowers_the_error():
    first, _ = trained(2, seed=0, rounds=1, blocks=512)
    later, levels = trained(2, seed=0, rounds=6, blocks=512)
    assert later < first
    assert torch.equal(levels, -levels.flip(0))


@pytest.mark.parametrize("dim", [16, 20, 64])
def test_the_bytes_are_those_of_the_scalar_codecs(dim):
    x = gaussian(1, 3, 40, dim)
    for ours, theirs in ((TrellisKey(3), WaterfillKey(3)), (TrellisValue(3), TurboQuantLog(3))):
        packed, other = ours.encode(x), theirs.encode(x)
        assert packed.nbytes == other.nbytes == ours.stored_bytes(x.shape, x.dtype)
        found, scalar = (
            (codec.decode(one) - x).square().mean()
            for codec, one in ((ours, packed), (theirs, other))
        )
        assert found < 0.75 * scalar


def test_what_has_no_trellis_is_refused():
    for codec in (TrellisKey, TrellisValue):
        with pytest.raises(PolyKVError, match="has no bits=7"):
            codec(7)


def test_vectors_shorter_than_a_window_have_scalar_codes():
    x = gaussian(1, 1, 3, 2)
    found, expected = TrellisValue(3).encode(x), TurboQuantLog(3).encode(x)
    assert torch.equal(found.tensors["codes"], expected.tensors["codes"])
    assert torch.equal(TrellisValue(3).decode(found), TurboQuantLog(3).decode(expected))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_an_outlier_in_one_block_is_not_clipped(backend):
    k = gaussian(1, 1, 400, 256)
    k[..., :16] *= 8  # a block of its own, with more bits
    k[:, :, 200, :16] *= 6
    off = {}
    for codec in (TrellisKey(4), WaterfillKey(4)):
        decoded = codec.decode(kernels.encode(codec, k, backend))
        off[type(codec)] = float((decoded - k)[:, :, 200].norm() / k[:, :, 200].norm())
    assert off[TrellisKey] < 0.1 < off[WaterfillKey]
