"""The reference model's generator against independent recomputation, its weights, its training."""

import ast
import hashlib
import json
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from polykv.config import REPO
from polykv.errors import PolyKVError
from polykv.pool import prefill
from polykv.reference import WEIGHTS_DIR, vocabulary
from polykv.reference.documents import generate_document, matches
from polykv.reference.exact_match import exact_matches
from polykv.reference.problems import TEMPLATES, Operands, draw_problem, draw_relay
from polykv.reference.text import join_words, split_words
from polykv.reference.world import Difficulty, sample_world
from reference_model import evaluate, train
from reference_model.curriculum import SHORT, Stage
from reference_model.rows import ROLE_WEIGHTS, VALUE, RowKind, write_row
from reference_model.tokenizer import build_tokenizer
from reference_model.tokenizer import vocabulary as vocabulary_ids

TOKENIZER = build_tokenizer()
seeds = st.integers(0, 10**6)


def encode(text, tokenizer=TOKENIZER):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_generator_writes_the_same_text_on_every_machine():
    texts = [generate_document(TOKENIZER, n, seed).text for n in (64, 256) for seed in range(20)]
    texts += [question.prompt + question.answer for question in evaluate.problems_alone(2)]
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    assert digest == "ca99e0eb0be22da074268fd30a37172976f7f067c8b9fee4b3e299ba8bfb6943"


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(40, 1200), st.sampled_from([0.5, 0.7]))
def test_document_has_exact_length_and_states_every_fact_in_its_prefix(seed, n_tokens, fraction):
    document = generate_document(TOKENIZER, n_tokens, seed, prefix_fraction=fraction)
    ids = encode(document.text)
    assert len(ids) == n_tokens
    prefix = TOKENIZER.decode(ids[: int(fraction * n_tokens)])
    assert len(document.questions) == min(15, len(document.facts))
    for question in document.questions:
        assert question.answer.strip() in prefix
        (fact,) = question.facts
        assert fact.value in question.answer


def test_document_of_a_foreign_tokenizer_has_exact_length():
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([generate_document(TOKENIZER, 2000, 0).text], vocab_size=400)
    foreign = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    for n_tokens in (100, 333):
        document = generate_document(foreign, n_tokens, 3)
        ids = encode(document.text, foreign)
        assert len(ids) == n_tokens
        prefix = foreign.decode(ids[: document.n_prefix])
        assert all(question.answer.strip() in prefix for question in document.questions)


def test_too_short_a_document_is_refused():
    with pytest.raises(PolyKVError, match="too short to state two facts"):
        generate_document(TOKENIZER, 8, 0)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(4, 200), st.sampled_from([0.0, 0.3]))
def test_worlds_of_the_two_splits_share_no_fact_and_keys_are_unique(seed, n_facts, namesakes):
    rng = random.Random(seed)
    knobs = Difficulty(namesakes=namesakes)
    worlds = {split: sample_world(rng, n_facts, split, knobs) for split in ("train", "heldout")}
    for split, facts in worlds.items():
        assert {fact.split for fact in facts} == {split}
        assert len({fact.key for fact in facts}) == len(facts)
    assert not set(worlds["train"]) & set(worlds["heldout"])


def test_namesakes_share_first_names_and_distractors_share_items():
    facts = sample_world(random.Random(0), 200, "train", Difficulty(namesakes=0.5))
    people = {fact.subject for fact in facts if fact.subject}
    double = [name for name in people if " " in name]
    assert 0.4 < len(double) / len(people) < 0.6
    first = [name.split()[0] for name in double]
    assert all(first.count(name) == 2 for name in first)
    items = [fact.attribute for fact in facts if fact.kind == "count"]
    assert len(items) / len(set(items)) > 2


def test_restated_sums_are_right():
    sums = 0
    for seed in range(30):
        words = split_words(generate_document(TOKENIZER, 300, seed).text)
        for i, word in enumerate(words[:-1]):
            if word == "=":
                assert int(words[i - 3]) + int(words[i - 1]) == int(words[i + 1])
                sums += 1
    assert sums > 20


@pytest.mark.parametrize("template", TEMPLATES)
def test_problem_answers_are_right_by_independent_arithmetic(template):
    """Work the printed solution again with Python's own arithmetic, from the printed facts."""
    for seed in range(20):
        rng = random.Random(seed)
        problem = None
        while problem is None:
            facts = sample_world(rng, 24, "heldout")
            problem = draw_problem(rng, Operands(facts), template)
        question = problem.alone(rng)
        steps, answer = question.answer.split("####")
        for step in [s for s in steps.split(". ") if "=" in s]:
            left, right = step.strip(" .").split("=")
            tree = ast.parse(left.strip(), mode="eval")
            assert eval(compile(tree, "", "eval")) == int(right)
        assert int(answer) == problem.steps[-1].result == int(right)
        assert 2 <= len(problem.steps) <= 5
        for fact in problem.facts:
            assert join_words(fact.statement()) in question.prompt
            assert join_words(fact.statement()) in question.answer
            assert fact in facts


