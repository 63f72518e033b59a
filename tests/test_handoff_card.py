"""CacheCard: what comes out is what went in, within its budget, and everything else is refused."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import TEXT, tiny_model
from transformers import DynamicCache

import polykv
from polykv import config
from polykv.codecs.uniform import Uniform
from polykv.errors import PolyKVError
from polykv.handoff import cardfile, packing
from polykv.handoff.card import CacheCard
from polykv.handoff.mixed import TIERS, MixedCodec
from polykv.handoff.policy import OWN, Policy, load_policy
from polykv.handoff.signals import Topology
from polykv.pool import prefill

POLICIES = map(load_policy, config.available("policy"))
CARDS = [policy.name for policy in POLICIES if policy.store != "text" and policy.carries == OWN]
BUDGETED = [name for name in CARDS if load_policy(name).store == "mixed"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", head_dim=64, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def ids(tokenizer):
    found = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    return found.repeat(1 + 512 // len(found))[:512]


def sealed(model, tokenizer, ids, policy="uniform", budget_bits=4.0, **options):
    cache = prefill(model, ids[None])
    card = CacheCard.seal(cache, ids, model, tokenizer, policy, budget_bits, **options)
    return card, cache


def same_tensors(one, other):
    a, b = one.payload.tensors(), other.payload.tensors()
    assert set(a) == set(b)
    pairs = [(one.ids_T, other.ids_T), *((a[name], b[name]) for name in a)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def same_cache(one, other):
    return all(
        torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
        for a, b in zip(one.layers, other.layers, strict=True)
    )


def continued(model, cache, n_tokens, steps=24):
    feed, out = torch.tensor([[7]]), []
    for _ in range(steps):
        feed = model(input_ids=feed, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        out.append(int(feed))
    assert cache.get_seq_length() == n_tokens + steps
    return out


@pytest.mark.parametrize("policy", CARDS)
def test_round_trip_is_bit_identical(policy, model, tokenizer, ids, tmp_path):
    card, _ = sealed(model, tokenizer, ids[:200], policy, topology=Topology(50, 3))
    card.save(tmp_path / "a" / "card.safetensors")
    again = polykv.CacheCard.open(tmp_path / "a" / "card.safetensors", model, tokenizer)
    assert same_tensors(card, again) and same_cache(card.dequantize(), again.dequantize())
    assert again.metadata == card.metadata and again.digest == card.digest
    assert again.n_tokens == 200 and again.mean_bits == card.mean_bits
    assert again.to_bytes() == card.to_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["card.safetensors"]


def test_full_is_token_identical_to_no_handoff(model, tokenizer, ids):
    card, cache = sealed(model, tokenizer, ids, "full")
    received = CacheCard.from_bytes(card.to_bytes(), model, tokenizer).dequantize()
    assert same_cache(received, cache)
    assert continued(model, received, 512) == continued(model, cache, 512)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_models_round_trip(dtype, model, tokenizer, ids):
    half = tiny_model("llama", head_dim=64).to(dtype)
    card, cache = sealed(half, tokenizer, ids[:100], "full")
    assert same_cache(CacheCard.from_bytes(card.to_bytes(), half, tokenizer).dequantize(), cache)
    card, _ = sealed(half, tokenizer, ids[:100], "local", 5.0)
    again = CacheCard.from_bytes(card.to_bytes(), half, tokenizer)
    assert same_tensors(card, again)
    # The exact tier of a bf16 model is bf16: a cast to fp16 would only add an error.
    assert card.metadata.exact == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("policy", BUDGETED)
@pytest.mark.parametrize("budget", (3, 4, 5.37, 6, 8, 12))
def test_nominal_bits_never_exceed_the_budget_and_stored_ones_are_counted_to_the_byte(
    policy, budget, model, tokenizer, ids
):
    card, _ = sealed(model, tokenizer, ids[:256], policy, budget)
    assert 0.99 * budget < card.nominal_bits <= budget
    assert (card.payload.key.tiers_T[:4] == 4).all() and (card.payload.value.tiers_T[:4] == 4).all()
    n_vectors = 8  # 4 layers of 2 heads
    stored = 4 * 256  # ids
    for side in (card.payload.key, card.payload.value):
        # A vector of 64 has one fp16 scale, and the map 3 bits a token.
        vector = {0: 16 + 2, 1: 24 + 2, 2: 32 + 2, 3: 64 + 2, 4: 128}
        stored += n_vectors * sum(vector[tier] for tier in side.tiers_T.tolist()) + 256 * 3 // 8
    stored += 2 * n_vectors * 64 * 2  # mean and spread of a channel
    assert card.nbytes == stored and card.mean_bits == 8 * stored / (256 * n_vectors * 2 * 64)
    header = len(card.to_bytes()) - stored
    assert 0 < header < 4096


@pytest.mark.parametrize("budget", (3, 4, 8, 16))
def test_uniform_gives_every_token_what_was_asked_for(budget, model, tokenizer, ids):
    card, _ = sealed(model, tokenizer, ids[:256], "uniform", budget)
    for side in (card.payload.key, card.payload.value):
        assert set(side.tiers_T[4:].tolist()) == {TIERS.index(budget)}
    between, _ = sealed(model, tokenizer, ids[:256], "uniform", 5.0)
    assert set(between.payload.key.tiers_T[4:].tolist()) == {2, 3}


def test_short_cards_keep_the_budget_too(model, tokenizer, ids):
    for n_tokens in range(1, 40, 3):
        card, _ = sealed(model, tokenizer, ids[:n_tokens], "uniform", 4.0)
        assert card.nominal_bits == (4.0 if n_tokens > 4 else 16.0)
        again = CacheCard.from_bytes(card.to_bytes(), model, tokenizer)
        assert same_tensors(card, again) and (again.payload.key.channels is None) == (n_tokens <= 4)


def test_a_budget_that_cannot_be_kept_is_refused_with_the_least(model, tokenizer, ids):
    with pytest.raises(PolyKVError, match="budget_bits=2.9 .* lowest tier has 3 bits"):
        sealed(model, tokenizer, ids[:64], "uniform", 2.9)
    four = Policy("four", tiers=(4, 8))
    with pytest.raises(PolyKVError, match="lowest tier has 4 bits"):
        sealed(model, tokenizer, ids[:64], four, 3.9)


def test_a_mix_with_a_low_tier_is_told_at_sealing(model, tokenizer, ids):
    packing.warn_of_low_tiers.cache_clear()
    with pytest.warns(UserWarning, match=r"50 % at 3 bits .*21 %.*50 % at 4 bits .*9.8 %"):
        sealed(model, tokenizer, ids[:256], "uniform", 3.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sealed(model, tokenizer, ids[:256], "uniform", 4.0)


def test_the_expected_error_is_that_of_normal_vectors():
    codec, x = MixedCodec(), torch.randn(1, 4, 400, 64, generator=torch.Generator().manual_seed(0))
    for tier in range(3):
        kept = codec.encode([x], torch.full((400,), tier, dtype=torch.uint8))
        error = (codec.decode(kept) - x).norm() / x.norm()
        assert float(error) == pytest.approx(codec.expected_error(tier, 64), rel=0.1)


def biased_cache(model, n_tokens):
    """Keys as Qwen's: content of 5 to 19, and in a few channels a bias of 100 to 280."""
    random = torch.Generator().manual_seed(0)
    cache = DynamicCache(config=model.config)
    for layer in range(4):
        size = 5 + 14 * torch.rand(1, 2, 1, 64, generator=random)
        keys = torch.randn(1, 2, n_tokens, 64, generator=random) * size
        keys[..., 60:] += torch.tensor([100.0, -280.0, 180.0, -120.0])
        cache.update(keys, torch.randn(1, 2, n_tokens, 64, generator=random), layer)
    return cache, keys


