"""Retrieval tasks: what they state and ask, where it stands, and the log-probabilities of answers."""

from random import Random

import pytest
import torch
from conftest import TEXT
from omegaconf import OmegaConf
from transformers import DynamicCache

from polykv import config, targets
from polykv.attention.cascade import attend_in_place
from polykv.documents import Question, load_documents
from polykv.errors import PolyKVError
from polykv.evaluation.answers import contains
from polykv.evaluation.retrieval import candidates, log_probs
from polykv.greedy import greedy
from polykv.pool import SharedKVPool, prefill
from polykv.recipe import load_recipe
from polykv.tasks.base import Task
from polykv.tokens import encode


def is_task(name):
    target = config.load_group("document", name).get("_target_", "").rpartition(".")
    return target[0].startswith("polykv.tasks.")


TASKS = [name for name in config.available("document") if is_task(name)]


def made(name, tokenizer, context=2400, seed=0, n_agents=15, n_documents=2):
    model = {"question_style": "plain", "question_template": "\n\nQuestion: {question}\nAnswer:"}
    settings = {"document": config.load_group("document", name), "model": model, "context": context}
    settings |= {
        "seed": seed,
        "n_agents": n_agents,
        "n_documents": n_documents,
        "prefix_fraction": 0.7,
    }
    return load_documents(OmegaConf.create(settings), tokenizer)


def written(name, seed=0, n_questions=15):
    cfg = config.load_group("document", name)
    return targets.find(cfg._target_).from_config(cfg).write(Random(seed), n_questions)


def test_every_module_of_a_task_has_a_yaml():
    found = {config.load_group("document", name)._target_ for name in TASKS}
    assert {cls.__module__ for cls in Task.__subclasses__()} <= {
        t.rpartition(".")[0] for t in found
    }
    assert len(TASKS) >= 6


@pytest.mark.parametrize("name", TASKS)
def test_a_task_says_what_it_tests_and_where_it_is_from(name):
    task = targets.find(config.load_group("document", name)._target_)
    assert task.tests and task.source and task.rule and "version" in vars(task)


@pytest.mark.parametrize("name", TASKS)
def test_what_is_asked_is_stated_once(name):
    content = written(name)
    asked = content.asked[:15]
    assert len({one.question for one in asked}) == 15
    for one in asked:
        needed = " ".join(content.statements[i] for i in one.needs)
        for part in one.answer.split(" and "):
            assert contains(needed, part)
        # Its statements are no other question's: the answer is decided by them alone.
        assert all(content.statements.count(content.statements[i]) == 1 for i in one.needs)


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_one_content(name):
    assert written(name) == written(name) != written(name, seed=1)


def test_the_first_of_several_mentions_is_right():
    content = written("first_mention")
    for one in content.asked:
        person = one.lead.split()[0]
        visits = [text for text in content.statements if text.startswith(person)]
        assert len(visits) == 2 and visits[0] == f"{person} visited {one.answer}."


def test_a_chain_leads_from_the_name_to_the_number():
    content = written("variables")
    for one in content.asked:
        name = one.lead.split()[0]
        (step,) = (text for text in content.statements if text.startswith(f"{name} has the same"))
        end = step.removesuffix(".").split()[-1]
        assert f"{end} has the number {one.answer}." in content.statements


@pytest.mark.parametrize("name", TASKS)
def test_a_document_has_its_length_and_all_of_its_statements(name, tokenizer):
    documents = made(name, tokenizer)
    assert len({document.digest for document in documents}) == 2
    for number, document in enumerate(documents):
        assert document.n_tokens == 2400 and torch.equal(document.asked_BT, document.ids_BT)
        text = tokenizer.decode(document.ids_BT[0])
        content = written_for(name, number)
        places = [text.find(statement) for statement in content.statements]
        assert min(places) >= 0 and places == sorted(places)
        for question, one in zip(document.questions, content.asked, strict=True):
            assert question.prompt.endswith(f"Answer: {one.lead}") and question.answer == one.answer
            first = min(places[i] for i in one.needs)
            assert question.depth == pytest.approx(first / len(text), abs=0.02)


def written_for(name, number):
    """The content of a document: its random numbers begin with those of the content."""
    cfg = config.load_group("document", name)
    return targets.find(cfg._target_).from_config(cfg).write(Random(f"{name}/0/{number}"), 15)


