"""A card read in place gives what the injected one gives, for every policy and any mix of tiers."""

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from polykv import attend_in_place, config, kernels
from polykv.attention.prefix import attend_prefix
from polykv.errors import PolyKVError
from polykv.handoff.card import CacheCard
from polykv.handoff.in_place import segments_by_layer
from polykv.handoff.mixed import MixedCodec
from polykv.handoff.policy import OWN, load_policy
from polykv.pool import prefill

N_TOKENS, N_LAYERS, KV_HEADS, DIM = 180, 2, 3, 16
POLICIES = map(load_policy, config.available("policy"))
CARDS = [policy.name for policy in POLICIES if policy.store != "text" and policy.carries == OWN]


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mixed(codec, tiers, seed):
    """One side; keys (seed 0) with biased channels, which cards take off."""
    layers = [gaussian(1, KV_HEADS, len(tiers), DIM, seed=seed + i) for i in range(N_LAYERS)]
    tiers_T = torch.tensor(tiers, dtype=torch.uint8)
    if seed > 0:
        return codec.encode(layers, tiers_T)
    layers = [layer + torch.linspace(-5, 5, DIM) for layer in layers]
    return codec.encode(layers, tiers_T, codec.channels_of(layers, tiers_T))


pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=24)


BACKENDS = {kernels.TORCH, kernels.pick_backend("auto", torch.device("cpu"))}


@settings(max_examples=40, deadline=None)
@given(pairs, st.sampled_from(sorted(BACKENDS)))
def test_segments_attend_as_the_decoded_card_does(tiers, backend):
    codec = MixedCodec(backend=backend)
    key, value = (mixed(codec, side, i) for i, side in enumerate(zip(*tiers, strict=True)))
    layers = segments_by_layer(key, value, codec, KV_HEADS)
    k_BHTD, v_BHTD = (codec.decode(side).double() for side in (key, value))
    q_HQD = gaussian(KV_HEADS, 2, DIM, seed=9)
    for index, segments in enumerate(layers):
        assert len(segments) == len(set(tiers))
        assert sum(segment.n_tokens for segment in segments) == len(tiers)
        heads = slice(index * KV_HEADS, (index + 1) * KV_HEADS)
        own = {"key": k_BHTD, "value": v_BHTD}
        for segment in segments:
            pair = dict(zip(own, segment.decode(), strict=True))
            for side, decoded in pair.items():
                told = own[side][:, heads].float()
                gaps = torch.cdist(decoded[0], told[0]).amin(-1)
                assert (gaps < 1e-5).all()  # each is one of the card's
        scores_HQT = (q_HQD.double() @ k_BHTD[0, heads].mT) * 0.25
        out_HQD, lse_HQ = attend_prefix(q_HQD, segments, 0.25, backend)
        assert torch.allclose(lse_HQ.double(), scores_HQT.logsumexp(-1), atol=1e-5)
        assert torch.allclose(
            out_HQD.double(), scores_HQT.softmax(-1) @ v_BHTD[0, heads], atol=1e-5
        )
    assert sum(s.nbytes for segments in layers for s in segments) == sum(
        part.nbytes for side in (key, value) for part in side.parts.values()
    )


def test_a_card_of_one_tier_is_read_without_a_copy():
    codec = MixedCodec()
    key, value = mixed(codec, [1] * 30, 0), mixed(codec, [2] * 30, 1)
    (segment,) = segments_by_layer(key, value, codec, KV_HEADS)[1]
    kept = key.parts[1].tensors["codes"]
    assert (
        segment.key.tensors["codes"].untyped_storage().data_ptr()
        == kept.untyped_storage().data_ptr()
    )


# Every policy with one architecture, every architecture with one or more policies.
ARCHITECTURES = ("llama", "gpt2", "qwen3")
CASES = [
    pytest.param(policy, name, marks=() if (i - j) % 3 == 0 else pytest.mark.slow)
    for i, policy in enumerate(CARDS)
    for j, name in enumerate(ARCHITECTURES)
]


@pytest.mark.parametrize(("policy", "architecture"), CASES)
def test_a_receiver_in_place_computes_what_the_injected_one_does(policy, architecture, tokenizer):
    model = tiny_model(architecture)
    ids = torch.randint(300, (N_TOKENS,), generator=torch.Generator().manual_seed(1))
    # Six bits: head_dim 8 to 16 makes scales dear, and tiers should mix.
    card = CacheCard.seal(prefill(model, ids[None]), ids, model, tokenizer, policy, 6.0)
    injected, in_place = card.dequantize(), card.reader()
    feed = torch.tensor([[5, 9, 7]])
    for _ in range(8):
        there = model(feed, past_key_values=injected).logits[:, -1]
        with attend_in_place(model):
            here = model(feed, past_key_values=in_place).logits[:, -1]
        assert torch.allclose(here, there, atol=5e-5)
        feed = there.argmax(-1, keepdim=True)  # not each its own: random weights do tie


def test_agents_share_a_card(tokenizer):
    model = tiny_model("llama")
    ids = torch.randint(300, (60,), generator=torch.Generator().manual_seed(1))
    card = CacheCard.seal(prefill(model, ids[None]), ids, model, tokenizer, "uniform", 6.0)
    turns = torch.cat([ids.expand(3, -1), torch.tensor([[5], [9], [7]])], dim=1)
    with attend_in_place(model):
        together = model(turns[:, 60:], past_key_values=card.reader(3)).logits
    for agent in range(3):
        alone = model(turns[agent : agent + 1, 60:], past_key_values=card.dequantize()).logits
        assert torch.allclose(together[agent], alone[0], atol=1e-4)
    with pytest.raises(PolyKVError, match="n_agents=0"):
        card.reader(0)
