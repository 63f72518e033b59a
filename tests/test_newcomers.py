"""NVFP4, KVarN and FibQuant against what their sources state, and searches that leave nothing out."""

import math

import pytest
import torch
from test_codecs import gaussian, relative_error

from polykv.codecs import fibquant
from polykv.codecs.codebook import lloyd_max
from polykv.codecs.fibquant import FibQuant
from polykv.codecs.kivi import KiviKey
from polykv.codecs.kvarn import KVarN, column_scales
from polykv.codecs.nvfp4 import NVFP4, e2m1_codes, e2m1_values
from polykv.codecs.rotation import rotation
from polykv.codecs.uniform import Uniform
from polykv.errors import PolyKVError
from polykv.recipe import load_recipe

# OCP Microscaling Formats (MX) v1.0, table 5: all 16 codes, from sign, exponent (bias 1) and mantissa.
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def test_e2m1_codes_have_their_published_values():
    codes = torch.arange(16, dtype=torch.uint8)
    assert e2m1_values(codes).tolist() == E2M1
    bits = [(code >> 3, code >> 1 & 3, code & 1) for code in range(16)]
    assert [
        (-1) ** s * (m / 2 if e == 0 else 2.0 ** (e - 1) * (1 + m / 2)) for s, e, m in bits
    ] == E2M1
    nonzero = torch.tensor([code for code in range(16) if code != 8], dtype=torch.uint8)
    assert torch.equal(e2m1_codes(e2m1_values(nonzero)), nonzero)


def test_e2m1_rounds_to_the_nearest_of_all_values_and_ties_to_even():
    x = torch.arange(-1024, 1025) / 128  # to 8 in steps that hit every tie
    distance = (x.unsqueeze(1) - torch.tensor(E2M1)).abs()
    found = e2m1_codes(x).long()
    assert torch.equal(distance.gather(1, found.unsqueeze(1)).squeeze(1), distance.amin(1))
    # 0 and -0 are as near; of the values proper the magnitudes tell the ties.
    tied = (distance[:, :8] == distance[:, :8].amin(1, True)).sum(1) == 2
    assert int(tied.sum()) == 7 and (found[tied] % 2 == 0).all()


def test_nvfp4_by_hand():
    # The largest value is 6 * 448, so the tensor's scale is 1, and blocks of absmax 12 and 1.5 have scales 2 and 1/4.
    x = torch.zeros(1, 1, 2, 32)
    x[0, 0, 0, 0] = 2688
    x[0, 0, 1, :4] = torch.tensor([12.0, -5.9, 0.9, 1.1])
    x[0, 0, 1, 16:19] = torch.tensor([-1.5, 0.3, 0.06])
    packed = NVFP4().encode(x)
    assert packed.tensors["tensor_scale"].item() == 1
    scales = packed.tensors["block_scale"].view(torch.float8_e4m3fn).float()
    assert scales.flatten().tolist() == [448, 0, 2, 0.25]
    # Nibbles, the even channel low: 12 is 6 (7), -5.9 is -3 (8 + 5), 0.9 and 1.1 are 0.5 (1).
    assert packed.tensors["codes"][0, 0, 1, :2].tolist() == [7 | 13 << 4, 1 | 1 << 4]
    decoded = NVFP4().decode(packed)[0, 0, 1]
    assert decoded[:4].tolist() == [12, -6, 1, 1]
    assert decoded[16:19].tolist() == [-1.5, 0.25, 0]


@pytest.mark.parametrize("dim", [64, 80, 20])
def test_no_other_nvfp4_code_is_nearer_under_the_kept_scales(dim):
    x = gaussian(1, 2, 40, dim) * gaussian(1, 2, 40, 1, seed=1).exp()
    packed = NVFP4().encode(x)
    scale = packed.tensors["block_scale"].view(torch.float8_e4m3fn).double()
    scale = (scale * packed.tensors["tensor_scale"]).repeat_interleave(16, -1)[..., :dim]
    levels = torch.tensor(E2M1, dtype=torch.float64) * scale.unsqueeze(-1)
    nearest = (levels - x.double().unsqueeze(-1)).abs().amin(-1)
    error = (NVFP4().decode(packed).double() - x.double()).abs()
    assert (error <= nearest + 1e-5 * scale).all()
    # A scale is off by at most a sixteenth, so the largest value of a block errs by that or by half its last step.
    assert (error <= scale * 1.001).all()


def test_fp8_keys_with_nvfp4_values_take_the_published_bits():
    """12.5 bits for a key and a value (vLLM pull request 53770)."""
    recipe, x = load_recipe("nvfp4_fp8_keys"), gaussian(1, 8, 512, 128)
    bits = sum(8 * codec.encode(x).nbytes / x.numel() for codec in (recipe.key, recipe.value))
    assert bits == pytest.approx(12.5, abs=0.001)


