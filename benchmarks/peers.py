"""N agents that continue one document on a CPU: transformers' caches, ours in place and llama.cpp, side by side.

    python benchmarks/peers.py /my/model.gguf --python /venv/with/llama-cpp-python/bin/python
    python benchmarks/peers.py /my/model.gguf --agents 1 15 --tokens 4096 --recipes waterfill_4

All get the same weights file, prompt and queries (random tokens), feed each agent its query and then its greedy tokens,
one token of each agent in a step, and take turns, a round of steps each, in two processes of which one waits:

- transformers, in one batch: unshared caches; the prompt's cache expanded to the batch; QuantizedCache (--quantized).
- ours: recipes read in place (--recipes).
- llama.cpp: the prompt once in a unified KV cache, a sequence for each agent, flash attention (--caches).

A step is the forward pass and the choice of each agent's next token. Only llama.cpp computes with the weights as the
file has them; the others with the same weights in --dtype. So `attends ms` is the attention alone: of transformers and
ours its time within further steps (step_parts.py), of llama.cpp the step less one after a prompt of one token.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from packages import PACKAGES, default_folder, ensure
from peers_cell import LLAMA_CPP, NOTES, Cell
from peers_torch import EXPANDED, QUANTIZED
from report import Report
from step_parts import UNSHARED
from timing import Worker, saying

from polykv.evaluation.concurrency import WARMUP

HERE = Path(__file__).resolve().parent
NO_PYTHON = "no --python with llama-cpp-python"


def main() -> None:
    arguments = parse()
    load = os.getloadavg()[0]
    about = {"threads": arguments.threads, "load": load, "timed": "in turn, two processes"}
    name = arguments.model.parent.name or arguments.model.name
    report = Report("peers", about, model=name, dtype=arguments.dtype)
    reasons = installed(arguments)
    for tokens in arguments.tokens:
        with tempfile.TemporaryDirectory() as folder, workers(arguments, tokens, folder) as found:
            for agents in arguments.agents:
                cell = Cell(arguments, tokens, agents, reasons)
                cell.measure(found)
                cell.record(report)
                cell.tell(f"{name}, load average at the start {load:.1f}")
                report.write(arguments.csv)
    for note in NOTES:
        print(note)
    print(f"rows: {report.write(arguments.csv)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--agents", nargs="+", type=int, default=[1, 5, 15, 30])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 8192])
    parser.add_argument("--recipes", nargs="*", default=["polykv", "waterfill_4", "trellis_4"])
    parser.add_argument("--quantized", nargs="*", choices=QUANTIZED, default=["hqq"])
    parser.add_argument("--caches", nargs="*", default=["f16", "q8_0", "q4_0"], help="llama.cpp's")
    parser.add_argument("--python", help="a Python that has llama-cpp-python")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="timed in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--packages", type=Path, default=default_folder())
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def installed(arguments: argparse.Namespace) -> dict[str, str]:
    """Why those of QuantizedCache's backends cannot be had that cannot."""
    wanted = [name for name in arguments.quantized if name in PACKAGES]
    found = {name: ensure(name, arguments.packages) for name in wanted}
    return {name: reason for name, reason in found.items() if reason}


@contextmanager
def workers(
    arguments: argparse.Namespace, tokens: int, folder: str
) -> Iterator[dict[str, Worker | str]]:
    """The process of torch and that of llama.cpp, or why there is none, for prompts of so many tokens."""
    options = {"model": [arguments.model], "agents": arguments.agents}
    options |= {"threads": [arguments.threads], "steps": [arguments.steps]}
    sides = [UNSHARED, EXPANDED, *arguments.quantized, *arguments.recipes]
    packages = [arguments.packages / name for name in arguments.quantized if name in PACKAGES]
    of_torch = {"tokens": [tokens], "sides": sides, "dtype": [arguments.dtype]}
    of_llama_cpp = {"warmup": [WARMUP], "caches": arguments.caches}
    # The prompt is there once the first is ready.
    command = sys.executable, "peers_torch.py", folder, options | of_torch
    found: dict[str, Worker | str] = {"torch": started(*command, packages)}
    found[LLAMA_CPP] = NO_PYTHON
    if arguments.python and isinstance(found["torch"], Worker):
        command = arguments.python, "peers_llama_cpp.py", folder, options | of_llama_cpp
        found[LLAMA_CPP] = started(*command)
    try:
        yield found
    finally:
        for one in found.values():
            if isinstance(one, Worker):
                one.close()


def started(
    python: str, script: str, folder: str, options: dict[str, list], packages: Sequence[Path] = ()
) -> Worker | str:
    """The running process, or why there is none; it finds `packages` beside those of its interpreter."""
    command = [python, str(HERE / script), folder]
    for name, values in options.items():
        command += [f"--{name}", *map(str, values)]
    # Not an option of the script: transformers looks for packages when it is imported.
    paths = [*map(str, packages), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with saying(f"{script} starts"):
        worker = Worker(command, environment)
    if worker.note:
        print(f"{script}: {worker.note}")
    return worker.reason or worker


if __name__ == "__main__":
    main()
