"""What every codec and every recipe keeps to.

A new file in polykv/codecs or conf/recipe is found by itself.
"""

import importlib
import inspect
import pkgutil
from collections import Counter
from dataclasses import fields
from itertools import product
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.profiler import ProfilerActivity, profile

import polykv.codecs.base
from polykv.codecs.base import Codec, Packed
from polykv.codecs.trellis import TrellisKey, TrellisValue
from polykv.errors import PolyKVError
from polykv.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "conf" / "recipe").glob("*.yaml"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
# head_dim 20 leaves a half byte at 3 bits and a short q8_0 block; 80 and 96 are no powers of two.
SHAPES = ((1, 2, 40, 64), (2, 3, 33, 80), (1, 1, 7, 96), (1, 2, 65, 128), (1, 2, 5, 20))


def codec_classes():
    for module in pkgutil.iter_modules(polykv.codecs.__path__, "polykv.codecs."):
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(cls, Codec) and not inspect.isabstract(cls):
                yield cls


def codecs_in(node):
    """Every codec that a recipe names, however deep."""
    if isinstance(node, dict) and str(node.get("_target_", "")).startswith("polykv.codecs."):
        yield instantiate(node)
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from codecs_in(child)


def load(path):
    return OmegaConf.to_container(OmegaConf.load(path))


CLASSES = sorted(set(codec_classes()), key=lambda cls: cls.__name__)
CODECS = {repr(cls()): cls() for cls in CLASSES}
CODECS |= {repr(codec): codec for path in RECIPES for codec in codecs_in(load(path))}


def of_each_class(codecs):
    """Codecs as pytest parameters: the default of each class and the first with other settings; others are slow."""
    seen, found = Counter(), []
    for name, codec in codecs.items():
        seen[type(codec)] += 1
        marks = pytest.mark.slow if seen[type(codec)] > 2 else ()
        found.append(pytest.param(codec, id=name, marks=marks))
    return found


def of_each_pair(names):
    """Recipes as pytest parameters: the first of each pair of codec classes; others are slow.

    Those with a codec for the agents' own tokens are left out (test_quantized_suffix.py).
    """
    seen, found = set(), []
    for name in names:
        recipe = load_recipe(name)
        if recipe.suffix:
            continue
        pair = type(recipe.key), type(recipe.value)
        found.append(pytest.param(name, id=name, marks=pytest.mark.slow if pair in seen else ()))
        seen.add(pair)
    return found


every_codec = pytest.mark.parametrize("codec", of_each_class(CODECS))
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def gaussian(*shape, dtype=torch.float32, device="cpu", seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype)


def relative_error(codec, x):
    x_decoded = codec.decode(codec.encode(x)).double()
    return float((x_decoded - x.double()).square().sum() / x.double().square().sum())


def test_there_is_something_to_test():
    names = {cls.__name__ for cls in CLASSES}
    assert names >= {"Identity", "Int8", "Q8_0", "TurboQuantMSE"}
    assert {path.stem for path in RECIPES} >= {"full", "fp16", "polykv", "polykv_q8_0"}


@every_codec
@pytest.mark.parametrize("device", DEVICES)
def test_round_trip_keeps_shape_and_dtype_at_the_documented_bytes(codec, device):
    for shape, dtype in product(SHAPES, DTYPES):
        x = gaussian(*shape, dtype=dtype, device=device)
        before = x.clone()
        packed = codec.encode(x)
        y = codec.decode(packed)
        assert y.shape == packed.shape == shape
        assert y.dtype == packed.dtype == dtype
        assert y.device == x.device
        assert y.isfinite().all()
        assert torch.equal(x, before)
        kept = packed.tensors.values()
        assert packed.nbytes == sum(t.numel() * t.element_size() for t in kept)
        assert packed.nbytes == codec.stored_bytes(shape, dtype)
        assert 8 * packed.nbytes >= codec.payload_bits(dtype) * x.numel()


@every_codec
def test_nothing_kept_is_a_view_of_the_input_or_of_more_than_it_says(codec):
    x = gaussian(1, 2, 40, 64)
    for tensor in codec.encode(x).tensors.values():
        assert tensor.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@every_codec
def test_encoding_is_deterministic_and_does_not_mind_strides(codec):
    x = gaussian(1, 4, 300, 64)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    again = type(codec)(**{f.name: getattr(codec, f.name) for f in fields(codec)})
    for other in (codec.encode(x), again.encode(x), codec.encode(strided)):
        for name, tensor in codec.encode(x).tensors.items():
            assert torch.equal(tensor, other.tensors[name])


@every_codec
def test_a_narrowed_pack_decodes_to_that_slice_without_copying(codec):
    x = gaussian(1, 2, 96, 64)
    packed = codec.encode(x)
    whole = codec.decode(packed)
    middle = 48 // codec.group * codec.group
    for start, stop in [(0, 96), (0, 1), (middle, 96), (middle, 57), (middle, middle)]:
        part = packed.narrow(start, stop)
        assert part.shape == (1, 2, stop - start, 64)
        # A matrix product over other rows may round otherwise, hence not bit for bit.
        torch.testing.assert_close(codec.decode(part), whole[:, :, start:stop])
        for name, tensor in part.tensors.items():
            storage = packed.tensors[name].untyped_storage()
            assert tensor.untyped_storage().data_ptr() == storage.data_ptr()


@every_codec
def test_narrowing_beyond_the_tokens_is_refused(codec):
    packed = codec.encode(gaussian(1, 2, 10, 64))
    for span in ((-1, 4), (5, 4), (0, 11)):
        with pytest.raises(PolyKVError, match="10 tokens"):
            packed.narrow(*span)


@every_codec
def test_chunks_do_not_show(codec, monkeypatch):
    x = gaussian(1, 8, 515, 64)
    chunked = codec.decode(codec.encode(x))
    monkeypatch.setattr(polykv.codecs.base, "CHUNKS", 1)
    whole = codec.decode(codec.encode(x))
    # Not all: a matrix product over other rows may round a value across a boundary.
    assert torch.isclose(chunked, whole, atol=1e-5).float().mean() > 0.9999


@every_codec
def test_one_token_and_zero_vectors(codec):
    for dtype in DTYPES:
        one = gaussian(1, 1, 1, 64, dtype=dtype)
        assert relative_error(codec, one) < 0.5
        zeros = torch.zeros(1, 2, 5, 64, dtype=dtype)
        assert torch.equal(codec.decode(codec.encode(zeros)), zeros)
        some = gaussian(1, 2, 5, 64, dtype=dtype)
        some[:, :, 2] = 0
        packed = codec.encode(some)
        decoded = codec.decode(packed)
        # A zero token that shares a minimum or mean with others does not decode to zeros.
        if codec.group == 1 and "mean" not in packed.tensors:
            assert torch.equal(decoded[:, :, 2], some[:, :, 2])
        assert decoded[:, :, 1].abs().sum() > 0


@every_codec
def test_constant_vectors_decode_to_something_nearer_than_zero(codec):
    assert relative_error(codec, torch.full((1, 2, 5, 128), -3.25)) < 0.9


@every_codec
def test_scale_is_no_matter_until_fp16_underflows(codec):
    for scale in (1e-30, 1e-8, 1e-3, 1e3):
        x = gaussian(1, 2, 9, 64) * scale
        decoded = codec.decode(codec.encode(x))
        assert decoded.isfinite().all()
        if scale >= 1e-3:
            assert relative_error(codec, x) < 0.4


@every_codec
def test_nan_and_infinity_are_refused_by_name(codec):
    values = (("nan", "NaN"), ("inf", "infinite"), ("-inf", "infinite"))
    for dtype, (value, name) in product(DTYPES, values):
        x = gaussian(1, 2, 300, 64, dtype=dtype)
        x[0, 1, 213, 5] = float(value)
        with pytest.raises(PolyKVError, match=f"{name}.*token 213.*;"):
            codec.encode(x)


@every_codec
def test_huge_values_round_trip_or_are_refused(codec):
    x = gaussian(1, 2, 9, 64, dtype=torch.bfloat16) * 1e30
    try:
        decoded = codec.decode(codec.encode(x))
    except PolyKVError as error:
        assert "overflow" in str(error) and "; use recipe=full" in str(error)
    else:
        assert decoded.isfinite().all()
        assert relative_error(codec, x) < 0.4


@every_codec
def test_fp16_at_its_limit_stays_finite(codec):
    x = torch.zeros(1, 1, 2, 64, dtype=torch.float16)
    x[..., 3] = 65504
    assert codec.decode(codec.encode(x)).isfinite().all()


@every_codec
def test_other_tensors_are_refused(codec):
    fp64 = torch.zeros(1, 1, 2, 64, dtype=torch.float64)
    for x in (torch.zeros(2, 3, 4), torch.zeros(1, 1, 0, 64), fp64):
        with pytest.raises(PolyKVError, match="cannot encode .*;"):
            codec.encode(x)


@pytest.mark.parametrize(
    "cls", [c for c in CLASSES if "bits" in {f.name for f in fields(c)}], ids=lambda c: c.__name__
)
def test_more_bits_never_more_error(cls):
    x, errors, sizes = gaussian(1, 2, 256, 128), [], []
    for bits in range(1, 9):
        try:
            codec = cls(bits=bits)
        except PolyKVError:
            continue  # not a width of this method
        errors.append(relative_error(codec, x))
        sizes.append(codec.encode(x).nbytes)
    assert len(errors) >= 2
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(set(sizes))


def peak_extra_bytes(codec, x):
    """Most bytes live at once while encoding, beyond the result; all allocations counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        packed = codec.encode(x)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert live == packed.nbytes  # the record is complete
    return peak - packed.nbytes


def profiled():
    """(codec, tokens). Of a trellis search 128 are slow, and of 2048 the profiler would keep 13 GB."""
    for one in of_each_class(CODECS):
        searched = isinstance(one.values[0], TrellisKey | TrellisValue)
        for n_tokens in (128,) if searched else (128, 2048):
            marks = pytest.mark.slow if searched or n_tokens > 128 else one.marks
            yield pytest.param(*one.values, n_tokens, id=f"{n_tokens}-{one.id}", marks=marks)


@pytest.mark.parametrize(("codec", "n_tokens"), profiled())
def test_encoding_takes_at_most_twice_the_fp16_bytes(codec, n_tokens):
    if codec.group >= n_tokens:
        return  # a group is not cut
    for dtype in (torch.float32, torch.bfloat16):
        x = gaussian(1, 8, n_tokens, 128, dtype=dtype)
        codec.encode(x)  # codebooks and rotations are made once
        assert 0 < peak_extra_bytes(codec, x) <= 2 * (2 * x.numel())


# Of the variance of Gaussians the best single bit loses 0.36 (Lloyd-Max), four even levels over the range of 64 0.26.
MOST_ERROR = 0.4


@every_recipe
def test_a_recipe_file_says_what_it_is_and_builds(path):
    assert path.read_text().startswith("# ")
    recipe = load(path)
    assert recipe["name"] == path.stem
    for codec in (instantiate(recipe["key"]), instantiate(recipe["value"])):
        assert isinstance(codec, Codec)
        assert hash(codec) == hash(codec)
        assert relative_error(codec, gaussian(1, 2, 64, 64)) < MOST_ERROR


def ratio(name, head_dim, n_tokens=1000):
    """Stored ratio of a recipe: fp16 bytes of keys and values over the bytes of what is kept."""
    recipe = load(next(path for path in RECIPES if path.stem == name))
    x = gaussian(1, 8, n_tokens, head_dim, dtype=torch.bfloat16)
    stored = sum(instantiate(recipe[part]).encode(x).nbytes for part in ("key", "value"))
    return 2 * 2 * x.numel() / stored


@pytest.mark.parametrize(
    ("name", "head_dim", "expected"),
    [
        ("polykv", 128, 2.876),
        ("polykv", 64, 2.844),
        ("polykv_q8_0", 128, 2.753),
        ("polykv_q8_0", 64, 2.723),
        ("full", 128, 1),
        ("fp16", 64, 1),
        ("int8_token", 128, 16 / 8.125),
        ("turboquant_4bit", 128, 16 / 4.125),
        ("turboquant_3bit", 128, 16 / 3.125),
        ("turboquant_2bit", 128, 16 / 2.125),
    ],
)
def test_stored_ratios_are_the_known_ones(name, head_dim, expected):
    assert ratio(name, head_dim) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("name", ["polykv", "polykv_q8_0"])
def test_nominal_ratio_is_the_papers(name):
    recipe = load(next(path for path in RECIPES if path.stem == name))
    bits = sum(instantiate(recipe[p]).payload_bits(torch.bfloat16) for p in ("key", "value"))
    assert 32 / bits == pytest.approx(2.909, abs=5e-4)


class TestPacked:
    """Tensors that are per token, per group and shared, as later codecs keep them."""

    packed = Packed(
        {
            "codes": torch.arange(10).view(1, 1, 10, 1),
            "scale": torch.arange(3).view(1, 1, 3, 1),
            "zero": torch.ones(1, 1, 1, 1),
        },
        shape=(1, 1, 10, 1),
        dtype=torch.float32,
        group=4,
    )

    def test_groups_follow_their_tokens(self):
        part = self.packed.narrow(4, 10)
        assert part.tensors["codes"].flatten().tolist() == [4, 5, 6, 7, 8, 9]
        assert part.tensors["scale"].flatten().tolist() == [1, 2]
        assert part.tensors["zero"].shape == (1, 1, 1, 1)
        assert part.narrow(4, 6).tensors["scale"].flatten().tolist() == [2]
        assert self.packed.narrow(0, 5).tensors["scale"].flatten().tolist() == [0, 1]

    def test_a_start_inside_a_group_is_refused(self):
        with pytest.raises(PolyKVError, match="multiple of 4"):
            self.packed.narrow(2, 10)

    def test_a_tensor_that_fits_no_token_count_is_refused(self):
        with pytest.raises(PolyKVError, match="'odd'"):
            Packed({"odd": torch.zeros(1, 1, 7, 1)}, (1, 1, 10, 1), torch.float32, 4)
