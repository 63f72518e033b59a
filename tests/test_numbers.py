"""Numbers at the edge: the rule of polykv/codecs/base.py, in every codec, recipe and backend."""

import math
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from conftest import TEXT, checked_cell, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import sampled, slow
from test_codecs import CODECS, RECIPES, gaussian, of_each_class, of_each_pair

import polykv
from polykv import kernels
from polykv.attention.cascade import attend_in_place
from polykv.attention.prefix import attend_prefix
from polykv.codecs.centred import Centred
from polykv.codecs.fibquant import FibQuant
from polykv.codecs.int8 import Int8
from polykv.codecs.kvarn import HIGHEST_LOG, KVarN
from polykv.codecs.q8_0 import Q8_0
from polykv.codecs.trellis import TrellisKey, TrellisValue
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.codecs.turboquant_log import TurboQuantLog
from polykv.codecs.turboquant_variants import TurboQuantNC, TurboQuantOutlier, TurboQuantProd
from polykv.codecs.waterfill import WaterfillKey
from polykv.errors import PolyKVError
from polykv.handoff.mixed import MixedCodec
from polykv.pool import SharedKVPool
from polykv.recipe import Exempt, Recipe
from polykv.segment import Segment


def available_backends():
    """torch, and those of the kernels that can be had here."""
    found = []
    for name in kernels.BACKENDS:
        with suppress(PolyKVError):
            found.append(kernels.pick_backend(name, torch.device("cpu")))
    return found


BACKENDS = available_backends()
N_TOKENS = 5
OVERFLOW = 65520.0  # rounds to infinity in fp16, and what is below does not
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALLEST_NORMAL = 2.0**-14  # in fp16
every_recipe = pytest.mark.parametrize("name", of_each_pair([path.stem for path in RECIPES]))
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, interpreting


def with_value(value, dtype=torch.float32, rest=0.0, dim=64):
    """(1, 2, N_TOKENS, dim) of `rest`, with one value in head 1, token 2."""
    x = torch.full((1, 2, N_TOKENS, dim), rest)
    x[0, 1, 2, 7] = value
    return x.to(dtype)


def outcomes(codec, x):
    """What every backend makes of `x`: decoded (B, H, T, D) in fp64, or the words of its refusal."""
    found = {}
    for backend in BACKENDS:
        try:
            packed = kernels.encode(codec, x, backend)
        except PolyKVError as error:
            found[backend] = str(error)
            continue
        decoded = codec.decode(packed)
        assert decoded.isfinite().all()
        assert kernels.decode_rotated(codec, packed, backend).isfinite().all()
        found[backend] = decoded.double()
    return found


def assert_agree(codec, x):
    """All backends refuse in the same words, or decode to the same but for rounding; gives the torch path's."""
    found = outcomes(codec, x)
    truth = found["torch"]
    for backend, other in found.items():
        if isinstance(truth, str) or isinstance(other, str):
            assert other == truth, backend
        else:
            # A norm may round to its neighbour, which among subnormals is far.
            atol = 2**-24 + 1e-6 * float(truth.abs().max())
            pair = (other, truth)
            if isinstance(codec, TrellisKey | TrellisValue):  # many codes of a lone value err alike
                pair = tuple((decoded - x).square().sum().sqrt() for decoded in pair)
            torch.testing.assert_close(*pair, rtol=2e-3, atol=atol, msg=backend)
    return truth


# Codecs


