"""The field's recipes against what their sources state: error on Gaussian data, layout, bias."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from pairwise import slow
from test_codecs import of_each_pair
from transformers.cache_utils import Fp8QuantizedLayer

from polykv.codecs.affine import affine_codes
from polykv.codecs.codebook import lloyd_max
from polykv.codecs.fp8 import Fp8
from polykv.codecs.kivi import KiviKey
from polykv.codecs.q4_0 import Q4_0
from polykv.codecs.q4_1 import Q4_1
from polykv.codecs.q5_0 import Q5_0
from polykv.codecs.rotated import Rotated
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.codecs.turboquant_variants import TurboQuantNC, TurboQuantOutlier, TurboQuantProd
from polykv.codecs.uniform import Uniform
from polykv.config import available
from polykv.errors import PolyKVError
from polykv.pool import SharedKVPool
from polykv.recipe import Recipe, load_recipe


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(codec, x):
    return float((codec.decode(codec.encode(x)) - x).square().sum() / x.square().sum())


@pytest.mark.parametrize("codec", [Q4_0(), Q4_1(), Q5_0()], ids=repr)
def test_ggml_error_is_that_of_rounding_to_its_steps(codec):
    x = gaussian(1, 4, 512, 128)
    step = codec.encode(x).tensors["scale"].float()
    assert relative_error(codec, x) == pytest.approx(float(step.square().mean()) / 12, rel=0.1)


@pytest.mark.parametrize(
    "codec",
    [Uniform(4), Uniform(4, 32, symmetric=False), Rotated(Uniform(4)), KiviKey(4)],
    ids=repr,
)
def test_uniform_and_kivi_error_is_that_of_rounding_to_their_steps(codec):
    x = gaussian(1, 4, 512, 128)
    kept = codec.encode(x).tensors
    step = kept["step" if "step" in kept else "scale"].float()
    # At the two ends of the range a value meets its level exactly, which only lowers the error.
    assert 0.8 < relative_error(codec, x) / (float(step.square().mean()) / 12) < 1.01


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_uniform_errs_by_at_most_half_a_step(bits, symmetric):
    x, codec = gaussian(1, 2, 64, 96), Uniform(bits, block=32, symmetric=symmetric)
    packed = codec.encode(x)
    step = packed.tensors["scale" if symmetric else "step"].float()
    error = (codec.decode(packed) - x).abs().unflatten(-1, (-1, 32)).amax(-1)
    # Where step or minimum was rounded down in fp16, the largest value saturates a little further out.
    assert (error <= step / 2 + x.abs().amax() * 2.0**-10).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_kivi_keys_by_hand(bits):
    # Two channels, 5 tokens in groups of 4: the last group holds one token and is exact.
    x = torch.tensor([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0], [3.0, 5.0], [7.0, -1.0]])
    packed = KiviKey(bits, group=4).encode(x.view(1, 1, 5, 2))
    assert packed.tensors["minimum"].view(2, 2).tolist() == [[0, 5], [7, -1]]
    top = 2**bits - 1
    step = torch.tensor([[3 / top, 0], [0, 0]]).half()
    assert torch.equal(packed.tensors["step"].view(2, 2), step)
    decoded = KiviKey(bits, group=4).decode(packed).view(5, 2)
    assert decoded[:, 1].tolist() == x[:, 1].tolist() and decoded[4, 0] == 7
    assert ((decoded - x).abs() <= 1.5 / top + 0.01).all()


def test_kivi_keys_do_not_mind_a_channel_that_is_far_off():
    """Why keys are quantized per channel: outlier channels (KIVI, section 3.1)."""
    x = gaussian(1, 2, 128, 64)
    x[..., 7] += 40
    centred = x - x.mean(dim=2, keepdim=True)

    def error(codec):
        return float((codec.decode(codec.encode(x)) - x).square().sum() / centred.square().sum())

    assert error(KiviKey(2)) < 0.2 < 3 * error(KiviKey(2)) < error(Uniform(2, 32, symmetric=False))


def test_a_last_group_of_one_token_after_whole_chunks_is_kept():
    x = gaussian(1, 2, 65, 128)
    codec = KiviKey(8, group=32)
    torch.testing.assert_close(
        codec.decode(codec.encode(x))[:, :, 64], x[:, :, 64], atol=2e-3, rtol=0
    )


def test_affine_codes_do_not_change_their_input():
    x = gaussian(4, 8)
    before = x.clone()
    affine_codes(x, 2, dim=-1)
    assert torch.equal(x, before)


def test_fp8_e4m3_is_transformers_own():
    x = gaussian(1, 2, 40, 64)
    theirs = Fp8QuantizedLayer()
    theirs.dtype = x.dtype
    values, scale = theirs._quantize(x)
    packed = Fp8("e4m3").encode(x)
    assert torch.equal(packed.tensors["codes"], values.view(torch.uint8))
    assert packed.tensors["scale"].item() == scale.item()
    assert torch.equal(Fp8("e4m3").decode(packed), theirs._dequantize((values, scale)))


@pytest.mark.parametrize(("kind", "mantissa"), [("e4m3", 3), ("e5m2", 2)])
def test_fp8_errs_by_at_most_half_a_unit_in_the_last_place(kind, mantissa):
    x = gaussian(1, 2, 40, 64).abs() + 0.5
    decoded = Fp8(kind).decode(Fp8(kind).encode(x))
    assert ((decoded - x).abs() <= x * 2.0 ** -(mantissa + 1) * 1.0001).all()


def test_a_rotation_saves_absmax_from_outliers():
    """One channel 20 times the others: absmax spends its levels on it, a rotation spreads it."""
    x = gaussian(1, 2, 256, 128)
    x[..., 3] *= 20
    plain, rotated = relative_error(Uniform(4), x), relative_error(Rotated(Uniform(4)), x)
    others = x.clone()
    others[..., 3] = 0
    lost = Uniform(4).decode(Uniform(4).encode(x))
    lost[..., 3] = 0
    assert float((lost - others).square().sum() / others.square().sum()) > 0.5
    assert rotated < plain
    # On Gaussian data it changes nothing.
    same = gaussian(1, 2, 512, 128)
    assert relative_error(Rotated(Uniform(4)), same) == pytest.approx(
        relative_error(Uniform(4), same), rel=0.05
    )


def test_rotated_refuses_what_needs_all_tokens():
    for codec in (KiviKey(), Fp8()):
        with pytest.raises(PolyKVError, match="share metadata"):
            Rotated(codec)


def test_rotated_stores_what_its_codec_stores():
    x = gaussian(1, 2, 9, 64)
    assert Rotated(Q4_0()).encode(x).nbytes == Q4_0().encode(x).nbytes == 2 * 9 * 2 * 18


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_norm_correction_keeps_the_norm_and_removes_the_shrinkage(bits):
    x = gaussian(1, 2, 512, 128)
    plain, corrected = (c.decode(c.encode(x)) for c in (TurboQuantMSE(bits), TurboQuantNC(bits)))
    shrunk = (plain.norm(dim=-1) / x.norm(dim=-1)).mean()
    # Lloyd-Max levels are the means of their cells: E q^2 = 1 - distortion.
    assert shrunk == pytest.approx(math.sqrt(1 - lloyd_max(bits).distortion), rel=5e-3)
    torch.testing.assert_close(corrected.norm(dim=-1), x.norm(dim=-1), rtol=2e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_inner_products_with_the_residual_are_unbiased(bits):
    """Algorithm 2's reason: MSE levels shrink inner products by 1 - distortion, the residual mends it."""
    x, query = gaussian(1, 4, 256, 128), gaussian(128, seed=1)
    x = x + query  # so that the true products are large
    true = (x @ query).mean()

    def slope(make):
        seeds = range(8)
        return sum((make(s).decode(make(s).encode(x)) @ query).mean() for s in seeds) / 8 / true

    shrinkage = 1 - lloyd_max(bits).distortion
    assert slope(lambda s: TurboQuantMSE(bits, seed=s)) == pytest.approx(shrinkage, abs=0.01)
    assert slope(lambda s: TurboQuantProd(bits, seed=s)) == pytest.approx(1, abs=0.012)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_the_residual_costs_squared_error_as_its_theory_says(bits):
    # A signed Hadamard S of d coordinates leaves (pi / 2 - 1) of the residual's energy.
    error = relative_error(TurboQuantProd(bits), gaussian(1, 2, 1024, 128))
    assert error == pytest.approx((math.pi / 2 - 1) * lloyd_max(bits - 1).distortion, rel=0.05)
    assert error > lloyd_max(bits).distortion


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_outlier_channels_lie_between_their_two_widths(bits):
    x = gaussian(1, 2, 512, 128)
    error = relative_error(TurboQuantOutlier(bits), x)
    assert lloyd_max(bits + 1).distortion < error < lloyd_max(bits).distortion
    # Where a quarter of the channels carries most of the energy, the finer width counts for it.
    x[..., ::4] *= 8
    codec = TurboQuantOutlier(bits, outliers=0.25)
    assert relative_error(codec, x) == pytest.approx(lloyd_max(bits + 1).distortion, rel=0.12)


