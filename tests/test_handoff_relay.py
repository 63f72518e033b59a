"""Relays, tasks, GSM8K's extractions and tests, and the time to first token."""

import gc
import json
import random
from decimal import Decimal

import datasets
import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from polykv import config, hub, shipped, textfile
from polykv.errors import PolyKVError
from polykv.evaluation import gsm8k, numerals
from polykv.evaluation.statistics import mcnemar
from polykv.evaluation.ttft import STAGES, Route, measure
from polykv.handoff.policy import load_policy
from polykv.handoff.relay import Handoff, divergence, force, ids_of, play, read_first
from polykv.handoff.signals import Topology
from polykv.handoff.tasks import Task, load_tasks
from polykv.pool import prefill
from reference_model.tokenizer import build_tokenizer

TASK = Task(
    ("The pool is written once ." * 6, " Each agent asks .", " A cache .", " And then ?"),
    (12,) * 4,
    ("1",) * 4,
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", head_dim=64, max_position_embeddings=1024)


def handoff(model, tokenizer, policy, budget=4.0, reseal="append"):
    return Handoff(model, tokenizer, load_policy(policy), budget, reseal)


def kl(model, tokenizer, script, policy, budget=4.0, reseal="append"):
    exact = force(script, handoff(model, tokenizer, "full"))
    other = force(script, handoff(model, tokenizer, policy, budget, reseal))
    (found,) = divergence(script, exact, [other])
    return [float(c.kl.mean()) for c in found]


@pytest.mark.parametrize("reseal", ("append", "requantize"))
def test_a_relay_under_full_writes_what_one_agent_alone_would(reseal, model, tokenizer):
    (turns,) = play([TASK], [handoff(model, tokenizer, "full", reseal=reseal)])
    ids = torch.empty(0, dtype=torch.long)
    for turn in turns:
        ids = torch.cat([ids, turn.prompt_T])
        asked = ids[None]
        out = model.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert turn.answer_T.tolist() == out[0, len(ids) :].tolist()
        ids = torch.cat([ids, turn.answer_T])


def test_text_gives_the_same_answers_as_full_cards(model, tokenizer):
    (script,) = play([TASK], [handoff(model, tokenizer, "full")])
    (again,) = play([TASK], [handoff(model, tokenizer, "reprefill")])
    assert [t.answer_T.tolist() for t in again] == [t.answer_T.tolist() for t in script]
    assert max(kl(model, tokenizer, script, "reprefill")) < 1e-4


def test_divergence_is_zero_before_the_first_hop_and_falls_with_bits(model, tokenizer):
    (script,) = play([TASK], [handoff(model, tokenizer, "full")])
    by_bits = [kl(model, tokenizer, script, "uniform", bits) for bits in (3, 4, 8)]
    assert all(first == 0 for first, *_ in by_bits)
    for coarse, fine in zip(by_bits, by_bits[1:], strict=False):
        assert all(a > b > 0 for a, b in zip(coarse[1:], fine[1:], strict=True))
    assert max(kl(model, tokenizer, script, "fp16")) < 1e-4


@pytest.mark.parametrize("policy", ("uniform", "topology", "random"))
def test_five_handoffs_by_append_lose_no_more_than_one(policy, model, tokenizer):
    """Agents that add nothing: what is left is depth alone."""
    ids = tokenizer(TASK.prompts[0], return_tensors="pt").input_ids[0]
    passing = handoff(model, tokenizer, policy, 3.0)
    cache = passing(prefill(model, ids[None]), ids, Topology(len(ids), 5))
    first = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    for hops_left in (4, 3, 2, 1):
        cache = passing(cache, ids, Topology(len(ids), hops_left))
    assert passing.card.metadata.hop == 5
    for layer, (keys, values) in zip(cache.layers, first, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_an_unknown_reseal_is_refused(model, tokenizer):
    with pytest.raises(PolyKVError, match="no reseal 'apend'"):
        handoff(model, tokenizer, "uniform", reseal="apend")


def test_a_relay_beyond_the_models_positions_is_refused(tokenizer):
    small = tiny_model("llama", max_position_embeddings=64)
    with pytest.raises(PolyKVError, match="the relay needs"):
        play([TASK], [handoff(small, tokenizer, "full")])


def test_a_replay_from_the_first_turns_cache_is_the_same(model, tokenizer):
    (script,) = play([TASK], [handoff(model, tokenizer, "full")])
    first, itself = read_first(script, model)
    n_tokens = first.get_seq_length()
    whole = list(force(script, handoff(model, tokenizer, "topology")))
    for _ in range(2):  # the cache is not modified
        rest = list(force(script, handoff(model, tokenizer, "topology"), first=first))
        assert all(torch.equal(a, b) for a, b in zip(whole[1:], rest, strict=True))
    assert first.get_seq_length() == n_tokens == len(ids_of(script[:1]))
    assert not itself.kl.any() and (itself.nll == itself.nll_full).all()


def test_of_each_replay_one_turn_at_a_time_is_in_memory(model, tokenizer):
    (script,) = play([TASK], [handoff(model, tokenizer, "full")])
    vocabulary, seen = model.config.vocab_size, []

    def live():
        tensors = (x for x in gc.get_objects() if isinstance(x, torch.Tensor))
        return [x for x in tensors if x.dim() == 2 and x.shape[-1] == vocabulary]

    gc.collect()
    others = {id(x): x for x in live()}  # what earlier tests left

    def count(*_):
        seen.append(sum(id(x) not in others for x in live()))

    hook = model.register_forward_hook(count)
    try:
        replays = [force(script[:3], handoff(model, tokenizer, "full")) for _ in range(2)]
        divergence(script[:3], replays[0], replays[1:])
    finally:
        hook.remove()
    assert len(seen) == 6
    assert max(seen) == 1  # what the others are compared with


def test_reference_tasks_are_right_held_out_and_grow_by_turns():
    cfg = config.load_group("relay", "reference")
    short, long = (load_tasks(cfg, 6, turns, seed=3) for turns in (2, 4))
    for a, b in zip(short, long, strict=True):
        assert b.prompts[:2] == a.prompts and len(b.prompts) == 4
        assert b.answers[:2] == a.answers and len(b.answers) == 4
    encoded = build_tokenizer()(long[0].prompts[0]).input_ids
    assert build_tokenizer().unk_token_id not in encoded
    assert load_tasks(cfg, 6, 4, seed=3) == long != load_tasks(cfg, 6, 4, seed=4)


def local_gsm8k(tmp_path, n=20):
    path = tmp_path / "test.jsonl"
    lines = [
        {"question": f"What is {i} + {{i}} ?", "answer": f"so\n#### {i},000"} for i in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_gsm8k_from_a_local_file(tmp_path):
    path = str(local_gsm8k(tmp_path))
    problems = gsm8k.load(path, 10, seed=0)
    assert problems == gsm8k.load(path, 10, seed=0) != gsm8k.load(path, 10, seed=1)
    cfg = OmegaConf.merge(config.load_group("relay", "gsm8k"), {"path": path})
    task = load_tasks(cfg, 10, 4, seed=0)[3]
    assert len(task.prompts) == 4 and problems[3].question in task.prompts[0]
    assert set(task.messages[1:]) == {task.messages[1]} and problems[3].question in task.messages[0]
    assert (
        set(task.answers) == {problems[3].answer}
        and problems[3].answer == problems[3].question.split()[2] + "000"
    )
    again = load_tasks(OmegaConf.merge(cfg, {"restate": True}), 10, 4, seed=0)[3]
    assert again.messages[0] == task.messages[0]
    assert all(problems[3].question in text for text in (*again.messages[1:], *again.prompts[1:]))
    with pytest.raises(PolyKVError, match="20 problems and n_problems=21"):
        gsm8k.load(path, 21, seed=0)


def test_gsm8k_ships_with_the_package():
    cfg = config.load_group("relay", "gsm8k")
    tasks = load_tasks(cfg, 150, 3, seed=0)
    assert tasks == load_tasks(cfg, 300, 3, seed=7)[:150]
    problems = [json.loads(line) for line in shipped.read("gsm8k").split("\n")[:150]]
    assert [Decimal(task.answers[-1]) for task in tasks] == [
        gsm8k.extract(p["answer"], "strict") for p in problems
    ]
    assert all(p["question"] in task.prompts[0] for p, task in zip(problems, tasks, strict=True))


def fake_split(monkeypatch, **changed):
    """A hub that has the shipped problems at their indices, and others elsewhere."""
    rows = [{"question": f"Q{i}", "answer": f"#### {i}"} for i in range(1319)]
    for line in textfile.lines(shipped.read("gsm8k")):
        row = json.loads(line)
        rows[row.pop("index")] = row
    rows[gsm8k.order(1319)[4]].update(changed)
    monkeypatch.setattr(datasets, "load_dataset", lambda *where, **how: rows)
    return rows


def test_more_problems_come_from_the_hub_after_the_same_first_ones(monkeypatch):
    rows = fake_split(monkeypatch)
    gsm8k.check_same(rows)
    problems = gsm8k.load(None, 1319, seed=0)
    assert problems[:300] == gsm8k.load(None, 300, seed=0)
    assert {p.question for p in problems} == {row["question"] for row in rows}
    monkeypatch.setattr(hub, "is_available", lambda *what: True)
    gsm8k.check_available(None, 1319)
    with pytest.raises(PolyKVError, match="1319 problems and n_problems=1320"):
        gsm8k.load(None, 1320, seed=0)


@pytest.mark.parametrize("changed", ({"question": "Q?"}, {"answer": "#### 0"}))
def test_a_hub_whose_problems_are_others_is_refused(changed, monkeypatch):
    rows = fake_split(monkeypatch, **changed)
    index = gsm8k.order(1319)[4]
    with pytest.raises(PolyKVError, match=f"problem {index} of the hub's"):
        gsm8k.load(None, 301, seed=0)
    with pytest.raises(PolyKVError, match="problem"):
        gsm8k.check_same(rows[:100])


GOOD = json.dumps({"question": "a", "answer": "#### 1"})


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[1]",
        "3",
        '{"question": "a"}',
        '{"question": "a", "answer": "1"}',
        '{"question": "a", "answer": 1}',
        '{"question": 1, "answer": "#### 1"}',
        '{"question": "a", "answer": "#### one"}',
        '{"question": "a", "answer": "#### 12:30"}',
        '{"question": "a", "answer": "#### 3,5"}',
        '{"question": "a", "answer": "#### 1 and #### 2"}',
    ],
)
def test_a_line_that_is_no_problem_is_named(bad, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{GOOD}\n\n{bad}\n{GOOD}")
    with pytest.raises(PolyKVError, match="bad.jsonl, line 3") as refused:
        gsm8k.load(str(path), 1, seed=0)
    assert "\n" not in str(refused.value)


def test_a_file_without_problems_is_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_text("")
    with pytest.raises(PolyKVError, match="bad.jsonl is empty"):
        gsm8k.load(str(tmp_path / "bad.jsonl"), 1, seed=0)


def test_problems_may_hold_line_separators_and_the_file_a_mark(tmp_path):
    # As GSM8K's train split does, saved with ensure_ascii=False.
    odd = {"question": "one\u2028two\x85three\x0cfour", "answer": "so\u2028\n#### 5"}
    lines = [json.dumps(odd, ensure_ascii=False), GOOD]
    path = tmp_path / "train.jsonl"
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    found = gsm8k.load(str(path), 2, seed=0)
    assert [problem.question for problem in found] == [odd["question"], "a"]
    assert [problem.answer for problem in found] == ["5", "1"]


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("3 + 4 = 7 . #### 7", "7", "7"),
        ("#### 1,234.50 then 9", "1234.5", "9"),
        ("####-3", "-3", "-3"),
        ("#### $18.00", "18", "18"),
        ("it is 12.", None, "12"),
        ("#### 5 no, #### 6", "5", "6"),
        ("#### Step one\n2 + 3\n#### 5\n#### 6", "5", "6"),
        (r"so \boxed{9{,}500}", None, "9500"),
        (r"#### \boxed{9{,}500}", "9500", "9500"),
        ("#### -$5", "-5", "-5"),
        ("#### $-5", "-5", "-5"),
        ("#### \u22125", "-5", "-5"),
        ("#### .5", "0.5", "0.5"),
        ("#### 1 080", "1080", "1080"),
        ("#### 1\u2009080", "1080", "1080"),
        ("#### 3/4", "0.75", "0.75"),
        ("#### 1 3/4", "1.75", "1.75"),
        (r"#### -\frac{3}{4}", "-0.75", "-0.75"),
        ("#### 007", "7", "7"),
        ("#### **18**", "18", "18"),
        ("#### 12:30", None, None),
        ("at 12:30 on 1/2/2024, version 1.2.3, 10^3 of 3,5", None, None),
        ("10-5=5", None, "5"),
        ("wait...5 apples", None, "5"),
        ("H2O", None, None),
        ("#### 1/0", None, None),
        ("none", None, None),
        ("", None, None),
    ],
)
def test_extraction(text, strict, flexible):
    for how, number in (("strict", strict), ("flexible", flexible)):
        assert gsm8k.extract(text, how) == (None if number is None else Decimal(number))


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-1e9, max_value=1e9))
def test_a_number_is_read_back_however_it_is_written(number):
    plain = numerals.canonical(number)
    for text in (
        plain,
        f"{number:,}",
        f"{number:,}".replace(",", "\u202f"),
        f"**{number}**",
        f"${plain}",
    ):
        assert numerals.gold(text) == numerals.gold(f"so\n#### {text}") == number
        assert gsm8k.extract(f"it is {text}.", "flexible") == number
        assert gsm8k.extract(f"#### {text}\n", "strict") == number