def uneven_tiles(n_tokens=256, dim=64, spread=0.6):
    """Gaussian rows and columns of very different sizes; large enough for KVarN's bounds, which are not relative."""
    tokens = (spread * gaussian(1, 2, n_tokens, 1, seed=1)).exp()
    channels = (spread * gaussian(1, 2, 1, dim, seed=2)).exp()
    return 30 * gaussian(1, 2, n_tokens, dim) * tokens * channels


@pytest.mark.parametrize("along", [-2, -1])
def test_normalized_tiles_have_equal_variances_of_rows_and_columns(along):
    tiles = uneven_tiles().unflatten(2, (-1, 128))
    across = -3 - along

    def ratio(x, dim):
        deviation = x.std(dim)
        return float((deviation.amax(-1) / deviation.amin(-1)).amax())

    assert ratio(tiles, across) > 10 and ratio(tiles, along) > 10
    scale = column_scales(tiles, along)
    assert scale.shape[along] == tiles.shape[along] and scale.shape[across] == 1
    columns = tiles / scale
    balanced = columns / columns.std(along, keepdim=True)
    assert ratio(balanced, along) == pytest.approx(1, abs=1e-4)
    assert ratio(balanced, across) < 1.08


@pytest.mark.parametrize("rows", ["channels", "tokens"])
@pytest.mark.parametrize("bits", [2, 4])
def test_kvarn_errs_by_half_a_step_and_less_than_plain_rounding(rows, bits):
    matrix = rotation(64, None, torch.device("cpu"))
    rotated = uneven_tiles(n_tokens=300)  # whose last tile is partial
    x, codec = rotated @ matrix.T, KVarN(bits, rows)
    packed = codec.encode(x)
    kept = {name: tensor.float() for name, tensor in packed.tensors.items() if name != "codes"}

    def per_token(tensor):
        return tensor if tensor.shape[2] == 300 else tensor.repeat_interleave(128, 2)[:, :, :300]

    step = per_token(kept["step"]) * per_token(kept["scale"])
    error = (codec.decode_rotated(packed) - rotated).abs()
    # Steps and minima in fp16 move the ends of the range a little.
    assert (error <= step / 2 + 2.0**-9 * rotated.abs().amax(-1, True) + 1e-3).all()
    plain = KiviKey(bits, 128) if rows == "channels" else Uniform(bits, symmetric=False)
    assert relative_error(codec, x) < 0.8 * relative_error(plain, rotated)


def test_kvarn_on_even_data_is_plain_rounding():
    x = 30 * gaussian(1, 2, 256, 64)
    kept = KVarN(4, "channels").encode(x).tensors
    step = float((kept["step"].float().repeat_interleave(128, 2) * kept["scale"]).square().mean())
    mean = step / 12 / float(x.square().mean())
    assert relative_error(KVarN(4, "channels"), x) == pytest.approx(mean, rel=0.05)


def test_kvarn_refuses_what_it_has_not():
    for options in ({"bits": 9}, {"rows": "heads"}, {"group": 0}):
        with pytest.raises(PolyKVError, match="choose 1 to 8 bits"):
            KVarN(**options)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_fibquant_on_a_gaussian_is_below_the_best_scalar_and_above_shannon(bits):
    error = relative_error(FibQuant(bits), gaussian(1, 4, 512, 128))
    assert 4.0**-bits < error < lloyd_max(bits).distortion * {1: 1, 2: 0.93, 3: 0.87, 4: 0.83}[bits]


def test_fibquants_source_is_two_coordinates_of_a_unit_vector():
    points = fibquant.source(64, 1 << 14)
    x = gaussian(1 << 14, 64).double()
    drawn = (x / x.norm(dim=1, keepdim=True))[:, :2]
    for power in (1, 2, 3):  # E r^2 = 2 / d, and higher moments as those of vectors
        moments = [float(p.square().sum(1).pow(power).mean()) for p in (points, drawn)]
        assert moments[0] == pytest.approx(moments[1], rel=0.02 * power**2)
    assert float(points.square().sum(1).mean()) == pytest.approx(2 / 64, rel=1e-3)
    assert points.mean(0).abs().max() < 1e-3


def test_fibquants_codewords_are_the_means_of_their_cells_and_codes_the_nearest():
    codewords = fibquant.codebook(128, 6)
    x = gaussian(1 << 15, 128, seed=3).double()
    points = (x / x.norm(dim=1, keepdim=True))[:, :2]
    distances = torch.cdist(points, codewords)
    codes = fibquant.nearest(points, codewords).long()
    torch.testing.assert_close(distances.gather(1, codes[:, None])[:, 0], distances.amin(1))
    means = torch.stack([points[codes == code].mean(0) for code in range(64)])
    assert ((means - codewords).norm(dim=1) * math.sqrt(128)).mean() < 0.03
