"""Decode drift against an independent computation on a tiny model, and experiment=decode_drift from cell to findings."""

import pytest
import torch
from conftest import TEXT, checked_cell, tiny_model
from transformers import DynamicCache

from polykv.codecs.int8 import Int8
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.codecs.uniform import Uniform
from polykv.errors import PolyKVError
from polykv.evaluation import prompts
from polykv.evaluation.decode_drift import MODES, drift, log_probs, reply_of, write_replies
from polykv.pool import SharedKVPool
from polykv.recipe import Exempt, Recipe, load_recipe

N_PROMPT, N_REPLY, PAGE = 41, 24, 6
Q4 = Recipe("q4", Uniform(4), Uniform(4))


def ids(tokenizer, start, n_tokens):
    return torch.tensor(tokenizer(TEXT[start:]).input_ids[:n_tokens])


@pytest.fixture(scope="module")
def reply(llama, tokenizer):
    (found,) = write_replies(llama, [ids(tokenizer, 0, N_PROMPT)], N_REPLY, stops=())
    return found


def divergence(model, reply, recipe, page=PAGE):
    return drift(model, reply, log_probs(model, reply, load_recipe("full")), recipe, page)


def test_the_reply_is_the_models_own_greedy_one(llama, tokenizer, reply):
    prompt_BT = ids(tokenizer, 0, N_PROMPT)[None]
    whole_BT = llama.generate(
        prompt_BT, do_sample=False, max_new_tokens=N_REPLY, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(reply.ids_BT, whole_BT)
    assert reply.pool.n_tokens == N_PROMPT - 1 and reply.n_tokens == N_REPLY


def test_replies_in_a_batch_are_those_written_alone(llama, tokenizer):
    texts = [ids(tokenizer, 0, N_PROMPT), ids(tokenizer, 100, 17)]
    together = write_replies(llama, texts, N_REPLY, stops=())
    for text, found in zip(texts, together, strict=True):
        (alone,) = write_replies(llama, [text], N_REPLY, stops=())
        assert torch.equal(found.ids_BT, alone.ids_BT)


def test_a_reply_ends_at_a_stop(llama, tokenizer, reply):
    stop = int(reply.rest_BT[0, 5])
    first = reply.rest_BT[0, 1:].tolist().index(stop)
    (ended,) = write_replies(llama, [ids(tokenizer, 0, N_PROMPT)], N_REPLY, stops=[stop])
    assert ended.n_tokens == first + 1


@pytest.mark.parametrize("page", [None, PAGE])
def test_the_uncompressed_cache_gives_the_plain_models_probabilities(llama, reply, page):
    logits_BTV = llama(reply.ids_BT[:, :-1]).logits
    expected_TV = logits_BTV[0, N_PROMPT - 1 :].log_softmax(-1)
    found_TV = log_probs(llama, reply, load_recipe("full"), page)
    torch.testing.assert_close(found_TV, expected_TV, atol=1e-4, rtol=1e-4)


def test_the_full_recipe_has_no_divergence(llama, reply):
    for found in divergence(llama, reply, load_recipe("full")).values():
        assert found.kl.max() < 1e-6 and found.others["same_top1"].all()


def by_hand(model, reply, key, value, page):
    """Log-probabilities, one token at a time, with codecs that know each token alone."""
    cache = DynamicCache(
        (key.decode(key.encode(k)), value.decode(value.encode(v)))
        for k, v in (reply.pool.decode_layer(layer) for layer in range(reply.pool.n_layers))
    )
    found = []
    for place in range(reply.n_tokens):
        logits_BTV = model(reply.rest_BT[:, place : place + 1], past_key_values=cache).logits
        found.append(logits_BTV[0, -1].log_softmax(-1))
        if page and (place + 1) % page == 0:
            for layer in cache.layers:
                for name, codec in (("keys", key), ("values", value)):
                    x = getattr(layer, name)
                    new = codec.decode(codec.encode(x[:, :, -page:]))
                    setattr(layer, name, torch.cat([x[:, :, :-page], new], dim=2))
    return torch.stack(found)


@pytest.mark.parametrize("page", [None, PAGE, 5])  # 5: the last page is not full
def test_divergence_is_that_of_an_independent_computation(llama, reply, page):
    codecs = Uniform(3), TurboQuantMSE(2)
    found = divergence(llama, reply, Recipe("mine", *codecs), page or PAGE)
    found = found["pages" if page else "exact"]
    full_TV = by_hand(llama, reply, *[load_recipe("full").key] * 2, None)
    other_TV = by_hand(llama, reply, *codecs, page)
    kl_T = torch.nn.functional.kl_div(other_TV, full_TV, reduction="none", log_target=True).sum(-1)
    assert kl_T.mean() > 1e-3
    torch.testing.assert_close(torch.tensor(found.kl), kl_T, atol=1e-4, rtol=1e-3)


def test_the_first_page_does_not_know_that_it_will_be_quantized(llama, reply):
    found = divergence(llama, reply, Q4)
    exact, pages = (found[mode].kl for mode in MODES)
    assert exact[:PAGE] == pytest.approx(pages[:PAGE], rel=1e-3, abs=1e-7)
    assert abs(exact[PAGE:] / pages[PAGE:] - 1).min() > 1e-3


def test_new_tokens_take_the_statistics_of_the_prompt(llama, reply):
    """Int8 per tensor has one scale: that of the prompt, beyond which values are cut."""
    recipe = Recipe("int8", Int8(), Int8())
    scales = [
        x.abs().max() / 127
        for layer in range(reply.pool.n_layers)
        for x in reply.pool.decode_layer(layer)
    ]
    cut = []

    cache = reply.pool.under(recipe).dequantize()
    llama(reply.rest_BT[:, :PAGE], past_key_values=cache)
    for layer in cache.layers:
        for name in ("keys", "values"):
            x, scale = getattr(layer, name), scales[len(cut)]
            new = (x[:, :, -PAGE:] / scale).round().clamp(-127, 127) * scale
            cut.append(bool((new - x[:, :, -PAGE:]).abs().max() > scale))
            setattr(layer, name, torch.cat([x[:, :, :-PAGE], new], dim=2))
    assert any(cut)  # so that the page's own scale would give other values
    rest_BT = reply.rest_BT[:, PAGE : 2 * PAGE]
    expected_TV = llama(rest_BT, past_key_values=cache).logits[0].log_softmax(-1)
    found_TV = log_probs(llama, reply, recipe, PAGE)[PAGE : 2 * PAGE]
    torch.testing.assert_close(found_TV, expected_TV, atol=1e-4, rtol=1e-4)
