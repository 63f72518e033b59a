"""WaterfillKey, TurboQuantLog and Centred: against an independent computation, to the byte, and in place."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import TEXT, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import polykv
from polykv import kernels
from polykv.attention.cascade import attend_in_place
from polykv.attention.prefix import attend_prefix
from polykv.codecs.base import FP16_MAX
from polykv.codecs.centred import Centred
from polykv.codecs.codebook import lloyd_max
from polykv.codecs.context import NOTHING, LayerContext, Rope
from polykv.codecs.rotation import hadamard, random_signs
from polykv.codecs.trellis import TrellisKey, TrellisValue
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.codecs.turboquant_log import TurboQuantLog
from polykv.codecs.waterfill import WaterfillKey
from polykv.errors import PolyKVError
from polykv.kernels import cpu
from polykv.pool import SharedKVPool
from polykv.prefill import prefill
from polykv.segment import Segment

BITS = {
    "waterfill_5": (5, 5),
    "waterfill_4": (4, 4),
    "waterfill_k4v3": (4, 3),
    "waterfill_3": (3, 3),
    "trellis_4": (4, 4),
    "trellis_3": (3, 3),
}
RECIPES = (*BITS, "mean_before_rope_4bit", "mean_after_rope_4bit")
EXTENDED = (WaterfillKey(4), TurboQuantLog(4), Centred(), TurboQuantMSE(4))


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rope_of(n_tokens, dim, first=4):
    """Halves of a head that turn by theta = 100 from token `first` on."""
    angles_P = 100.0 ** -(torch.arange(dim // 2) / (dim // 2))
    angles_TP = torch.arange(first, first + n_tokens).unsqueeze(1) * angles_P
    half = torch.arange(dim // 2)
    return Rope(angles_TP.cos(), angles_TP.sin(), half, half + dim // 2)


def biased_keys(heads, n_tokens, dim, seed=0, bias=20):
    """(keys, context): channels of unequal spread around a bias that RoPE turns, and unequal queries."""
    rope = rope_of(n_tokens, dim)
    spread_HD = gaussian(heads, 1, dim, seed=seed).exp()
    before = gaussian(1, heads, n_tokens, dim, seed=seed + 1) * spread_HD
    before += bias * gaussian(1, heads, 1, dim, seed=seed + 2)
    query_rms = gaussian(1, heads, 1, dim, seed=seed + 3).abs() + 0.1
    return rope.turn(before), LayerContext(rope, query_rms)


# The definition once more, head by head and value by value, without the package's own steps.


def rotated(vector, rope, token, back=False):
    out = vector.clone()
    half, sign = len(vector) // 2, -1 if back else 1
    for i in range(half):
        c, s = rope.cos_TP[token, i], sign * rope.sin_TP[token, i]
        out[i] = vector[i] * c - vector[i + half] * s
        out[i + half] = vector[i + half] * c + vector[i] * s
    return out


def nearest(values, bits):
    levels = torch.tensor(lloyd_max(bits).levels)
    return levels[(values.unsqueeze(-1) - levels).abs().argmin(-1)]


def log_rms(rms_T):
    largest = rms_T.max().half().float()
    return largest * 2 ** ((24 * (rms_T / largest).log2()).round() / 24)


def expected_keys(k_HTD, context, bits):
    heads, n_tokens, dim = k_HTD.shape
    n_blocks = dim // 16
    half, importance, parts = dim // 2, {}, []
    for h in range(heads):
        undone = torch.stack(
            [rotated(k_HTD[h, t], context.rope, t, back=True) for t in range(n_tokens)]
        )
        mean = undone.double().mean(0).half().float()
        means = torch.stack([rotated(mean, context.rope, t) for t in range(n_tokens)])
        rest = k_HTD[h] - means
        sigma = rest.square().mean(0).sqrt()
        square = context.query_rms[0, h, 0] ** 2
        w = ((square + square.roll(half)) / 2).sqrt()
        level = w.mean()
        w = w / level
        scale = (w / (sigma / sigma.mean())).sqrt().half().float()
        order = (w * sigma).argsort(descending=True)
        y = (rest * scale)[:, order].unflatten(1, (n_blocks, 16))
        rms = y.square().mean((0, 2)).sqrt()
        w_rms = (w / scale)[order].view(n_blocks, 16).square().mean(1).sqrt()
        for j in range(n_blocks):
            importance[h, j] = float((rms[j] * w_rms[j] * level).log2())
        parts.append((means, scale, order, y, rms.half().float()))
    widths = dict.fromkeys(importance, 1)
    for _ in range(round(bits * len(widths)) - len(widths)):
        open_ = [block for block in widths if widths[block] < (7 if bits >= 4.5 else 6)]
        widths[max(open_, key=lambda block: 2 * importance[block] - 2 * widths[block])] += 1
    matrix = random_signs(16, 0).unsqueeze(1) * hadamard(16)
    out = torch.empty_like(k_HTD)
    for h, (means, scale, order, y, rms) in enumerate(parts):
        white = y @ matrix / rms.unsqueeze(1)
        token = log_rms(white.square().mean((1, 2)).sqrt()).view(-1, 1)
        blocks = [nearest(white[:, j] / token, widths[h, j]) * token for j in range(n_blocks)]
        back = (torch.stack(blocks, 1) * rms.unsqueeze(1) @ matrix.T).flatten(1)
        out[h] = means + torch.empty_like(back).index_copy_(1, order, back) / scale
    return out, widths


@pytest.mark.parametrize("bits", [1, 2.5, 4, 5])
@pytest.mark.parametrize("dim", [32, 64])
def test_keys_are_those_of_the_definition(bits, dim):
    k, context = biased_keys(3, 40, dim)
    codec = WaterfillKey(bits)
    packed = codec.encode(k, context)
    expected, widths = expected_keys(k[0], context, bits)
    kept = packed.tensors["widths"].int()
    nibbles = torch.stack([kept & 15, kept >> 4], -1).flatten(-2)[0, :, 0, : dim // 16]
    assert nibbles.flatten().tolist() == list(widths.values())
    error = (codec.decode(packed)[0] - expected).abs()
    # A value within rounding of a boundary may take the next level.
    assert (error < 1e-4).float().mean() > 0.999


def test_values_are_those_of_the_definition():
    v, codec = gaussian(1, 2, 50, 64), TurboQuantLog(4)
    matrix = random_signs(64, 0).unsqueeze(1) * hadamard(64)
    for h in range(2):
        rms = log_rms(v[0, h].square().mean(1).sqrt()).unsqueeze(1)
        expected = nearest(v[0, h] @ matrix / rms, 4) * rms @ matrix.T
        error = (codec.decode(codec.encode(v))[0, h] - expected).abs()
        assert (error < 1e-5).float().mean() > 0.999


def test_the_mean_before_rope_takes_off_what_a_bias_adds():
    k, context = biased_keys(2, 64, 32)
    error = {}
    for codec in (TurboQuantMSE(4), Centred(before_rope=False), Centred(), WaterfillKey(4)):
        decoded = codec.decode(codec.encode(k, context))
        error[codec] = float((decoded - k).square().mean())
    plain, after, before, waterfill = error.values()
    assert plain > after > 5 * before and before > waterfill / 2


def test_queries_that_do_not_look_at_a_channel_take_its_bits():
    k, context = gaussian(1, 1, 200, 32), LayerContext(query_rms=torch.ones(1, 1, 1, 32))
    context.query_rms[..., 16:] = 0.01
    codec = WaterfillKey(3)
    error = (codec.decode(codec.encode(k, context)) - k).square().mean((0, 1, 2))
    assert error[:16].mean() < error[16:].mean() / 100


# Options that leave a part out

PARTS = ("centred", "before_rope", "queries")


def test_a_codec_that_does_not_ask_encodes_as_one_that_is_not_told():
    k, context = biased_keys(2, 64, 32)
    for option, unknown in (("before_rope", "rope"), ("queries", "query_rms")):
        blind = WaterfillKey(3, **{option: False})
        expected = WaterfillKey(3).encode(k, replace(context, **{unknown: None}))
        found = blind.encode(k, context)
        assert all(torch.equal(found.tensors[n], t) for n, t in expected.tensors.items())
        assert torch.equal(blind.decode(found), WaterfillKey(3).decode(expected))


def test_without_centring_the_mean_is_zero_and_a_bias_costs():
    k, context = biased_keys(2, 64, 32)
    found = WaterfillKey(4, centred=False).encode(k, context)
    assert not found.tensors["mean"].any()
    errors = [
        (codec.decode(codec.encode(k, context)) - k).square().mean()
        for codec in (WaterfillKey(4, centred=False), WaterfillKey(4))
    ]
    assert errors[0] > 5 * errors[1]


@pytest.mark.parametrize(("bits", "expected"), [(4, [4] * 4), (2.5, [3, 3, 2, 2])])
def test_equal_widths_spend_as_many_bits(bits, expected):
    k, context = biased_keys(2, 40, 32)
    codec = WaterfillKey(bits, equal_widths=True)
    packed = codec.encode(k, context)
    kept = packed.tensors["widths"].int().flatten()
    assert torch.stack([kept & 15, kept >> 4], -1).flatten().tolist() == expected
    assert packed.nbytes == WaterfillKey(bits).stored_bytes(packed.shape, k.dtype)


@pytest.mark.parametrize("option", PARTS)
def test_the_cpu_kernel_leaves_out_the_same_parts(option):
    x, context = biased_keys(3, 300, 64, bias=3)
    assert_same_format(WaterfillKey(4, **{option: False}), x, context)
    assert_same_format(WaterfillKey(2.5, equal_widths=True), x, context)


# Bytes


def stored(name, head_dim, n_tokens, heads=2):
    recipe = polykv.load_recipe(name)
    x = gaussian(1, heads, n_tokens, head_dim)
    segments = recipe.encode_layer(x, x, 0, 1)
    return [sum(getattr(s, side).nbytes for s in segments) for side in ("key", "value")]


@pytest.mark.parametrize(("name", "bits"), BITS.items())
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_stored_bits_are_the_recipes_formula(name, bits, dim):
    n_tokens, heads = 300, 2
    for side, b, shared in zip((0, 1), bits, (41.25 + 16 / dim, 16 / dim), strict=True):
        per_value = (b + 8 / dim) * (1 - 4 / n_tokens) + 64 / n_tokens + shared / n_tokens
        found = stored(name, dim, n_tokens, heads)[side]
        assert 8 * found == pytest.approx(per_value * heads * n_tokens * dim, abs=1e-6)


def test_waterfill_4_is_4_22_bits_at_the_studys_length():
    keys, values = stored("waterfill_4", 64, 717)
    assert 8 * (keys + values) / (2 * 2 * 717 * 64) == pytest.approx(4.2204, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (2, 5, 40)), st.sampled_from([1, 8, 16, 20, 33, 64, 80])),
    bits=st.floats(1, 7),
    size=st.sampled_from([1e-6, 1.0, 1e3]),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_any_shape_and_width_round_trips_at_its_bytes(shape, bits, size, seed):
    x, codec = gaussian(*shape, seed=seed) * size, WaterfillKey(bits)
    packed = codec.encode(x)
    assert packed.nbytes == codec.stored_bytes(shape, x.dtype)
    y = codec.decode(packed)
    assert y.shape == shape and y.isfinite().all()
    q = gaussian(shape[0], shape[1], 3, shape[3])
    scores = codec.scores(codec.rotate(q, packed.tensors), packed)
    torch.testing.assert_close(scores, q @ y.mT, rtol=1e-4, atol=1e-4 * size)


@pytest.mark.parametrize("bits", [0.9, 7.1])
def test_widths_that_no_block_has_are_refused(bits):
    with pytest.raises(PolyKVError, match=f"bits={bits}"):
        WaterfillKey(bits)


def test_centred_takes_codecs_without_shared_statistics():
    with pytest.raises(PolyKVError, match="cannot wrap WaterfillKey"):
        Centred(WaterfillKey())


def test_a_mean_beyond_fp16_is_refused():
    with pytest.raises(PolyKVError, match="overflow fp16, in which WaterfillKey stores its mean"):
        WaterfillKey().encode(torch.full((1, 1, 4, 32), 2.0 * FP16_MAX))


# Tokens that are added later


@pytest.mark.parametrize("codec", EXTENDED, ids=repr)
def test_added_tokens_use_the_statistics_of_the_first(codec):
    k, context = biased_keys(2, 90, 32)
    first = codec.encode(k[:, :, :60], context.narrow(0, 60))
    both = codec.extend(first, k[:, :, 60:], context.narrow(60, 90))
    assert both.shape == k.shape and both.nbytes == codec.stored_bytes(k.shape, k.dtype)
    for name, tensor in first.tensors.items():
        assert torch.equal(both.narrow(0, 60).tensors[name], tensor)
    decoded = codec.decode(both)
    torch.testing.assert_close(decoded[:, :, :60], codec.decode(first))
    later = (decoded[:, :, 60:] - k[:, :, 60:]).square().mean()
    assert later < 2 * (decoded[:, :, :60] - k[:, :, :60]).square().mean()


def test_longer_tokens_may_be_added_up_to_four_times_the_longest():
    v, codec = gaussian(1, 1, 30, 64), TurboQuantLog(5)
    packed = codec.extend(codec.encode(v), 3 * v)
    torch.testing.assert_close(codec.decode(packed)[:, :, 30:], 3 * v, rtol=0, atol=1.0)
    # Beyond that they are clipped.
    clipped = codec.decode(codec.extend(codec.encode(v), 1e3 * v))[:, :, 30:]
    assert clipped.square().mean() < 1e-3 * (1e3 * v).square().mean()


def test_a_context_of_other_tokens_is_refused():
    k, context = biased_keys(2, 60, 32)
    codec = WaterfillKey(4)
    for encode in (codec.encode, lambda x, known: kernels.encode(codec, x, "cpu", known)):
        with pytest.raises(PolyKVError, match="RoPE of 60 tokens, and the tensor 59"):
            encode(k[:, :, 1:], context)
    first = codec.encode(k[:, :, :50], context.narrow(0, 50))
    with pytest.raises(PolyKVError, match="give the context"):
        codec.extend(first, k[:, :, 50:])
    with pytest.raises(PolyKVError, match="RoPE of 60 tokens, and the tensor 10"):
        codec.extend(first, k[:, :, 50:], context)
    without = codec.encode(k[:, :, :50])
    assert codec.extend(without, k[:, :, 50:], context.narrow(50, 60)).context.rope is None


def test_tokens_are_not_added_inside_a_group():
    from polykv.codecs.kivi import KiviKey

    codec = KiviKey(4, group=8)
    with pytest.raises(PolyKVError, match="groups of 8"):
        codec.extend(codec.encode(gaussian(1, 1, 12, 16)), gaussian(1, 1, 4, 16))
    whole = codec.extend(codec.encode(gaussian(1, 1, 8, 16)), gaussian(1, 1, 12, 16, seed=1))
    assert whole.nbytes == codec.stored_bytes((1, 1, 20, 16), torch.float32)


# The CPU kernel's encoder


def assert_same_format(codec, x, context=NOTHING):
    """The torch path's tensors, but for codes of values within rounding of a boundary."""
    ours, truth, off = cpu.encode(codec, x, context), codec.encode(x, context), {}
    assert (ours.shape, ours.dtype, ours.context) == (truth.shape, truth.dtype, truth.context)
    assert list(ours.tensors) == list(truth.tensors)
    for name, expected in truth.tensors.items():
        found = ours.tensors[name]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        off[name] = float((found != expected).float().mean())
        if found.is_floating_point():
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6, msg=name)
    # Sums in another order may round a statistic to its neighbour in fp16, and then codes change with it.
    rounded = any(off.get(name, 0) for name in ("mean", "scale", "block_rms", "largest"))
    few = 1e-2 if isinstance(codec, TrellisKey | TrellisValue) else 1e-3  # a block changes at once
    assert max(off["codes"], off["norm"]) <= (0.05 if rounded else few)
    assert all(share < 0.02 for name, share in off.items() if name not in ("codes", "largest"))
    decoded = [codec.decode(one) for one in (ours, truth)]
    if isinstance(codec, TrellisKey | TrellisValue):
        errors = [(one.float() - x).square().mean() for one in decoded]
        torch.testing.assert_close(*errors, rtol=0.02, atol=1e-6)
    else:
        torch.testing.assert_close(*decoded, rtol=0.3, atol=0.3)


