"""Attention to compressed tokens against fp64 attention over the same tokens decoded; the choice of a backend."""

import sys
import warnings
from math import ceil, lcm
from types import SimpleNamespace

import pytest
import torch
from pairwise import slow
from test_codecs import every_codec, of_each_pair
from torch.profiler import ProfilerActivity, profile

import polykv
from polykv import kernels
from polykv.attention import prefix
from polykv.attention.prefix import attend_prefix
from polykv.attention.scratch import GPU_TIMES, scratch
from polykv.attention.softmax import OnlineSoftmax, merge
from polykv.attention.suffix import attend_suffix
from polykv.codecs.int8 import Int8
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.errors import PolyKVError
from polykv.kernels import cpu
from polykv.recipe import load_recipe
from polykv.segment import Segment, decode_segments

N_LAYERS = 12
HEAD_DIMS = (64, 80, 96, 128, 256)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def keys_and_values(heads, n_tokens, dim):
    """Keys with large and small channels, as models have them; unit values."""
    scale_D = gaussian(dim, seed=1).abs() * 2
    return gaussian(1, heads, n_tokens, dim, seed=2) * scale_D, gaussian(1, heads, n_tokens, dim)


def exact(q_HQD, k_HTD, v_HTD, scaling):
    """Output and log-sum-exp in fp64."""
    scores = q_HQD.double() @ k_HTD.double().mT * scaling
    return scores.softmax(dim=-1) @ v_HTD.double(), scores.logsumexp(dim=-1)


def errors(q_HQD, segments, scaling, backend="torch"):
    """Largest absolute error of the output, and of the log-sum-exp relative to its size."""
    out, lse = attend_prefix(q_HQD, segments, scaling, backend)
    assert out.dtype == lse.dtype == torch.float32
    keys, values = decode_segments(segments)
    true_out, true_lse = exact(q_HQD, keys[0], values[0], scaling)
    lse_error = (lse - true_lse).abs() / true_lse.abs().clamp_min(1)
    return float((out - true_out).abs().max()), float(lse_error.max())


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0, *slow(1)])
@pytest.mark.parametrize("name", of_each_pair(polykv.available_recipes()))
def test_every_recipe_attends_exactly(name, shift):
    recipe = load_recipe(name)
    for place, dim in enumerate(HEAD_DIMS):
        layer = (0, 5)[(place + shift) % 2]  # some recipes keep the first layers exact
        k_BHTD, v_BHTD = keys_and_values(2, 333, dim)
        segments = recipe.encode_layer(k_BHTD, v_BHTD, layer, N_LAYERS)
        assert max(errors(gaussian(2, 30, dim, seed=3), segments, dim**-0.5)) < 1e-5


@every_codec
def test_every_codec_attends_exactly_over_several_chunks(codec, monkeypatch):
    monkeypatch.setattr(prefix, "DECODE_BYTES", 2 * 64 * prefix.BYTES_PER_VALUE * 50)
    monkeypatch.setattr(prefix, "SCORE_BYTES", 2 * 4 * 50 * 7)
    k_BHTD, v_BHTD = keys_and_values(2, 173, 64)
    segment = Segment(codec, codec, codec.encode(k_BHTD), codec.encode(v_BHTD))
    chunks = list(prefix.chunks(segment, prefix.DECODE_BYTES))
    assert len(chunks) >= min(4, ceil(173 / codec.group))
    assert sum(key.shape[2] for key, _ in chunks) == 173
    assert all(key.shape[2] <= lcm(50, codec.group) for key, _ in chunks)
    assert max(errors(gaussian(2, 30, 64, seed=3), [segment], 0.125)) < 1e-5