def test_depths_are_spread_over_the_document(tokenizer):
    (document,) = made("needle", tokenizer, n_documents=1)
    depths = sorted(question.depth for question in document.questions)
    assert depths[0] < 0.1 and depths[-1] > 0.8
    assert max(b - a for a, b in zip(depths, depths[1:], strict=False)) < 0.2


def test_documents_of_a_seed_are_the_same_and_of_another_others(tokenizer):
    ids = [made("lookup", tokenizer, seed=seed)[0].ids_BT for seed in (0, 0, 1)]
    assert torch.equal(ids[0], ids[1]) and not torch.equal(ids[0], ids[2])


def test_a_text_of_another_length_is_filled_further(tokenizer):
    short, long = (made("needle", tokenizer, context=n, n_documents=1)[0] for n in (1500, 9000))
    assert (short.n_tokens, long.n_tokens) == (1500, 9000)
    assert [q.answer for q in short.questions] == [q.answer for q in long.questions]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"context": None}, "context=1024"),
        ({"context": 200}, "raise context"),
        ({"n_agents": 26}, "lower n_agents"),
    ],
)
def test_what_has_no_room_is_refused(tokenizer, given, named):
    with pytest.raises(PolyKVError, match=named) as refused:
        made("needle", tokenizer, **given)
    assert "\n" not in str(refused.value)


# Candidates and their log-probabilities


def asked(*answers):
    return [Question("", answer, "") for answer in answers]


def test_candidates_are_the_right_answer_and_others_of_the_document():
    assert candidates(asked("a", "b", "a", "c"), 2) == [
        ["a", "b", "c"], ["b", "a", "c"], ["a", "c", "b"], ["c", "a", "b"],
    ]  # fmt: skip
    assert candidates(asked("a", "a"), 3) == [["a"], ["a"]]


@pytest.fixture(scope="module")
def shared(llama, tokenizer):
    """A prefix, its pool, and questions and answers of different lengths."""
    prefix_BT = encode(tokenizer, TEXT[:200])
    pool = SharedKVPool.from_cache(prefill(llama, prefix_BT), load_recipe("full"))
    questions = [
        encode(tokenizer, text)[0] for text in ("Who reads ?", "What is written once and", "a")
    ]
    answers = [
        [encode(tokenizer, text)[0] for text in of]
        for of in ((" agents", " a pool", " many of"), (" cache",), (" question of its own", " b"))
    ]
    return prefix_BT, pool, questions, answers


@pytest.mark.parametrize("reader", ["in_place", "dequantize"])
def test_log_probabilities_are_those_of_the_plain_model(llama, shared, reader):
    prefix_BT, pool, questions, answers = shared
    if reader == "in_place":
        with attend_in_place(llama):
            found = log_probs(llama, pool.reader(3), questions, answers)
    else:
        found = log_probs(llama, pool.dequantize(3), questions, answers)
    for question_T, options, own in zip(questions, answers, found, strict=True):
        assert len(own) == len(options)
        for answer_T, got in zip(options, own, strict=True):
            ids_BT = torch.cat([prefix_BT[0], question_T, answer_T])[None]
            told_TV = llama(ids_BT).logits[0, -len(answer_T) - 1 : -1].log_softmax(-1)
            expected = float(told_TV.gather(1, answer_T[:, None]).sum())
            assert got == pytest.approx(expected, abs=1e-3)


def test_without_a_document_nothing_comes_before_the_question(llama, shared):
    _, _, questions, answers = shared
    found = log_probs(llama, DynamicCache(), questions, answers)
    told_TV = llama(torch.cat([questions[2], answers[2][0]])[None]).logits[0].log_softmax(-1)
    n = len(answers[2][0])
    expected = float(told_TV[-n - 1 : -1].gather(1, answers[2][0][:, None]).sum())
    assert found[2][0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("recipe", ["full", "polykv"])
def test_questions_of_one_batch_are_answered_as_one_by_one(llama, tokenizer, recipe):
    pool = SharedKVPool.from_cache(
        prefill(llama, encode(tokenizer, TEXT[:200])), load_recipe(recipe)
    )
    texts = [TEXT[start : start + 10 + start % 7] for start in range(0, 150, 10)]
    questions = [encode(tokenizer, text)[0] for text in texts]
    with attend_in_place(llama):
        together = greedy(llama, pool.reader(15), questions, 4, stops=[])
        alone = [greedy(llama, pool.reader(1), [ids_T], 4, stops=[])[0] for ids_T in questions]
    assert len({tuple(ids.tolist()) for ids in together}) > 1
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
