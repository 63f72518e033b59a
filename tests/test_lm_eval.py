"""polykv.lm_eval: with recipe=full lm-eval gets plain transformers' answers and scores, and wrong input is refused."""

import json
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXT
from test_tokens import BOS
from test_tokens import made as tokenizer_of

from polykv.config import REPO
from polykv.errors import PolyKVError
from polykv.pool import SharedKVPool, prefill
from polykv.tokens import encode

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
pytestmark = pytest.mark.slow

TASKS = REPO / "tests" / "data" / "lm_eval"
QUESTIONS = [json.loads(line) for line in (TASKS / "questions.jsonl").read_text().splitlines()]
PROMPTS = [one["text"] + one["question"] for one in QUESTIONS]


def made(recipe="full", pretrained="reference", **more):
    from polykv.lm_eval.model import PolyKVLM

    return PolyKVLM(pretrained=str(pretrained), recipe=recipe, **({"device": "cpu"} | more))


@pytest.fixture(scope="module")
def full():
    return made()


@pytest.fixture
def run_lm_eval(monkeypatch, tmp_path, capsys):
    """Runs lm-eval's command line in this process; (exit code, results, samples by task, stderr)."""

    def run(model_args, tasks="stated"):
        from lm_eval import tasks as known

        from polykv.lm_eval.__main__ import main

        # Without the thousands of tasks that lm-eval brings, which take seconds to find.
        manager = partial(known.TaskManager, include_defaults=False)
        monkeypatch.setattr(known, "TaskManager", manager)
        monkeypatch.chdir(REPO)
        command = ["lm_eval", "run", "--model", "polykv", "--model_args", model_args]
        command += ["--tasks", tasks, "--include_path", str(TASKS), "--device", "cpu"]
        command += ["--output_path", str(tmp_path), "--log_samples"]
        monkeypatch.setattr(sys, "argv", command)
        code = main()
        results = [json.loads(path.read_text()) for path in tmp_path.rglob("results_*.json")]
        said = {
            path.name.split("_2")[0]: [json.loads(line) for line in path.read_text().splitlines()]
            for path in tmp_path.rglob("samples_*.jsonl")
        }
        return code, results[0] if results else None, said, capsys.readouterr().err

    return run


def plainly(lm, prompt, limit):
    """transformers' own greedy ids after a prompt."""
    ids_BT = encode(lm.tokenizer, prompt, begins=True)
    settings = {"do_sample": False, "max_new_tokens": limit, "pad_token_id": 0}
    written_BT = lm.model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **settings)
    return written_BT[0, ids_BT.shape[1] :]


def asked(lm, prompts, **gen_kwargs):
    return lm.generate_until([SimpleNamespace(args=(prompt, gen_kwargs)) for prompt in prompts])


def scored(lm, pairs):
    return lm.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])


@pytest.mark.parametrize("reader", ["dequantize", "in_place"])
def test_answers_of_the_uncompressed_cache_are_plain_greedy_ones(full, reader):
    lm = full if reader == "dequantize" else made(reader=reader)
    written = [plainly(lm, prompt, 12) for prompt in PROMPTS]
    expected = [lm.tokenizer.decode(ids_T, skip_special_tokens=True) for ids_T in written]
    assert asked(lm, PROMPTS, until=[], max_gen_toks=12) == expected
    assert len(set(expected)) > 4
    assert asked(lm, PROMPTS, until=["?", "."], max_gen_toks=12) == [
        text.partition(".")[0].partition("?")[0] for text in expected
    ]


def test_an_end_token_ends_an_answer(full, monkeypatch):
    ids_T = plainly(full, PROMPTS[0], 12)
    monkeypatch.setattr(full.model.generation_config, "eos_token_id", int(ids_T[0]))
    assert asked(full, PROMPTS[:1], until=[]) == [full.tokenizer.decode(ids_T[:1])]
    assert len(ids_T) > 1


def test_scores_of_the_uncompressed_cache_are_those_of_one_forward_pass(full):
    pairs = [
        (prompt, f" {answer}")
        for prompt, one in zip(PROMPTS, QUESTIONS, strict=True)
        for answer in (*one["choices"], f"{one['answer']}. Q")
    ]
    for (context, after), (log_prob, is_greedy) in zip(pairs, scored(full, pairs), strict=True):
        n_before = encode(full.tokenizer, context, begins=True).shape[1]
        ids_BT = encode(full.tokenizer, context + after, begins=True)
        scores_TV = full.model(ids_BT).logits[0, n_before - 1 : -1].log_softmax(-1)
        after_T = ids_BT[0, n_before:]
        assert log_prob == pytest.approx(
            float(scores_TV.gather(1, after_T[:, None]).sum()), abs=1e-4
        )
        assert is_greedy == bool((scores_TV.argmax(-1) == after_T).all())
    # One pool for all answers to a prompt, and a text without a context is scored after BOS or EOS.
    n_pools = full.get_model_info()["polykv"]["pools"]
    scored(full, [(PROMPTS[0], " red"), (PROMPTS[0], " blue"), ("", " red")])
    assert full.get_model_info()["polykv"]["pools"] == n_pools + 1