SENTENCES = {  # each template's question, solved by hand from its numbers in order of reading
    "gain_lose": lambda v, k: v[0] + k[0] - k[1],
    "pool_give": lambda v, k: v[0] + v[1] - k[0],
    "pool_three": lambda v, k: sum(v),
    "share": lambda v, k: (v[0] + k[0]) // k[1],
    "double": lambda v, k: 2 * v[0] - k[0],
    "compare": lambda v, k: v[0] + k[0] - v[1],
    "move": lambda v, k: 2 * (v[1] + k[0]),
    "both": lambda v, k: v[0] + v[1] - k[0],
    "chain": lambda v, k: v[0] + k[0] - k[1] + k[2] - k[3],
    "long_chain": lambda v, k: v[0] + k[0] - k[1] + k[2] - k[3] + k[4],
    "change": lambda v, k: 99 - v[0] * k[0],
    "basket": lambda v, k: v[0] * k[0] + v[1] * k[1],
    "sale": lambda v, k: (v[0] - k[0]) * k[1],
    "two_hop": lambda v, k: v[0] + k[0] - k[1],
    "three_step": lambda v, k: 2 * (v[0] - k[0]) + k[1],
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_problem_questions_say_what_the_steps_do(template):
    rng = random.Random(template)
    for _ in range(20):
        problem = None
        while problem is None:
            problem = draw_problem(rng, Operands(sample_world(rng, 24, "train")), template)
        values = [int(fact.value) for fact in problem.facts if fact.kind != "role"]
        told = [int(word) for word in problem.question if word.isdigit()]
        assert SENTENCES[template](values, told) == problem.answer


def test_relay_turns_hand_on_one_number():
    rng = random.Random(0)
    relay = None
    while relay is None:
        relay = draw_relay(rng, Operands(sample_world(rng, 24, "train")), 4)
    numbers = [int(turn.answer.split("####")[1]) for turn in relay.turns]
    starts = [int(turn.answer.split()[0]) for turn in relay.turns[1:]]
    assert len(relay.turns) == 4
    assert starts == numbers[:-1]


def test_matching_answers():
    assert matches(" Ada's apples number 14.<eot> Q:", "Ada's apples number 14.")
    assert not matches("Ada's apples number 15.", "Ada's apples number 14.")
    assert matches("3 + 4 = 7. #### 7", "4 + 3 = 7. #### 7")
    assert not matches("3 + 4 = 7. #### 71", "4 + 3 = 7. #### 7")
    assert not matches("", "Ada's apples number 14.")


def test_every_value_is_one_token_and_no_word_has_two_meanings():
    categories = [v for v in vars(vocabulary).values() if isinstance(v, tuple)]
    words = [word for category in categories for word in category]
    assert len(words) == len(set(words))
    for word in words:
        assert len(encode(word)) == 1
        assert (encode(word) == [TOKENIZER.unk_token_id]) == (word == vocabulary.UNKNOWN)
    open_categories = [*vocabulary.TRAITS.values(), vocabulary.COUNTS, vocabulary.PRICES]
    assert all(len(category) > 18 for category in open_categories)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_tokenizer_round_trip(seed):
    text = generate_document(TOKENIZER, 200, seed).text
    ids = encode(text)
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids) == text
    assert len(ids) == len(split_words(text))
    assert encode(TOKENIZER.decode(ids[:140])) == ids[:140]


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=200))
def test_tokenizer_takes_any_text(text):
    TOKENIZER.decode(encode(text))


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from([0.0, 1.0]))
def test_rows_are_full_and_tagged(seed, alone):
    kind = RowKind(256, problems=0.4, alone=alone, worlds=Difficulty(namesakes=0.2))
    words, roles = write_row(random.Random(seed), kind)
    assert len(words) == len(roles) == 256
    assert set(roles) <= set(range(len(ROLE_WEIGHTS)))
    assert encode(join_words(words)) == TOKENIZER.convert_tokens_to_ids(words)


