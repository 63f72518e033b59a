"""What people type wrong: each is answered in one line on stderr that names the thing and the mend, exit code 2."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from reliability import stage
from reliability.finding import Finding


@dataclass(frozen=True)
class BadInput:
    """One mistake.

    Attributes:
        kind: in words.
        overrides: what is typed; `{}` stands for a folder of its own.
        named: what the answer has to name.
        prepare: puts into that folder what the mistake is about.
    """

    kind: str
    overrides: str
    named: str
    prepare: Callable[[Path], object] = lambda folder: None


def run(quick: bool) -> list[Finding]:
    """A finding for each mistake. All are quick: nothing is measured."""
    return [answer(mistake) for mistake in MISTAKES if applies(mistake)]


def applies(mistake: BadInput) -> bool:
    """Where there is a GPU, asking for it is no mistake."""
    return "device=cuda" not in mistake.overrides or not torch.cuda.is_available()


def answer(mistake: BadInput) -> Finding:
    """Make the mistake and judge the answer."""
    start = time.monotonic()
    with TemporaryDirectory(prefix="polykv-bad-") as folder:
        own, results = Path(folder) / "own", Path(folder) / "results"
        own.mkdir()
        mistake.prepare(own)
        overrides = mistake.overrides.replace("{}", str(own)).split(" ")
        if not any(override.startswith("results_dir=") for override in overrides):
            overrides.append(f"results_dir={results}")
        given = stage.run(overrides)
        written = [str(path) for path in results.rglob("*") if path.is_file()]
    # A slow machine's progress is no part of the answer.
    lines = [line for line in given.err.strip().splitlines() if not line.startswith("[")]
    said = lines[-1] if lines else ""
    wrong = []
    if given.code != 2:
        wrong.append(f"exit {given.code}")
    if len(lines) != 1 or not said.startswith("error: "):
        wrong.append(f"{len(lines)} lines on stderr")
    if mistake.named not in said:
        wrong.append(f"{mistake.named} is not named")
    if written:
        wrong.append(f"written: {written[:3]}")
    shown = said.replace(str(own), "FOLDER").replace(str(results), "RESULTS")
    shown = shown if len(shown) < 400 else f"{shown[:400]} ..."
    typed = mistake.overrides.replace("{}", "FOLDER")
    return Finding(
        area="bad input",
        tried=f"{mistake.kind}: `{typed}`",
        times=1,
        answered=f"`{shown}`" + "".join(f" ({problem})" for problem in wrong),
        survived=not wrong,
        seconds=time.monotonic() - start,
    )


def _files(**contents: bytes) -> Callable[[Path], object]:
    """Writes NAME.txt or, for `config`, a model's config.json."""

    def prepare(folder: Path) -> None:
        for name, content in contents.items():
            (folder / ("config.json" if name == "config" else f"{name}.txt")).write_bytes(content)

    return prepare


def _recipe(text: str) -> Callable[[Path], object]:
    """A recipe of the user's own, FOLDER/recipe/mine.yaml, found with --config-dir."""

    def prepare(folder: Path) -> None:
        (folder / "recipe").mkdir()
        (folder / "recipe" / "mine.yaml").write_text(text, encoding="utf-8")

    return prepare


SMALL_LLAMA = b'{"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2}'
WORDS = b"some text " * 200
QUALITY = "experiment=polykv_quality recipe=full n_agents=2"
OWN_TEXT = f"{QUALITY} document=file context=160"
OWN_RECIPE = "--config-dir {} recipe=mine"
HANDOFF = "experiment=handoff_accuracy policy=uniform n_hops=1 budget_bits=4 reseal=append"