def test_the_papers_two_and_a_half_bits_are_two_and_a_quarter():
    assert TurboQuantOutlier(2, outliers=32 / 128).payload_bits(torch.float32) == 2.25
    assert TurboQuantOutlier(2, outliers=0.5).payload_bits(torch.float32) == 2.5


STATED = {  # bits per value at head_dim 128, as the comment of each YAML says; keys, values
    "q8_0": (8.5, 8.5), "q5_0": (5.5, 5.5), "q4_1": (5, 5), "q4_0": (4.5, 4.5),
    "q4_0_rotated": (4.5, 4.5), "kivi_2bit_no_exemptions": (3, 3), "kivi_4bit_no_exemptions": (5, 5),
    "kivi_2bit": (3, 3), "kivi_4bit": (5, 5), "fp8_e4m3": (8, 8), "fp8_e5m2": (8, 8),
    "uniform": (4.125, 4.125), "uniform_rotated": (4.125, 4.125),
    "uniform_rotated_keys": (4.125, 4.125), "uniform_rotated_values": (4.125, 4.125),
    "uniform_3bit": (3.125, 3.125), "uniform_2bit": (2.125, 2.125),
    "uniform_rotated_3bit": (3.125, 3.125), "turboquant_2_5bit": (2.75, 2.75),
    "turboquant_3_5bit": (3.75, 3.75), "turboquant_prod_3bit": (3.25, 3.125),
    "turboquant_prod_4bit": (4.25, 4.125), "vllm_k8v4": (8, 4.25), "vllm_4bit_nc": (4.125, 4.25),
    "vllm_k3v4_nc": (3.125, 4.25), "vllm_3bit_nc": (3.125, 3.25), "polykv": (8, 3.125),
    "vllm_k8v4_no_exemptions": (8, 4.25), "vllm_4bit_nc_no_exemptions": (4.125, 4.25),
    "vllm_k3v4_nc_no_exemptions": (3.125, 4.25), "vllm_3bit_nc_no_exemptions": (3.125, 3.25),
    "polykv_q8_0": (8.5, 3.125), "int8_token": (8.125, 8.125), "turboquant_2bit": (2.125, 2.125),
    "turboquant_3bit": (3.125, 3.125), "turboquant_4bit": (4.125, 4.125), "fp16": (16, 16),
    "nvfp4": (4.5, 4.5), "nvfp4_fp8_keys": (8, 4.5), "kvarn_k4v2": (4.375, 2.375),
    "kvarn_k4v2_no_exemptions": (4.375, 2.375), "kvarn_k4v4": (4.375, 4.375),
    "kvarn_k4v4_no_exemptions": (4.375, 4.375), "fibquant_3bit": (3.125, 3.125),
    "fibquant_4bit": (4.125, 4.125),
}  # fmt: skip


