"""Cards of models with states: exact, counted to the byte, and refused where they do not fit."""

from dataclasses import replace
from math import ceil

import pytest
import torch
from test_handoff_windows import TOKENIZER, reopened, sealed
from test_recurrent import N_NEW, ids_of, model_of

from polykv.attention.cascade import attend_in_place
from polykv.errors import PolyKVError
from polykv.greedy import greedy
from polykv.handoff import cardfile, verify
from polykv.handoff.card import CacheCard
from polykv.handoff.cardfile import CardError
from polykv.handoff.policy import load_policy
from polykv.prefill import prefill
from polykv.recurrent import State

N = 20


@pytest.fixture(
    scope="module", params=["qwen3_next", pytest.param("nemotron_h", marks=pytest.mark.slow)]
)
def model(request):
    return model_of(request.param)


def generated(model, ids_T):
    out = model.generate(ids_T[None], max_new_tokens=N_NEW, do_sample=False, pad_token_id=0)
    return out[0, len(ids_T) :].tolist()


def states(card):
    kept = (one for one in card.decode() if isinstance(one, State))
    return [x for one in kept for x in one.tensors.values()]


def test_an_exact_card_and_one_appended_to_say_what_plain_generate_says(model):
    ids_T, queries = ids_of(N + 5), [ids_of(3, seed=seed) for seed in (1, 2)]
    card = reopened(sealed(model, ids_T[:N], "full"), model)
    longer = card.append(prefill(model, ids_T[None]), ids_T, model, TOKENIZER, "full")
    assert longer.metadata.parent == card.digest
    for one, known_T in ((card, ids_T[:N]), (reopened(longer, model), ids_T)):
        expected = [generated(model, torch.cat([known_T, query_T])) for query_T in queries]
        before = [x.clone() for x in states(one)]
        assert expected[0] != expected[1]
        for number, query_T in enumerate(queries):
            found = greedy(model, one.dequantize(), [query_T], N_NEW)
            assert found[0].tolist() == expected[number]
        with attend_in_place(model):
            together = greedy(model, one.reader(2), queries, N_NEW)
        assert [answer_T.tolist() for answer_T in together] == expected
        assert all(map(torch.equal, before, states(one)))


def test_stored_bytes_by_hand_and_states_bit_for_bit(model):
    cache = prefill(model, ids_of(N)[None])
    card = reopened(sealed(model, ids_of(N)), model)
    # One layer has keys and values: 4 exact tokens, the others with 4-bit codes and a scale; two maps of tiers, mean
    # and spread of keys, and ids.
    (keys,) = (one.keys for one in cache.layers if getattr(one, "keys", None) is not None)
    dim, heads = keys.shape[3], keys.shape[1]
    values = 2 * dim * 4 + (dim // 2 + 2) * (N - 4)
    state = [x for one in cache.layers for kind in ("conv", "recurrent")
             for x in getattr(one, f"{kind}_states", {}).values()]  # fmt: skip
    n_state = sum(x.nbytes for x in state)
    expected = 4 * N + 2 * (heads * values + ceil(3 * N / 8)) + 2 * 2 * heads * dim + n_state
    assert card.nbytes == expected
    assert card.mean_bits == 8 * expected / (2 * N * heads * dim + n_state // 2)
    assert card.nominal_bits == 4.0
    assert len(state) == len(states(card)) > 0 and all(map(torch.equal, state, states(card)))
    rest_T = ids_of(4, seed=3)
    dequantized = model(rest_T[None], past_key_values=card.dequantize()).logits
    with attend_in_place(model):
        in_place = model(rest_T[None], past_key_values=card.reader(1)).logits
    torch.testing.assert_close(in_place, dequantized, rtol=0, atol=1e-4)


def test_a_full_card_of_the_models_length_is_within_the_bound_of_memory(model):
    ids_T = ids_of(model.config.max_position_embeddings)
    assert len(sealed(model, ids_T, "full").to_bytes()) <= verify.largest(model)


@pytest.mark.parametrize(
    "change",
    [
        {"states": None},
        {"states": [0]},
        {"states": [0, 1, 2]},
        {"states": [2, 0]},
        {"states": [0, True]},
        {"states": [0, 3]},
        {"states": [0, "2"]},
        {"payload": "mixed"},
        {"payload": "windowed", "windows": [None, 8, None]},
        {"n_layers": 2},
        {"n_tokens": N + 1},
        {"dtype": "float16"},
    ],
)
def test_forged_metadata_are_refused(change):
    model = model_of("qwen3_next")
    fields, tensors, _ = cardfile.loads(sealed(model, ids_of(N)).to_bytes())
    assert fields["states"] == [0, 2]
    with pytest.raises(CardError):
        CacheCard.from_bytes(cardfile.dumps(fields | change, tensors), model, TOKENIZER)


def test_forged_states_are_refused():
    model = model_of("qwen3_next")
    fields, tensors, _ = cardfile.loads(sealed(model, ids_of(N)).to_bytes())
    state = tensors["state.recurrent.0"]
    bad = state.clone()
    bad.view(-1)[3] = torch.nan
    for forged in (state[:1], state[:, :1], state.half(), bad, None):
        changed = tensors | {"state.recurrent.0": forged}
        left = {name: x for name, x in changed.items() if x is not None}
        with pytest.raises(CardError, match="state.recurrent.0"):
            CacheCard.from_bytes(cardfile.dumps(fields, left), model, TOKENIZER)
    more = tensors | {"state.recurrent.1": state.clone()}
    with pytest.raises(CardError, match=r"state.recurrent.1"):
        CacheCard.from_bytes(cardfile.dumps(fields, more), model, TOKENIZER)


def test_a_receiver_without_states_and_another_models_cache_are_refused():
    model, other = (
        model_of("qwen3_next"),
        model_of("qwen3_next", layer_types=["full_attention"] * 3),
    )
    content = sealed(model, ids_of(N)).to_bytes()
    with pytest.raises(CardError, match="another model"):
        CacheCard.from_bytes(content, other, TOKENIZER)
    swapped = model_of(
        "qwen3_next", layer_types=["full_attention", "linear_attention", "linear_attention"]
    )
    for wrong in (other, swapped):
        with pytest.raises(PolyKVError, match="does not fit"):
            CacheCard.seal(prefill(wrong, ids_of(N)[None]), ids_of(N), model, TOKENIZER)


SIGNALS = ("attention_window", "value_norm")


@pytest.mark.parametrize("policy", ["waterfill", "topology", *SIGNALS])
def test_policies_that_need_every_layers_keys_are_refused_by_name(policy):
    model = model_of("qwen3_next")
    if policy in SIGNALS:
        policy = replace(load_policy("uniform"), name=policy, importance=(policy,))
    else:
        policy = load_policy(policy)
    with pytest.raises(PolyKVError, match=f"{policy.name}.*qwen3_next has states.*uniform"):
        sealed(model, ids_of(N), policy)
