"""Hostile files: fuzzed for a while, damaged at random, and one of every kind that has a name."""

import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from fuzz import damage
from fuzz.promises import check_card, check_cell
from fuzz.run import fuzz
from fuzz.seeds import CORPUS
from fuzz.tiny import KEY, any_model, tiny_model
from polykv.handoff.card import CacheCard
from polykv.handoff.cardfile import CardError
from reliability.finding import Finding

SECONDS = {False: 120, True: 5}  # quick or not: of fuzzing, for each reader
N_DAMAGED = 10_000
REPO = Path(__file__).parent.parent
READERS = {"card": "the card reader", "cell": "the results reader"}


def run(quick: bool) -> list[Finding]:
    """Fuzzing, every named kind and signatures; random damages only where there is time for them."""
    found = [_fuzzed(target, SECONDS[quick]) for target in READERS]
    found += [] if quick else [_damaged()]
    with any_model:
        return found + _named(tiny_model()) + _unsigned(tiny_model()) + _cells()


def seeds() -> dict[str, bytes]:
    """The committed cards that are as they should be."""
    files = sorted((CORPUS / "card").iterdir())
    return {file.name: file.read_bytes() for file in files if not file.name.startswith("found-")}


def _fuzzed(target: str, seconds: int) -> Finding:
    run = fuzz(target, seconds)
    tried = f"coverage-guided fuzzing of {READERS[target]} (atheris)"
    answered = (
        f"{run.edges} edges and {run.features} features reached; {run.trace or 'nothing broke'}"
    )
    fine = run.trace is None and run.executions > 0
    return Finding("fuzzing", tried, run.executions, answered, fine, run.seconds)


def _damaged() -> Finding:
    """Flipped, cut, moved and repeated bytes, by the test that does it."""
    began = time.monotonic()
    command = [sys.executable, "tests/test_handoff_damage.py", str(N_DAMAGED)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    said = (done.stdout + done.stderr).strip().splitlines()[-1]
    counts = [int(n) for n in re.findall(r"(?:refused|identical) (\d+)", said)]
    fine = done.returncode == 0 and sum(counts) == N_DAMAGED
    tried = "a card with bytes flipped, cut, moved, repeated"
    return Finding("hostile cards", tried, N_DAMAGED, said, fine, time.monotonic() - began)


def _named(model: PreTrainedModel) -> list[Finding]:
    """Every kind of damage to every seed."""
    found = []
    for name, kind in damage.CARDS.items():
        changed = [kind(content) for content in seeds().values()]
        found.append(_tried(name, changed, lambda content: check_card(content, model)))
    return found


def _cells() -> list[Finding]:
    """Every kind of damage to a cell's file of results."""
    sealed = (CORPUS / "cell" / "sealed").read_bytes()
    with tempfile.TemporaryDirectory(prefix="polykv-cells-") as folder:
        return [
            _tried(
                name, [kind(sealed)], lambda content: _named_by(content, Path(folder)), "results"
            )
            for name, kind in damage.CELLS.items()
        ]


def _named_by(content: bytes, root: Path) -> str | None:
    """How the reader names the file, without the folder, which is another one each time."""
    line = check_cell(content, root)
    return line and line.replace(str(root), "ROOT")


def _unsigned(model: PreTrainedModel) -> list[Finding]:
    """Cards without the right signature, where a key is required."""
    made = [damage.unsigned_kinds(content) for content in seeds().values()]

    def opened(content: bytes) -> str | None:
        try:
            CacheCard.from_bytes(bytearray(content), model, None, KEY)
        except CardError as error:
            return str(error)
        return None

    return [
        _tried(f"{kind}, and a key is required", [one[kind] for one in made], opened)
        for kind in made[0]
    ]


def _tried(
    name: str, contents: list[bytes], read: Callable[[bytes], str | None], kind: str = "cards"
) -> Finding:
    """`read` must refuse all of them; the line it does so with most often is the answer."""
    began, lines = time.monotonic(), Counter()
    for content in contents:
        try:
            lines[read(content) or "OPENED"] += 1
        except (
            Exception
        ) as error:  # the promise that is broken, or whatever came instead of a refusal
            lines[f"BROKEN: {type(error).__name__}: {error}"] += 1
    fine = not any(line.startswith(("OPENED", "BROKEN")) for line in lines)
    worst = next((line for line in lines if line.startswith(("OPENED", "BROKEN"))), None)
    answered = worst or lines.most_common(1)[0][0]
    spent = time.monotonic() - began
    return Finding(f"hostile {kind}", name, len(contents), answered, fine, spent)
