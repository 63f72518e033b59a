"""Two and more processes that run the same sweep into one results folder at the same time."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

from reliability import stage
from reliability.again import differs, outcome
from reliability.finding import Finding


def run(quick: bool) -> list[Finding]:
    """All findings of this file."""
    crowds = {2: 1} if quick else {2: 6, 4: 4}
    return [together(n, times) for n, times in crowds.items()]


def together(n_processes: int, times: int) -> Finding:
    """Start them at once; whoever ends last has drawn the whole table, each cell was measured once."""
    start = time.monotonic()
    failures = []
    for number in range(times):
        with TemporaryDirectory(prefix="polykv-shared-") as folder:
            root = Path(folder) / "results"
            sweeps = [stage.Run(stage.in_folder(root)) for _ in range(n_processes)]
            answers = [sweep.end() for sweep in sweeps]
            for answer in answers:
                # A process that found every cell held and none finished has nothing to draw.
                idle = answer.code == 2 and "no results in" in answer.err
                if not (answer.code == 0 or idle) or "Traceback" in answer.err:
                    failures.append(f"round {number}: {answer.code}: {answer.err.strip()[-300:]}")
            failures += differs(root, f"round {number}")
    return Finding(
        area="one results folder",
        tried=f"{n_processes} processes start the same sweep at once",
        times=times,
        answered=outcome("each cell measured once, table complete when the last ends", failures),
        survived=not failures,
        seconds=time.monotonic() - start,
    )