def test_a_run_states_what_it_measured(run_lm_eval):
    code, results, said, err = run_lm_eval(
        "pretrained=reference,recipe=turboquant_2bit", tasks="stated,stated_choice"
    )
    assert code == 0, err
    lm = made("turboquant_2bit")
    assert [one["resps"][0][0] for one in said["samples_stated"]] == asked(
        lm, PROMPTS, until=["."], max_gen_toks=8
    )
    right = [one["resps"][0][0].strip() == one["doc"]["answer"] for one in said["samples_stated"]]
    assert results["results"]["stated"]["exact_match,stripped"] == sum(right) / len(right)
    pools = [
        SharedKVPool.from_cache(
            prefill(lm.model, encode(lm.tokenizer, prompt)[:, :-1]), lm.recipe, "torch"
        )
        for prompt in PROMPTS
    ]
    about = results["config"]["polykv"]
    # Once for each task: the prompts are the same, and each has one pool for all of its choices.
    assert about["pools"] == 16 and about["pooled_tokens"] == 2 * sum(p.n_tokens for p in pools)
    assert about["stored_bytes"] == 2 * sum(p.stored_bytes for p in pools)
    stored_bits = 8 * about["stored_bytes"] / (2 * sum(p.n_values for p in pools))
    assert about["stored_bits"] == stored_bits < 4
    assert about["weights"].startswith("reference@") and about["dtype"] == "float32"
    assert about["recipe"]["name"] == "turboquant_2bit" and about["commit"]
    assert results["lm_eval_version"] and results["n-samples"]["stated"]["effective"] == 8


def test_a_compressing_recipe_changes_scores_and_bytes(full):
    pairs = [(prompt, f" {one['answer']}") for prompt, one in zip(PROMPTS, QUESTIONS, strict=True)]
    exact, lossy = (
        [log_prob for log_prob, _ in scored(lm, pairs)] for lm in (full, made("turboquant_2bit"))
    )
    assert all(a != b for a, b in zip(exact, lossy, strict=True))
    assert full.get_model_info()["polykv"]["stored_bits"] == 32


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"recipe": "polykvv"}, "did you mean 'polykv'"),
        ({"recipe": ""}, "recipe=waterfill_4"),
        ({"pretrained": "smollm"}, "did you mean 'smollm2-"),
        ({"pretrained": ""}, "names no pretrained"),
        ({"reader": "in-place"}, "there are: dequantize, in_place"),
        ({"dtype": "int8"}, "there are: float32"),
        ({"batch_size": "auto"}, "leave it out"),
        ({"revision": "main"}, "takes no revision"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_before_the_model_is_loaded(arguments, named, monkeypatch):
    monkeypatch.setattr("polykv.models.AutoModelForCausalLM", None)
    with pytest.raises(PolyKVError, match=named) as refused:
        made(**({"pretrained": "reference"} | arguments))
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_the_default_device_of_lm_eval_is_a_cpu_without_a_gpu():
    assert made(device="cuda:0").get_model_info()["polykv"]["device"] == "cpu"
    with pytest.raises(PolyKVError, match="cuda:1 cannot be used"):
        made(device="cuda:1")


def test_the_command_line_ends_in_one_line(run_lm_eval):
    code, results, _, err = run_lm_eval("pretrained=reference,recipe=polykvv")
    assert code == 2 and results is None
    assert err.splitlines()[-1].startswith(
        "error: no recipe named 'polykvv'; did you mean 'polykv'?"
    )


@pytest.mark.parametrize(
    ("gen_kwargs", "named"),
    [
        ({"do_sample": True, "temperature": 0.7}, "do_sample=True, and answers are greedy"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"max_gen_toks": 0}, "give 1 or more"),
        ({"max_gen_toks": 9999}, "request 1 needs .* positions"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_any_answer(full, gen_kwargs, named):
    requests = [
        SimpleNamespace(args=(PROMPTS[0], {})),
        SimpleNamespace(args=(PROMPTS[1], gen_kwargs)),
    ]
    n_pools = full.get_model_info()["polykv"]["pools"]
    with pytest.raises(PolyKVError, match=named):
        full.generate_until(requests)
    assert full.get_model_info()["polykv"]["pools"] == n_pools


def test_scores_that_read_no_pool_are_refused(full):
    with pytest.raises(PolyKVError, match="no score reads a compressed cache"):
        full.loglikelihood_rolling([SimpleNamespace(args=(PROMPTS[0],))])


def test_kept_answers_are_of_one_recipe(full, tmp_path):
    from lm_eval.api.model import CachingLM

    path = str(tmp_path / "kept.db")
    request = SimpleNamespace(args=(PROMPTS[0], {"until": ["."], "max_gen_toks": 8}))
    first = CachingLM(full, path).generate_until([request])
    n_pools = full.get_model_info()["polykv"]["pools"]
    assert CachingLM(full, path).generate_until([request]) == first
    assert full.get_model_info()["polykv"]["pools"] == n_pools
    with pytest.raises(PolyKVError, match="another path"):
        CachingLM(made("polykv"), path)


def test_a_prompt_begins_with_bos_once(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "chatty")
    tokenizer = tokenizer_of("<bos> $A", bos_token="<bos>")
    tokenizer.chat_template = "<bos>{% for turn in messages %}{{ turn.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    lm = made(pretrained=folder)
    chat = lm.apply_chat_template([{"role": "user", "content": "Is a cache small ?"}])
    ids = lm.tok_encode("Is a cache small ?")
    assert lm.tok_encode(chat) == ids and ids.count(BOS) == 1 and ids[0] == BOS


def test_a_model_without_a_chat_template_is_asked_plainly(full):
    with pytest.raises(PolyKVError, match="leave --apply_chat_template out"):
        full.apply_chat_template([{"role": "user", "content": "Why?"}])


def test_a_folder_is_a_model(checkpoint):
    lm = made(pretrained=checkpoint, recipe="polykv", dtype="bfloat16")
    about = lm.get_model_info()
    assert about["polykv"]["weights"].startswith("local@") and about["model_dtype"] == "bfloat16"
    assert asked(lm, [TEXT[:200]], max_gen_toks=4)[0]
    assert lm.model.dtype == torch.bfloat16
