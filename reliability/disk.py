"""A results folder that takes no more: its disk is full, its files are cut off, or it may only be read."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from polykv.results import load_rows
from reliability import injected, stage
from reliability.again import differs, outcome, resumed
from reliability.finding import Finding

# From less than the probe before a sweep needs, over room for some cells, to all but the last figures.
SIZES_KIB = (48, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
ROOMY = "64m"
NOT_TRIED = "not tried here: it takes root and a file system that can be mounted"


def run(quick: bool) -> list[Finding]:
    """All findings of this file."""
    if quick:
        return [full(SIZES_KIB[3:4]), read_only_before()]
    some = range(stage.N_CELLS)
    return [full(SIZES_KIB), cut_off(some), read_only_before(), read_only_during(some)]


def full(sizes_kib: Sequence[int]) -> Finding:
    """ENOSPC from a real, small file system."""
    start = time.monotonic()
    failures, n_kept = [], []
    for size in sizes_kib if can_mount() else ():
        with mounted(f"size={size}k") as root:
            answer = stage.run(stage.in_folder(root))
            fits = answer.code == 0 and not differs(root, f"{size} KiB")
            if not fits:
                failures += refused(answer, root, f"{size} KiB", "No space left on device")
            n_kept.append(len(stage.finished(root)))
            mount("-o", f"remount,size={ROOMY}", root)
            failures += resumed(root, f"{size} KiB, then {ROOMY}B")
    kept = f" ({min(n_kept)} to {max(n_kept)} cells done)" if n_kept else ""
    return Finding(
        area="disk full",
        tried=f"a tmpfs that fills up during the sweep{kept}, then grows; then run again",
        times=len(n_kept),
        answered=_answer(n_kept, "one line names the folder, exit 1 or 2; same table", failures),
        survived=not failures,
        seconds=time.monotonic() - start,
    )


def cut_off(after_cells: Sequence[int]) -> Finding:
    """Writes that the kernel cuts short, as a quota does."""
    start = time.monotonic()
    failures = []
    for n_cells in after_cells:
        with TemporaryDirectory(prefix="polykv-cut-") as folder:
            root = Path(folder) / "results"
            limit = partial(injected.small_files, n_cells)
            answer = stage.run(stage.in_folder(root), limit)
            what = f"after {n_cells} cells"
            failures += refused(answer, root, what, "File too large")
            if len(stage.finished(root)) != n_cells:
                failures.append(f"{what}: {len(stage.finished(root))} files of cells")
            failures += resumed(root, what)
    return Finding(
        area="disk full",
        tried="every write cut off at 1 KiB (RLIMIT_FSIZE) from one cell on; then run again without",
        times=len(after_cells),
        answered=outcome("one line names the folder; no half cell seen; same table", failures),
        survived=not failures,
        seconds=time.monotonic() - start,
    )


def read_only_before() -> Finding:
    """A folder of finished cells that became read-only: mounted so, or without write permission."""
    start = time.monotonic()
    failures = []
    with mounted(f"size={ROOMY}") if can_mount() else _folder() as root:
        stage.run(stage.in_folder(root))
        shutil.rmtree(root / "tables")
        before = stage.finished(root)
        with _locked(root):
            answer = stage.run(stage.in_folder(root))
        if answer.code != 2:
            failures.append(f"exit {answer.code}")
        failures += refused(answer, root, "before", "")
        if stage.finished(root) != before:
            failures.append("a cell changed")
        failures += resumed(root, "writable again")
    return Finding(
        area="read-only results",
        tried="a folder with finished cells, read-only before the start; then writable again",
        times=1,
        answered=outcome("exit 2 before any work, one line names the folder; same table", failures),
        survived=not failures,
        seconds=time.monotonic() - start,
    )


def read_only_during(after_cells: Sequence[int]) -> Finding:
    """A file system that goes read-only under a running sweep, as after an I/O error."""
    start = time.monotonic()
    failures, times = [], 0
    for n_cells in after_cells if can_mount() else ():
        with mounted(f"size={ROOMY}") as root:
            remount = partial(injected.read_only, root, n_cells)
            answer = stage.run(stage.in_folder(root), remount)
            what = f"after {n_cells} cells"
            failures += refused(answer, root, what, "Read-only file system")
            mount("-o", "remount,rw", root)
            failures += resumed(root, what)
            times += 1
    return Finding(
        area="read-only results",
        tried="a file system that becomes read-only between two cells; then writable again",
        times=times,
        answered=_answer(times, "one line names the folder, exit 1 or 2; same table", failures),
        survived=not failures,
        seconds=time.monotonic() - start,
    )


def refused(answer: stage.Answer, root: Path, what: str, reason: str) -> list[str]:
    """What is wrong with how a run answered a folder that takes no more."""
    said = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    wrong = []
    if answer.code not in (1, 2) or "Traceback" in answer.err:
        wrong.append(f"{what}: exit {answer.code}: {answer.err.strip()[-300:]}")
    elif not any("cannot write" in line and str(root) in line and reason in line for line in said):
        wrong.append(f"{what}: said {said}")
    if stage.finished(root) and (damaged := load_rows(root)[1]):
        wrong.append(f"{what}: {damaged}")
    return wrong


def can_mount() -> bool:
    """Whether this process may mount a file system of its own."""
    if os.geteuid() != 0:
        return False
    with TemporaryDirectory(prefix="polykv-mount-") as folder:
        possible = mount("-t", "tmpfs", "tmpfs", folder, check=False)
        if possible:
            subprocess.run(["umount", folder], check=True)
        return possible


@contextmanager
def mounted(options: str) -> Iterator[Path]:
    """A new tmpfs with these options, for as long as the block lasts."""
    with TemporaryDirectory(prefix="polykv-disk-") as folder:
        root = Path(folder) / "results"
        root.mkdir()
        mount("-t", "tmpfs", "-o", options, "tmpfs", root)
        try:
            yield root
        finally:
            subprocess.run(["umount", "--lazy", root], check=True)


def mount(*arguments: str | Path, check: bool = True) -> bool:
    """Whether `mount ARGUMENTS` worked."""
    done = subprocess.run(["mount", *arguments], check=check, capture_output=True)
    return done.returncode == 0


@contextmanager
def _folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="polykv-disk-") as folder:
        yield Path(folder) / "results"


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Read-only while the block lasts. Root ignores permissions, so its file system is mounted so."""
    if can_mount():
        mount("-o", "remount,ro", root)
        yield
        mount("-o", "remount,rw", root)
        return
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield
    for folder in folders:
        folder.chmod(0o755)


def _answer(tried: object, promise: str, failures: list[str]) -> str:
    return outcome(promise, failures) if tried else NOT_TRIED