@pytest.mark.parametrize(
    "dim", [16, 64, 80, *(pytest.param(n, marks=pytest.mark.slow) for n in (128, 256))]
)
def test_the_cpu_kernel_encodes_as_torch_does(dim):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, context = biased_keys(3, 300, dim, bias=3)
        for bits in (1, 2.5, 4, 5, 7):
            assert_same_format(WaterfillKey(bits), x.to(dtype), context)
        for bits in range(1, 8):
            assert_same_format(TurboQuantLog(bits), x.to(dtype))
    for bits in (1, 2.5, 4):
        assert_same_format(TrellisKey(bits), x, context)
    for bits in range(1, 7):
        assert_same_format(TrellisValue(bits), x[:, :, :40])


def test_the_cpu_kernel_encodes_batches_layouts_and_other_ropes():
    x = gaussian(2, 40, 6, 64).transpose(1, 2)
    assert_same_format(WaterfillKey(4), x)
    assert_same_format(WaterfillKey(4), x, LayerContext(query_rms=gaussian(2, 6, 1, 64).abs()))
    assert_same_format(TurboQuantLog(3), x[:, 1:4, 5:])
    rope, even = rope_of(40, 20), torch.arange(0, 20, 2)
    neighbours = Rope(1.1 * rope.cos_TP, 1.1 * rope.sin_TP, even, even + 1)
    assert_same_format(WaterfillKey(4), x + 2, LayerContext(neighbours))
    assert_same_format(WaterfillKey(4), x[:, :, :1])
    assert_same_format(WaterfillKey(4), torch.zeros(1, 2, 5, 32))
    assert cpu.encode(WaterfillKey(4), gaussian(1, 1, 5, 20)) is None


