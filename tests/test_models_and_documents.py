"""Loading: names, folders, geometry without a hub, documents of an exact length, and one clear line when it fails."""

import re

import datasets
import pytest
import torch
from conftest import TEXT
from omegaconf import OmegaConf
from pairwise import slow

import polykv
from polykv import config, documents, models
from polykv.documents import load_documents, prefix_tokens
from polykv.errors import PolyKVError
from polykv.geometry import Geometry
from polykv.models import load_config

# Read off the models' own configs on the hub: (layers, kv heads, head_dim, parameters in millions).
KNOWN = {
    "smollm2-135m": (30, 3, 64, 135),
    "smollm2-1.7b": (24, 32, 64, 1711),
    "llama-3-8b": (32, 8, 128, 8030),
    "llama-3.1-8b": (32, 8, 128, 8030),
    "qwen2.5-0.5b": (24, 2, 64, 494),
    "gemma-3-270m": (18, 1, 256, 268),
    "gemma-3-27b": (62, 16, 128, 27009),  # without its vision encoder
    "gpt-oss-20b": (24, 8, 64, 20915),
    "qwen3-8b": (36, 8, 128, 8191),
}
LARGE = {"gemma-3-27b", "gpt-oss-20b", "qwen3-8b", "llama-3-8b", "llama-3.1-8b"}
# Of all layers but every sixth, or every second.
WINDOWS = {"gemma-3-270m": (512, 6), "gemma-3-27b": (1024, 6), "gpt-oss-20b": (128, 2)}


@pytest.mark.parametrize("name", [*sorted({*KNOWN} - LARGE), *slow(*sorted(LARGE))])
def test_geometry_in_the_yaml_is_the_architecture(name):
    from transformers import AutoModelForCausalLM

    architecture = load_config(config.load_group("model", name))
    layers, kv_heads, head_dim, millions = KNOWN[name]
    found = [(one.n_kv_heads, one.head_dim, one.window) for one in Geometry.of(architecture).layers]
    window, full = WINDOWS.get(name, (None, 1))
    windows = [window if (layer + 1) % full else None for layer in range(layers)]
    assert found == [(kv_heads, head_dim, window) for window in windows]
    with torch.device("meta"):
        counted = AutoModelForCausalLM.from_config(architecture).num_parameters()
    assert round(counted / 1e6) == millions


@pytest.mark.parametrize("name", config.available("model"))
def test_every_model_yaml_says_what_it_is(name):
    cfg = config.load_group("model", name)
    assert cfg.name == name and cfg.trained_weights in models.KINDS
    models.pick_dtype(cfg.dtype)
    assert "{question}" in cfg.question_template


def test_a_local_folder_is_a_model(checkpoint, llama):
    model, tokenizer = polykv.load_model(str(checkpoint))
    assert model.config.model_type == "llama"
    assert torch.equal(model.lm_head.weight, llama.lm_head.weight)
    assert tokenizer.decode(tokenizer(TEXT[:50]).input_ids) == TEXT[:50]


def test_the_reference_model_answers_offline():
    model, tokenizer = polykv.load_model("reference")
    pool = polykv.SharedKVPool.from_text(
        model, tokenizer, "Ada has 14 apples .", polykv.load_recipe("polykv")
    )
    assert isinstance(pool.ask(model, tokenizer, ["Q"], max_new_tokens=4)[0], str)


def test_random_weights_have_the_exact_architecture():
    cfg = config.load_group("model", "smollm2-135m")
    cfg.weights, cfg.geometry.num_hidden_layers = "random", 1
    model, tokenizer = models.load_weights(cfg, "cpu")
    assert model.config.num_key_value_heads == 3
    assert len(tokenizer) <= model.config.vocab_size


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("referense", "no model named 'referense'; did you mean 'reference'"),
        ("qwen2.5-0.5b", "cannot be loaded.*connect to the hub"),
    ],
)
def test_models_that_cannot_be_had(name, message):
    with pytest.raises(PolyKVError, match=message):
        polykv.load_model(name)


def test_an_incomplete_folder_is_named(tmp_path):
    with pytest.raises(PolyKVError, match=f"no model in {tmp_path}"):
        polykv.load_model(str(tmp_path))


def test_unknown_recipe():
    with pytest.raises(PolyKVError, match="no recipe named 'polykw'; did you mean 'polykv'"):
        polykv.load_recipe("polykw")


