"""BOS and EOS: a sequence begins as its tokenizer has it begin, and nothing ends before what follows; limits likewise
are those of the tokens that a model really reads.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import TEXT, checked_cell
from gguf_files import write
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import polykv
from experiments.session import Session
from polykv import config, gguf, shipped, windows
from polykv.documents import load_documents
from polykv.errors import PolyKVError
from polykv.evaluation import memory
from polykv.evaluation.continuation import score_rest
from polykv.handoff.policy import load_policy
from polykv.handoff.relay import Handoff, play
from polykv.handoff.tasks import Task
from polykv.models import ModelSource
from polykv.pool import prefill
from polykv.recipe import load_recipe
from polykv.tokens import encode, last_places, opening

EOS, BOS, MASK = 0, 1, 2  # ids; MASK stands for a second token before a text, as GLM has one
NAMES = {"<eos>": EOS, "<bos>": BOS, "<mask>": MASK}
# name: (post-processor, options of the tokenizer, what opens a text)
KINDS = {
    "gemma": ("<bos> $A", {"bos_token": "<bos>"}, [BOS]),
    "llama-3": ("<bos> $A:0", {"bos_token": "<bos>", "pad_token": "<eos>"}, [BOS]),
    "qwen": (None, {}, []),
    "gpt-2": ("bytes", {"bos_token": "<eos>", "unk_token": "<eos>"}, []),
    "bos and eos": ("<bos> $A <eos>", {"bos_token": "<bos>"}, [BOS]),
    "eos": ("$A <eos>", {"bos_token": "<bos>"}, []),
    "opt": ("<eos> $A", {"bos_token": "<eos>"}, [EOS]),
    "glm": ("<mask> <bos> $A", {}, [MASK, BOS]),
    "flag": (None, {"bos_token": "<bos>", "add_bos_token": True}, [BOS]),
    "flags": (
        None,
        {"bos_token": "<bos>", "add_bos_token": True, "add_eos_token": True},
        [BOS],
    ),
    "flag of eos": ("<bos> $A", {"bos_token": "<bos>", "add_eos_token": True}, []),
    "flags off": (
        "<bos> $A <eos>",
        {"bos_token": "<bos>", "add_bos_token": False, "add_eos_token": False},
        [],
    ),
}
FLAGS = KINDS["flags"][1]  # with these the tokenizer's own call puts EOS behind a text


def bpe() -> Tokenizer:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(NAMES), initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator([TEXT], trainer)
    return found


TRAINED = bpe().to_str()


def made(form, **options) -> PreTrainedTokenizerFast:
    core = Tokenizer.from_str(TRAINED)
    if form == "bytes":
        core.post_processor = processors.ByteLevel(trim_offsets=False)
    elif form:
        special = [(name, number) for name, number in NAMES.items() if name in form]
        core.post_processor = processors.TemplateProcessing(single=form, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", **options)


TOKENIZERS = {kind: made(form, **options) for kind, (form, options, _) in KINDS.items()}


def plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_what_opens_a_text_is_what_the_tokenizer_puts_before_it(kind, tmp_path):
    tokenizer, expected = TOKENIZERS[kind], KINDS[kind][2]
    assert opening(tokenizer) == expected
    tokenizer.save_pretrained(tmp_path)
    assert opening(AutoTokenizer.from_pretrained(tmp_path)) == expected


@given(text=st.text(), kind=st.sampled_from(list(KINDS)))
def test_a_text_begins_as_transformers_has_it_and_ends_as_it_ends(text, kind):
    tokenizer, before = TOKENIZERS[kind], KINDS[kind][2]
    own, ids = plain_ids(tokenizer, text), encode(tokenizer, text, begins=True)[0].tolist()
    assert ids == before + own == tokenizer(text).input_ids[: len(before) + len(own)]
    assert encode(tokenizer, text)[0].tolist() == own


def test_a_flag_set_later_counts():
    tokenizer = made(None, bos_token="<bos>")
    assert opening(tokenizer) == []
    tokenizer.add_bos_token = True
    assert opening(tokenizer) == [BOS]


def test_an_opening_that_cannot_be_told_is_refused():
    core = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    core.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 0)]
    )
    with pytest.raises(PolyKVError, match="vocabulary"):
        opening(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<eos>"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({}, []), ({"add_bos_token": True, "add_eos_token": True}, [BOS])],
)
def test_a_gguf_file_says_what_opens_a_text(flags, expected, tmp_path, monkeypatch, llama):
    monkeypatch.setenv("POLYKV_CACHE", str(tmp_path / "cache"))
    metadata = {f"tokenizer.ggml.{name}": value for name, value in flags.items()}
    metadata |= {"tokenizer.ggml.bos_token_id": BOS, "tokenizer.ggml.eos_token_id": EOS}
    tokenizer = made(None, bos_token="<bos>")
    path = write(tmp_path / "a.gguf", llama, tokenizer, metadata=metadata)
    assert opening(gguf.load_tokenizer(path)) == expected
    assert opening(polykv.load_model(str(path), "cpu")[1]) == expected  # of the converted folder


# Pool, relay, windows, chat


@pytest.mark.parametrize("kind", ("flags", "gemma", "qwen", "opt"))
def test_a_pool_is_asked_as_one_text_would_go_on(kind, llama):
    tokenizer, text, query = TOKENIZERS[kind], TEXT[:200], " Why ?"
    pool = polykv.SharedKVPool.from_text(llama, tokenizer, text, polykv.load_recipe("full"))
    whole = KINDS[kind][2] + plain_ids(tokenizer, text) + plain_ids(tokenizer, query)
    ids_BT = torch.tensor([whole])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": EOS, "eos_token_id": EOS}
    plain = llama.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
    expected = tokenizer.decode(plain[0, len(whole) :], skip_special_tokens=True)
    assert pool.ask(llama, tokenizer, [query], max_new_tokens=8) == [expected]


def test_a_pool_of_nothing_but_bos_is_refused(llama):
    with pytest.raises(PolyKVError, match="empty"):
        polykv.SharedKVPool.from_text(llama, TOKENIZERS["flags"], "", polykv.load_recipe("full"))


def test_a_relay_begins_once_and_ends_before_no_answer(llama):
    tokenizer, task = (
        TOKENIZERS["flags"],
        Task(("The pool", " a cache", " and"), (4, 4, 4), ("1",) * 3),
    )
    (turns,) = play([task], [Handoff(llama, tokenizer, load_policy("full"), 16.0, "append")])
    prompts = [turn.prompt_T.tolist() for turn in turns]
    bare = [plain_ids(tokenizer, prompt) for prompt in task.prompts]
    assert prompts == [[BOS, *bare[0]], *bare[1:]]


@pytest.mark.parametrize("kind", ("gemma", "glm", "flags", "qwen"))
def test_every_window_begins_a_sequence_and_no_token_of_the_text_is_lost(kind):
    tokenizer, before = TOKENIZERS[kind], KINDS[kind][2]
    own, context = plain_ids(tokenizer, TEXT), 50
    n_own = context - len(before)
    found = windows.consecutive(tokenizer, TEXT, context, 1000)
    assert all(ids_BT.shape == (1, context) for ids_BT in found)
    assert all(ids_BT[0, : len(before)].tolist() == before for ids_BT in found)
    kept = [token for ids_BT in found for token in ids_BT[0, len(before) :].tolist()]
    assert len(found) == len(own) // n_own and kept == own[: len(found) * n_own]
    (whole,) = windows.consecutive(tokenizer, TEXT, None, 1)
    assert whole[0].tolist() == before + own
    text = " \n = A = \n \n word word \n \n = B = \n \n other words"
    articles = windows.of_articles(tokenizer, text, len(before) + 5, 2)
    assert [ids_BT[0].tolist() for ids_BT in articles] == [
        before + plain_ids(tokenizer, start)[:5] for start in ("= A = \n \n", "= B = \n \n")
    ]


def test_a_window_with_no_room_for_text_is_refused():
    with pytest.raises(PolyKVError, match="context=2"):
        windows.consecutive(TOKENIZERS["glm"], TEXT, 2, 1)


WRITES_BOS = "<bos>{{ messages[0].content }}{% if add_generation_prompt %} A:{% endif %}"


@pytest.mark.parametrize(
    ("template", "begins"), [(WRITES_BOS, True), (WRITES_BOS.removeprefix("<bos>"), False)]
)
def test_in_a_chat_the_template_alone_writes_bos(template, begins, tmp_path):
    tokenizer = made(None, **FLAGS)
    tokenizer.chat_template = template
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    document = config.load_group("document", "file")
    document.path = str(tmp_path / "text.txt")
    settings = {
        "document": document, "model": {"question_style": "chat", "question_template": "{question}"},
        "context": 60, "prefix_fraction": 0.7, "n_agents": 1, "n_documents": 2, "seed": 0,
    }  # fmt: skip
    for found in load_documents(OmegaConf.create(settings), tokenizer):
        assert found.ids_BT[0, 0] == BOS and found.bos
        asked = found.asked_BT[0].tolist()
        assert asked.count(BOS) == begins == found.asked_bos and EOS not in asked
        assert tokenizer.decode(found.prefix_BT[0, 1:]).strip() in tokenizer.decode(asked)


# Rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama) -> Path:
    """A local model of 256 positions whose tokenizer adds BOS and EOS, and a text of 300 tokens beside it."""
    place = tmp_path_factory.mktemp("local")
    tokenizer = TOKENIZERS["flags"]
    llama.save_pretrained(place)
    tokenizer.save_pretrained(place)
    ids = plain_ids(tokenizer, TEXT)[:299]
    (place / "long.txt").write_text(tokenizer.decode(ids), encoding="utf-8")
    (place / "short.txt").write_text(tokenizer.decode(ids[:200]), encoding="utf-8")
    return place


def cell(folder, text, *overrides):
    given = ["experiment=recipe_frontier", "model=local", f"model.path={folder}", "device=cpu",
             "document=file", f"document.path={folder}/{text}.txt", "context=null"]  # fmt: skip
    return checked_cell(*given, *overrides)


def test_rows_say_whether_bos_was_read_and_how_long_the_text_is(folder):
    module, settled = cell(folder, "short")
    rows = module.run(settled, Session())
    assert {(row["bos"], row["context_tokens"]) for row in rows} == {(True, 201)}


# Positions: of what was tokenised, not of what was set


def test_a_whole_text_beyond_the_positions_is_refused_before_a_run(folder):
    # 70 % of it, with question and answer, would fit.
    with pytest.raises(PolyKVError, match="300 positions.* 256"):
        cell(folder, "long")


def test_all_positions_can_be_used_with_bos_among_them(folder):
    module, settled = cell(folder, "long", "context=256", "prefix_fraction=0.5")
    assert {row["context_tokens"] for row in module.run(settled, Session())} == {256}


@pytest.mark.parametrize("n_last", [1, 3])
def test_the_last_places_are_those_of_a_number(n_last, llama):
    ids_BT = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        kept, whole = (
            llama(input_ids=ids_BT, logits_to_keep=keep).logits
            for keep in (last_places(ids_BT, n_last), 0)
        )
    torch.testing.assert_close(kept, whole[:, -n_last:])


def test_scoring_beyond_the_positions_is_refused(llama):
    cache = prefill(llama, torch.arange(200)[None])
    with pytest.raises(PolyKVError, match="257 positions.* 256"):
        score_rest(llama, cache, torch.arange(57)[None])
    assert score_rest(llama, cache, torch.arange(56)[None]).shape == (55, 300)


def test_a_relay_beyond_the_positions_is_refused_before_a_run(folder, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problem = {"question": "How many ?", "answer": "#### 1"}
    long = problem | {"question": "word " * 200}
    problems.write_text("\n".join(map(json.dumps, [problem, long])), encoding="utf-8")
    given = ["experiment=handoff_accuracy", "model=local", f"model.path={folder}", "device=cpu",
             "relay=gsm8k", f"relay.path={problems}", "n_problems=2", "n_hops=1",
             "relay.max_new_tokens=4"]  # fmt: skip
    with pytest.raises(PolyKVError, match="problem 2.* 256"):
        checked_cell(*given)


def test_decoding_beyond_the_positions_is_not_measured():
    model = OmegaConf.create(
        {"name": "tiny", "weights": "random", "dtype": "float32", "geometry": GEOMETRY}
    )
    source, recipe = ModelSource.of(model), load_recipe("full")
    setting = {"n_tokens": 60, "n_agents": 2, "device": "cpu", "backend": "torch"}
    with pytest.raises(PolyKVError, match="69 positions.* 64"):
        memory.resident_bytes(source, recipe, "unshared", **setting)


GEOMETRY = {
    "model_type": "llama", "vocab_size": 1200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


# A real model


@pytest.mark.slow
def test_gemma_needs_its_bos():
    """Perplexity of three articles' first 512 tokens: 39.6 with BOS, 105.1 without."""
    folder = Path(os.environ.get("POLYKV_TEST_MODELS", "")) / "gemma-3-270m"
    if not (folder / "model.gguf").is_file():
        pytest.skip("POLYKV_TEST_MODELS names no folder with this model")
    options = {"gguf_file": "model.gguf", "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    assert opening(tokenizer) == [tokenizer.bos_token_id]
    nll = {0: [], 1: []}
    for ids_BT in windows.of_articles(tokenizer, shipped.read("wikitext2"), 513, 3):
        for n_left_out, found in nll.items():
            scored_TV = score_rest(model, None, ids_BT[:, n_left_out:])[1 - n_left_out :]
            found.append(-scored_TV.gather(1, ids_BT[0, 2:, None]))
    with_bos, without = (float(torch.cat(found).mean().exp()) for found in nll.values())
    assert with_bos == pytest.approx(39.6, rel=0.01) and without == pytest.approx(105.1, rel=0.01)
