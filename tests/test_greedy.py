"""Greedy answers are the model's own, whatever its generation_config recommends for sampling."""

import pytest
import torch
from conftest import TEXT, tiny_model
from transformers import DynamicCache, GenerationConfig

import polykv
from polykv.greedy import greedy
from polykv.handoff.policy import load_policy
from polykv.handoff.relay import Handoff, play
from polykv.handoff.tasks import Task
from polykv.pool import prefill

QUERIES = ["What does each agent ask ?", "Is a cache small ?", "A"]
NEW_TOKENS = 24
# Each changes what `generate(do_sample=False)` writes, or how much, or makes it warn.
RECOMMENDED = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 5,
    "top_p": 0.9,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[17]],
    "suppress_tokens": [20, 30],
    "begin_suppress_tokens": [40],
    "forced_eos_token_id": 0,
    "exponential_decay_length_penalty": (2, 2.0),
    "min_length": 200,
    "min_new_tokens": 20,
    "max_length": 5,
    "num_beams": 3,
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def pool(model, tokenizer):
    return polykv.SharedKVPool.from_text(model, tokenizer, TEXT[:300], polykv.load_recipe("polykv"))


def ids_of(tokenizer):
    return [
        tokenizer(query, return_tensors="pt", add_special_tokens=False).input_ids[0]
        for query in QUERIES
    ]


@pytest.fixture(scope="module")
def written(model, pool, tokenizer):
    return [greedy(model, pool.dequantize(), [ids_T], NEW_TOKENS)[0] for ids_T in ids_of(tokenizer)]


def test_it_writes_the_likeliest_tokens(model, pool, tokenizer, written):
    for ids_T, answer_T in zip(ids_of(tokenizer), written, strict=True):
        whole = torch.cat([ids_T, answer_T])[None]
        logits_TV = model(whole, past_key_values=pool.dequantize()).logits[0]
        assert answer_T.tolist() == logits_TV.argmax(-1)[len(ids_T) - 1 : -1].tolist()
        assert len(answer_T) == NEW_TOKENS


@pytest.fixture(params=["one", "several"])
def stops(request, model, written, monkeypatch):
    """The hub's settings, with end-of-sequence tokens that cut the first answer short of the others."""
    stop = int(written[0][5])
    eos = stop if request.param == "one" else [299, stop]
    settings = GenerationConfig(eos_token_id=eos, pad_token_id=0, bos_token_id=0, **RECOMMENDED)
    monkeypatch.setattr(model, "generation_config", settings)
    return [stop]


def cut(answer_T, stops):
    answer = answer_T.tolist()
    ends = [answer.index(stop) + 1 for stop in stops if stop in answer]
    return answer[: min(ends, default=len(answer))]


@pytest.mark.parametrize("reader", ["dequantize", "in_place"])
def test_a_pool_is_asked_greedily(reader, model, pool, tokenizer, written, stops, capfd, recwarn):
    expected = [tokenizer.decode(cut(x, stops), skip_special_tokens=True) for x in written]
    assert pool.ask(model, tokenizer, QUERIES, NEW_TOKENS, reader) == expected
    assert len(cut(written[0], stops)) < NEW_TOKENS
    assert not recwarn.list and capfd.readouterr() == ("", "")


def test_a_relay_is_played_greedily(model, tokenizer, monkeypatch, capfd, recwarn):
    task = Task(("Two agents share a", "Is a cache small ?"), (12, 12), ("1", "1"))

    def answers():
        handoff = Handoff(model, tokenizer, load_policy("full"), 16.0, "append")
        return [turn.answer_T.tolist() for turn in play([task], [handoff])[0]]

    expected = answers()
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=0, **RECOMMENDED))
    assert answers() == expected
    assert not recwarn.list and capfd.readouterr() == ("", "")


def test_an_end_within_a_batch_changes_no_other_row(model, pool, tokenizer, written, stops):
    together = greedy(model, unshared(pool, len(QUERIES)), ids_of(tokenizer), NEW_TOKENS)
    assert [x.tolist() for x in together] == [cut(x, stops) for x in written]


def test_a_text_ends_the_row_that_says_it(model, pool, tokenizer, written):
    said = [tokenizer.decode(x) for x in written]
    text = next(said[0][i : i + 3] for i in range(5, 99) if said[0][i : i + 3] not in said[1])
    ends = [
        next((n for n in range(1, len(x) + 1) if text in tokenizer.decode(x[:n])), None)
        for x in written
    ]
    assert ends[0] < len(written[0]) and ends[1] is None
    prompts = ids_of(tokenizer)
    together = greedy(
        model,
        unshared(pool, len(QUERIES)),
        prompts,
        NEW_TOKENS,
        tokenizer,
        [],
        until=["not said", text],
    )
    assert [x.tolist() for x in together] == [
        x[:end].tolist() for x, end in zip(written, ends, strict=True)
    ]


def unshared(pool, n_agents):
    layers = (pool.decode_layer(index) for index in range(pool.n_layers))
    return DynamicCache([tuple(x.repeat(n_agents, 1, 1, 1) for x in layer) for layer in layers])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_padded_rows_keep_their_positions(architecture, tokenizer):
    model = tiny_model(architecture)
    ids_BT = tokenizer(TEXT[:200], return_tensors="pt").input_ids
    full = polykv.SharedKVPool.from_cache(prefill(model, ids_BT), polykv.load_recipe("full"))
    alone = [
        greedy(model, full.dequantize(), [ids_T], 12)[0].tolist() for ids_T in ids_of(tokenizer)
    ]
    together = greedy(model, unshared(full, len(QUERIES)), ids_of(tokenizer), 12)
    assert [x.tolist() for x in together] == alone


def test_without_an_end_token_it_writes_as_many_as_asked_for(model, pool, tokenizer, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    (answer_T,) = greedy(model, pool.dequantize(), ids_of(tokenizer)[:1], 7)
    assert len(answer_T) == 7


def test_the_output_layer_reads_contiguous_rows(llama, tokenizer):
    seen = []
    hook = llama.lm_head.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].is_contiguous())
    )
    greedy(llama, DynamicCache(config=llama.config), ids_of(tokenizer), 2)
    hook.remove()
    assert len(seen) == 2 and all(seen)  # torch copies the weights once per row otherwise
