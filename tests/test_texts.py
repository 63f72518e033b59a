"""The shipped texts: length and questions, that the pooled part answers them, and where they are from."""

import hashlib
import json
import re

import pytest
import yaml

from polykv import shipped, textfile
from polykv.evaluation import gsm8k
from polykv.shipped import TEXTS

POOLED = 0.7  # PolyKV prefills this part of a document
N_QUESTIONS = 15
# SmolLM2 needs 1.23 to 1.30 tokens for a word of such prose; 600 and 1,851 are the published lengths.
PUBLISHED_TOKENS = {"moon_landing": 600, "packet_networks": 1851}
SMALL_WORDS = {"a", "an", "the", "in", "on", "at", "of"}


def load(name):
    return yaml.safe_load((TEXTS / f"{name}.yaml").read_text(encoding="utf-8"))


def key_phrase(answer):
    """The answer without the small words that it begins with."""
    words = answer.split()
    while words[0].lower() in SMALL_WORDS:
        words.pop(0)
    return " ".join(words)


@pytest.fixture(params=PUBLISHED_TOKENS)
def name(request):
    return request.param


def test_no_text_is_left_out():
    assert {path.stem for path in TEXTS.glob("*.yaml")} == set(PUBLISHED_TOKENS)


def test_shape(name):
    content = load(name)
    assert set(content) == {"title", "text", "questions"}
    assert content["title"] and len(content["questions"]) == N_QUESTIONS
    for item in content["questions"]:
        assert set(item) == {"question", "answer"}
        assert isinstance(item["answer"], str) and item["answer"].strip() == item["answer"] != ""
        assert item["question"].endswith("?")


def test_length_is_that_of_the_published_document(name):
    n_words = len(load(name)["text"].split())
    assert 1.23 < PUBLISHED_TOKENS[name] / n_words < 1.30


def test_text_is_clean_prose(name):
    text = load(name)["text"]
    assert text.isascii() and "  " not in text
    assert all(paragraph.endswith((".", "?")) for paragraph in text.split("\n"))


def test_the_pooled_part_answers_every_question(name):
    content = load(name)
    words = content["text"].split()
    pooled = " ".join(words[: int(POOLED * len(words))])
    for item in content["questions"]:
        found = re.search(rf"\b{re.escape(key_phrase(item['answer']))}\b", pooled)
        assert found, f"{item['answer']!r} is not in the first 70 %"


def test_questions_and_answers_are_distinct(name):
    for part in ("question", "answer"):
        found = [item[part].lower() for item in load(name)["questions"]]
        assert len(set(found)) == N_QUESTIONS


def test_no_question_gives_its_answer_away(name):
    for item in load(name)["questions"]:
        assert key_phrase(item["answer"]).lower() not in item["question"].lower()


def test_every_file_is_the_one_that_the_readme_names():
    readme = (TEXTS / "README.md").read_text(encoding="utf-8")
    for path in TEXTS.iterdir():
        assert f"`{path.name}`" in readme or path.name == "README.md"
    said = dict(line.split("  ")[::-1] for line in re.findall(r"^[0-9a-f]{64}  .*$", readme, re.M))
    contents = {name: (TEXTS / name).read_bytes() for name in said if (TEXTS / name).is_file()}
    contents["wikitext2_test.txt (unpacked)"] = shipped.read("wikitext2").encode()
    assert len(contents) == 3
    for name, content in contents.items():
        assert hashlib.sha256(content).hexdigest() == said[name], name


def test_problems_are_the_first_of_the_drawn_order():
    rows = [json.loads(line) for line in textfile.lines(shipped.read("gsm8k"))]
    assert [row["index"] for row in rows] == gsm8k.order(1319)[:300]
    assert len({row["question"] for row in rows}) == 300


def test_wikitext2_is_the_whole_test_split():
    # 245,569 tokens with one <eos> a line: Merity et al. 2016, arXiv 1609.07843, table 1.
    text = shipped.read("wikitext2")
    assert len(text.split()) + text.count("\n") == 245_569