def overflowing_spike(codec):
    """The least lone value among zeros (head_dim 64) whose scale or norm leaves fp16; None where none does."""
    norms = TurboQuantMSE | TurboQuantNC | TurboQuantProd | TurboQuantOutlier | FibQuant
    if isinstance(codec, norms):
        return OVERFLOW
    if isinstance(codec, KVarN):  # of a minimum, under the largest scale, after the rotation
        return OVERFLOW * 8 * float(torch.tensor(HIGHEST_LOG).exp().half())
    if isinstance(codec, TurboQuantLog):
        return OVERFLOW * 8  # of its RMS
    if isinstance(codec, WaterfillKey):
        return OVERFLOW * N_TOKENS  # of its mean
    if isinstance(codec, Centred):
        return OVERFLOW * N_TOKENS / (N_TOKENS - 1)
    inner = getattr(codec, "codec", codec)
    spread = 8 if inner is not codec else 1  # a rotation spreads it over 64 channels
    per_step = {"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q8_0": 127}
    if type(inner).__name__ in per_step:
        return OVERFLOW * per_step[type(inner).__name__] * spread
    if type(inner).__name__ == "Uniform":
        steps = 2**inner.bits - 1
        return OVERFLOW * (steps / 2 if inner.symmetric else steps) * spread
    if type(inner).__name__ == "KiviKey":
        return OVERFLOW * (2**inner.bits - 1)
    if type(inner).__name__ == "Identity":
        return OVERFLOW if inner.dtype == "float16" else None
    if type(inner).__name__ == "Int8" and inner.granularity == "token":
        return OVERFLOW * 127
    return None


CARD_CODECS = [MixedCodec().codec(tier) for tier in range(3)]
ALL = CODECS | {repr(codec): codec for codec in CARD_CODECS}
every_quantizer = pytest.mark.parametrize("codec", of_each_class(ALL))


@every_quantizer
def test_what_overflows_fp16_is_refused_and_nothing_below_is(codec):
    limit = overflowing_spike(codec)
    if limit is None:
        for dtype in (torch.float32, torch.bfloat16):
            x = with_value(3e38, dtype)
            assert torch.isclose(assert_agree(codec, x).max(), x.double().max(), rtol=1e-5)
        return
    below = assert_agree(codec, with_value(limit * (1 - 1e-3)))
    # Published codebooks clip a lone value (TurboQuant's reach 1 of it at 2 bits: 0.4529); none vanishes.
    assert below[0, 1, 2, 7] == below.abs().max() > 0.4 * limit
    refusal = assert_agree(codec, with_value(limit * (1 + 1e-3)))
    assert f"values up to {limit * (1 + 1e-3):.5g} overflow fp16" in refusal
    assert "; use recipe=full" in refusal


@every_quantizer
@pytest.mark.parametrize("shift", [0, *slow(1, 2)])
def test_what_is_not_finite_is_refused_alike(codec, shift):
    values = ((math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "infinite"))
    for place, dtype in enumerate(DTYPES):  # each with a value of its own
        value, name = values[(place + shift) % len(values)]
        refusal = assert_agree(codec, with_value(value, dtype, rest=1.0))
        assert name in refusal and "token 2" in refusal


@every_quantizer
def test_zeros_constants_equal_tokens_and_one_token(codec):
    for x in (torch.zeros(1, 2, 5, 64), -torch.zeros(1, 2, 5, 64)):
        assert (assert_agree(codec, x) == 0).all()
    assert_agree(codec, gaussian(1, 2, 1, 64).expand(1, 2, 5, 64))
    assert_agree(codec, gaussian(1, 2, 1, 64))
    constant = torch.full((1, 2, 5, 64), -3.25)
    if isinstance(codec, TurboQuantMSE):  # whose rotation leaves exact ties
        assert all(isinstance(found, torch.Tensor) for found in outcomes(codec, constant).values())
    else:
        assert isinstance(assert_agree(codec, constant), torch.Tensor)


@pytest.mark.slow
@every_quantizer
@pytest.mark.parametrize(
    "dims", [(1, 3, 48, 576), pytest.param((2, 24, 112, 192, 256), marks=pytest.mark.slow)], ids=str
)
def test_any_head_dim(codec, dims):
    for dim in dims:
        x = gaussian(1, 2, 5, dim)
        if isinstance(codec, TurboQuantOutlier) and dim == 1:
            with pytest.raises(PolyKVError, match="head_dim is 1; choose"):
                codec.encode(x)
            continue
        assert_agree(codec, x)
        assert codec.encode(x).nbytes == codec.stored_bytes((1, 2, 5, dim), x.dtype)