@every_codec
def test_the_rotated_domain_holds_the_same_vectors(codec):
    for dim in (64, 80):
        x_BHTD, q_BHQD = gaussian(2, 3, 37, dim), gaussian(2, 3, 5, dim, seed=1)
        packed = codec.encode(x_BHTD)
        x_decoded, rotated = codec.decode(packed), codec.decode_rotated(packed)
        assert rotated.dtype == torch.float32
        torch.testing.assert_close(codec.unrotate(rotated, packed.tensors), x_decoded)
        scores = codec.scores(codec.rotate(q_BHQD, packed.tensors), packed)
        torch.testing.assert_close(scores, q_BHQD @ x_decoded.mT, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("n_agents", [1, 2, 15, 64])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_any_number_of_agents_and_query_heads(n_agents, group):
    k_BHTD, v_BHTD = keys_and_values(3, 200, 96)
    segments = load_recipe("polykv").encode_layer(k_BHTD, v_BHTD, 5, N_LAYERS)
    assert max(errors(gaussian(3, n_agents * group, 96, seed=3), segments, 0.1)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["polykv", "polykv_q8_0", "turboquant_4bit"])
def test_half_precision_caches_and_queries(name, dtype):
    k_BHTD, v_BHTD = keys_and_values(2, 500, 128)
    segments = load_recipe(name).encode_layer(k_BHTD.to(dtype), v_BHTD.to(dtype), 5, N_LAYERS)
    assert max(errors(gaussian(2, 60, 128, seed=3).to(dtype), segments, 128**-0.5)) < 2e-2


def test_large_scores_do_not_overflow():
    k_BHTD, v_BHTD = keys_and_values(2, 100, 64)
    segments = load_recipe("fp16").encode_layer(k_BHTD, v_BHTD, 5, N_LAYERS)
    q_HQD = 100 * gaussian(2, 4, 64, seed=3)  # scores of thousands: exp() of them is infinite
    out, lse = attend_prefix(q_HQD, segments, 1.0, "torch")
    keys, values = decode_segments(segments)
    true_out, true_lse = exact(q_HQD, keys[0], values[0], 1.0)
    assert float(true_lse.max()) > 1000
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.double(), true_out, rtol=0, atol=1e-2)


def test_the_prefix_is_never_rotated(monkeypatch):
    """The values' rotation is undone on the 5 outputs, the keys' done on the 5 queries, not on 300 tokens."""
    seen = []
    for name in ("rotate", "unrotate"):
        original = getattr(TurboQuantMSE, name)

        def spy(self, x, tensors, original=original):
            seen.append(x.shape[2])
            return original(self, x, tensors)

        monkeypatch.setattr(TurboQuantMSE, name, spy)
    codec = TurboQuantMSE(bits=3)
    k_BHTD, v_BHTD = keys_and_values(2, 300, 64)
    segment = Segment(codec, codec, codec.encode(k_BHTD), codec.encode(v_BHTD))
    seen.clear()
    attend_prefix(gaussian(2, 5, 64), [segment], 0.1, "torch")
    assert seen == [5, 5]


def test_merging_parts_is_attention_over_all():
    q_HQD, k_HTD, v_HTD = gaussian(2, 6, 32), gaussian(2, 90, 32, seed=1), gaussian(2, 90, 32)
    whole = exact(q_HQD, k_HTD, v_HTD, 0.3)
    first = exact(q_HQD, k_HTD[:, :13], v_HTD[:, :13], 0.3)
    second = exact(q_HQD, k_HTD[:, 13:], v_HTD[:, 13:], 0.3)
    for got, true in zip(merge(first, second), whole, strict=True):
        torch.testing.assert_close(got, true)
    nothing = torch.zeros(2, 6, 32, dtype=torch.double), torch.full((2, 6), -torch.inf).double()
    for parts in ((whole, nothing), (nothing, whole)):
        for got, true in zip(merge(*parts), whole, strict=True):
            assert torch.equal(got, true)


def test_a_query_that_sees_nothing_at_first():
    softmax = OnlineSoftmax((2,), 3, torch.device("cpu"))
    values = torch.eye(3)
    softmax.add(torch.full((2, 3), -torch.inf), values, 0, 2)
    softmax.add(torch.tensor([[0.0, 0.0, -torch.inf]]), values, 0, 1)
    out, lse = softmax.result()
    assert torch.equal(out, torch.tensor([[0.5, 0.5, 0], [0, 0, 0]]))
    torch.testing.assert_close(lse, torch.tensor([0.6931472, -torch.inf]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n_queries", "n_tokens"), [(1, 700), (40, 1100)])
def test_suffix_attention_masks_and_chunks(n_queries, n_tokens, dtype):
    group, scaling = 3, 0.2
    q_BHRD = gaussian(2, 2, n_queries * group, 16).to(dtype)
    k_BHTD, v_BHTD = (gaussian(2, 2, n_tokens, 16, seed=seed).to(dtype) for seed in (1, 2))
    mask_B1QT = gaussian(2, 1, n_queries, n_tokens, seed=3) > 0
    mask_B1QT[1, :, -1] = False  # padding sees nothing
    out, lse = attend_suffix(q_BHRD, Segment.uncompressed(k_BHTD, v_BHTD), mask_B1QT, scaling)
    scores = q_BHRD.double() @ k_BHTD.double().mT * scaling
    hidden = ~mask_B1QT.repeat_interleave(group, dim=2)
    scores = scores.masked_fill(hidden, -torch.inf)
    true = (scores.softmax(dim=-1).nan_to_num(0) @ v_BHTD.double()).float()
    torch.testing.assert_close(out, true, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1).float())


def peak_bytes(action):
    """Most bytes alive at once in `action`, beyond what was there; all of torch's allocations counted."""
    action()  # codebooks and rotations are made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        action()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    "name",
    ["polykv", "kivi_2bit_no_exemptions", *slow("polykv_q8_0", "turboquant_prod_3bit")],
)
def test_temporaries_are_bounded_by_the_chunk_not_by_the_context(name):
    """8 kv heads x 128, 15 agents x 4 query heads: under 8 MiB at 2,048 tokens and no more at 4,096."""
    recipe, q_HQD = load_recipe(name), gaussian(8, 60, 128)
    peaks = []
    for n_tokens in (2048, 4096):
        segments = recipe.encode_layer(*keys_and_values(8, n_tokens, 128), 5, N_LAYERS)
        peaks.append(peak_bytes(lambda s=segments: attend_prefix(q_HQD, s, 0.1, "torch")))
    assert peaks[0] < 8 << 20
    assert peaks[1] <= peaks[0] * 1.01
    fp32_layer = 2 * 8 * 4096 * 128 * 4
    assert peaks[1] < fp32_layer / 4  # a rebuilt layer would show