def test_shipped_folder_loads_plainly_and_answers():
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS_DIR, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        WEIGHTS_DIR, trust_remote_code=False, dtype=torch.float32
    ).eval()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert (WEIGHTS_DIR / "model.safetensors").stat().st_size < 20e6
    assert model.config.head_dim == 64
    assert model.config.max_position_embeddings == 4096
    assert (
        tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    )
    kept, dropped = [], []
    for seed in range(20):
        document = generate_document(tokenizer, 256, 10_000 + seed)
        prefix = encode(document.text, tokenizer)[: document.n_prefix]
        cache = prefill(model, torch.tensor([prefix]))
        kept += exact_matches(model, tokenizer, document.questions, cache)
        dropped += exact_matches(model, tokenizer, document.questions)
    assert sum(kept) / len(kept) > 0.85
    assert sum(dropped) / len(dropped) < 0.10


def test_greedy_answer_is_right_where_exact_match_says_so():
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS_DIR)
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS_DIR, dtype=torch.float32).eval()
    document = generate_document(tokenizer, 256, 77)
    prefix = encode(document.text, tokenizer)[: document.n_prefix]
    cache = prefill(model, torch.tensor([prefix]))
    found = exact_matches(model, tokenizer, document.questions, cache)
    for question, right in zip(document.questions, found, strict=True):
        ids = torch.tensor([prefix + encode(question.prompt, tokenizer)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
        )
        answer = tokenizer.decode(out[0, ids.shape[1] :])
        wanted = question.answer.strip() + tokenizer.eos_token
        assert (split_words(answer) == split_words(wanted)) == right


ROWS = RowKind(64, facts_per_person=(1, 2), plain=0.5)
TINY = train.Size(
    hidden=256,
    layers=2,
    heads=4,
    kv_heads=2,
    intermediate=64,
    stages=(Stage(0.0, ((1.0, ROWS),)), Stage(1.01, ((1.0, SHORT),))),
    batch_tokens=512,
    tokens=512 * 8,
)


@pytest.mark.slow
def test_training_resumes_to_identical_weights(tmp_path):
    def run(folder, *stops):
        folder.mkdir()
        for stop in stops:
            state = train.Run(TINY, 0, "cpu")
            if (folder / "checkpoint.pt").exists():
                state.load(folder / "checkpoint.pt")
            train.train(state, folder, total_tokens=4096, stop=stop)
        return state

    whole, parts = run(tmp_path / "whole", 4096), run(tmp_path / "parts", 1500, 4096)
    assert whole.progress["step"] == parts.progress["step"] > 4
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)
    start = train.build_model(TINY, 0).state_dict()["model.embed_tokens.weight"]
    assert not torch.equal(start, whole.model.state_dict()["model.embed_tokens.weight"])


@pytest.mark.slow
def test_training_lowers_the_loss():
    state = train.Run(TINY, 0, "cpu")
    losses = [state.train_step(10**9)["loss"] for _ in range(60)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.slow
def test_untrained_model_already_finds_values_by_their_keys():
    """The built-in circuit against chance (1 of about 30 values), at two sizes."""
    words = vocabulary_ids()
    rows = [write_row(random.Random(seed), ROWS) for seed in range(20)]
    ids = torch.tensor([[words[word] for word in row] for row, _ in rows])
    roles = torch.tensor([roles for _, roles in rows])[:, 1:]
    for size in (TINY, train.Size(384, 2, 6, 2, 64, TINY.stages, 512, 512)):
        logits = train.build_model(size, 0)(input_ids=ids[:, :-1]).logits.detach()
        logits.scatter_(2, ids[:, :-1, None], -torch.inf)  # a start repeats its own token
        right = (logits.argmax(-1) == ids[:, 1:])[roles == VALUE]
        assert right.float().mean() > 0.7


@pytest.mark.slow
def test_batches_drawn_ahead_are_the_same():
    ahead, here = train.Batches(TINY, 0, workers=1), train.Batches(TINY, 0, workers=0)
    for key in ((0, 0), (0, 1), (1, 2)):
        for a, b in zip(ahead.take(*key), here.take(*key), strict=True):
            assert torch.equal(a, b)
    ahead.pool.shutdown(cancel_futures=True)


def test_card_matches_the_weights_and_the_evaluation_set():
    found = json.loads((WEIGHTS_DIR / "evaluation.json").read_text())
    assert found["usable_context"] >= 256
    assert found["digest"] in (WEIGHTS_DIR / "README.md").read_text()


def test_documents_and_problems_import_no_torch():
    code = (
        "import sys, polykv.reference.documents, polykv.reference.problems; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_that_is_installed_imports_how_the_model_was_made():
    for package in ("polykv", "experiments", "analysis", "hydra_plugins"):
        for file in (REPO / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                aliases = node.names if isinstance(node, ast.Import) else []
                imported = [alias.name for alias in aliases] + [getattr(node, "module", None) or ""]
                assert not any(name.startswith("reference_model") for name in imported), file