@every_quantizer
@pytest.mark.parametrize(
    ("magnitudes", "dtype"),
    [((1e-6, 3e-8, 1e-38), torch.bfloat16), *slow(((1e-7, 1e-20, 1e-45), torch.float16))],
    ids=["some", "others"],
)
def test_scales_below_fp16_round_to_its_grid_or_vanish(codec, magnitudes, dtype):
    x = gaussian(1, 2, 9, 64)
    own = float((assert_agree(codec, x) - x.double()).abs().max())
    grid = (
        2 ** min(math.ceil(codec.payload_bits(x.dtype)), 8) + 1
    ) * 2**-25  # levels, and a minimum
    if isinstance(codec, KVarN):
        grid *= (
            8  # a step that vanishes leaves errors of one sign, which the rotation of 64 adds up
        )
    assert grid < 1e-5
    for magnitude in magnitudes:
        small = x * magnitude
        error = float((assert_agree(codec, small) - small.double()).abs().max())
        vanished = float(small.abs().max()) if magnitude < 1e-10 else grid
        assert error <= 1.01 * own * magnitude + min(grid, vanished)
    assert_agree(codec, (x * 1e-7).to(dtype))


@every_quantizer
@settings(max_examples=8, deadline=None)
@given(exponent=st.integers(-6, 6), seed=st.integers(0, 99))
def test_a_power_of_two_changes_no_code(codec, exponent, seed):
    if isinstance(codec, KVarN):
        return  # whose bounds on scales are absolute
    x = gaussian(1, 2, 40, 64, seed=seed)
    if isinstance(codec, TrellisKey):
        x += 1  # its codes depend on every bit of the mean, which has to stay normal in fp16
    for backend in BACKENDS[:2]:
        one = kernels.encode(codec, x, backend)
        other = kernels.encode(codec, x * 2.0**exponent, backend)
        for name, tensor in one.tensors.items():
            if not tensor.is_floating_point():
                assert torch.equal(tensor, other.tensors[name])
            elif tensor.dtype == torch.float32 or tensor.abs().min() * 2**-6 > SMALLEST_NORMAL:
                # WaterfillKey's scale is relative to the head, its largest RMS to that of the blocks.
                relative = isinstance(codec, WaterfillKey) and name in ("scale", "largest")
                factor = 1.0 if relative else 2.0**exponent
                assert torch.equal(tensor * factor, other.tensors[name])


@st.composite
def edge_tensors(draw):
    """Rows of magnitudes of their own, with a few single values from all over fp32."""
    n_tokens, dim = draw(st.integers(1, 20)), draw(st.sampled_from((16, 64, 80)))
    magnitudes = st.sampled_from((0.0, 1e-42, 1e-9, 1e-6, 1e-3, 1.0, 300.0, 5e3, 6e4, 1e6))
    rows = torch.tensor(draw(st.lists(magnitudes, min_size=n_tokens, max_size=n_tokens)))
    x = gaussian(1, 2, n_tokens, dim, seed=draw(st.integers(0, 99))) * rows[:, None]
    for value in draw(st.lists(st.floats(width=32), max_size=2)):
        x[0, 0, draw(st.integers(0, n_tokens - 1)), draw(st.integers(0, dim - 1))] = value
    return x.to(draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))))


WITH_KERNELS = [Int8(), Int8("token"), Q8_0(), TurboQuantMSE(3), TurboQuantMSE(2, signs=False)]


@settings(max_examples=30, deadline=None)
@given(x=edge_tensors(), codec=st.sampled_from(WITH_KERNELS))
def test_backends_refuse_the_same_tensors(x, codec):
    found = outcomes(codec, x)  # and what they take, they decode to finite values
    refusals = {name: got for name, got in found.items() if isinstance(got, str)}
    if refusals and "overflow" in next(iter(refusals.values())):
        norms = torch.linalg.vector_norm(x.double(), dim=-1).amax()
        if isinstance(codec, TurboQuantMSE) and abs(norms / OVERFLOW - 1) < 1e-6:
            return  # another order of summation may round across
    assert len(refusals) in (0, len(BACKENDS)) and len(set(refusals.values())) <= 1