def test_biased_keys_keep_their_content_where_plain_codes_lose_it(model, tokenizer, ids):
    """The card of format 1, Uniform without a mean, fails the very bound."""
    cache, keys = biased_cache(model, 256)
    content = (keys - keys.mean(2, keepdim=True))[:, :, 4:]

    def lost(decoded):
        return float((decoded - keys)[:, :, 4:].norm() / content.norm())

    for bits, bound in ((4.0, 0.12), (8.0, 0.01)):
        card = CacheCard.seal(cache, ids[:256], model, tokenizer, "uniform", bits)
        assert lost(card.decode()[3][0]) < bound
        plain = Uniform(int(bits), 64)
        assert lost(plain.decode(plain.encode(keys))) > 4 * bound


def test_append_keeps_the_parents_bits(model, tokenizer, ids):
    card, _ = sealed(model, tokenizer, ids[:256], "topology", 4.0)
    for end in (300, 301, 400):
        cache = card.dequantize()
        model(input_ids=ids[None, card.n_tokens : end], past_key_values=cache)
        child = card.append(cache, ids[:end], model, tokenizer, "topology", 4.0)
        for side in ("key", "value"):
            old, new = getattr(card.payload, side), getattr(child.payload, side)
            assert torch.equal(new.tiers_T[: card.n_tokens], old.tiers_T)
            for tier, part in old.parts.items():
                for name, tensor in part.tensors.items():
                    kept = new.parts[tier].tensors[name][:, :, : tensor.shape[2]]
                    assert torch.equal(kept, tensor)
        for a, b in zip(child.decode(), card.decode(), strict=True):
            assert all(torch.equal(x[:, :, : card.n_tokens], y) for x, y in zip(a, b, strict=True))
        assert child.nominal_bits <= 4.0 and child.metadata.parent == card.digest
        assert all(map(torch.equal, child.payload.key.channels, card.payload.key.channels))
        assert child.metadata.hop == card.metadata.hop + 1
        card = CacheCard.from_bytes(child.to_bytes(), model, tokenizer)