@pytest.mark.parametrize("codec", [WaterfillKey(4), TurboQuantLog(4)], ids=repr)
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_what_the_cpu_kernel_cannot_encode_is_left_to_torch(codec, value):
    x = gaussian(1, 2, 300, 32)
    x[0, 1, 270, 3] = value
    assert cpu.encode(codec, x) is None
    with pytest.raises(PolyKVError, match="token 270|overflow fp16"):
        kernels.encode(codec, x, "cpu")


# In place


def assert_attends(q, segments, backend, tolerance=1e-5):
    """Against attention in fp64 over the decoded tokens."""
    keys, values = (torch.cat(x, 2)[0] for x in zip(*(s.decode() for s in segments), strict=True))
    scaling = q.shape[-1] ** -0.5
    scores = q.double() @ keys.double().mT * scaling
    out, lse = attend_prefix(q, segments, scaling, backend)
    expected = scores.softmax(-1) @ values.double()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("name", RECIPES)
def test_attention_in_place_is_that_over_the_decoded_tokens(name):
    k, context = biased_keys(2, 150, 64, bias=5)
    v, q = gaussian(1, 2, 150, 64, seed=8), gaussian(2, 7, 64, seed=9)
    segments = polykv.load_recipe(name).encode_layer(k, v, 5, 9, "torch", context)
    assert_attends(q, segments, "torch")


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 128, 256])
def test_the_cpu_kernel_attends_as_torch_does(name, dim):
    k, context = biased_keys(3, 150, dim, bias=3)
    v, q = gaussian(1, 3, 150, dim, seed=8), gaussian(3, 19, dim, seed=9)
    for known in (context, LayerContext()):
        segments = polykv.load_recipe(name).encode_layer(k, v, 5, 9, "cpu", known)
        assert cpu.attend(q, segments[1], 0.1) is not None
        assert_attends(q, segments, "cpu", 3e-5)