@pytest.mark.parametrize("name", [*sorted(STATED)[::2], *slow(*sorted(STATED)[1::2])])
def test_stored_bits_are_the_documented_ones(name):
    x, recipe = gaussian(1, 2, 2048, 128), load_recipe(name)
    found = [8 * codec.encode(x).nbytes / x.numel() for codec in (recipe.key, recipe.value)]
    # Of metadata per tensor or head nothing is left to see at 2,048 tokens.
    assert found == pytest.approx(STATED[name], abs=0.01)


@pytest.mark.parametrize("name", of_each_pair(available("recipe")))
def test_a_pool_stores_its_recipes_formula_to_the_byte(name):
    """Exemptions and bits by layer included: fp16 where exempt, else what the codecs' formulas say."""
    recipe, n_layers = load_recipe(name), 6
    exempt = recipe.exempt
    for n_tokens in (100, 179, 300):
        pair, expected = (gaussian(1, 2, n_tokens, 64), gaussian(1, 2, n_tokens, 64)), 0
        pool = SharedKVPool.from_layers([pair] * n_layers, recipe)
        n_tokens = recipe.n_kept(n_tokens)
        for layer in range(n_layers):
            whole = layer < exempt.first_layers or layer >= n_layers - exempt.last_layers
            exact = n_tokens if whole else min(exempt.sinks + exempt.recent, n_tokens)
            expected += 2 * 2 * (2 * exact * 64)
            if exact < n_tokens:
                shape = (1, 2, n_tokens - exact, 64)
                codecs = recipe.codecs(layer, n_layers)
                expected += sum(codec.stored_bytes(shape, torch.float32) for codec in codecs)
        assert pool.stored_bytes == expected, n_tokens


def test_layer_bits_follow_the_depth():
    recipe = load_recipe("per_layer")
    assert recipe.nominal_ratio(torch.float16) == 4
    x = gaussian(1, 1, 4, 64)

    def bits(layer, n_layers):
        (segment,) = recipe.encode_layer(x, x, layer, n_layers)
        return segment.key_codec.codec.bits, segment.value_codec.codec.bits

    assert [bits(layer, 4) for layer in range(4)] == [(8, 4), (4, 4), (4, 2), (4, 2)]
    assert [bits(layer, 8) for layer in (0, 1, 2, 7)] == [(8, 4), (8, 4), (4, 4), (4, 2)]
    with pytest.raises(PolyKVError, match="4 entries and the model 3 layers"):
        bits(0, 3)


@pytest.mark.parametrize(
    ("table", "message"), [([[8]], "entry"), ([[8, 9]], "bits=9"), ([[4, 4]], "no bits to set")]
)
def test_a_wrong_table_of_bits_is_refused(table, message):
    codec = (
        "polykv.codecs.uniform.Uniform" if message != "no bits to set" else "polykv.codecs.fp8.Fp8"
    )
    part = {"_target_": codec}
    cfg = {"name": "mine", "key": part, "value": part, "layer_bits": table}
    with pytest.raises(PolyKVError, match=message):
        Recipe.from_config(OmegaConf.create(cfg))
