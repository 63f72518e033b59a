"""Cards under one recipe: what a pool under the same holds, for a receiver that has the model alone."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import tiny_model
from hypothesis import HealthCheck, given, settings
from omegaconf import OmegaConf
from robustness import forge
from robustness.promises import any_model, check_card
from robustness.promises import tiny_model as small_model
from test_families import model_of
from transformers import DynamicCache

import polykv
from polykv import attend_in_place, config, versions
from polykv.codecs.context import LayerContext
from polykv.errors import PolyKVError
from polykv.handoff.card import CacheCard
from polykv.handoff.cardfile import CardError
from polykv.handoff.coded import recipe_of
from polykv.handoff.policy import CODECS, Policy, load_policy
from polykv.pool import SharedKVPool, prefill
from polykv.prefill import reread
from polykv.ropes import ropes

N_TOKENS = 90
RECIPES = {
    "waterfill": {3: "waterfill_3", 3.5: "waterfill_k4v3", 4: "waterfill_4", 5: "waterfill_5"},
    "trellis": {2: "trellis_2", 3: "trellis_3", 4: "trellis_4"},
}
each_kind = pytest.mark.parametrize("kind", CODECS)
STATISTICS = ("mean", "scale", "order", "block_rms", "widths", "largest")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", head_dim=64)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(300, (N_TOKENS,), generator=torch.Generator().manual_seed(1))


def sealed(model, ids, bits=4.0, kind="waterfill"):
    return CacheCard.seal(prefill(model, ids[None]), ids, model, None, kind, bits)


def opened(card, model):
    return CacheCard.from_bytes(card.to_bytes(), model, None)


def far(ours, theirs):
    """The largest difference of two caches' keys and values, by layer."""
    pairs = zip(ours.layers, theirs.layers, strict=True)
    return max(float((getattr(a, side) - getattr(b, side)).abs().max())
               for a, b in pairs for side in ("keys", "values"))  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer():
    """Cards are of no tokenizer here; other tests look at its fingerprint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polykv.handoff.fingerprint.of_tokenizer", lambda tokenizer: "1" * 64)
        yield


@pytest.mark.parametrize(
    ("kind", "bits"), [(kind, bits) for kind, known in RECIPES.items() for bits in known]
)
def test_a_budget_means_the_recipe_of_the_same_bits(kind, bits):
    ours, theirs = recipe_of(kind, bits), polykv.load_recipe(RECIPES[kind][bits])
    assert (ours.key, ours.value, ours.exempt) == (theirs.key, theirs.value, theirs.exempt)
    assert 32 / ours.nominal_ratio(torch.float32) == 2 * bits


# RoPE in halves, in neighbours, in some layers, and none.
@pytest.mark.parametrize(
    ("kind", "name"),
    [*product(["waterfill"], ["llama", "glm", "smollm3", "gpt2"]), ("trellis", "llama")],
)
def test_a_card_holds_what_a_pool_under_the_recipe_holds(kind, name, ids):
    own = {"smollm3": {"no_rope_layers": [1, 0, 1, 0]}}
    model = model_of(name) if name == "glm" else tiny_model(name, **own.get(name, {}))
    ids = ids[:50] % 96  # what GLM has
    cache, recipe = prefill(model, ids[None]), polykv.load_recipe(RECIPES[kind][4])
    pool = SharedKVPool.from_cache(cache, recipe)
    card = opened(CacheCard.seal(cache, ids, model, None, kind, 4.0), model)
    assert far(card.dequantize(), pool.dequantize()) < 1e-5
    assert card.nbytes == 4 * len(ids) + pool.stored_bytes
    assert card.nominal_bits == 4.0 and card.metadata.payload == kind
    with attend_in_place(model):
        feed = torch.tensor([[5, 9, 7]])
        ours, theirs = (model(feed, past_key_values=held.reader(1)).logits for held in (card, pool))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@each_kind
def test_stored_bytes_follow_the_formula(kind, model, ids):
    card = sealed(model, ids, kind=kind)
    n_layers, heads, dim, coded, blocks = 4, 2, 64, N_TOKENS - 4, 4
    keys = coded * heads * (dim // 2 + 1) + heads * (5 * dim + 2 * blocks + blocks // 2 + 2)
    values = coded * heads * (dim // 2 + 1) + 2 * heads
    sinks = 2 * 4 * heads * dim * 2
    assert card.nbytes == 4 * N_TOKENS + n_layers * (keys + values + sinks)
    assert 0 < len(card.to_bytes()) - card.nbytes < 4096


@each_kind
def test_another_process_needs_the_model_alone(kind, model, ids, tmp_path):
    card = sealed(model, ids, 3.5, kind)
    card.save(tmp_path / "a.card")
    twin = tiny_model("llama", head_dim=64)
    again = CacheCard.open(tmp_path / "a.card", twin, None, payload=kind)
    assert again.to_bytes() == card.to_bytes() and again.metadata == card.metadata
    assert far(again.dequantize(), card.dequantize()) == 0
    assert again.nominal_bits == 3.5 and again.mean_bits == card.mean_bits


def test_an_offset_turns_the_keys_that_it_says(model, ids):
    whole = prefill(model, ids[None])
    late = DynamicCache(
        [(layer.keys[:, :, 30:], layer.values[:, :, 30:]) for layer in whole.layers]
    )
    at, elsewhere = (
        CacheCard.seal(late, ids[30:], model, None, "waterfill", 4.0, position_offset=offset)
        for offset in (30, 0)
    )
    again = opened(at, model)
    assert far(again.dequantize(), at.dequantize()) == 0
    assert torch.equal(at.payload.ropes[0].cos_TP, ropes(model, N_TOKENS)[0].cos_TP[34:])
    assert far(again.dequantize(), late) < far(elsewhere.dequantize(), late)


@each_kind
def test_appended_tokens_use_the_statistics_of_the_first(kind, model, ids):
    card = opened(sealed(model, ids[:60], kind=kind), model)
    for end in (61, 75):
        cache = card.dequantize()
        with torch.no_grad():
            model(input_ids=ids[None, card.n_tokens : end], past_key_values=cache)
        child = card.append(cache, ids[:end], model, None, kind, 4.0)
        assert child.metadata.parent == card.digest and child.metadata.hop == card.metadata.hop + 1
        old, new = card.payload.tensors(), child.payload.tensors()
        for name, tensor in old.items():
            frozen = name.partition(".")[2] in (*STATISTICS, "exact")
            kept = new[name] if frozen else new[name][:, :, : tensor.shape[2]]
            assert torch.equal(kept, tensor), name
        for index, layer in enumerate(cache.layers):
            (_, known), (_, grown) = (one.payload.segments()[index] for one in (card, child))
            rope = ropes(model, end)[index].narrow(card.n_tokens, end)
            said = known.key_codec.extend(
                known.key,
                layer.keys[:, :, card.n_tokens :],
                LayerContext(rope),
            )
            assert torch.equal(grown.key.tensors["codes"], said.tensors["codes"])
        again = opened(child, model)
        assert far(again.dequantize(), child.dequantize()) == 0
        for ours, theirs in zip(again.dequantize().layers, cache.layers, strict=True):
            new_TD, exact_TD = (one.keys[0, :, card.n_tokens :] for one in (ours, theirs))
            assert (new_TD - exact_TD).norm() < 0.2 * exact_TD.norm()
        assert child.nominal_bits == 4.0
        card = again


def test_a_card_of_sinks_alone_grows_into_one_that_was_sealed_at_once(model, ids):
    for n_tokens in (1, 3, 4):
        short = opened(sealed(model, ids[:n_tokens]), model)
        assert short.nominal_bits == 16 and set(short.payload.tensors()) == {
            "key.exact",
            "value.exact",
        }
        cache = prefill(model, ids[None, :40])
        grown = short.append(cache, ids[:40], model, None, "waterfill", 4.0)
        alone = CacheCard.seal(cache, ids[:40], model, None, "waterfill", 4.0)
        assert far(grown.dequantize(), alone.dequantize()) == 0


def test_a_card_is_continued_under_its_own_codecs_alone(model, ids):
    cache = prefill(model, ids[None])
    card = sealed(model, ids[:60])
    mixed = CacheCard.seal(prefill(model, ids[None, :60]), ids[:60], model, None, "uniform", 4.0)
    for first, policy, bits in (
        (card, "waterfill", 5.0), (card, "trellis", 4.0), (card, "uniform", 4.0), (card, "fp16", 4.0),
        (mixed, "waterfill", 4.0),
    ):  # fmt: skip
        with pytest.raises(PolyKVError, match="other codecs"):
            first.append(cache, ids, model, None, policy, bits)


@each_kind
def test_bits_that_the_codecs_do_not_have_are_refused(kind, model, ids):
    most = {"waterfill": 7, "trellis": 6}[kind]
    said = f"budget_bits=.* a {kind} card takes 1 to {most} bits, in steps of a half"
    for bits in (0.5, 3.3, most + 0.5, most + 1, "4"):
        with pytest.raises(PolyKVError, match=said):
            sealed(model, ids[:10], bits, kind)
    for bits in (1, most):
        assert opened(sealed(model, ids[:10], bits, kind), model).nominal_bits == bits
    for codec in CODECS[kind]:
        with pytest.raises(PolyKVError, match=f"{most + 1}"):
            replace(codec, bits=most + 1)


def test_the_queries_of_a_cache_that_was_not_prefilled_are_read_again(model, ids):
    whole = prefill(model, ids[None])
    grown = DynamicCache([(layer.keys, layer.values) for layer in whole.layers])
    card = CacheCard.seal(grown, ids, model, None, "waterfill", 4.0)
    assert far(opened(card, model).dequantize(), whole) < 0.5 * far(
        sealed(model, ids, 2.0).dequantize(), whole
    )
    for of_all, of_some in zip(whole.contexts, reread(model, grown, ids, 26), strict=True):
        ratio = (of_some.query_rms / of_all.query_rms).log().abs()
        assert 0 < ratio.max() < 0.5
    assert all(
        torch.equal(mine.query_rms, own.query_rms)
        for mine, own in zip(reread(model, grown, ids, 0), whole.contexts, strict=True)
    )


def test_the_codecs_versions_are_part_of_a_cells_identity():
    found = {
        name: versions.of({"policy": OmegaConf.to_container(config.load_group("policy", name))}, ())
        for name in ("waterfill", "trellis", "uniform")
    }
    assert {"WaterfillKey", "TurboQuantLog", "Codec"} == set(found["waterfill"])
    assert {"TrellisKey", "TrellisValue"} == set(found["trellis"]) - set(found["waterfill"])
    assert found["uniform"] == {}


def test_a_policy_has_the_codecs_that_cards_know():
    scalar, trellis = load_policy("waterfill"), load_policy("trellis")
    assert scalar.has_budget and trellis.has_budget
    assert (scalar.kind, trellis.kind) == ("waterfill", "trellis")
    halves = (scalar.codecs[0], trellis.codecs[1])
    for odd in (
        {"store": "codecs"},
        {"codecs": scalar.codecs},
        {"store": "codecs", "codecs": halves},
    ):
        with pytest.raises(PolyKVError, match="codecs=.*WaterfillKey.*TrellisKey"):
            Policy("mine", **odd)


# Hostile files ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A model, and a card's bytes by kind."""
    with any_model:
        model = small_model()
        yield (
            model,
            {kind: bytes(sealed(model, torch.arange(20), kind=kind).to_bytes()) for kind in CODECS},
        )


