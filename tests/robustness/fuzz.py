"""Coverage-guided fuzzing of the card reader or the results reader with atheris (libFuzzer).

`python -m robustness.fuzz card|cell SECONDS FOLDER` is a process of its own, as libFuzzer never returns; FOLDER gets
the inputs that it grows and the one that breaks something.
"""

import sys
from pathlib import Path

import atheris
from hypothesis import given

with atheris.instrument_imports(include=["polykv", "json"]):
    from robustness import promises
from robustness import forge

# Of an input: bytes, that long ones come at once, seconds, and MiB of the process.
LIMITS = {"max_len": 4096, "len_control": 0, "timeout": 10, "rss_limit_mb": 2048}


def main(target: str, seconds: str, folder: Path) -> None:
    """Search the choices that the strategy draws from."""
    (folder / "grown").mkdir()
    options = LIMITS | {"max_total_time": seconds, "print_final_stats": 1}
    options |= {"artifact_prefix": f"{folder}/"}
    model = promises.tiny_model()
    promises.any_model.start()

    @given(forge.cards())
    def card(content: bytes) -> None:
        promises.check_card(content, model)

    @given(forge.cells())
    def cell(content: bytes) -> None:
        promises.check_cell(content, folder / "results")

    read = {"card": card, "cell": cell}[target].hypothesis.fuzz_one_input
    flags = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup(["fuzz", str(folder / "grown"), *flags], lambda choices: read(choices) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
