"""Agents that answer together, each from a cache of its own length, write what each writes alone."""

import pytest
import torch
from conftest import TEXT, tiny_model
from pairwise import slow
from transformers import DynamicCache

from polykv.errors import PolyKVError
from polykv.handoff.policy import load_policy
from polykv.handoff.relay import Handoff, first_turns, play
from polykv.handoff.replies import replies
from polykv.handoff.tasks import Task
from polykv.pool import prefill

LENGTHS = (7, 40, 12, 25, 33)  # of the caches
PROMPTS = (3, 1, 9, 2, 5)
LIMITS = (12, 12, 4, 12, 9)
ARCHITECTURES = ("llama", "qwen2", "phi3", "gpt2", "gpt_neox")
PROBLEMS = ("The pool is written once", "Each agent asks a question of its own .", "A cache ?")


@pytest.fixture(scope="module", params=[*ARCHITECTURES][:3] + slow(*[*ARCHITECTURES][3:]))
def model(request):
    return tiny_model(request.param)


def text_ids(tokenizer):
    return tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids[0]


def rows(model, tokenizer, empty=False):
    """Caches and prompts of several rows, cut from the text at different places."""
    ids_T = text_ids(tokenizer)
    caches, prompts = [], []
    for row, (n_cached, n_prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        whole_T = ids_T[10 * row : 10 * row + n_cached + n_prompt]
        cached_T = whole_T[:n_cached]
        caches.append(
            DynamicCache(config=model.config) if empty else prefill(model, cached_T[None])
        )
        prompts.append(whole_T if empty else whole_T[n_cached:])
    return caches, prompts


def alone(model, tokenizer, empty=False):
    caches, prompts = rows(model, tokenizer, empty)
    each = zip(caches, prompts, LIMITS, strict=True)
    return [replies(model, tokenizer, [c], [p], [limit])[0] for c, p, limit in each]


def assert_same(together, expected):
    for (ids_T, cache), (own_T, own) in zip(together, expected, strict=True):
        assert ids_T.tolist() == own_T.tolist()
        for layer, other in zip(cache.layers, own.layers, strict=True):
            torch.testing.assert_close(layer.keys, other.keys, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(layer.values, other.values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("empty", (False, True))
def test_a_row_of_a_batch_writes_what_it_writes_alone(empty, model, tokenizer):
    caches, prompts = rows(model, tokenizer, empty)
    together = replies(model, tokenizer, caches, prompts, LIMITS)
    assert_same(together, alone(model, tokenizer, empty))
    for (ids_T, cache), n_cached, n_prompt in zip(together, LENGTHS, PROMPTS, strict=True):
        assert cache.get_seq_length() == n_cached + n_prompt + len(ids_T)


def test_one_row_writes_the_likeliest_tokens(model, tokenizer):
    caches, prompts = rows(model, tokenizer)
    (ids_T, _), *_ = alone(model, tokenizer)
    whole_T = torch.cat([text_ids(tokenizer)[: LENGTHS[0]], prompts[0], ids_T])
    likeliest = model(whole_T[None]).logits[0].argmax(-1)
    start = LENGTHS[0] + PROMPTS[0]
    assert ids_T.tolist() == likeliest[start - 1 : -1].tolist() and len(ids_T) == LIMITS[0]


def test_rows_that_have_ended_leave_the_batch(model, tokenizer, monkeypatch):
    first = alone(model, tokenizer)
    stop = int(first[0][0][2])
    monkeypatch.setattr(model.generation_config, "eos_token_id", stop)
    expected = alone(model, tokenizer)
    assert len(expected[0][0]) <= 3 < len(first[0][0])
    caches, prompts = rows(model, tokenizer)
    sizes, heard = [], []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: sizes.append(len(given["input_ids"])), with_kwargs=True
    )
    together = replies(model, tokenizer, caches, prompts, LIMITS, lambda: heard.append(len(sizes)))
    hook.remove()
    assert_same(together, expected)
    assert len(heard) == len(LENGTHS) and heard == sorted(heard)
    assert sizes[0] == len(LENGTHS) > sizes[max(LIMITS) - 1]


def test_a_model_that_counts_padding_is_refused(tokenizer, monkeypatch, llama):
    monkeypatch.setattr(llama.config, "model_type", "mpt")
    with pytest.raises(PolyKVError, match="mpt counts the padding"):
        replies(llama, tokenizer, *rows(llama, tokenizer), LIMITS)


def tasks():
    prompts = (" Each agent asks .", " And then ?")
    return [Task((problem, *prompts), (10, 6, 10), ("1",) * 3) for problem in PROBLEMS]


def handoffs(model, tokenizer, policy, n):
    return [Handoff(model, tokenizer, load_policy(policy), 4.0, "append") for _ in range(n)]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ("uniform", "topology", "reprefill"))
def test_a_relay_among_others_is_the_relay_alone(policy, llama, tokenizer):
    ways = handoffs(llama, tokenizer, policy, 3)
    together = play(tasks(), ways)
    for task, turns, way in zip(tasks(), together, ways, strict=True):
        (lonely,) = handoffs(llama, tokenizer, policy, 1)
        (expected,) = play([task], [lonely])
        for turn, own in zip(turns, expected, strict=True):
            assert turn.prompt_T.tolist() == own.prompt_T.tolist()
            assert turn.answer_T.tolist() == own.answer_T.tolist()
        assert way.bits == lonely.bits
        assert len(way.bits) == (0 if policy == "reprefill" else 2)


def test_the_first_turns_of_another_relay_are_gone_on_from_and_left_as_they_were(llama, tokenizer):
    first = first_turns(tasks(), llama, tokenizer)
    lengths = [cache.get_seq_length() for _, cache in first]
    whole = play(tasks(), handoffs(llama, tokenizer, "uniform", 3))
    for _ in range(2):
        found = play(tasks(), handoffs(llama, tokenizer, "uniform", 3), first=first)
        for turns, own in zip(found, whole, strict=True):
            assert [t.answer_T.tolist() for t in turns] == [t.answer_T.tolist() for t in own]
    assert [cache.get_seq_length() for _, cache in first] == lengths


def test_relays_of_fp16_cards_write_what_transformers_writes_of_all_their_tokens(llama, tokenizer):
    for turns in play(tasks(), handoffs(llama, tokenizer, "fp16", 3)):
        ids_T = torch.empty(0, dtype=torch.long)
        for turn in turns:
            asked = torch.cat([ids_T, turn.prompt_T])[None]
            out = llama.generate(
                asked, attention_mask=torch.ones_like(asked), max_new_tokens=len(turn.answer_T), do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            assert turn.answer_T.tolist() == out[0, asked.shape[1] :].tolist()
            ids_T = torch.cat([asked[0], turn.answer_T])
