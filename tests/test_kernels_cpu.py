"""The fast CPU path against the torch path (formats, codes) and against attention in fp64."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from polykv import kernels
from polykv.attention.prefix import attend_torch
from polykv.attention.suffix import attend_suffix
from polykv.codecs.codebook import lloyd_max
from polykv.codecs.identity import Identity
from polykv.codecs.int8 import Int8
from polykv.codecs.q8_0 import Q8_0
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.codecs.turboquant_variants import TurboQuantNC
from polykv.codecs.uniform import Uniform
from polykv.errors import PolyKVError
from polykv.kernels import cpu
from polykv.segment import Segment

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))

INT8_CODECS = [Int8(), Int8("token"), Q8_0()]
TURBOQUANT_CODECS = [
    TurboQuantMSE(bits=bits, signs=signs) for bits in (2, 3, 4) for signs in (False, True)
]
UNIFORM_CODECS = [Uniform(2, 64), Uniform(3), Uniform(4, 64), Uniform(4, 16), Uniform(8, 48)]
CODECS = INT8_CODECS + TURBOQUANT_CODECS + UNIFORM_CODECS
EXACT_CODECS = [Identity(), Identity("float16"), Identity("bfloat16")]
DIMS = [16, 64, 80, 96, 128, 256]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A fp32 rotation of unit scale errs by less; two orders of summation differ by at most this.
ROUNDING = 1e-5


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def boundary_distance(codec, x):
    """Of each rotated unit value, in fp64, to the nearest decision boundary."""
    x = x.double()
    y = x @ codec.rotation(x.shape[-1], x.device).double()
    y *= x.shape[-1] ** 0.5 / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-300)
    boundaries = torch.tensor(lloyd_max(codec.bits).boundaries, dtype=torch.float64)
    return (y.unsqueeze(-1) - boundaries).abs().amin(dim=-1)


def ulps(a, b):
    """Steps between fp16 numbers >= 0."""
    return (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()


def assert_same_format(codec, x, ties=False):
    """The kernel's encoding of `x` is the torch path's, but for values within rounding of a boundary.

    Those are few, unless the data are made of `ties`. Where the norm is kept as zero any code will do.
    """
    ours, truth = cpu.encode(codec, x), codec.encode(x)
    assert ours is not None
    assert (ours.shape, ours.dtype, ours.group) == (truth.shape, truth.dtype, truth.group)
    assert list(ours.tensors) == list(truth.tensors)
    for name, expected in truth.tensors.items():
        assert ours.tensors[name].dtype == expected.dtype
        assert ours.tensors[name].shape == expected.shape
        assert ours.tensors[name].is_contiguous()
    if not isinstance(codec, TurboQuantMSE):
        assert all(torch.equal(ours.tensors[name], truth.tensors[name]) for name in truth.tensors)
        return
    # A sum of squares in another order may round to the neighbouring fp16 number, seldom.
    off = ulps(ours.tensors["norm"], truth.tensors["norm"])
    assert off.max() <= 1 and off.sum() <= 1 + off.numel() // 100
    levels = torch.ones_like(truth.tensors["norm"])
    index = [
        codec.decode_rotated(type(p)({**p.tensors, "norm": levels}, p.shape, p.dtype))
        for p in (ours, truth)
    ]
    differ = (index[0] != index[1]) & (truth.tensors["norm"] > 0)
    assert (boundary_distance(codec, x)[differ] < ROUNDING).all()
    assert ties or differ.sum() <= 2 + differ.numel() // 1000


# Encoding


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_encodes_the_torch_format(codec):
    for dim, dtype in product(DIMS, DTYPES):
        assert_same_format(codec, (3 * gaussian(2, 3, 37, dim)).to(dtype))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_encodes_any_layout_of_whole_vectors(codec):
    base = gaussian(2, 33, 6, 80)
    assert_same_format(codec, base.transpose(1, 2))  # as a projection leaves it
    assert_same_format(codec, base[:, 5:, 1:4].transpose(1, 2))
    assert_same_format(codec, base[:1, :, :1].expand(2, 33, 3, 80))
    unaligned = gaussian(1 + 4 * 7 * 64)[1:].view(1, 4, 7, 64)
    assert_same_format(codec, unaligned)
    assert_same_format(codec, unaligned.bfloat16().flatten()[64 - 7 : -7].view(1, 9, 3, 64))
    assert cpu.encode(codec, base.transpose(1, 3)) is None  # its vectors are scattered


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_encodes_extreme_values(codec):
    x = gaussian(1, 2, 40, 64, seed=1)
    x[:, :, 0] = 0
    x[:, :, 1] *= 1e-9  # the norm vanishes in fp16
    x[:, :, 2] *= 1e-6  # scale and norm are subnormal
    x[:, :, 3] *= 1e-42  # subnormal themselves
    x[:, :, 4] *= 5000
    x[:, :, 5] = 0
    x[:, :, 5, 7] = -60000  # a single spike
    x[:, :, 6] = 1.25
    x[:, :, 7] = -0.0
    packed = cpu.encode(codec, x)
    assert_same_format(codec, x, ties=True)
    torch.testing.assert_close(codec.decode(packed), codec.decode(codec.encode(x)))
    assert_same_format(codec, x[:, :, 2:3].half())  # subnormal halves


def test_int8_rounds_halves_as_the_torch_path():
    halves = torch.arange(-127, 128).float() / 2
    x = torch.cat([halves, torch.tensor([127.0])]).repeat(1, 1, 3, 1)
    for codec in INT8_CODECS:  # with a scale of 1, every second value is a tie
        assert_same_format(codec, x)
    nearly = torch.tensor([0.5 - 2**-25, -(0.5 - 2**-25), 0.5, -0.5, 127.0] + [0.0] * 11)
    assert_same_format(Q8_0(), nearly.view(1, 1, 1, 16))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_what_cannot_be_encoded_is_refused_by_the_torch_path(codec):
    x = gaussian(1, 2, 300, 64)
    for value in (float("nan"), float("inf"), -float("inf"), 3e38):
        x[0, 1, 290, 63] = value
        if value == 3e38 and codec == Int8():
            continue  # its scale is fp32
        assert cpu.encode(codec, x) is None
        with pytest.raises(PolyKVError, match="cannot encode|overflow"):
            kernels.encode(codec, x, "cpu")


def test_other_codecs_and_shapes_take_the_torch_path():
    x = gaussian(1, 2, 5, 64)
    others = (Uniform(5), Uniform(symmetric=False), Uniform(4, 40))
    for codec in (*others, TurboQuantMSE(bits=5), TurboQuantMSE(bits=1), TurboQuantNC()):
        assert cpu.encode(codec, x) is None
        assert cpu.decode_rotated(codec, codec.encode(x)) is None
        kept = kernels.encode(codec, x, "cpu").tensors
        assert all(torch.equal(kept[name], t) for name, t in codec.encode(x).tensors.items())
    assert cpu.encode(Int8(), gaussian(1, 2, 5, 40)) is None
    assert cpu.encode(Int8(), gaussian(1, 2, 5, 512)) is None
    assert cpu.encode(Int8(), x.double()) is None
    assert cpu.encode(Int8(), x[:, :, :0]) is None
    assert cpu.encode(Int8(), x.to("meta")) is None


# Decoding


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_decodes_exactly(codec):
    for dim in DIMS:
        packed = codec.encode(gaussian(2, 3, 37, dim))
        assert torch.equal(cpu.decode_rotated(codec, packed), codec.decode_rotated(packed))
        part = packed.narrow(5, 30)
        assert torch.equal(cpu.decode_rotated(codec, part), codec.decode_rotated(part))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_decodes_every_norm_and_every_code(bits):
    codec = TurboQuantMSE(bits=bits)
    packed = codec.encode(gaussian(1, 1, 1 << 15, 16))
    norms = torch.arange(1 << 15, dtype=torch.int16).view(
        torch.float16
    )  # all, infinity and NaN too
    packed.tensors["norm"].copy_(norms.view(1, 1, -1, 1))
    torch.testing.assert_close(
        cpu.decode_rotated(codec, packed),
        codec.decode_rotated(packed),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


# Attention


def attention(q_HQD, segment, scaling):
    """Output and log-sum-exp in fp64 over the decoded cache."""
    keys, values = (tensor[0].double() for tensor in segment.decode())
    scores = q_HQD.double() @ keys.mT * scaling
    return scores.softmax(dim=-1) @ values, scores.logsumexp(dim=-1)


def segment_of(key_codec, value_codec, *shape, seed=0):
    k, v = 2 * gaussian(1, *shape, seed=seed), gaussian(1, *shape, seed=seed + 1)
    return Segment(key_codec, value_codec, key_codec.encode(k), value_codec.encode(v))


def assert_attends(q_HQD, segment, tolerance=1e-5, scaling=None):
    scaling = scaling or q_HQD.shape[-1] ** -0.5
    out, lse = cpu.attend(q_HQD, segment, scaling)
    expected, expected_lse = attention(q_HQD, segment, scaling)
    assert out.dtype == lse.dtype == torch.float32
    assert (out - expected).abs().max() < tolerance
    assert (lse - expected_lse).abs().max() < tolerance


@pytest.mark.parametrize("dim", DIMS)
def test_attends_at_every_head_dim_and_length(dim):
    for n_tokens, key_codec in product((1, 2, 63, 64, 65, 500), INT8_CODECS):
        segment = segment_of(key_codec, TurboQuantMSE(3), 2, n_tokens, dim)
        assert_attends(gaussian(2, 20, dim, seed=2), segment)


@pytest.mark.parametrize("key_codec", CODECS, ids=str)
def test_attends_to_every_codec_pair(key_codec):
    for value_codec in CODECS:
        segment = segment_of(key_codec, value_codec, 2, 130, 96)
        assert_attends(gaussian(2, 7, 96, seed=2), segment)


@pytest.mark.parametrize("dim", DIMS)
def test_attends_to_tokens_that_are_kept_exactly(dim):
    for exact in EXACT_CODECS:
        for other in (exact, Uniform(2, 64), TurboQuantMSE(3)):
            q = gaussian(2, 7, dim, seed=2)
            assert_attends(q, segment_of(exact, other, 2, 130, dim))
            assert_attends(q, segment_of(other, exact, 2, 130, dim))


@pytest.mark.parametrize("heads,group", [(8, 1), (2, 4), (1, 8)])  # MHA, GQA, MQA
@pytest.mark.parametrize("agents", [1, 15, 64])
def test_attends_for_many_agents(agents, heads, group):
    segment = segment_of(Int8(), TurboQuantMSE(3, signs=False), heads, 200, 64)
    assert_attends(gaussian(heads, agents * group, 64, seed=2), segment)


def test_attends_at_the_edges_of_a_tile():
    segment = segment_of(Q8_0(), TurboQuantMSE(3), 1, 70, 64)
    for queries in (15, 16, 17, 31, 33, 48, 49, 63, 64, 65, 130):
        assert_attends(gaussian(1, queries, 64), segment)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_attends_with_queries_of_any_dtype_and_layout(dtype):
    segment = segment_of(Int8("token"), TurboQuantMSE(4), 3, 90, 128)
    # Queries are read exactly: only the arithmetic, which is fp32, rounds.
    assert_attends(gaussian(3, 6, 128).to(dtype), segment)
    assert_attends(gaussian(6, 3, 128).to(dtype).transpose(0, 1), segment)


@pytest.mark.parametrize(
    ("key_codec", "n_tokens", "dim"),
    [(Int8("token"), 90, 128), (TurboQuantMSE(4), 33, 16), (Uniform(4, 32), 65, 48), (Q8_0(), 3001, 64)],
    ids=str,
)  # fmt: skip
def test_bfloat16_queries_are_attended_as_exactly_as_by_torch_in_bfloat16(key_codec, n_tokens, dim):
    segment = segment_of(key_codec, TurboQuantMSE(3), 2, n_tokens, dim)
    keys, values = (tensor.bfloat16() for tensor in segment.decode())
    for n_queries in (7, 33, 64):
        q_HQD = gaussian(2, n_queries, dim, seed=2).bfloat16()
        expected, expected_lse = attention(q_HQD, segment, dim**-0.5)
        out, lse = cpu.attend(q_HQD, segment, dim**-0.5)
        theirs = F.scaled_dot_product_attention(q_HQD[None], keys, values)[0]
        error, allowed = ((got - expected).square().mean().sqrt() for got in (out, theirs))
        assert error < 1.25 * allowed
        assert (lse - expected_lse).abs().max() < 2**-6


def test_an_odd_number_of_tokens_reads_nothing_of_the_block_before():
    """Blocks of 64 tokens are decoded into one buffer; pairs of bfloat16 must not reach behind the last token."""
    segment = segment_of(Identity(), Identity(), 1, 129, 64)
    segment.value.tensors["values"][:, :, :128] = 1e30
    q_HQD = torch.zeros(1, 1, 64, dtype=torch.bfloat16)
    segment.key.tensors["values"][:, :, :128] = 0
    segment.key.tensors["values"][:, :, 128] = 100
    out, _ = cpu.attend(q_HQD + 1, segment, 1.0)
    torch.testing.assert_close(
        out[0, 0], segment.value.tensors["values"][0, 0, 128].float(), rtol=2**-7, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n_queries", "n_tokens", "dim", "codec"),
    [
        *[(1, 1, 16, None), (1, 33, 64, None), (3, 700, 96, None)],
        *[(1, 33, 64, Q8_0()), (3, 70, 80, Int8("token")), (1, 20, 96, Uniform(4))],
    ],
)
def test_suffixes_are_attended_and_merged_as_by_torch(n_queries, n_tokens, dim, codec, dtype):
    agents, heads, group = 3, 2, 5
    q_BHRD = gaussian(agents, heads, n_queries * group, dim).to(dtype)
    k_BHTD, v_BHTD = (
        gaussian(agents, heads, 2 * n_tokens, dim, seed=s)[:, :, ::2].to(dtype) for s in (1, 2)
    )
    own = Segment.uncompressed(k_BHTD, v_BHTD)
    if codec:
        own = Segment(codec, codec, codec.encode(k_BHTD), codec.encode(v_BHTD))
    mask_B1QT = gaussian(agents, 1, n_queries, n_tokens, seed=3) > 0
    mask_B1QT[1] = False  # an agent that sees nothing of its own
    shape = (heads, agents * n_queries * group)
    other = gaussian(*shape, dim, seed=4), gaussian(*shape, seed=5)
    other[1][:, : n_queries * group] = -torch.inf  # nothing of the other keys, for the first agent
    merged = tuple(part.unflatten(1, (agents, -1)).transpose(0, 1) for part in other)
    for more in (None, merged):
        tensors = (q_BHRD, own, mask_B1QT)
        out, lse = cpu.attend_suffix(*tensors, 0.3, more)
        true_out, true_lse = attend_suffix(*tensors, 0.3, other=more)
        torch.testing.assert_close(out, true_out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, true_lse, rtol=1e-5, atol=1e-5)
        q_BHRD[2] = torch.nan  # is not taken for a query that sees nothing
        out, _ = cpu.attend_suffix(*tensors, 0.3, more)
        assert out[2].isnan().all() and out[:2].isfinite().all()
        q_BHRD[2] = 0


def test_attends_to_a_part_of_a_segment():
    whole = segment_of(Q8_0(), TurboQuantMSE(3), 2, 300, 80)
    part = Segment(
        *(whole.key_codec, whole.value_codec),
        whole.key.narrow(70, 211),
        whole.value.narrow(70, 211),
    )
    assert_attends(gaussian(2, 9, 80), part)


def test_attends_to_sharp_and_to_constant_scores():
    segment = segment_of(Int8(), TurboQuantMSE(3), 2, 3000, 64)
    q = gaussian(2, 5, 64)
    assert_attends(q, segment, scaling=3.0, tolerance=1e-4)  # scores of some hundred, each rounded
    out, lse = cpu.attend(0 * q, segment, 0.125)
    torch.testing.assert_close(lse, torch.full_like(lse, 3000).log())
    torch.testing.assert_close(
        out, segment.decode()[1][0].mean(1, True).expand_as(out), atol=1e-6, rtol=0
    )


def test_attends_without_drift_over_a_long_prefix():
    segment = segment_of(Int8(), TurboQuantMSE(3), 1, 40_000, 64)
    assert_attends(gaussian(1, 2, 64, seed=2), segment, 2e-6)


def test_values_of_zero_vectors_and_nan_queries():
    codec = TurboQuantMSE(3)
    zero = torch.zeros(1, 2, 10, 64)
    segment = Segment(Int8(), codec, Int8().encode(zero), codec.encode(zero))
    out, lse = cpu.attend(gaussian(2, 3, 64), segment, 1.0)
    assert (out == 0).all() and torch.allclose(lse, torch.tensor(10.0).log())
    q = gaussian(2, 3, 64)
    q[0, 1, 5] = float("nan")
    out, lse = cpu.attend(q, segment_of(Int8(), codec, 2, 10, 64), 1.0)
    assert out[0, 1].isnan().all() and lse[0, 1].isnan()  # a broken model is not hidden
    assert out.isnan().any(dim=-1).sum() == 1


def test_what_attention_leaves_to_the_torch_path():
    pair = Int8(), TurboQuantMSE(3)
    q, x = gaussian(2, 3, 64), gaussian(1, 2, 9, 64)
    assert cpu.attend(q, segment_of(*pair, 2, 9, 40), 1.0) is None
    assert cpu.attend(q.double(), segment_of(*pair, 2, 9, 64), 1.0) is None
    assert cpu.attend(q, segment_of(Int8(), Uniform(5), 2, 9, 64), 1.0) is None
    assert cpu.attend(q, segment_of(Identity(), Uniform(), 2, 9, 40), 1.0) is None
    assert cpu.attend(q, segment_of(*pair, 3, 9, 64), 1.0) is None
    two = x.repeat(2, 1, 1, 1)
    assert cpu.attend(q, Segment(*pair, pair[0].encode(two), pair[1].encode(two)), 1.0) is None


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_threads_do_not_change_codes_and_split_attention_merges(three_threads, monkeypatch):
    monkeypatch.setattr(cpu, "VALUES_PER_THREAD", 1)
    monkeypatch.setattr(cpu, "PRODUCTS_PER_THREAD", 1)
    x = gaussian(1, 2, 700, 64)
    for codec in CODECS:
        assert_same_format(codec, x)
        packed = codec.encode(x)
        assert torch.equal(cpu.decode_rotated(codec, packed), codec.decode_rotated(packed))
        x[0, 1, 650, 3] = float("inf")
        assert cpu.encode(codec, x) is None
        x[0, 1, 650, 3] = 0
    for n_tokens in (1, 3, 1500):  # the last is cut into three parts
        assert_attends(gaussian(1, 4, 64), segment_of(Int8(), TurboQuantMSE(3), 1, n_tokens, 64))


# Random shapes

shapes = st.tuples(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 90),
    st.integers(1, 16).map(lambda n: 16 * n),
)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CODECS), shapes, st.sampled_from(DTYPES), st.floats(-4, 3), st.integers(0, 99)
)
def test_any_shape_encodes_and_decodes(codec, shape, dtype, magnitude, seed):
    x = (10**magnitude * gaussian(*shape, seed=seed)).to(dtype)
    assert_same_format(codec, x)
    packed = codec.encode(x)
    assert torch.equal(cpu.decode_rotated(codec, packed), codec.decode_rotated(packed))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CODECS),
    st.sampled_from(CODECS),
    shapes,
    st.integers(1, 140),
    st.integers(0, 99),
)
def test_any_shape_attends(key_codec, value_codec, shape, queries, seed):
    _, heads, n_tokens, dim = shape
    segment = segment_of(key_codec, value_codec, heads, n_tokens, dim, seed=seed)
    q = gaussian(heads, queries, dim, seed=seed + 2)
    assert_attends(q, segment)
    out, lse = cpu.attend(q, segment, dim**-0.5)
    expected, expected_lse = attend_torch(q, segment, dim**-0.5)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=2e-5, rtol=0)
