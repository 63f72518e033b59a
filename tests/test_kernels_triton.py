"""The Triton kernels through Triton's interpreter, against the codecs and against attention in fp64; and that
they compile for Hopper, which needs no GPU either.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from pairwise import slow

from polykv import kernels
from polykv.attention.cascade import attend_in_place
from polykv.codecs.bitpack import unpack
from polykv.codecs.codebook import lloyd_max
from polykv.codecs.identity import Identity
from polykv.codecs.int8 import Int8
from polykv.codecs.q8_0 import Q8_0
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.codecs.turboquant_variants import TurboQuantNC
from polykv.codecs.uniform import Uniform
from polykv.errors import PolyKVError
from polykv.pool import SharedKVPool, prefill
from polykv.recipe import load_recipe
from polykv.segment import Segment

triton = pytest.importorskip("triton", reason="triton has wheels for Linux only")
from polykv.kernels import triton as triton_kernels  # noqa: E402

if isinstance(triton.language.sum, triton.JITFunction):
    raise RuntimeError(
        "triton loaded before TRITON_INTERPRET was set; set it at the top of conftest.py"
    )

CODECS = {
    "turboquant_2bit": TurboQuantMSE(2),
    "turboquant_3bit": TurboQuantMSE(3),
    "turboquant_3bit_unsigned": TurboQuantMSE(3, signs=False),
    "turboquant_4bit": TurboQuantMSE(4),
    "int8_tensor": Int8(),
    "int8_token": Int8("token"),
    "q8_0": Q8_0(),
}
DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def values(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(3).to(dtype)


def unrounded(codec, x):
    """What the codec rounds, in fp64, its decision boundaries, and the codes in the same order."""
    x, dim = x.double(), x.shape[-1]
    if isinstance(codec, TurboQuantMSE):
        y = x @ codec.rotation(dim, x.device).double() * dim**0.5
        norm = x.norm(dim=-1, keepdim=True)
        return y / norm.clamp_min(1e-30), torch.tensor(lloyd_max(codec.bits).boundaries)
    scale = codec.encode(x.float()).tensors["scale"].double()
    if isinstance(codec, Q8_0):
        scale = scale.repeat_interleave(32, dim=-1)[..., :dim]
    return x / scale.clamp_min(1e-30), torch.arange(-127, 127) + 0.5


def unpacked(codec, packed):
    codes = packed.tensors["codes"]
    return unpack(codes, codec.bits, packed.shape[3]) if hasattr(codec, "bits") else codes


# Every codec at three head_dims, each with a dtype of its own; the others in `make test-all`.
ENCODED = [
    pytest.param(name, dim, dtype, marks=() if (i + j + k) % 5 == 0 else pytest.mark.slow)
    for i, name in enumerate(CODECS)
    for j, dim in enumerate(DIMS)
    for k, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("name", "dim", "dtype"), ENCODED)
def test_encode_differs_from_torch_only_at_decision_boundaries(name, dim, dtype):
    codec = CODECS[name]
    x = values(1, 2, 67, dim, seed=DTYPES.index(dtype), dtype=dtype)
    ours, theirs = triton_kernels.encode(codec, x), codec.encode(x)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    for key, tensor in theirs.tensors.items():
        mine = ours.tensors[key]
        assert (mine.shape, mine.dtype) == (tensor.shape, tensor.dtype)
        if key != "codes":  # norms and scales: as the sum's order leaves them
            torch.testing.assert_close(mine, tensor, rtol=1e-3, atol=0)
    off = unpacked(codec, ours).int() - unpacked(codec, theirs).int()
    assert off.abs().max() <= 1
    y, boundaries = unrounded(codec, x)
    y = y[off != 0]
    distance = (y[:, None] - boundaries.double()).abs().amin(dim=-1)
    # Q8_0 rounds against the fp32 scale and keeps it in fp16, to 11 bits.
    assert (distance < (1e-1 if isinstance(codec, Q8_0) else 1e-4)).all()
    assert len(y) <= 0.005 * off.numel()


@pytest.mark.slow
def test_encode_takes_any_layout_and_a_batch():
    x = values(2, 40, 3, 64).transpose(1, 2)
    for codec in CODECS.values():
        ours, theirs = triton_kernels.encode(codec, x), triton_kernels.encode(codec, x.contiguous())
        assert all(torch.equal(ours.tensors[key], theirs.tensors[key]) for key in theirs.tensors)
    by_column = values(1, 2, 64, 40).mT
    assert torch.equal(
        triton_kernels.decode_rotated(Q8_0(), triton_kernels.encode(Q8_0(), by_column)),
        Q8_0().decode_rotated(Q8_0().encode(by_column)),
    )


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dim", (64, 80, 256))
def test_decode_is_the_codecs(name, dim):
    codec = CODECS[name]
    packed = codec.encode(values(2, 2, 99, dim)).narrow(7, 80)
    ours = triton_kernels.decode_rotated(codec, packed)
    torch.testing.assert_close(ours, codec.decode_rotated(packed), rtol=1e-6, atol=0)


def test_vectors_of_zeros_decode_to_zeros():
    x = values(1, 2, 40, 64)
    x[:, 1, 5:9] = 0
    for codec in CODECS.values():
        y = triton_kernels.decode_rotated(codec, triton_kernels.encode(codec, x))
        assert (y[:, 1, 5:9] == 0).all() and (y[:, 0] != 0).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("bad", (torch.nan, torch.inf, 1e30))
def test_what_cannot_be_encoded_is_refused_as_by_torch(bad):
    x = values(1, 1, 40, 64)
    x[0, 0, 17, 3] = bad
    for codec in (TurboQuantMSE(3), Int8("token"), Q8_0(), Uniform(4)):
        with pytest.raises(PolyKVError, match="cannot encode|overflow"):
            kernels.encode(codec, x, "triton")


def test_what_has_no_kernel_is_left_to_torch():
    x = values(1, 2, 20, 64)
    others = [
        (TurboQuantMSE(5), x),
        (TurboQuantNC(), x),
        (Identity(), x),
        (TurboQuantMSE(3), x[..., :20]),
        (Uniform(4, 32, symmetric=False), x),
        (Uniform(4, 64), values(1, 2, 20, 80)),
    ]
    for codec, tensor in others:
        assert triton_kernels.encode(codec, tensor) is None
        packed = kernels.encode(codec, tensor, "triton")
        assert triton_kernels.decode_rotated(codec, packed) is None
    batch = values(2, 2, 20, 64)
    pairs = [(Int8(), Int8(), x), (Int8(), TurboQuantMSE(3), batch), (Uniform(3), Identity(), x)]
    for key_codec, value_codec, tensor in pairs:
        segment = Segment(
            key_codec, value_codec, key_codec.encode(tensor), value_codec.encode(tensor)
        )
        assert triton_kernels.attend(x[0], segment, 0.1) is None


@pytest.mark.slow
# Every width once; the others in `make test-all`.
@pytest.mark.parametrize(
    ("bits", "dim"), [(2, 64), (4, 128), (8, 64), *slow((2, 128), (4, 64), (8, 128))]
)
def test_uniform_is_the_codecs_bit_for_bit(bits, dim):
    codec = Uniform(bits, 64)
    for dtype in DTYPES:
        x = values(2, 67, 3, dim, dtype=dtype).transpose(1, 2)
        x[0, 1, 3] = 0
        ours, theirs = triton_kernels.encode(codec, x), codec.encode(x)
        assert all(torch.equal(ours.tensors[key], theirs.tensors[key]) for key in theirs.tensors)
        for packed in (theirs, theirs.narrow(5, 60)):
            decoded = triton_kernels.decode_rotated(codec, packed)
            assert torch.equal(decoded, codec.decode_rotated(packed))


# kv heads, queries (agents x query tokens x heads that share a kv head), tokens
SHAPES = ((2, 1, 1), (1, 60, 333), (3, 15, 129), (1, 64 * 4, 64), (2, 7, 400))
PAIRS = (
    (Int8(), TurboQuantMSE(3, signs=False)),
    (Int8("token"), TurboQuantMSE(2)),
    (Q8_0(), TurboQuantMSE(4)),
    (TurboQuantMSE(3), TurboQuantMSE(3)),
    (TurboQuantMSE(4), TurboQuantMSE(2)),
    (TurboQuantMSE(2), TurboQuantMSE(4)),
)


# Of cards: blocks within a vector, one for a vector, and tokens that are kept exactly.
CARD_PAIRS = (
    (Uniform(4, 64), Uniform(2, 64)),
    (Uniform(2, 32), Identity()),
    (Identity(), Uniform(8, 64)),
    (Uniform(8, 64), Uniform(4)),
    (Identity("float16"), Identity("float16")),
    (Uniform(4), TurboQuantMSE(3)),
)


def make_segment(pair, k, v):
    key_codec, value_codec = pair
    return Segment(key_codec, value_codec, key_codec.encode(k), value_codec.encode(v))


def attention_fp64(q, segment, scaling):
    key, value = (replace(packed, dtype=torch.float32) for packed in (segment.key, segment.value))
    k, v = segment.key_codec.decode(key)[0].double(), segment.value_codec.decode(value)[0].double()
    scores = scaling * q.double() @ k.mT
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def assert_attention(q, segment, scaling, atol):
    out, lse = triton_kernels.attend(q, segment, scaling)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    expected, expected_lse = attention_fp64(q, segment, scaling)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=atol)


# Every shape and every head_dim once, three in fp32 and two in 16 bits; the others in `make test-all`.
HALVES = (torch.bfloat16, torch.float16)
ATTENDED = [
    pytest.param(
        shape, dim, dtype, marks=() if (3 * i - j) % 5 == 0 and place == i % 2 else pytest.mark.slow
    )
    for i, shape in enumerate(SHAPES)
    for j, dim in enumerate(DIMS)
    for place, dtype in enumerate((torch.float32, HALVES[i // 2 % 2]))
]


@pytest.mark.parametrize(("shape", "dim", "dtype"), ATTENDED)
def test_attend_is_attention_over_the_decoded_segment(shape, dim, dtype):
    heads, n_queries, n_tokens = shape
    # Every pair meets every head_dim, and every shape.
    pair = PAIRS[(DIMS.index(dim) + SHAPES.index(shape)) % len(PAIRS)]
    k, v = values(1, heads, n_tokens, dim, seed=1) / 3, values(1, heads, n_tokens, dim, seed=2) / 3
    q = values(heads, n_queries, dim, seed=3) / 2
    segment = make_segment(pair, k, v)
    assert_attention(q.to(dtype), segment, dim**-0.5, 1e-5 if dtype == torch.float32 else 2e-2)


# One for each way that a tier is stored; the others in `make test-all`.
CARDS = [
    pytest.param(
        pair, dim, marks=() if (i, dim) in ((0, 64), (1, 128), (4, 64)) else pytest.mark.slow
    )
    for i, pair in enumerate(CARD_PAIRS)
    for dim in (64, 128)
]


@pytest.mark.slow
@pytest.mark.parametrize(("pair", "dim"), CARDS, ids=str)
def test_attend_is_attention_over_a_cards_tokens(pair, dim):
    k, v, q = (
        values(1, 2, 100, dim, seed=1) / 3,
        values(1, 2, 100, dim, seed=2) / 3,
        values(2, 9, dim),
    )
    whole = make_segment(pair, k, v)
    part = replace(whole, key=whole.key.narrow(7, 71), value=whole.value.narrow(7, 71))
    for segment in (whole, part, make_segment(pair, torch.zeros_like(k), v)):
        assert_attention(q / 2, segment, dim**-0.5, 1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        segment = make_segment(pair, k.to(dtype), v.to(dtype))
        assert_attention((q / 2).to(dtype), segment, dim**-0.5, 2e-2)


# The first three have values of 3, 2 and 4 bits.
some_pairs = pytest.mark.parametrize(
    "pair",
    [*PAIRS[:3], *(pytest.param(pair, marks=pytest.mark.slow) for pair in PAIRS[3:])],
    ids=lambda pair: f"{type(pair[0]).__name__}-{pair[1].bits}",
)


@pytest.mark.slow
@some_pairs
def test_attend_looks_every_code_up_exactly(pair):
    # One token: the output is its value vector, whatever the score. Small norms do not vanish.
    for size in (1e-3, 1, 1e3):
        v = values(1, 1, 1, 256) * size
        segment = make_segment(pair, values(1, 1, 1, 256), v)
        for dtype, rtol in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-3)):
            out, _ = triton_kernels.attend(values(1, 3, 256, dtype=dtype), segment, 0.1)
            expected = attention_fp64(out, segment, 0.1)[0].float()
            torch.testing.assert_close(
                out, expected, rtol=0, atol=rtol * expected.norm().item() / 16
            )


@pytest.mark.slow
@some_pairs
def test_attend_takes_part_of_a_segment_and_keys_of_zeros(pair):
    k, v, q = (
        values(*shape, 64, seed=len(shape)) / 3 for shape in ((1, 2, 200), (1, 2, 200), (2, 4))
    )
    whole = make_segment(pair, k, v)
    part = replace(whole, key=whole.key.narrow(70, 171), value=whole.value.narrow(70, 171))
    assert_attention(q, part, 0.125, 1e-5)
    assert_attention(q, make_segment(pair, torch.zeros_like(k), v), 0.125, 1e-5)
    assert_attention(q.transpose(0, 1).contiguous().transpose(0, 1), part, 0.125, 1e-5)


def test_attend_survives_large_scores():
    pair, (k, v) = PAIRS[0], (values(1, 1, 300, 64, seed=1), values(1, 1, 300, 64, seed=2))
    k[0, 0, :64] -= 20  # far below the rest, and first: the running maximum has to move
    assert_attention(values(1, 5, 64), make_segment(pair, k, v), 1.0, 1e-4)


def test_agents_that_read_in_place_answer_as_with_torch():
    model = tiny_model("llama", num_hidden_layers=2)
    ids_NT = torch.randint(300, (3, 45), generator=torch.Generator().manual_seed(0))
    ids_NT[:, :40] = ids_NT[0, :40]
    answers = []
    for backend in ("torch", "triton"):
        recipe = load_recipe("polykv")
        pool = SharedKVPool.from_cache(prefill(model, ids_NT[:1, :40]), recipe, backend)
        asked = {"attention_mask": torch.ones_like(ids_NT), "past_key_values": pool.reader(3)}
        with attend_in_place(model):
            answers.append(
                model.generate(ids_NT, max_new_tokens=3, do_sample=False, pad_token_id=0, **asked)
            )
    assert torch.equal(*answers)


@pytest.mark.slow
def test_kernels_compile_for_hopper():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("compile_triton.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # 99 KiB of shared memory is what GPUs of every kind have since Ampere.
    sizes = [int(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(sizes) >= 10 and max(sizes) <= 99 * 1024