def test_a_recipe_with_an_option_its_codec_lacks():
    cfg = config.load_group("recipe", "polykv")
    cfg.value.bitz = 3
    with pytest.raises(PolyKVError, match="recipe 'polykv' cannot be built.*bitz"):
        polykv.Recipe.from_config(cfg)


def test_prefix_is_cut_as_in_the_paper():
    found = [prefix_tokens(n, 0.7) for n in (1837, 7194, 600, 1851, 1953)]
    assert found == [1285, 5035, 420, 1295, 1367]
    with pytest.raises(PolyKVError, match="leaves"):
        prefix_tokens(4, 0.9)


def settings(document: str, /, **changes):
    base = {
        "document": config.load_group("document", document),
        "model": {"question_template": "\nQuestion: {question}\nAnswer:"},
        "context": 100, "prefix_fraction": 0.7, "n_agents": 3, "n_documents": 1, "seed": 0,
    }  # fmt: skip
    return OmegaConf.merge(base, changes)


@pytest.mark.parametrize("name", ["moon_landing", "packet_networks"])
def test_shipped_documents(name, tokenizer):
    (document,) = load_documents(settings(name), tokenizer)
    assert document.ids_BT.shape == (1, 100) and document.n_prefix == 70
    assert len(document.questions) == 15
    assert document.questions[0].prompt == f"\nQuestion: {document.questions[0].text}\nAnswer:"
    assert document.asked_BT is document.prefix_BT and document.prefix_BT.shape == (1, 70)


@pytest.mark.parametrize(
    ("template", "asked"),
    [
        (r"\n\nQ: {question}\nA:", "\n\nQ: Why?\nA:"),  # as a command line hands it over
        ('{"q": "{question}", "a": {x}', '{"q": "Why?", "a": {x}'),
        ("{question} {} {0} }{", "Why? {} {0} }{"),
    ],
)
def test_a_question_template_of_ones_own(template, asked, tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "questions.txt").write_text("Why?")
    own = {"path": str(tmp_path / "text.txt"), "questions": str(tmp_path / "questions.txt")}
    cfg = settings("file", document=own, n_agents=1, model={"question_template": template})
    documents.check_document(cfg)
    (document,) = load_documents(cfg, tokenizer)
    assert [question.prompt for question in document.questions] == [asked]


@pytest.mark.parametrize("template", ["Answer:", "{ question }", None])
def test_a_template_without_a_question_is_refused(template, tokenizer):
    cfg = settings("moon_landing", model={"question_template": template})
    with pytest.raises(PolyKVError, match="question_template.*{question}"):
        documents.check_document(cfg)
    with pytest.raises(PolyKVError, match="question_template.*{question}"):
        load_documents(cfg, tokenizer)


def test_a_file_gives_consecutive_windows(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    cfg = settings("file", n_documents=2, document={"path": str(path)})
    first, second = load_documents(cfg, tokenizer)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert torch.equal(torch.cat([first.ids_BT, second.ids_BT], dim=1), ids[:, :200])


def test_generated_documents_are_held_out_and_seeded():
    _, tokenizer = polykv.load_model("reference")
    cfg = settings("generated", context=256, n_documents=2)
    first, second = load_documents(cfg, tokenizer)
    again, _ = load_documents(cfg, tokenizer)
    assert first.ids_BT.shape == (1, 256)
    assert torch.equal(first.ids_BT, again.ids_BT) and not torch.equal(first.ids_BT, second.ids_BT)
    assert all(question.answer for question in first.questions)
    assert all(q.text in q.prompt and "Q:" not in q.text for q in first.questions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 100_000}, "lower context"),
        ({"n_agents": 16}, "has 15 questions and n_agents=16"),
    ],
)
def test_more_than_a_document_has(changes, message, tokenizer):
    with pytest.raises(PolyKVError, match=message):
        load_documents(settings("moon_landing", **changes), tokenizer)


