"""Contexts with questions in the forms of SCBench and LongBench."""

import json
import zipfile

import pytest
import torch
from omegaconf import OmegaConf

from polykv import config, contexts
from polykv.documents import load_documents
from polykv.errors import PolyKVError
from polykv.tokens import encode

FACTS = {"Anna": "4127", "Bruno": "5230", "Clara": "6339"}


def loaded(tokenizer, path, name="scbench", context=300, n_agents=3, **options):
    settings = {
        "document": {**config.load_group("document", name), "path": path and str(path), **options},
        "model": {"question_style": "plain", "question_template": "\n\nQ: {question}\nA:"},
        "context": context,
        "n_agents": n_agents,
        "n_documents": 2,
        "prefix_fraction": 0.7,
    }
    return load_documents(OmegaConf.create(settings), tokenizer)


def text_of(number, places=("Anna", "Bruno", "Clara")):
    """A long text: one statement at its start, one in its middle, one at its end."""
    filler = f"Text {number} says that the river runs past the old house. " * 60
    stated = [f"The number of {name} is {FACTS[name]}. " for name in places]
    return stated[0] + filler + stated[1] + filler + stated[2]


def turns(names=FACTS):
    return [{"input": f"What is the number of {name}?", "answer": FACTS[name]} for name in names]


@pytest.fixture
def scbench(tmp_path):
    lines = [{"id": i, "context": text_of(i), "multi_turns": turns()} for i in range(3)]
    path = tmp_path / "multi_turn.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_long_context_loses_its_middle_and_the_questions_that_it_answers(tokenizer, scbench):
    first, second = loaded(tokenizer, scbench, n_agents=2)
    assert [q.answer for q in first.questions] == ["4127", "6339"]
    assert first.questions[0].prompt == "\n\nQ: What is the number of Anna?\nA:"
    whole_T = encode(tokenizer, text_of(0))[0]
    own_T = first.ids_BT[0, first.n_opening :]
    assert first.n_tokens == second.n_tokens == 300 and not torch.equal(own_T, second.ids_BT[0])
    half = -(-len(own_T) // 2)
    assert torch.equal(own_T[:half], whole_T[:half])
    assert torch.equal(own_T[half:], whole_T[half - len(own_T) :])
    # All of it is in the pool that agents ask.
    assert torch.equal(first.asked_BT, first.ids_BT)


def test_lines_of_one_context_are_one_document_with_all_right_answers(tokenizer, tmp_path):
    lines = [
        {"context": text_of(0), "input": turn["input"], "answers": [turn["answer"], "a number"]}
        for turn in turns(["Anna", "Clara"])
    ]
    path = tmp_path / "longbench.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (one,) = loaded(tokenizer, path, "longbench", n_agents=2)
    assert [(q.answer, q.also) for q in one.questions] == [
        ("4127", ("a number",)),
        ("6339", ("a number",)),
    ]


@pytest.mark.parametrize("context, n_agents", [(300, 3), (100_000, 1)])
def test_too_few_questions_or_tokens_are_refused_with_what_there_is(
    tokenizer, scbench, context, n_agents
):
    n_longest = len(encode(tokenizer, text_of(0), begins=True)[0])
    with pytest.raises(PolyKVError, match=f"n_agents={n_agents}.* {n_longest} tokens"):
        loaded(tokenizer, scbench, context=context, n_agents=n_agents)


def test_answers_may_be_numbers_and_a_url_may_name_a_file_of_an_archive(tokenizer, tmp_path):
    line = {"context": text_of(0), "multi_turns": [{"input": "Anna?", "answer": 4127}]}
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/kv.jsonl", json.dumps(line) + "\n")
    url = f"zip://data/{{task}}.jsonl::{tmp_path}/data.zip"
    (one,) = loaded(tokenizer, None, n_agents=1, url=url)
    assert [question.answer for question in one.questions] == ["4127"]


def test_files_of_the_hub_are_downloaded_at_their_commit(tokenizer, tmp_path, monkeypatch):
    asked = []

    def download(repo, name, **options):
        asked.append((repo, name, options["repo_type"], options["revision"]))
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            line = {"context": text_of(0), "input": "Anna?", "answers": ["4127"]}
            archive.writestr("data/multifieldqa_en.jsonl", json.dumps(line) + "\n")
        return str(tmp_path / "data.zip")

    monkeypatch.setattr(contexts.hub, "check_reachable", lambda *what: None)
    monkeypatch.setattr(contexts, "hf_hub_download", download)
    (one,) = loaded(tokenizer, None, "longbench", n_agents=1)
    ((repo, name, kind, revision),) = asked
    assert (repo, name, kind) == ("THUDM/LongBench", "data.zip", "dataset") and len(revision) == 40
    assert [question.answer for question in one.questions] == ["4127"]


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        '{"context": "a"}',
        '{"input": "a", "answers": []}',
        '{"context": "a", "input": "b", "answer": null}',
    ],
)
def test_a_file_of_another_form_is_refused(tokenizer, tmp_path, line):
    path = tmp_path / "other.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(PolyKVError, match=path.name):
        loaded(tokenizer, path)


@pytest.mark.parametrize("name", ["scbench", "longbench"])
def test_without_a_hub_a_copy_is_asked_for(tokenizer, name):
    with pytest.raises(PolyKVError, match="cannot be reached.*document.path"):
        loaded(tokenizer, None, name)