@given(st.text("0123456789 .,:/-#$%e^'\\{}", max_size=30))
def test_no_text_breaks_the_parser_and_gold_is_one_whole_number(text):
    numbers = numerals.all_numbers(text)
    try:
        gold = numerals.gold(text)
    except PolyKVError:
        return
    assert numbers and gold == numbers[-1]


def test_verdicts_are_those_of_each_extraction():
    assert gsm8k.right(["#### 1", "2", "x"], ["1", "2.0", "3"]) == {
        "strict": [True, False, False],
        "flexible": [True, True, False],
        "last_mark": [True, False, False],
    }
    assert gsm8k.right([], []) == dict.fromkeys(gsm8k.EXTRACTIONS, [])


def test_replies_with_several_marks_and_empty_ones():
    replies = ["#### 1 no, #### 2", "#### 3", "", " \n", "#### Step\n#### 5"]
    found = gsm8k.right(replies, ["1", "3", "4", 4, "so #### 5"])
    assert {how: sum(right) for how, right in found.items()} == {
        "strict": 3,
        "flexible": 2,
        "last_mark": 2,
    }
    assert [gsm8k.has_several_marks(reply) for reply in replies] == [1, 0, 0, 0, 1]
    with pytest.raises(PolyKVError, match="eighteen"):
        gsm8k.right(["#### 18"], ["eighteen"])


