"""Coverage-guided fuzzing of the card reader and the results reader with atheris (libFuzzer).

`python -m robustness.fuzz TARGET ...` is the process that fuzzes, as libFuzzer never returns; `fuzz` starts it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

TARGETS = ("card", "cell")
TESTS = Path(__file__).parent.parent
# Of an input: bytes, that long ones come at once, seconds, and MiB of the process.
LIMITS = {"max_len": 4096, "len_control": 0, "timeout": 10, "rss_limit_mb": 2048}
STARTING = 180  # seconds for imports on a busy machine


def fuzz(target: str, seconds: int, folder: Path) -> tuple[int, int]:
    """Fuzz for so long: (executions, coverage features). `folder` gets what it grows.

    Raises:
        AssertionError: something broke, with the trace and the input.
    """
    (folder / "grown").mkdir()
    options = LIMITS | {"max_total_time": seconds, "print_final_stats": 1}
    options |= {"artifact_prefix": f"{folder}/"}
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, "-m", "robustness.fuzz", target, str(folder),
         *(f"-{name}={value}" for name, value in options.items())],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        timeout=seconds + STARTING, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    found = (re.findall(rf"{name} +(\d+)", done.stdout) for name in ("executed_units:", "ft:"))
    executions, features = (int(numbers[-1]) for numbers in found)
    return executions, features


def main(target: str, folder: Path, options: list[str]) -> None:
    """Fuzz in this process, until libFuzzer ends it: it searches the choices that the strategy draws from."""
    import atheris
    from hypothesis import given

    with atheris.instrument_imports(include=["polykv", "json"]):
        from robustness import promises
    from robustness import strategies

    model, root = promises.tiny_model(), folder / "results"
    promises.any_model.start()

    @given(strategies.cards())
    def card(content: bytes) -> None:
        promises.check_card(content, model)

    @given(strategies.cells())
    def cell(content: bytes) -> None:
        promises.check_cell(content, root)

    read = {"card": card, "cell": cell}[target].hypothesis.fuzz_one_input
    atheris.Setup(["fuzz", str(folder / "grown"), *options], lambda choices: read(choices) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