def test_backends_are_named_and_refused(monkeypatch):
    cpu = torch.device("cpu")
    assert kernels.pick_backend("torch", cpu) == "torch"
    assert kernels.pick_backend("auto", torch.device("meta")) == "torch"
    with pytest.raises(PolyKVError, match="no backend named 'abacus'; there are: auto, torch"):
        kernels.pick_backend("abacus", cpu)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        PolyKVError, match="backend=triton is not available: it does not run on cpu"
    ):
        kernels.pick_backend("triton", cpu)
    with pytest.raises(PolyKVError, match="backend=cpu is not available: it does not run on cuda"):
        kernels.pick_backend("cpu", torch.device("cuda"))


def test_a_missing_compiler_falls_back_with_one_warning(monkeypatch):
    # A reason that no other test gives: a process warns of it once.
    monkeypatch.setattr(cpu, "available", lambda: "no compiler in this test")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [kernels.pick_backend("auto", torch.device("cpu")) for _ in range(3)] == 3 * [
            "torch"
        ]
    assert [str(w.message) for w in caught] == [
        "backend cpu is not available (no compiler in this test); using torch, which is slower"
    ]
    with pytest.raises(PolyKVError, match="backend=cpu is not available: no compiler in"):
        kernels.pick_backend("cpu", torch.device("cpu"))


def test_a_module_that_cannot_be_imported_is_a_missing_backend(monkeypatch):
    monkeypatch.setitem(sys.modules, "polykv.kernels.triton", None)
    with pytest.raises(PolyKVError, match="import of polykv.kernels.triton halted"):
        kernels.pick_backend("triton", torch.device("cuda"))


def test_what_a_kernel_does_not_support_torch_does(monkeypatch):
    codec, x_BHTD = Int8(), gaussian(1, 2, 20, 64)
    segment = Segment(codec, codec, codec.encode(x_BHTD), codec.encode(x_BHTD))
    q_HQD = gaussian(2, 3, 64)
    answer = (torch.ones(2, 3, 64), torch.zeros(2, 3))
    asked = []
    module = SimpleNamespace(
        encode=lambda codec, x, context: asked.append("encode"),
        decode_rotated=lambda codec, packed: asked.append("decode_rotated"),
        attend=lambda q, segment, scaling: asked.append("attend"),
    )
    monkeypatch.setitem(sys.modules, "polykv.kernels.cpu", module)
    assert torch.equal(
        kernels.encode(codec, x_BHTD, "cpu").tensors["codes"], segment.key.tensors["codes"]
    )
    rotated = kernels.decode_rotated(codec, segment.key, "cpu")
    assert torch.equal(rotated, codec.decode_rotated(segment.key))
    assert max(errors(q_HQD, [segment], 0.1, backend="cpu")) < 1e-5
    assert asked == ["encode", "decode_rotated", "attend"]
    module.attend = lambda q, segment, scaling: answer
    assert attend_prefix(q_HQD, [segment], 0.1, "cpu") is answer


def test_a_gpu_works_in_larger_pieces():
    assert scratch(100, torch.device("cpu")) == 100
    assert scratch(100, torch.device("cuda")) == 100 * GPU_TIMES
