"""Run again what was disturbed, as a user would, and hold the result against a sweep that nobody disturbed."""

import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from reliability import stage

TRIES = 10  # each a second later, while workers that outlived their sweep are at a cell still


def resumed(
    root: Path, what: str, launcher: str = "sequential", sweep: Sequence[str] = stage.SWEEP
) -> list[str]:
    """Run the sweep again into `root`; what went wrong, said with `what` had happened to it before.

    A cell that was finished must keep its file; the table must be that of an undisturbed sweep to the byte.
    """
    finished = stage.finished(root)
    wanted = (*sweep, *stage.LAUNCHERS[launcher], f"results_dir={root}")
    for _ in range(TRIES):
        again = stage.run(wanted, *stage.FORKS[launcher])
        if "another process" not in again.err:
            break
        time.sleep(1)
    if again.code != 0:
        return [f"{what}: run again, it ended with {again.code}: {again.err.strip()[-300:]}"]
    if not finished.items() <= stage.finished(root).items():
        return [f"{what}: a finished cell was measured again"]
    return differs(root, what, sweep)


def differs(root: Path, what: str, sweep: Sequence[str] = stage.SWEEP) -> list[str]:
    """What keeps the folder's table from being that of an undisturbed sweep."""
    try:
        return [] if stage.table(root) == undisturbed(tuple(sweep)) else [f"{what}: another table"]
    except AssertionError as error:
        return [f"{what}: {error}"]


@cache
def undisturbed(sweep: tuple[str, ...]) -> bytes:
    """The table of a sweep, sequential, that nobody disturbs.

    Raises:
        RuntimeError: not even that works.
    """
    with TemporaryDirectory(prefix="polykv-undisturbed-") as folder:
        answer = stage.run((*sweep, f"results_dir={folder}"))
        if answer.code != 0:
            raise RuntimeError(f"an undisturbed sweep ended with {answer.code}: {answer.err}")
        return stage.table(Path(folder))


def outcome(promise: str, failures: list[str]) -> str:
    """What to say of a trial: its promise was kept, or where it was not (the first three)."""
    return promise if not failures else f"{len(failures)} failed: {'; '.join(failures[:3])}"
