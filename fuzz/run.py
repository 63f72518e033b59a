"""One bounded run of libFuzzer over a target, in a process of its own: libFuzzer never returns."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from polykv.errors import PolyKVError

TARGETS = ("card", "cell")
HERE = Path(__file__).parent
LONGEST = 16384  # bytes of an input
SLOWEST = 10  # seconds that one input may take before libFuzzer stops the run
RESIDENT = 2048  # MiB of the whole process; torch takes 500
STARTING = 180  # seconds for imports on a busy machine


@dataclass(frozen=True)
class Run:
    """`edges` and `features` are libFuzzer's coverage counts; `trace` is the end of what broke, or None."""

    executions: int
    edges: int
    features: int
    seconds: float
    trace: str | None = None

    def __str__(self) -> str:
        found = f"{self.executions} executions, {self.edges} edges, {self.features} features"
        return f"{found}, {self.seconds:.0f} s; {self.trace or 'nothing broke'}"


def fuzz(target: str, seconds: int, keep: Path | None = None) -> Run:
    """Fuzz `card` or `cell` for `seconds`, from the committed seeds.

    Raises:
        PolyKVError: unknown target, or atheris is not installed.
    """
    if target not in TARGETS:
        raise PolyKVError(f"no fuzz target {target!r}; there are: {', '.join(TARGETS)}")
    if find_spec("atheris") is None:
        raise PolyKVError("atheris is not installed; on Linux x86_64: pip install -e '.[dev]'")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="polykv-fuzz-") as folder:
        grown = Path(folder) / "grown"
        grown.mkdir()
        options = {"max_total_time": seconds, "max_len": LONGEST, "timeout": SLOWEST}
        options |= {
            "rss_limit_mb": RESIDENT,
            "print_final_stats": 1,
            "artifact_prefix": f"{folder}/",
        }
        done = subprocess.run(
            [sys.executable, "-m", f"fuzz.{target}", str(grown), str(HERE / "corpus" / target),
             *(f"-{name}={value}" for name, value in options.items())],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            timeout=seconds + STARTING, cwd=HERE.parent, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        broken = [path for path in Path(folder).iterdir() if path.is_file()]
        if keep is not None and broken:
            keep.mkdir(parents=True, exist_ok=True)
            for path in broken:
                shutil.copy(path, keep)
    trace = None if done.returncode == 0 else _trace(done.stdout)
    spent = time.monotonic() - began
    counts = [_last(done.stdout, name) for name in ("executed_units:", "cov:", "ft:")]
    return Run(*counts, spent, trace)


def _last(text: str, name: str) -> int:
    found = re.findall(rf"{name} +(\d+)", text)
    return int(found[-1]) if found else 0


def _trace(text: str) -> str:
    """The last exception's own line, or the last line at all."""
    lines = [line for line in text.splitlines() if line.strip()]
    named = [
        line for line in lines if re.match(r"[\w.]+(Error|Exception|Limit)\b|.*SUMMARY:", line)
    ]
    return (named or lines or ["nothing was printed"])[0]
