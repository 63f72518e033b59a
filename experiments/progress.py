"""Progress on stderr: the cell, the phase and the time left, at least every 5 seconds.

A terminal shows one line that is rewritten. A pipe gets a line for each phase and each finished cell, and one after
HEARTBEAT seconds without any. Finished cells are counted in the results folder, so workers on any machine count.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, Thread
from typing import TextIO

from experiments.sweep import failure_path
from polykv import progress
from polykv.progress import Phase
from polykv.results import Store

HEARTBEAT = 4.0  # seconds
LOOK = 0.5  # seconds between two counts of the results folder
CLEAR = "\r\x1b[K"


@dataclass
class Cells:
    """Count of a sweep's cells that have ended, from the files in the results folder.

    Attributes:
        folders: of finished cells and of failed cells, each with one file a cell.
        names: the identities of the cells to count.
        started: when the sweep began (time.monotonic).
        before: the files of failures in earlier runs, with their times of change.
    """

    folders: tuple[Path, Path]
    names: set[str]
    started: float
    before: dict[Path, int] = field(init=False)

    def __post_init__(self) -> None:
        self.before = self._ended()

    def n_ended(self) -> int:
        """Cells that have finished or failed since the sweep began."""
        return len({path.stem for path, _ in self._ended().items() - self.before.items()})

    def _ended(self) -> dict[Path, int]:
        """The files of these cells, with their times of change."""
        times = {}
        for folder, suffix in zip(self.folders, (".json", ".txt"), strict=True):
            for path in folder.glob(f"*{suffix}"):
                if path.stem in self.names:
                    with suppress(FileNotFoundError):  # removed as the cell is tried again
                        times[path] = path.stat().st_mtime_ns
        return times


class Reporter:
    """A context manager that shows the phases of this process and the cells of its sweep."""

    def __init__(self, out: TextIO = sys.stderr) -> None:
        self._out, self._terminal = out, out.isatty()
        self._phase, self._since = Phase("starting"), time.monotonic()
        self._first = 0.0  # steps of the phase that were done before it began
        self._began = self._said = self._since
        self._cells: Cells | None = None
        self._n_ended, self._last_ended = 0, 0.0
        self._lock, self._over = Lock(), Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Reporter":
        global _current
        _current = self
        progress.listen(self._hear)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None
        self._over.set()
        self._thread.join()
        progress.listen(None)
        with self._lock:
            self._clear()

    @contextmanager
    def sweep(self, results_dir: str, study: str, cells: set[str]) -> Iterator[None]:
        """Count these cells of a sweep within the context."""
        done = Store(results_dir).path(study, "CELL").parent
        failed = failure_path(results_dir, study, "CELL").parent
        self._n_ended, self._cells = 0, Cells((done, failed), cells, time.monotonic())
        try:
            yield
        finally:
            self._look()
            self._cells = None

    def say(self, line: str) -> None:
        """Print a line on stdout, after clearing the progress line."""
        with self._lock:
            self._clear()
            print(line, flush=True)

    def _hear(self, phase: Phase) -> None:
        with self._lock:
            changed = phase.name != self._phase.name
            if changed or phase.done < self._phase.done:  # the next cell's starts again
                self._since, self._first = time.monotonic(), phase.done
            self._phase = phase
            if changed and not self._terminal and self._cells:
                self._write(self._line())

    def _watch(self) -> None:
        while not self._over.wait(LOOK):
            self._look()

    def _look(self) -> None:
        with self._lock:
            if self._cells and (n := self._cells.n_ended()) != self._n_ended:
                self._n_ended, self._last_ended = n, time.monotonic()
                if not self._terminal:
                    self._write(
                        f"{n} of {len(self._cells.names)} cells finished{self._cells_left()}"
                    )
            if self._terminal:
                width = shutil.get_terminal_size((80, 24)).columns
                self._out.write(CLEAR + self._line()[: width - 1])
                self._out.flush()
            elif time.monotonic() - self._said >= HEARTBEAT:
                self._write(self._line())

    def _line(self) -> str:
        parts = []
        if self._cells:
            number = min(self._n_ended + 1, len(self._cells.names))
            parts.append(f"cell {number}/{len(self._cells.names)}")
        phase = self._phase
        parts.append(
            phase.name
            + (f" {min(int(phase.done) + 1, phase.total)}/{phase.total}" if phase.total else "")
        )
        if phase.items and phase.done > self._first:
            per_minute = 60 * (phase.done - self._first) / (time.monotonic() - self._since)
            parts.append(f"{per_minute:.1f} {phase.items} a minute")
        return ", ".join(parts) + (self._cells_left() or self._phase_left())

    def _cells_left(self) -> str:
        """The time that the cells left take if they take as long as those before; empty if this one takes longer."""
        if not self._cells or not self._n_ended:
            return ""
        per_cell = (self._last_ended - self._cells.started) / self._n_ended
        left = per_cell * (len(self._cells.names) - self._n_ended)
        left -= time.monotonic() - self._last_ended
        return f", about {left:.0f} s left" if left > 0 else ""

    def _phase_left(self) -> str:
        """The time that the phase's steps left take, once one is finished."""
        phase = self._phase
        if not phase.total or not self._first < phase.done < phase.total:
            return ""
        per_step = (time.monotonic() - self._since) / (phase.done - self._first)
        return f", about {per_step * (phase.total - phase.done):.0f} s left of it"

    def _write(self, line: str) -> None:
        self._said = time.monotonic()
        print(f"[{self._said - self._began:4.0f} s] {line}", file=self._out, flush=True)

    def _clear(self) -> None:
        if self._terminal:
            self._out.write(CLEAR)
            self._out.flush()


_current: Reporter | None = None


@contextmanager
def shown(results_dir: str, study: str, cells: set[str]) -> Iterator[None]:
    """Count the cells of a sweep within the context, if this process has a reporter."""
    with _current.sweep(results_dir, study, cells) if _current else nullcontext():
        yield


def say(line: str) -> None:
    """Print a line on stdout, after clearing the progress line."""
    if _current:
        _current.say(line)
    else:
        print(line, flush=True)