MISTAKES = (
    # names
    BadInput("an axis misspelt", "recpie=polykv", "recpie"),
    BadInput("no such recipe", "recipe=polykw", "polykw"),
    BadInput("no such model", "model=lama", "lama"),
    BadInput("no such document", "document=nowhere", "nowhere"),
    BadInput("no such experiment", "experiment=polykv_qualty", "polykv_qualty"),
    BadInput("no such policy", f"{HANDOFF} policy=psychic", "psychic"),
    BadInput("no such reader", "reader=telepathy", "telepathy"),
    BadInput("no such backend", "backend=abacus", "abacus"),
    BadInput("no such scorer", f"{QUALITY} scorer=bleu", "bleu"),
    BadInput("no such launcher", "launcher=teleport", "teleport"),
    BadInput("no such logger", "logger=telegraph", "telegraph"),
    BadInput("no such dtype", "model.dtype=int3", "int3"),
    BadInput("no such kind of weights", "weights=stolen", "stolen"),
    BadInput("no such device", "device=warp", "warp"),
    BadInput("a device that is not there", "device=cuda", "cuda"),
    BadInput("no such codec setting", "recipe=polykv recipe.value.bitz=3", "bitz"),
    BadInput("no such reseal", f"{HANDOFF} reseal=glue", "glue"),
    BadInput("no such outside reference", "experiment=outside_references outside=fp7", "fp7"),
    BadInput("no such transport", "experiment=handoff_ttft transports=[pigeon]", "pigeon"),
    BadInput("no such hardware", "experiment=capacity hardware=abacus", "abacus"),
    BadInput("no such reader to compare", "experiment=concurrency readers=[telepathy]", "telepathy"),
    # values
    BadInput("nobody reads", "n_agents=0", "n_agents=0"),
    BadInput("a word for a number", "n_agents=many", "n_agents='many'"),
    BadInput("a word for a length", "context=banana", "context='banana'"),
    BadInput("a negative length", "context=-5", "context=-5"),
    BadInput("no length where one is needed", "context=null", "context"),
    BadInput("longer than the model's positions", "context=256,9999", "9999"),
    BadInput("a fraction above one", "prefix_fraction=1.5", "prefix_fraction=1.5"),
    BadInput("a word for a fraction", "prefix_fraction=half", "prefix_fraction"),
    BadInput("nothing left to score", "context=100 prefix_fraction=0.999", "prefix_fraction=0.999"),
    BadInput("a negative seed", "seed=-1", "seed=-1"),
    BadInput("no new tokens", "max_new_tokens=0", "max_new_tokens=0"),
    BadInput("more bits than a codec has", "recipe=polykv recipe.value.bits=9", "bits"),
    BadInput("a word for bits", "recipe=polykv recipe.value.bits=three", "bits"),
    BadInput("an impossible budget", f"{HANDOFF} budget_bits=-1", "budget_bits=-1"),
    BadInput("a budget that is no number", f"{HANDOFF} budget_bits=cheap", "budget_bits='cheap'"),
    BadInput("a budget below the smallest width", "experiment=recipe_search budget_bits=1", "budget_bits=1"),
    BadInput("no handoff", f"{HANDOFF} n_hops=0", "n_hops=0"),
    BadInput("nothing to compare", "experiment=concurrency readers=[]", "readers=[]"),
    BadInput("too few repeats", "experiment=handoff_ttft repeats=0", "repeats=0"),
    BadInput("a turn longer than the context", "experiment=handoff_ttft turn_tokens=9999", "turn_tokens=9999"),
    BadInput("no jobs at all", "hydra.sweeper.max_jobs=0", "max_jobs=0"),
    BadInput("a value forgotten", "recipe=", "recipe"),
    BadInput("a bracket not closed", "n_agents=[1", "[1"),
    # models and the hub
    BadInput("a local model without a path", f"{QUALITY} model=local", "model.path"),
    BadInput("a model folder that is not there", f"{OWN_TEXT} model=local model.path=/nowhere", "/nowhere"),
    BadInput("a folder without a model", f"{OWN_TEXT} model=local model.path={{}}", "config.json"),
    BadInput("a config.json that is no JSON", f"{OWN_TEXT} model=local model.path={{}}", "config.json",
             _files(config=b"{oops")),
    BadInput("a kind of model that nobody knows", f"{OWN_TEXT} model=local model.path={{}}", "telepath",
             _files(config=b'{"model_type": "telepath"}')),
    BadInput("a model folder without weights", f"{OWN_TEXT} model=local model.path={{}} "
             "document.path={}/text.txt",
             "own", _files(config=SMALL_LLAMA, text=WORDS)),
    BadInput("weights where no hub is", f"{QUALITY} model=qwen2.5-0.5b document=moon_landing", "hub"),
    BadInput("a text for a GGUF file", f"{OWN_TEXT} model=gguf model.path={{}}/text.txt", "no GGUF file",
             _files(text=WORDS)),
    BadInput("a folder without a GGUF file", f"{OWN_TEXT} model=gguf model.path={{}}", "no .gguf files"),
    BadInput("a dataset where no hub is", f"{QUALITY} document=wikitext2_raw", "hub"),
    BadInput("a scorer where no hub is", f"{QUALITY} scorer=roberta-large", "hub"),
    BadInput("quality of random weights", f"{QUALITY} model=qwen2.5-0.5b weights=random "
             "document=moon_landing", "random weights"),
    BadInput("a generated document for another model", f"{QUALITY} model=smollm2-135m", "document=generated"),
    # documents
    BadInput("a text without a path", OWN_TEXT, "document.path"),
    BadInput("a text that is not there", f"{OWN_TEXT} document.path=/nowhere/text.txt", "/nowhere/text.txt"),
    BadInput("a folder for a text", f"{OWN_TEXT} document.path={{}}", "document.path"),
    BadInput("a text that is not UTF-8", f"{OWN_TEXT} document.path={{}}/text.txt", "text.txt",
             _files(text="Übermaß".encode("latin-1"))),
    BadInput("an empty text", f"{OWN_TEXT} document.path={{}}/text.txt", "text.txt", _files(text=b" \n")),
    BadInput("a text shorter than the context", f"{OWN_TEXT} document.path={{}}/text.txt", "context=160",
             _files(text=b"short")),
    BadInput("no questions file", f"{OWN_TEXT} document.path={{}}/text.txt document.questions=/nowhere/q",
             "/nowhere/q", _files(text=WORDS)),
    BadInput("fewer questions than agents", f"{OWN_TEXT} document.path={{}}/text.txt "
             "document.questions={}/text.txt n_agents=3", "n_agents=3", _files(text=WORDS)),
    # files of one's own
    BadInput("broken YAML", OWN_RECIPE, "mine.yaml", _recipe("name: mine\nkey: [oops\n")),
    BadInput("a recipe of a codec that is not there", OWN_RECIPE, "nothing.Codec",
             _recipe("name: mine\nkey: {_target_: nothing.Codec}\nvalue: {_target_: nothing.Codec}\n")),
    BadInput("a recipe without values", OWN_RECIPE, "value",
             _recipe("name: mine\nkey: {_target_: polykv.codecs.int8.Int8, granularity: tensor}\n")),
    # results
    BadInput("results_dir is a file", "results_dir={}/text.txt", "text.txt", _files(text=b"not a folder")),
    BadInput("results_dir below a file", "results_dir={}/text.txt/results", "text.txt", _files(text=b"no folder")),
)  # fmt: skip
