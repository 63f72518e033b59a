"""What the harness adds to the model's work: recipes scored on one document beside the forward passes that it takes.

    python benchmarks/harness.py /my/model.gguf --recipes polykv waterfill_4 q8_0 q4_0
    python benchmarks/harness.py /my/model.gguf --context 2048 --dtype bfloat16 --repeats 3

Both sides take turns. The passes: the prefix is read once, then the rest once per recipe and once for the uncompressed
cache, each in one forward pass over a cache that is there. The harness: the cells of experiment=compare, without memory
and answers, from the documents to the rows of each; the model is loaded once and not counted. Encoding and decoding of
caches, all scores and their intervals are what it adds.

The peak resident set is that of a process that runs the same sweep from the command line, libraries included; beside it
the bytes that have to be there: the weights, two caches, log-probabilities of two readings.
"""

import argparse
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hydra import compose, initialize_config_dir
from report import Report, show
from timing import quartiles, timed
from transformers import DynamicCache, PreTrainedModel

from experiments import sweep
from experiments.session import FULL, PREFILLED, READ, Session
from polykv.config import CONF
from polykv.documents import Document

ROOT = Path(__file__).resolve().parents[1]
RECIPES = (
    "polykv", "waterfill_4", "waterfill_3", "q8_0", "q4_0", "turboquant_4bit", "kivi_2bit", "fp8_e4m3",
)  # fmt: skip


def overrides(given: argparse.Namespace, recipe: str) -> list[str]:
    """The command line of one recipe's cell."""
    own = [f"model.path={given.model.resolve()}", f"model.dtype={given.dtype}"]
    own += [f"document={given.document}", f"context={given.context}", f"recipe={recipe}"]
    alone = ["n_documents=1", "answers=0", "resident=false", "seed=0", "backend=cpu"]
    return ["experiment=compare", "model=gguf", "model.name=measured", *own, *alone]


def cells(given: argparse.Namespace) -> list[sweep.Cell]:
    """The cells of all recipes."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return [sweep.prepare(compose("config", overrides(given, one))) for one in given.recipes]


def harness(found: list[sweep.Cell], session: Session) -> None:
    """All cells from their documents to their rows; nothing but the model is left of an earlier call."""
    for name in (READ, FULL, PREFILLED):
        session.free(name)
    for cell in found:
        cell.study.run(cell.settled, session)


@torch.no_grad()
def passes(model: PreTrainedModel, document: Document, n_recipes: int) -> None:
    """The forward passes that the scores of so many recipes take."""
    cache = DynamicCache(config=model.config)
    model(input_ids=document.prefix_BT, past_key_values=cache, logits_to_keep=1)
    for _ in range(n_recipes + 1):
        own = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
        model(input_ids=document.rest_BT, past_key_values=own)


def command_line(given: argparse.Namespace) -> tuple[float, int]:
    """Seconds of `run.py --help`, and the largest resident set of a process that runs the sweep, in bytes."""
    start = [sys.executable, "run.py"]
    run = partial(subprocess.run, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    taken, _ = timed(lambda: run([*start, "--help"]))
    with TemporaryDirectory() as folder:
        sweep_of = overrides(given, ",".join(given.recipes))
        run([*start, *sweep_of, f"results_dir={folder}", "render=false"])
    # Of all children so far; at its start a child counts what this process has, which is less than the sweep needs.
    return taken, 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def needed_bytes(model: PreTrainedModel, document: Document) -> int:
    """Of the weights, two caches of the whole document, and fp32 log-probabilities of two readings."""
    weights = sum(one.nbytes for one in {id(p): p for p in model.parameters()}.values())
    with torch.no_grad():
        cache = model(input_ids=document.ids_BT[:, :64], use_cache=True).past_key_values
    of_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 64
    n_scored = document.rest_BT.shape[1] - 1
    return int(
        weights + 2 * of_token * document.ids_BT.shape[1] + 8 * n_scored * model.config.vocab_size
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--document", default="wikitext2_evaluation")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    process = command_line(given)  # before this process holds a model
    found, session = cells(given), Session()
    model, _ = session.model(found[0].settled)
    (document,) = session.documents(found[0].settled)
    times: dict[str, list[float]] = {"harness": [], "forward passes": []}
    for turn in range(1 + given.repeats):
        print(f"round {turn} of {given.repeats}", flush=True)
        own = timed(lambda: harness(found, session))[0]
        least = timed(lambda: passes(model, document, len(found)))[0]
        if turn:  # the first is a warm-up
            times["harness"].append(own)
            times["forward passes"].append(least)
    tell(given, times, process, needed_bytes(model, document))


def tell(
    given: argparse.Namespace,
    times: dict[str, list[float]],
    process: tuple[float, int],
    needed: int,
) -> None:
    """The table and the CSV."""
    started, peak = process
    about = {"threads": given.threads, "load": os.getloadavg()[0]}
    shared = {
        "model": given.model.parent.name,
        "dtype": given.dtype,
        "context_tokens": given.context,
    }
    report = Report("harness", about, **shared)
    lines, middles = [], {}
    for name, taken in times.items():
        low, middle, high = quartiles(taken)
        middles[name] = middle
        lines.append([name, f"{middle:.2f}", f"{low:.2f}-{high:.2f}"])
        report.add(name, "seconds", middle, "s", (low, high), n=len(taken))
    ratio = middles["harness"] / middles["forward passes"]
    report.add("harness", "over_forward_passes", ratio, "x")
    for name, value in (("sweep", peak), ("needed", needed)):
        report.add(name, "resident_bytes", value, "bytes")
    report.add("run.py --help", "seconds", started, "s")
    title = (
        f"{len(given.recipes)} recipes on one document: {shared['model']}, {given.context:,} tokens, {given.dtype}, "
        f"{given.threads} threads"
    )
    notes = [
        f"The harness takes {ratio:.2f} times what its forward passes take.",
        f"run.py --help takes {started:.1f} s; the sweep's peak is {peak / 2**20:,.0f} MiB, libraries "
        f"included, and weights, two caches and log-probabilities are {needed / 2**20:,.0f} MiB.",
        f"written to {report.write(given.csv)}",
    ]
    show(title, ["", "s", "quartiles"], lines, notes)


if __name__ == "__main__":
    main()