def test_mcnemar_is_the_exact_binomial_test():
    one, other = [True] * 8 + [False] * 2 + [True] * 5, [False] * 8 + [True] * 2 + [True] * 5
    only_one, only_other, p = mcnemar(one, other)
    # 2 sum_{k<=2} C(10, k) / 2^10 = 2 (1 + 10 + 45) / 1024.
    assert (only_one, only_other) == (8, 2) and p == pytest.approx(112 / 1024)
    assert mcnemar(one, one) == (0, 0, 1.0)
    rng = random.Random(0)
    a, b = ([rng.random() < 0.5 for _ in range(60)] for _ in range(2))
    assert mcnemar(a, b)[2] == pytest.approx(mcnemar(b, a)[2])


def test_stages_add_up_to_the_total(model, tokenizer):
    routes = [Route(load_policy("reprefill"))]
    routes += [Route(load_policy(n), t) for n in ("fp16", "topology") for t in ("memory", "file")]
    ids_T = torch.arange(1025) % model.config.vocab_size
    timings = measure(model, tokenizer, ids_T[:300], 8, routes, 4.0, repeats=3)
    for route, timing in zip(routes, timings, strict=True):
        whole = sum(timing.stages.values())
        assert len(timing.total) == 3 and (abs(whole / timing.total - 1) < 0.05).all()
        if route.policy.store == "text":
            assert list(timing.stages) == ["first_forward"]
        else:
            names = STAGES if route.transport == "file" else STAGES[:1] + STAGES[4:]
            assert list(timing.stages) == list(names)
    with pytest.raises(PolyKVError, match="needs 1025 positions"):
        measure(model, tokenizer, ids_T, 8, routes, 4.0, repeats=3)


@pytest.mark.parametrize("reseal", ("append", "requantize"))
def test_depth_alone_costs_nothing_under_append(reseal, model, tokenizer):
    (script,) = play([TASK], [handoff(model, tokenizer, "full")])
    options = (model, tokenizer, "topology", 3.0, reseal)
    exact = force(script, handoff(model, tokenizer, "full"))
    others = [force(script, handoff(*options), 1, passes) for passes in (1, 5)]
    once, five = (float(turns[-1].kl.mean()) for turns in divergence(script, exact, others))
    assert once > 0
    assert five == once if reseal == "append" else five >= 0