def poke(name, at, byte):
    def change(parts):
        parts.payload[parts.header[name]["data_offsets"][0] + at] = byte

    return forge.forged(change)


@each_kind
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (poke("key.order", 0, 200), "order does not hold every channel once"),
        (poke("key.order", 0, 1), "order does not hold every channel once"),
        (poke("key.widths", 0, 0), "widths that no encoder writes"),
        (poke("key.widths", 0, 7), "widths that no encoder writes"),
        (poke("key.widths", 0, 5), "widths does not fill the codes"),
        (forge.forged(lambda p: p.poke("key.scale", 0.0)), "scale holds a zero"),
        (forge.forged(lambda p: p.poke("key.largest", -1.0)), "largest holds numbers below zero"),
        (forge.forged(lambda p: p.poke("key.mean", float("nan"))), "NaN"),
        (forge.forged(lambda p: p.header.update({"key.x": p.header.pop("key.norm")})), "norm is missing"),
        (forge.card_field("payload", "mixed"), "fields do not match"),
        (forge.card_field("payload", "codes"), "payload is not one of"),
        (forge.forged(lambda p: p.fields.pop("payload")), "inconsistent"),
        (forge.card_field("budget_bits", None), "waterfill card takes 1 to 7|trellis card takes 1 to 6"),
        (forge.card_field("budget_bits", 5.0), "key.codes is"),
        (forge.card_field("group_size", 32), "group_size is not the payload's"),
        (forge.card_field("exact", "bfloat16"), "dtype of exact tokens"),
    ],
)  # fmt: skip
def test_a_forged_card_is_refused(damage, message, kind, small):
    model, content = small[0], small[1][kind]
    assert check_card(content, model) is None
    with pytest.raises(CardError, match=message):
        CacheCard.from_bytes(bytearray(damage(content)), model, None)
    assert check_card(damage(content), model)


def test_no_block_of_trellis_keys_has_seven_bits(small):
    model, ids_T = small[0], torch.arange(20)
    for kind, message in (("waterfill", "does not fill the codes"), ("trellis", "no encoder")):
        content = bytes(sealed(model, ids_T, 5.0, kind).to_bytes())
        with pytest.raises(CardError, match=f"key.widths .*{message}"):
            CacheCard.from_bytes(bytearray(poke("key.widths", 0, 7)(content)), model, None)


def test_edited_cards_are_refused_or_work(small):
    model, contents = small
    lines = []

    @settings(
        max_examples=25, deadline=None, derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )  # fmt: skip
    @given(forge.cards(contents))
    def check(changed):
        lines.append(check_card(changed, model))

    check()
    assert 0 < lines.count(None) < 25
