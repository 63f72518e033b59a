"""The sweep's progress bar, kept by what the results folder holds: workers on any machine need not report."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from tqdm import tqdm

from experiments.sweep import failure_path
from polykv.results import Store

INTERVAL = 0.5  # seconds; a look is two listings


@contextmanager
def shown(results_dir: str, experiment: str, cells: set[str]) -> Iterator[None]:
    """Show how many of the cells are done or have failed, on a terminal."""
    with tqdm(total=len(cells), desc="cells", unit="cell", disable=None) as bar:
        if bar.disable or not cells:
            yield
            return
        one = next(iter(cells))
        done = Store(results_dir).path(experiment, one).parent
        failed = failure_path(results_dir, experiment, one).parent
        before = _times(failed, cells)  # failures that are tried again

        def look() -> None:
            n_failed = len(_times(failed, cells).items() - before.items())
            if n_failed:
                bar.set_postfix(failed=n_failed, refresh=False)
            bar.update(len(_times(done, cells)) + n_failed - bar.n)

        ended = Event()
        watcher = Thread(target=_watch, args=(look, ended), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            look()


def _watch(look: Callable[[], None], ended: Event) -> None:
    while not ended.wait(INTERVAL):
        look()


def _times(folder: Path, cells: set[str]) -> dict[str, int]:
    """When each of the cells that the folder holds was written."""
    times = {}
    for path in folder.glob("*.*"):
        if path.stem in cells and path.suffix in (".json", ".txt"):
            try:
                times[path.stem] = path.stat().st_mtime_ns
            except FileNotFoundError:
                continue  # it is tried again just now
    return times