def test_append_refuses_other_tokens_and_other_precision(model, tokenizer, ids):
    card, cache = sealed(model, tokenizer, ids[:64])
    other = ids[:64].clone()
    other[3] += 1
    with pytest.raises(PolyKVError, match="does not continue"):
        card.append(cache, other, model, tokenizer)
    with pytest.raises(PolyKVError, match="another dtype"):
        card.append(cache, ids[:64], model, tokenizer, "full")
    with pytest.raises(PolyKVError, match=r"takes 4\.000 bits and budget_bits=3"):
        card.append(cache, ids[:64], model, tokenizer, "uniform", 3.0)


@pytest.mark.slow
def test_a_fresh_process_continues_token_identically(checkpoint, llama, tokenizer, tmp_path):
    path = tmp_path / "card.safetensors"
    ids = tokenizer(TEXT[:300], return_tensors="pt").input_ids[0]
    card, _ = sealed(llama, tokenizer, ids, "local", 6.0)
    card.save(path)
    code = (
        "import sys, json, torch, polykv; torch.set_num_threads(1)\n"
        "model, tokenizer = polykv.load_model(sys.argv[1], 'cpu')\n"
        "card = polykv.CacheCard.open(sys.argv[2], model, tokenizer)\n"
        "cache, feed, out = card.dequantize(), torch.tensor([[7]]), []\n"
        "for _ in range(24):\n"
        "    feed = model(input_ids=feed, past_key_values=cache).logits[:, -1].argmax(-1)[None]\n"
        "    out.append(int(feed))\n"
        "print(json.dumps(out))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint), str(path)],
        capture_output=True, text=True, timeout=120, cwd=config.REPO,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = continued(llama, card.dequantize(), len(ids))
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_another_model_or_tokenizer_is_refused(model, tokenizer, ids):
    content = sealed(model, tokenizer, ids[:64])[0].to_bytes()
    twin = tiny_model("llama", head_dim=64, max_position_embeddings=4096)
    assert CacheCard.from_bytes(bytearray(content), twin, tokenizer).n_tokens == 64
    other = tiny_model("llama", head_dim=64, max_position_embeddings=4096)
    other.model.layers[2].mlp.up_proj.weight[3, 5] += 1e-3
    for changed in (other, tiny_model("llama"), tiny_model("qwen3")):
        with pytest.raises(polykv.CardError, match="another model"):
            CacheCard.from_bytes(bytearray(content), changed, tokenizer)
    from reference_model.tokenizer import build_tokenizer

    with pytest.raises(polykv.CardError, match="another tokenizer"):
        CacheCard.from_bytes(bytearray(content), model, build_tokenizer())


@pytest.mark.parametrize(
    ("version", "message"),
    [(4, "format version 4 .* reads up to 3"), (2, "format version 2, .* seal it again")],
)
def test_another_version_is_refused(version, message, model, tokenizer, ids, monkeypatch):
    card, _ = sealed(model, tokenizer, ids[:64])
    monkeypatch.setattr(cardfile, "VERSION", version)
    content = card.to_bytes()
    monkeypatch.undo()
    with pytest.raises(polykv.CardError, match=message) as refused:
        CacheCard.from_bytes(content, model, tokenizer)
    assert "\n" not in str(refused.value)


def test_memory_store_and_missing_cards(model, tokenizer, ids):
    card, _ = sealed(model, tokenizer, ids[:64])
    card.save("memory://cards/one.safetensors")
    assert same_tensors(CacheCard.open("memory://cards/one.safetensors", model, tokenizer), card)
    for path in ("memory://cards/two", "/nowhere/at/all", "nosuchscheme://x"):
        with pytest.raises(polykv.CardError):
            CacheCard.open(path, model, tokenizer)
    with pytest.raises(polykv.CardError, match="cannot write"):
        card.save("/proc/card")


def test_a_card_is_not_moved_into_a_folder_of_its_name(model, tokenizer, ids, tmp_path):
    card, _ = sealed(model, tokenizer, ids[:64])
    with pytest.raises(polykv.CardError, match="is a folder; give the name of a file"):
        card.save(str(tmp_path))
    assert not any(tmp_path.iterdir())


def test_seal_refuses_what_does_not_belong_together(model, tokenizer, ids):
    cache = prefill(model, ids[None, :64])
    with pytest.raises(PolyKVError, match="does not fit 63 token ids"):
        CacheCard.seal(cache, ids[:63], model, tokenizer)
    with pytest.raises(PolyKVError, match="does not fit"):
        CacheCard.seal(cache, ids[:64], tiny_model("llama"), tokenizer)
    with pytest.raises(PolyKVError, match="no policy named 'lokal'; did you mean 'local'"):
        CacheCard.seal(cache, ids[:64], model, tokenizer, "lokal")
    with pytest.raises(PolyKVError, match="makes no card"):
        CacheCard.seal(cache, ids[:64], model, tokenizer, "reprefill")
    with pytest.raises(PolyKVError, match="empty"):
        CacheCard.seal(DynamicCache(config=model.config), [], model, tokenizer)


def test_inverse_gives_bits_to_the_other_tokens(model, tokenizer, ids):
    tiers = {
        name: sealed(model, tokenizer, ids[:256], name, 6.0)[0]
        .payload.key.tiers_T[4:]
        .numpy()
        .astype(float)
        for name in ("local", "inverse")
    }
    assert np.corrcoef(tiers["local"], tiers["inverse"])[0, 1] < 0


def test_sinks_and_recent_tokens_are_served_first(model, tokenizer, ids):
    card, _ = sealed(model, tokenizer, ids, "sinks_recent", 3.5)
    tiers = card.payload.key.tiers_T.numpy()
    inside = np.r_[tiers[:4], tiers[-64:]]
    assert inside.min() >= 2 > tiers[4:-64].mean()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"importance": ("attenton",)}, "no signal 'attenton'"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"tiers": (4, 2)}, "tiers"),
        ({"store": "float8"}, "no store"),
    ],
)
def test_a_policy_refuses_what_it_does_not_know(settings, message):
    with pytest.raises(PolyKVError, match=message):
        Policy("mine", **settings)
