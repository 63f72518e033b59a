"""What people type wrong: one line on stderr that names the thing and the mend, exit code 2, and nothing written."""

import pytest
import torch
from conftest import run_py

from robustness.stage import first

SMALL_LLAMA = (
    b'{"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}'
)
WORDS = b"some text " * 200
CONFIG, TEXT, RECIPE = "config.json", "text.txt", "recipe/mine.yaml"
QUALITY = "experiment=polykv_quality recipe=full n_agents=2"
OWN_TEXT = f"{QUALITY} document=file context=160"
OWN_MODEL = f"{OWN_TEXT} model=local model.path={{}}"
OWN_RECIPE = "--config-dir {} recipe=mine"
HANDOFF = "experiment=handoff_accuracy policy=uniform n_hops=1 budget_bits=4 reseal=append"

# What is typed, what the answer has to name, and files; `{}` stands for a folder of these files.
MISTAKES = (
    ("recpie=polykv", "recpie"),
    ("recipe=polykw", "polykw"),
    ("experiment=polykv_qualty", "polykv_qualty"),
    ("launcher=teleport", "teleport"),
    ("reader=telepathy", "telepathy"),
    ("model=reference device=cuda", "cuda"),
    ("recipe=polykv recipe.value.bitz=3", "bitz"),
    ("n_agents=many", "n_agents='many'"),
    ("model=reference context=256,9999", "9999"),
    (f"{HANDOFF} budget_bits=-1", "budget_bits=-1"),
    (f"{OWN_MODEL}", "config.json", {CONFIG: b"{oops"}),
    (f"{OWN_TEXT} document.path={{}}/text.txt", "text.txt", {TEXT: "Übermaß".encode("latin-1")}),
    (OWN_RECIPE, "mine.yaml", {RECIPE: b"name: mine\nkey: [oops\n"}),
    ("results_dir={}/text.txt", "text.txt", {TEXT: b"not a folder"}),
    # names
    ("model=lama", "lama"),
    (f"{HANDOFF} policy=psychic", "psychic"),
    ("backend=abacus", "abacus"),
    (f"{QUALITY} scorer=bleu", "bleu"),
    ("model.dtype=int3", "int3"),
    ("weights=stolen", "stolen"),
    ("device=warp", "warp"),
    (f"{HANDOFF} reseal=glue", "glue"),
    ("experiment=outside_references outside=fp7", "fp7"),
    ("experiment=handoff_ttft transports=[pigeon]", "pigeon"),
    ("experiment=capacity hardware=abacus", "abacus"),
    ("experiment=concurrency readers=[telepathy]", "telepathy"),
    # values
    ("n_agents=0", "n_agents=0"),
    ("context=banana", "context='banana'"),
    ("context=-5", "context=-5"),
    ("model=reference context=null", "context"),
    ("prefix_fraction=1.5", "prefix_fraction=1.5"),
    ("prefix_fraction=half", "prefix_fraction"),
    ("context=100 prefix_fraction=0.999", "prefix_fraction=0.999"),
    ("seed=-1", "seed=-1"),
    ("max_new_tokens=0", "max_new_tokens=0"),
    ("recipe=polykv recipe.value.bits=9", "bits"),
    ("recipe=polykv recipe.value.bits=three", "bits"),
    (f"{HANDOFF} budget_bits=cheap", "budget_bits='cheap'"),
    ("experiment=recipe_search budget_bits=1", "budget_bits=1"),
    (f"{HANDOFF} n_hops=0", "n_hops=0"),
    ("experiment=concurrency readers=[]", "readers=[]"),
    ("experiment=handoff_ttft repeats=0", "repeats=0"),
    ("experiment=handoff_ttft turn_tokens=9999", "turn_tokens=9999"),
    ("hydra.sweeper.max_jobs=0", "max_jobs=0"),
    ("recipe=", "recipe"),
    ("n_agents=[1", "[1"),
    # models and the hub
    (f"{QUALITY} model=local", "model.path"),
    (f"{OWN_TEXT} model=local model.path=/nowhere", "/nowhere"),
    (OWN_MODEL, "config.json"),
    (OWN_MODEL, "telepath", {CONFIG: b'{"model_type": "telepath"}'}),
    (f"{OWN_MODEL} document.path={{}}/text.txt", "own", {CONFIG: SMALL_LLAMA, TEXT: WORDS}),
    (f"{QUALITY} model=qwen2.5-0.5b document=moon_landing", "hub"),
    (f"{OWN_TEXT} model=gguf model.path={{}}/text.txt", "not a GGUF file", {TEXT: WORDS}),
    (f"{OWN_TEXT} model=gguf model.path={{}}", "no .gguf files"),
    (f"{QUALITY} document=wikitext2_raw", "hub"),
    (f"{QUALITY} render=maybe", "true or false"),
    (f"{QUALITY} scorer=roberta-large", "hub"),
    (f"{QUALITY} model=qwen2.5-0.5b weights=random document=moon_landing", "random weights"),
    (f"{QUALITY} model=smollm2-135m", "document=generated"),
    # documents
    (OWN_TEXT, "document.path"),
    (f"{OWN_TEXT} document.path=/nowhere/text.txt", "/nowhere/text.txt"),
    (f"{OWN_TEXT} document.path={{}}", "document.path"),
    (f"{OWN_TEXT} document.path={{}}/text.txt", "text.txt", {TEXT: b" \n"}),
    (f"{OWN_TEXT} document.path={{}}/text.txt", "context=160", {TEXT: b"short"}),
    (f"{OWN_TEXT} document.path={{}}/text.txt document.questions=/nowhere/q", "/nowhere/q", {TEXT: WORDS}),
    (f"{OWN_TEXT} document.path={{}}/text.txt document.questions={{}}/text.txt n_agents=3", "n_agents=3",
     {TEXT: WORDS}),
    # files of one's own
    (OWN_RECIPE, "nothing.Codec",
     {RECIPE: b"name: mine\nkey: {_target_: nothing.Codec}\nvalue: {_target_: nothing.Codec}\n"}),
    (OWN_RECIPE, "value",
     {RECIPE: b"name: mine\nkey: {_target_: polykv.codecs.int8.Int8, granularity: tensor}\n"}),
    ("results_dir={}/text.txt/results", "text.txt", {TEXT: b"no folder"}),
)  # fmt: skip


@pytest.mark.parametrize(("typed", "named", "files"), first(6, [(*m, {})[:3] for m in MISTAKES]))
def test_bad_input_is_one_line_and_exit_2(typed, named, files, tmp_path):
    if "device=cuda" in typed and torch.cuda.is_available():
        pytest.skip("where there is a GPU, asking for it is no mistake")
    own, results = tmp_path / "own", tmp_path / "results"
    own.mkdir()
    for name, content in files.items():
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_bytes(content)
    overrides = typed.replace("{}", str(own)).split(" ")
    if "results_dir=" not in typed:
        overrides.append(f"results_dir={results}")
    given = run_py(*overrides)
    # A slow machine shows its progress first.
    lines = [line for line in given.stderr.splitlines() if line and not line.startswith("[")]
    assert given.returncode == 2 and len(lines) == 1, given
    assert lines[0].startswith("error: ") and named in lines[0], lines
    assert not [path for path in results.rglob("*") if path.is_file()]
