"""Token-level mixed precision and the allocator, against what can be computed by hand."""

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polykv import kernels
from polykv.codecs.uniform import Uniform
from polykv.errors import PolyKVError
from polykv.handoff.allocate import allocate
from polykv.handoff.mixed import MixedCodec

COST = (3.0, 4.0, 8.0, 16.0)
ERROR = tuple(Uniform(bits).relative_error for bits in (3, 4, 8)) + (0.0,)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from((2, 3, 4, 8)), st.integers(1, 80), st.integers(1, 70), st.integers(0, 99))
def test_tiers_err_by_half_a_step_and_store_what_they_say(bits, dim, group, seed):
    codec, x = Uniform(bits, group), gaussian(1, 2, 9, dim, seed=seed)
    packed = codec.encode(x)
    assert packed.nbytes == codec.stored_bytes(x.shape, x.dtype)
    size = min(group, dim)
    for start in range(0, dim, size):
        part, back = x[..., start : start + size], codec.decode(packed)[..., start : start + size]
        step = 2 * part.abs().amax(-1, keepdim=True) / (2**bits - 1)
        # What rounding the scale to fp16 adds: 2^-11 of it, or 2^-25 where it is subnormal, times the code.
        slack = step / 2 + part.abs().amax(-1, keepdim=True) * 2**-10 + 2**bits * 2**-25
        assert ((back - part).abs() <= slack).all()


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_relative_error_is_that_of_uniform_values(bits):
    x = torch.rand((1, 4, 500, 64), generator=torch.Generator().manual_seed(1)) * 2 - 1
    codec = Uniform(bits)
    measured = (codec.decode(codec.encode(x)) - x).square().mean()
    assert measured == pytest.approx(codec.relative_error, rel=0.08)


def layers_and_tiers(n_tokens=37, seed=0):
    layers = [gaussian(1, 2, n_tokens, 20, seed=seed + layer) for layer in range(3)]
    tiers = torch.from_numpy(np.random.default_rng(seed).integers(0, 5, n_tokens)).to(torch.uint8)
    return layers, tiers