@pytest.mark.parametrize(
    "codecs",
    [
        *((WaterfillKey(bits), TurboQuantLog(bits)) for bits in range(1, 8)),
        *((TrellisKey(bits), TrellisValue(bits)) for bits in range(1, 7)),
    ],
    ids=repr,
)
def test_the_cpu_kernel_reads_every_width(codecs):
    v, q = gaussian(1, 2, 70, 48), gaussian(2, 5, 48, seed=1)
    segment = Segment(*codecs, *(codec.encode(v) for codec in codecs))
    assert cpu.attend(q, segment, 0.1) is not None
    assert_attends(q, [segment], "cpu")


def test_the_cpu_kernel_reads_partial_rope_in_pairs_of_neighbours():
    k, v, q = gaussian(1, 2, 90, 32), gaussian(1, 2, 90, 32, seed=1), gaussian(2, 5, 32, seed=2)
    rope, even = rope_of(90, 12), torch.arange(0, 12, 2)
    rope = Rope(1.1 * rope.cos_TP, 1.1 * rope.sin_TP, even, even + 1)
    recipe = polykv.load_recipe("waterfill_4")
    segments = recipe.encode_layer(k + 2, v, 5, 9, "cpu", LayerContext(rope))
    assert cpu.attend(q, segments[1], 0.1) is not None
    assert_attends(q, segments, "cpu")