# Attention


def attended(q_HQD, segment, backend):
    return attend_prefix(q_HQD, [segment], q_HQD.shape[-1] ** -0.5, backend)


EDGES = ("key near fp16's end", "value near it", "tiny", "zeros")
KEY_CODECS = (Int8(), Int8("token"), Q8_0(), TurboQuantMSE(3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edge", "key_codec", "dtype"), sampled(EDGES, KEY_CODECS, DTYPES), ids=str
)
def test_backends_attend_alike_at_the_edge(key_codec, edge, dtype):
    k, v, q = gaussian(1, 2, 70, 64), gaussian(1, 2, 70, 64, seed=1), gaussian(2, 9, 64, seed=2)
    if edge == "tiny":
        k, v = k * 1e-6, v * 1e-6
    elif edge == "zeros":
        k, v = k * 0, v * 0
    else:
        (k if "key" in edge else v)[..., 3, 5] = 65504
    value_codec = TurboQuantMSE(3)
    segment = Segment(key_codec, value_codec, key_codec.encode(k), value_codec.encode(v))
    keys, values = (
        codec.decode(replace(packed, dtype=torch.float32))[0].double()
        for codec, packed in ((key_codec, segment.key), (value_codec, segment.value))
    )
    q = q.to(dtype)
    expected = (q.double() @ keys.mT / 8).softmax(dim=-1) @ values
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for backend in BACKENDS:
        out, lse = attended(q, segment, backend)
        assert lse.isfinite().all() and out.isfinite().all()
        if "key" in edge and dtype != torch.float32 and isinstance(key_codec, TurboQuantMSE):
            continue  # scores of 1e4, and Triton rounds the rotated queries to 16 bits
        atol = tolerance * float(values.abs().max())
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol, msg=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_query_gives_nan_and_no_number(backend):
    """fp16 queries that overflow in the rotated domain too: a number would be a wrong one."""
    codec = TurboQuantMSE(3)
    segment = Segment(codec, codec, *(codec.encode(gaussian(1, 1, 70, 64, seed=s)) for s in (0, 1)))
    q = gaussian(1, 3, 64)
    q[0, 1, 4] = math.nan
    out, lse = attended(q, segment, backend)
    assert out[0, 1].isnan().all() and lse[0, 1].isnan() and out[0, ::2].isfinite().all()
    long = torch.full((1, 3, 64), 6e4).half()
    truth, (out, _) = attended(long, segment, "torch")[0], attended(long, segment, backend)
    assert out.isnan().all() or torch.allclose(out, truth, atol=1e-2)


def test_in_place_reading_saturates_as_injecting_does(tokenizer):
    """An fp16 value near the end of fp16 decodes beyond it: neither reader may turn that into infinity."""
    model = tiny_model("llama").half()
    layers_ = [
        (gaussian(1, 2, 6, 8).half(), torch.full((1, 2, 6, 8), 6e4).half()) for _ in range(4)
    ]
    for _, values in layers_:
        values[..., 1:] = 0
    recipe = Recipe("test", Int8("token"), TurboQuantNC(3))
    pool = SharedKVPool.from_layers(layers_, recipe)
    assert pool.decode_layer(0)[1].isfinite().all()
    query = torch.randn(1, 4, 3, 8).half()
    cache = pool.reader(1)
    key, value = cache.update(*(torch.zeros(1, 2, 3, 8).half() for _ in "kv"), layer_idx=0)
    from polykv.attention.cascade import cascade_attention

    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    with torch.no_grad(), attend_in_place(model):
        out, _ = cascade_attention(model, query, key, value, mask)
    assert out.isfinite().all() and out.abs().max() > 1e4


# Recipes and pools


def model_layers(n_layers=4, n_tokens=150, dtype=torch.float32):
    return [
        tuple(gaussian(1, 2, n_tokens, 64, seed=2 * i + j).to(dtype) for j in range(2))
        for i in range(n_layers)
    ]


@every_recipe
@pytest.mark.parametrize("side", ["keys", "values"])
def test_a_pool_names_layer_and_side(name, side):
    recipe, found = polykv.load_recipe(name), model_layers()
    found[2][side == "values"][0, 1, 70, 3] = math.nan
    for backend in BACKENDS[:2]:
        with pytest.raises(PolyKVError, match=f"^layer 2: {side}: cannot encode NaN .*token 70"):
            SharedKVPool.from_layers(found, recipe, backend=backend)


def test_an_exempt_run_says_which_tokens_it_is_of():
    recipe = Recipe("test", Int8(), Int8(), Exempt(sinks=4, recent=10))
    found = model_layers(dtype=torch.bfloat16)
    found[1][0][0, 0, 145, 0] = 1e5
    words = "layer 1: keys: tokens 140 to 149: values up to 99840 overflow fp16"
    with pytest.raises(PolyKVError, match=words):
        SharedKVPool.from_layers(found, recipe)


@every_recipe
def test_outliers_of_a_bf16_model_are_kept_or_refused_never_clipped(name):
    recipe = polykv.load_recipe(name)
    token = -1 if recipe.keep else 70  # the last one is never dropped
    for size in (300.0, 4e3, 9e4, 1e30):
        found = model_layers(dtype=torch.bfloat16)
        found[2][0][..., token, 9] = size
        try:
            keys, _ = SharedKVPool.from_layers(found, recipe).decode_layer(2)
        except PolyKVError as error:
            assert "overflow fp16" in str(error) and "; use recipe=full" in str(error)
            assert size > 65504
            continue
        assert keys.isfinite().all()
        # At the coarsest, TurboQuant at 2 bits, a lone value keeps 0.45 of its size; a norm is never cut.
        assert keys[..., token, 9].float().min() > 0.4 * size


@every_recipe
def test_pools_of_zeros_and_of_one_token(name):
    recipe = polykv.load_recipe(name)
    zeros = [(torch.zeros(1, 2, 9, 64), torch.zeros(1, 2, 9, 64)) for _ in range(4)]
    assert all((x == 0).all() for x in SharedKVPool.from_layers(zeros, recipe).decode_layer(1))
    assert SharedKVPool.from_layers(model_layers(n_tokens=1), recipe).n_tokens == 1


# Documents and answers


def test_a_document_of_one_token_is_a_pool_and_an_empty_one_an_error(llama, tokenizer):
    recipe = polykv.load_recipe("polykv")
    assert len(tokenizer("A").input_ids) == 1
    pool = SharedKVPool.from_text(llama, tokenizer, "A", recipe)
    answers = {
        reader: pool.ask(llama, tokenizer, ["is", "a"], 5, reader)
        for reader in ("dequantize", "in_place")
    }
    assert answers["dequantize"] == answers["in_place"]
    with pytest.raises(PolyKVError, match="document is empty; give"):
        SharedKVPool.from_text(llama, tokenizer, "", recipe)
    with pytest.raises(PolyKVError, match="max_new_tokens=0"):
        pool.ask(llama, tokenizer, ["is"], max_new_tokens=0)


def test_a_model_that_computes_nan_is_named_by_its_first_layer(tokenizer):
    model = tiny_model("llama")
    model.model.layers[1].self_attn.v_proj.weight[3, 3] = math.inf
    with pytest.raises(PolyKVError, match="^layer 1: values: cannot encode"):
        SharedKVPool.from_text(model, tokenizer, TEXT[:100], polykv.load_recipe("full"))


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("", "is empty; give a file with text"),
        (" \n", "is empty"),
        ("A", "leaves 0 tokens to prefill"),
    ],
)
def test_a_run_refuses_documents_without_room(tmp_path, checkpoint, text, refusal):
    (tmp_path / "text.txt").write_text(text)
    document = ["document=file", f"document.path={tmp_path / 'text.txt'}"]
    model = ["model=local", f"model.path={checkpoint}"]
    with pytest.raises(PolyKVError, match=refusal):
        checked_cell("experiment=polykv_quality", *document, *model, "context=null", "n_agents=1")