def test_a_token_decodes_as_its_own_codec_says_whatever_its_neighbours_are():
    (layers, tiers), codec = layers_and_tiers(), MixedCodec()
    decoded = codec.decode(codec.encode(layers, tiers)).split(2, 1)
    for token, layer in itertools.product(range(37), range(3)):
        one = codec.codec(int(tiers[token]))
        alone = one.decode(one.encode(layers[layer][:, :, token : token + 1]))
        # A product of one row may be summed in another order than one of many.
        torch.testing.assert_close(
            decoded[layer][:, :, token : token + 1], alone, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_every_backend_writes_the_same_bits_and_reads_the_same_values(dtype):
    fast = kernels.pick_backend("auto", torch.device("cpu"))
    tiers = torch.arange(150).remainder(5).to(torch.uint8)
    x = gaussian(3, 1, 2, 150, 80)
    x[1, :, :, 7] = (x[1, :, :, 7] * 60_000).clamp(
        -65_504, 65_504
    )  # decodes beyond fp16, and saturates
    x[0, :, :, 5] = 0
    x[0, :, :, 6] *= 1e-7  # its scale is subnormal in fp16
    layers = list(x.to(dtype))
    truth, ours = (MixedCodec(None, backend=name) for name in (kernels.TORCH, fast))
    expected, found = truth.encode(layers, tiers), ours.encode(layers, tiers)
    for name, tensor in expected.tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name
    decoded = ours.decode(found)
    assert decoded.dtype == dtype and decoded.isfinite().all()
    assert torch.equal(decoded, truth.decode(expected))


def test_stored_bytes_are_those_of_the_tensors_and_of_the_formula():
    (layers, tiers), codec = layers_and_tiers(), MixedCodec()
    mixed = codec.encode(layers, tiers)
    assert mixed.nbytes == sum(tensor.nbytes for tensor in mixed.tensors().values())
    vector = (1, 6, 1, 20)
    kept = sum(codec.codec(int(tier)).stored_bytes(vector, torch.float32) for tier in tiers)
    assert mixed.nbytes == kept + -(-37 * 3 // 8)
    channels = codec.channels_of(layers, tiers)
    assert codec.encode(layers, tiers, channels).nbytes == mixed.nbytes + 2 * 6 * 20 * 2


def test_rebuild_is_the_inverse_of_tensors():
    (layers, tiers), codec = layers_and_tiers(), MixedCodec()
    for channels in (None, codec.channels_of(layers, tiers)):
        mixed = codec.encode(layers, tiers, channels)
        again = codec.rebuild(mixed.tensors(), mixed.shape, mixed.dtype, is_key=bool(channels))
        assert torch.equal(again.tiers_T, tiers)
        assert torch.equal(codec.decode(again), codec.decode(mixed))
    with pytest.raises(PolyKVError, match="no token needs: mean, spread"):
        codec.rebuild(mixed.tensors(), mixed.shape, mixed.dtype)


@pytest.mark.parametrize("name", ("map", "mean", "spread", "3.codes", "4.scale", "16.values"))
def test_rebuild_refuses_what_does_not_fit(name):
    (layers, tiers), codec = layers_and_tiers(), MixedCodec()
    mixed = codec.encode(layers, tiers, codec.channels_of(layers, tiers))
    whole = mixed.tensors()
    for changed in (None, whole[name][..., :-1], whole[name].to(torch.float64)):
        tensors = {k: v for k, v in whole.items() if k != name}
        tensors |= {} if changed is None else {name: changed}
        with pytest.raises(PolyKVError, match=name.replace(".", r"\.")):
            codec.rebuild(tensors, mixed.shape, mixed.dtype, is_key=True)
    with pytest.raises(PolyKVError, match="no token needs"):
        codec.rebuild(whole | {"5.codes": whole["map"]}, mixed.shape, mixed.dtype, is_key=True)


def test_extend_equals_encoding_at_once_and_keeps_old_bytes():
    (layers, tiers), codec = layers_and_tiers(), MixedCodec()
    channels = codec.channels_of(layers, tiers)
    old = codec.encode([layer[:, :, :20] for layer in layers], tiers[:20], channels)
    new = codec.encode([layer[:, :, 20:] for layer in layers], tiers[20:], channels)
    joined, whole = codec.extend(old, new), codec.encode(layers, tiers, channels)
    assert joined.shape == whole.shape
    for name, tensor in whole.tensors().items():
        assert torch.equal(joined.tensors()[name], tensor)
    for tier, part in old.parts.items():
        for name, tensor in part.tensors.items():
            assert torch.equal(joined.parts[tier].tensors[name][:, :, : tensor.shape[2]], tensor)


def spent_and_error(tiers, weights):
    cost = sum(COST[tier] for tier in tiers)
    return cost, sum(w * ERROR[tier] for w, tier in zip(weights, tiers, strict=True))


weights_of = st.lists(st.floats(0.001, 1000), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(weights_of, st.floats(3, 17))
def test_no_allocation_that_costs_no_more_is_better_before_the_remainder_is_spent(weights, bits):
    """Greedy by marginal gain is optimal for what it spends; only a remainder is left to chance."""
    n, weights = len(weights), np.array(weights)
    cost, _ = spent_and_error(allocate(weights, COST, ERROR, bits * n), weights)
    assert cost <= bits * n + 1e-9
    every = [spent_and_error(t, weights) for t in itertools.product(range(4), repeat=n)]
    # Budgets at which the steps by falling gain come out even: the costs along the greedy path.
    for spent in greedy_costs(weights):
        if spent <= bits * n:
            own_cost, own = spent_and_error(allocate(weights, COST, ERROR, spent), weights)
            assert own_cost <= spent + 1e-9
            best = min(error for cost, error in every if cost <= spent + 1e-9)
            assert own <= best * (1 + 1e-9) + 1e-15


@settings(max_examples=60, deadline=None)
@given(weights_of, st.floats(3, 17))
def test_the_gap_to_brute_force_is_at_most_one_step(weights, bits):
    n, weights = len(weights), np.array(weights)
    _, own = spent_and_error(allocate(weights, COST, ERROR, bits * n), weights)
    every = [spent_and_error(t, weights) for t in itertools.product(range(4), repeat=n)]
    best = min(error for cost, error in every if cost <= bits * n + 1e-9)
    assert own - best <= weights.max() * (ERROR[0] - ERROR[1]) + 1e-12


def greedy_costs(weights):
    gains = [
        (-w * (ERROR[k] - ERROR[k + 1]) / (COST[k + 1] - COST[k]), k, COST[k + 1] - COST[k])
        for w in weights
        for k in range(3)
    ]
    steps = [step for _, _, step in sorted(gains)]
    return np.cumsum([len(weights) * COST[0], *steps])


def test_the_rest_is_spent_until_no_step_fits():
    weights = np.random.default_rng(0).exponential(size=100)
    for bits in np.linspace(3, 16, 40):
        tiers = allocate(weights, COST, ERROR, bits * 100)
        left = bits * 100 - sum(COST[tier] for tier in tiers)
        steps = [COST[tier + 1] - COST[tier] for tier in tiers if tier < 3]
        assert left + 1e-9 >= 0 and (not steps or left < min(steps))


def test_equal_items_are_told_apart_evenly():
    tiers = allocate(np.ones(4096), COST, ERROR, 4096 * 3.5)
    halves = [tiers[i : i + 64].mean() for i in range(0, 4096, 64)]
    assert set(tiers) == {0, 1} and max(halves) - min(halves) < 0.06


def test_a_budget_below_the_lowest_tier_is_refused():
    with pytest.raises(PolyKVError, match="below the lowest tier's 3.000"):
        allocate(np.ones(4), COST, ERROR, 11.9)


def test_32k_tokens_take_well_under_a_second():
    weights = np.random.default_rng(0).exponential(size=2 * 32768)
    start = time.process_time()
    tiers = allocate(weights, COST, ERROR, 4.0 * len(weights))
    assert time.process_time() - start < 1
    assert np.mean([COST[tier] for tier in tiers]) == pytest.approx(4.0, rel=1e-4)