def test_the_cpu_kernel_leaves_other_pairs_and_layouts_to_torch():
    k, context = biased_keys(2, 40, 32)
    key, q = WaterfillKey(4).encode(k, context), gaussian(2, 3, 32)
    assert cpu.attend(q, Segment(WaterfillKey(4), WaterfillKey(4), key, key), 0.1) is None
    small = WaterfillKey(4).encode(gaussian(1, 2, 40, 20))
    values = TurboQuantLog(4).encode(gaussian(1, 2, 40, 20))
    segment = Segment(WaterfillKey(4), TurboQuantLog(4), small, values)
    assert cpu.attend(gaussian(2, 3, 20), segment, 0.1) is None
    assert_attends(gaussian(2, 3, 20), [segment], "cpu")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "smollm3", "gpt_neox", "gpt2"])
def test_a_model_answers_in_place_as_it_does_dequantized(architecture, tokenizer):
    model = tiny_model(architecture)
    pool = SharedKVPool.from_text(model, tokenizer, TEXT[:300], polykv.load_recipe("waterfill_4"))
    queries = [" Each agent asks", " A quantized"]
    dequantized = pool.ask(model, tokenizer, queries, 8, "dequantize")
    assert pool.ask(model, tokenizer, queries, 8, "in_place") == dequantized
    ids_BT = torch.arange(9)[None]
    with torch.no_grad():
        plain = model(input_ids=ids_BT, past_key_values=pool.dequantize()).logits
        with attend_in_place(model):
            in_place = model(input_ids=ids_BT, past_key_values=pool.reader(1)).logits
    assert (in_place - plain).abs().max() < 1e-5 * plain.abs().max()


