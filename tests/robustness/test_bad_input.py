"""What people type wrong: one line on stderr that names the thing and the mend, exit code 2, and nothing written."""

import pytest
import torch

from robustness import stage

SMALL_LLAMA = (
    b'{"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}'
)
WORDS = b"some text " * 200
CONFIG, TEXT, RECIPE = "config.json", "text.txt", "recipe/mine.yaml"
QUALITY = "experiment=polykv_quality recipe=full n_agents=2"
OWN_TEXT = f"{QUALITY} document=file context=160"
OWN_RECIPE = "--config-dir {} recipe=mine"
HANDOFF = "experiment=handoff_accuracy policy=uniform n_hops=1 budget_bits=4 reseal=append"

# (the mistake, what is typed, what the answer has to name, files); `{}` stands for a folder of these files.
MISTAKES = (
    # names
    ("an axis misspelt", "recpie=polykv", "recpie"),
    ("no such recipe", "recipe=polykw", "polykw"),
    ("no such model", "model=lama", "lama"),
    ("no such document", "document=nowhere", "nowhere"),
    ("no such experiment", "experiment=polykv_qualty", "polykv_qualty"),
    ("no such policy", f"{HANDOFF} policy=psychic", "psychic"),
    ("no such reader", "reader=telepathy", "telepathy"),
    ("no such backend", "backend=abacus", "abacus"),
    ("no such scorer", f"{QUALITY} scorer=bleu", "bleu"),
    ("no such launcher", "launcher=teleport", "teleport"),
    ("no such logger", "logger=telegraph", "telegraph"),
    ("no such dtype", "model.dtype=int3", "int3"),
    ("no such kind of weights", "weights=stolen", "stolen"),
    ("no such device", "device=warp", "warp"),
    ("a device that is not there", "model=reference device=cuda", "cuda"),
    ("no such codec setting", "recipe=polykv recipe.value.bitz=3", "bitz"),
    ("no such reseal", f"{HANDOFF} reseal=glue", "glue"),
    ("no such outside reference", "experiment=outside_references outside=fp7", "fp7"),
    ("no such transport", "experiment=handoff_ttft transports=[pigeon]", "pigeon"),
    ("no such hardware", "experiment=capacity hardware=abacus", "abacus"),
    ("no such reader to compare", "experiment=concurrency readers=[telepathy]", "telepathy"),
    # values
    ("nobody reads", "n_agents=0", "n_agents=0"),
    ("a word for a number", "n_agents=many", "n_agents='many'"),
    ("a word for a length", "context=banana", "context='banana'"),
    ("a negative length", "context=-5", "context=-5"),
    ("no length where one is needed", "model=reference context=null", "context"),
    ("longer than the model's positions", "model=reference context=256,9999", "9999"),
    ("a fraction above one", "prefix_fraction=1.5", "prefix_fraction=1.5"),
    ("a word for a fraction", "prefix_fraction=half", "prefix_fraction"),
    ("nothing left to score", "context=100 prefix_fraction=0.999", "prefix_fraction=0.999"),
    ("a negative seed", "seed=-1", "seed=-1"),
    ("no new tokens", "max_new_tokens=0", "max_new_tokens=0"),
    ("more bits than a codec has", "recipe=polykv recipe.value.bits=9", "bits"),
    ("a word for bits", "recipe=polykv recipe.value.bits=three", "bits"),
    ("an impossible budget", f"{HANDOFF} budget_bits=-1", "budget_bits=-1"),
    ("a budget that is no number", f"{HANDOFF} budget_bits=cheap", "budget_bits='cheap'"),
    ("a budget below the smallest width", "experiment=recipe_search budget_bits=1", "budget_bits=1"),
    ("no handoff", f"{HANDOFF} n_hops=0", "n_hops=0"),
    ("nothing to compare", "experiment=concurrency readers=[]", "readers=[]"),
    ("too few repeats", "experiment=handoff_ttft repeats=0", "repeats=0"),
    ("a turn longer than the context", "experiment=handoff_ttft turn_tokens=9999", "turn_tokens=9999"),
    ("no jobs at all", "hydra.sweeper.max_jobs=0", "max_jobs=0"),
    ("a value forgotten", "recipe=", "recipe"),
    ("a bracket not closed", "n_agents=[1", "[1"),
    # models and the hub
    ("a local model without a path", f"{QUALITY} model=local", "model.path"),
    ("a model folder that is not there", f"{OWN_TEXT} model=local model.path=/nowhere", "/nowhere"),
    ("a folder without a model", f"{OWN_TEXT} model=local model.path={{}}", "config.json"),
    ("a config.json that is no JSON", f"{OWN_TEXT} model=local model.path={{}}", "config.json",
             {CONFIG: b"{oops"}),
    ("a kind of model that nobody knows", f"{OWN_TEXT} model=local model.path={{}}", "telepath",
             {CONFIG: b'{"model_type": "telepath"}'}),
    ("a model folder without weights", f"{OWN_TEXT} model=local model.path={{}} "
             "document.path={}/text.txt",
             "own", {CONFIG: SMALL_LLAMA, TEXT: WORDS}),
    ("weights where no hub is", f"{QUALITY} model=qwen2.5-0.5b document=moon_landing", "hub"),
    ("a text for a GGUF file", f"{OWN_TEXT} model=gguf model.path={{}}/text.txt", "no GGUF file",
             {TEXT: WORDS}),
    ("a folder without a GGUF file", f"{OWN_TEXT} model=gguf model.path={{}}", "no .gguf files"),
    ("a dataset where no hub is", f"{QUALITY} document=wikitext2_raw", "hub"),
    ("a scorer where no hub is", f"{QUALITY} scorer=roberta-large", "hub"),
    ("quality of random weights", f"{QUALITY} model=qwen2.5-0.5b weights=random "
             "document=moon_landing", "random weights"),
    ("a generated document for another model", f"{QUALITY} model=smollm2-135m", "document=generated"),
    # documents
    ("a text without a path", OWN_TEXT, "document.path"),
    ("a text that is not there", f"{OWN_TEXT} document.path=/nowhere/text.txt", "/nowhere/text.txt"),
    ("a folder for a text", f"{OWN_TEXT} document.path={{}}", "document.path"),
    ("a text that is not UTF-8", f"{OWN_TEXT} document.path={{}}/text.txt", "text.txt",
             {TEXT: "Übermaß".encode("latin-1")}),
    ("an empty text", f"{OWN_TEXT} document.path={{}}/text.txt", "text.txt", {TEXT: b" \n"}),
    ("a text shorter than the context", f"{OWN_TEXT} document.path={{}}/text.txt", "context=160",
             {TEXT: b"short"}),
    ("no questions file", f"{OWN_TEXT} document.path={{}}/text.txt document.questions=/nowhere/q",
             "/nowhere/q", {TEXT: WORDS}),
    ("fewer questions than agents", f"{OWN_TEXT} document.path={{}}/text.txt "
             "document.questions={}/text.txt n_agents=3", "n_agents=3", {TEXT: WORDS}),
    # files of one's own
    ("broken YAML", OWN_RECIPE, "mine.yaml", {RECIPE: b"name: mine\nkey: [oops\n"}),
    ("a recipe of a codec that is not there", OWN_RECIPE, "nothing.Codec",
             {RECIPE: b"name: mine\nkey: {_target_: nothing.Codec}\nvalue: {_target_: nothing.Codec}\n"}),
    ("a recipe without values", OWN_RECIPE, "value",
             {RECIPE: b"name: mine\nkey: {_target_: polykv.codecs.int8.Int8, granularity: tensor}\n"}),
    # results
    ("results_dir is a file", "results_dir={}/text.txt", "text.txt", {TEXT: b"not a folder"}),
    ("results_dir below a file", "results_dir={}/text.txt/results", "text.txt", {TEXT: b"no folder"}),
)  # fmt: skip


@pytest.mark.parametrize(("mistake", "typed", "named", "files"), [(*m, {})[:4] for m in MISTAKES])
def test_bad_input_is_one_line_and_exit_2(mistake, typed, named, files, tmp_path):
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
    given = stage.run(overrides)
    # The progress that a slow machine shows is no part of the answer.
    lines = [line for line in given.err.strip().splitlines() if not line.startswith("[")]
    assert given.code == 2 and len(lines) == 1, given
    assert lines[0].startswith("error: ") and named in lines[0], lines
    assert not [path for path in results.rglob("*") if path.is_file()]