def test_files_that_cannot_be_read(tmp_path, tokenizer):
    def ask(path) -> None:
        load_documents(settings("file", document={"path": str(path)}), tokenizer)

    with pytest.raises(PolyKVError, match="needs document.path"):
        load_documents(settings("file"), tokenizer)
    with pytest.raises(PolyKVError, match="No such file"):
        ask(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(PolyKVError, match="is empty"):
        ask(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo\n\xe9t\xe9")
    with pytest.raises(PolyKVError, match="latin.txt, line 3, is not UTF-8"):
        ask(tmp_path / "latin.txt")


def test_lines_end_at_line_feeds_alone_and_a_mark_is_no_text(tmp_path, tokenizer):
    asked, text = tmp_path / "questions.txt", tmp_path / "text.txt"
    asked.write_bytes("Why\u2028now?\r\n\r\nA\x0cB\x85C?\nLast?".encode("utf-8-sig"))
    text.write_bytes(TEXT.replace(" . ", " .\r\n").encode("utf-8-sig"))
    where = {"path": str(text), "questions": str(asked)}
    (document,) = load_documents(settings("file", document=where), tokenizer)
    assert [q.text for q in document.questions] == ["Why\u2028now?", "A\x0cB\x85C?", "Last?"]
    plain = tokenizer(TEXT.replace(" . ", " .\n"), return_tensors="pt").input_ids
    assert torch.equal(document.ids_BT, plain[:, :100])


@pytest.mark.parametrize(
    ("context", "n"),
    [
        (100, 16),
        pytest.param(20_000, 16, marks=pytest.mark.slow),
        pytest.param(400_000, 2, marks=pytest.mark.slow),
    ],
)
def test_wikitext2_needs_no_hub_and_begins_with_articles(context, n, tokenizer):
    found = load_documents(settings("wikitext2", context=context, n_documents=16), tokenizer)
    assert len(found) == n and {document.n_tokens for document in found} == {context}
    starts = [tokenizer.decode(document.ids_BT[0, :40]) for document in found]
    assert all(re.match(r"= [^=]+ = \n \n [^=]", start) for start in starts)
    assert len(set(starts)) == n


def test_evaluation_documents_are_the_articles_after_the_first_twelve(tokenizer):
    every = load_documents(settings("wikitext2", context=300, n_documents=40), tokenizer)
    held_out = load_documents(
        settings("wikitext2_evaluation", context=300, n_documents=28), tokenizer
    )
    assert [d.digest for d in held_out] == [d.digest for d in every[12:]]


def test_articles_cannot_all_be_skipped(tokenizer):
    left_out = {**config.load_group("document", "wikitext2_evaluation"), "skip_articles": 60}
    with pytest.raises(PolyKVError, match="skip_articles=60"):
        load_documents(settings("wikitext2_evaluation", document=left_out, context=300), tokenizer)


def test_gsm8k_documents_are_problems_with_solutions(tokenizer):
    first, *_ = load_documents(settings("gsm8k", context=256, n_documents=2), tokenizer)
    assert "Question: Mazie has 52 marbles" in tokenizer.decode(first.ids_BT[0])


def test_wikitext2_has_no_length_of_its_own(tokenizer):
    with pytest.raises(PolyKVError, match="set context=1024"):
        load_documents(settings("wikitext2", context=None), tokenizer)


RAW = " \n = A raw title = \n \n Word for word . \n" + "some words \n" * 60


def test_raw_wikitext2_is_of_the_hub_or_a_copy(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(PolyKVError, match="cannot be reached.*document=wikitext2,.*document.path"):
        load_documents(settings("wikitext2_raw"), tokenizer)
    (tmp_path / "wiki.test.raw").write_text(RAW)
    copy = {"path": str(tmp_path / "wiki.test.raw")}
    (local,) = load_documents(settings("wikitext2_raw", document=copy), tokenizer)
    # The hub has a line a row, blank ones empty.
    lines = [line if line.strip() else "" for line in RAW.splitlines(keepends=True)]
    monkeypatch.setattr(documents.hub, "check_reachable", lambda *what: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *where, **how: {"text": lines})
    documents.hub_wikitext2.cache_clear()
    (from_hub,) = load_documents(settings("wikitext2_raw"), tokenizer)
    documents.hub_wikitext2.cache_clear()
    assert torch.equal(local.ids_BT, from_hub.ids_BT) and from_hub.name == "wikitext2_raw"
    assert tokenizer.decode(local.ids_BT[0]).startswith("= A raw title = \n \n Word for word")


def test_a_short_text_gives_as_many_windows_as_fit(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    n_tokens = tokenizer(TEXT, return_tensors="pt").input_ids.shape[1]
    cfg = settings("file", n_documents=16, document={"path": str(path)}, context=n_tokens // 4)
    assert len(load_documents(cfg, tokenizer)) == 4
    (whole,) = load_documents(OmegaConf.merge(cfg, {"context": None}), tokenizer)
    assert whole.n_tokens == n_tokens
    with pytest.raises(PolyKVError, match=f"{n_tokens} tokens.*fewer than context={n_tokens + 1}"):
        load_documents(OmegaConf.merge(cfg, {"context": n_tokens + 1}), tokenizer)