# Quality, on the embedded model


def divergence(model, cache, rest_BT, full_TV):
    with torch.no_grad():
        logits = model(input_ids=rest_BT, past_key_values=cache).logits[0].log_softmax(-1)
    return float((full_TV.exp() * (full_TV - logits)).sum(-1).mean())


def test_tokens_added_later_cost_little_more_than_in_the_prefix():
    """256 tokens quantized with the statistics of the 150 before them."""
    from polykv.reference.documents import generate_document
    from polykv.tokens import encode

    model, tokenizer = polykv.load_model("reference", device="cpu")
    text = generate_document(tokenizer, 480, seed=3).text
    ids_BT = encode(tokenizer, text)
    first, stop = 150, 406
    cache = prefill(model, ids_BT[:, :stop])
    recipe, layers, added = polykv.load_recipe("waterfill_4"), [], []
    for index, (layer, context) in enumerate(zip(cache.layers, cache.contexts, strict=True)):
        parts = [x[:, :, :first] for x in (layer.keys, layer.values)]
        early = recipe.encode_layer(
            *parts, index, len(cache.layers), context=context.narrow(0, first)
        )
        sinks, main = early
        later = context.narrow(first, stop)
        key = main.key_codec.extend(main.key, layer.keys[:, :, first:], later)
        value = main.value_codec.extend(main.value, layer.values[:, :, first:])
        added.append([sinks, Segment(main.key_codec, main.value_codec, key, value)])
        pair = layer.keys, layer.values
        layers.append(recipe.encode_layer(*pair, index, len(cache.layers), context=context))
    rest_BT = ids_BT[:, stop:]
    with torch.no_grad():
        full = model(input_ids=rest_BT, past_key_values=cache).logits[0].log_softmax(-1)
    together, apart = (
        divergence(model, SharedKVPool(one, recipe).dequantize(), rest_BT, full)
        for one in (layers, added)
    )
    assert 0 < apart < 2 * together
    assert math.isfinite(together)
