"""Recipe.suffix: agents' own tokens under a codec, read in place."""

from dataclasses import replace

import pytest
import torch
from conftest import TEXT, tiny_model
from test_cascade import DOCUMENT, QUERIES, batch, generate, ids_of

from polykv.attention.cascade import attend_in_place
from polykv.codecs.int8 import Int8
from polykv.codecs.kivi import KiviKey
from polykv.codecs.q8_0 import Q8_0
from polykv.codecs.rotated import Rotated
from polykv.codecs.uniform import Uniform
from polykv.errors import PolyKVError
from polykv.evaluation.continuation import score_rest
from polykv.pool import SharedKVPool
from polykv.recipe import load_recipe

N_AGENTS = 5


def pools(model, tokenizer, suffix, backend="torch"):
    """The same document without and with a codec of the suffixes."""
    recipe = load_recipe("polykv")
    return [
        SharedKVPool.from_text(model, tokenizer, DOCUMENT, one, backend=backend)
        for one in (recipe, replace(recipe, suffix=suffix))
    ]


def writing_through(cache, codec):
    """A cache of unshared copies that keeps what `codec` makes of new tokens."""

    def through(update):
        def rounded(keys, values, *rest, **options):
            new = (codec.decode(codec.encode(x)) for x in (keys, values))
            return update(*new, *rest, **options)

        return rounded

    for layer in cache.layers:
        layer.update = through(layer.update)
    return cache


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("architecture", ["llama", "mistral"])  # mistral: with a window
def test_agents_say_what_copies_that_round_their_own_tokens_say(architecture, backend, tokenizer):
    model = tiny_model(architecture)
    plain, pool = pools(model, tokenizer, Q8_0(), backend)
    rows = batch([ids_of(tokenizer, q) for q in QUERIES[:N_AGENTS]], plain.n_tokens)
    copies = writing_through(plain.dequantize(N_AGENTS), Q8_0())
    expected = generate(model, copies, *rows, max_new_tokens=40)
    assert not torch.equal(
        expected, generate(model, plain.dequantize(N_AGENTS), *rows, max_new_tokens=40)
    )
    with attend_in_place(model):
        got = generate(model, pool.reader(N_AGENTS), *rows, max_new_tokens=40)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(
    "codec",
    [Q8_0(), Int8("token"), Uniform(4), Rotated(Uniform(4))],
    ids=lambda c: type(c).__name__,
)
def test_logits_of_every_kind_of_codec(codec, backend, llama, tokenizer):
    plain, pool = pools(llama, tokenizer, codec, backend)
    rest = torch.tensor([ids_of(tokenizer, TEXT[300:420])])
    expected = score_rest(llama, writing_through(plain.dequantize(), codec), rest)
    with attend_in_place(llama):
        cache = pool.reader(1)
        torch.testing.assert_close(score_rest(llama, cache, rest), expected, rtol=0, atol=1e-3)
    shape = (1, pool.reader(1).layers[0].segments[0].key.shape[1], cache.layers[0].n_suffix)
    of_layer = 2 * codec.stored_bytes((*shape, pool.head_dim), torch.float32)
    assert [layer.suffix_bytes for layer in cache.layers] == [of_layer] * pool.n_layers


def test_tokens_are_cropped_selected_and_repeated_as_uncompressed_ones(llama, tokenizer):
    plain, pool = pools(llama, tokenizer, Q8_0())
    ids_BT = torch.tensor([ids_of(tokenizer, QUERIES[i])[:2] for i in (3, 5, 7)])
    next_BT = torch.tensor([ids_of(tokenizer, QUERIES[9])[:2]])

    def logits(cache, crop):
        llama(ids_BT, past_key_values=cache)
        crop(cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        return llama(next_BT.expand(4, -1), past_key_values=cache).logits

    expected = logits(writing_through(plain.dequantize(3), Q8_0()), lambda cache: cache.crop(-1))
    with attend_in_place(llama):
        cache = pool.reader(3)
        got = logits(cache, lambda cache: cache.crop(-1))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
        cache.reset()
        assert cache.layers[0].suffix_bytes == 0
        again = logits(pool.reader(3), lambda cache: cache.crop(-1))
    assert torch.equal(again, got)


@pytest.mark.parametrize("codec", [Int8("tensor"), KiviKey()], ids=lambda c: type(c).__name__)
def test_a_codec_whose_tokens_share_metadata_is_refused(codec):
    with pytest.raises(PolyKVError, match="Q8_0"):
        replace(load_recipe("polykv"), suffix=codec)


def test_reading_unshared_copies_is_refused(llama, tokenizer):
    _, pool = pools(llama, tokenizer, Q8_0())
    with pytest.raises(PolyKVError, match="reader=in_place"):
        pool.dequantize()
    with pytest.raises(PolyKVError, match="reader=in_place"):
        pool.ask(llama, tokenizer, QUERIES[:2])


def test_the_uncompressed_recipe_with_such_a_suffix_is_no_baseline():
    full = load_recipe("full")
    assert full.is_full and not replace(full, suffix=Q8_0()).is_full


def test_recipes_of_the_repository_compress_what_they_name():
    recipe = load_recipe("trellis_3_q8_0_suffix")
    assert recipe.suffix == Q8_0()
    assert replace(recipe, name="trellis_3", suffix=None) == load_recipe("trellis_3")
    recipe, of_4 = load_recipe("trellis_k3_75v4_q8_0_suffix"), load_recipe("trellis_4")
    assert recipe.suffix == Q8_0()
    assert replace(recipe, name="trellis_4", suffix=None, key=of_4.key) == of_4
    assert recipe.key == replace(of_4.key, bits=3.75)
