"""A results folder that takes no more: its disk is full, writes are cut short, or it may only be read."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from functools import cache, partial
from tempfile import TemporaryDirectory

import pytest

from polykv.results import load_rows
from robustness import stage
from robustness.stage import N_CELLS, first

# From less than the probe before a sweep needs, over room for some cells, to all but the last figures.
SIZES_KIB = (128, 48, 96, 112, 160, 192, 224, 256, 320, 384, 448, 512)
ROOMY = "64m"


@pytest.mark.parametrize("size_kib", first(1, SIZES_KIB))
def test_a_disk_that_fills_up(size_kib, tmp_path):
    with mounted(tmp_path, f"size={size_kib}k") as root:
        answer = stage.run(stage.in_folder(root), full=True)
        if answer.code == 0:
            stage.assert_undisturbed(root)
        else:
            assert_refused(answer, root, "No space left on device")
        mount("-o", f"remount,size={ROOMY}", root)
        stage.resume(root)


def test_a_folder_that_is_read_only_from_the_start(tmp_path):
    root = tmp_path / "results"
    root.mkdir()
    with mounted(tmp_path, f"size={ROOMY}") if can_mount() else TemporaryDirectory():
        stage.run(stage.in_folder(root))
        shutil.rmtree(root / "tables")
        before = stage.finished(root)
        with locked(root):
            answer = stage.run(stage.in_folder(root))
        assert_refused(answer, root)
        assert answer.code == 2 and stage.finished(root) == before
        stage.resume(root)


@pytest.mark.faults
@pytest.mark.parametrize("n_cells", range(N_CELLS))
def test_writes_that_are_cut_short(n_cells, tmp_path):
    """RLIMIT_FSIZE from one cell on, as a quota does."""
    root = tmp_path / "results"
    answer = stage.run(stage.in_folder(root), partial(stage.small_files, n_cells))
    assert_refused(answer, root, "File too large")
    assert len(stage.finished(root)) == n_cells
    stage.resume(root)


def assert_refused(answer, root, reason=""):
    """One line names the folder and the reason, and no half-written cell is seen."""
    assert answer.code in (1, 2) and "Traceback" not in answer.err, answer
    said = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert any(str(root) in line and reason in line for line in said), said
    assert not load_rows(root)[1]


@cache
def can_mount() -> bool:
    """Whether this process may mount a file system of its own."""
    if os.geteuid() != 0:
        return False
    with TemporaryDirectory(prefix="polykv-mount-") as folder:
        if not mount("-t", "tmpfs", "tmpfs", folder, check=False):
            return False
        subprocess.run(["umount", folder], check=True)
        return True


@contextmanager
def mounted(folder, options):
    """A new tmpfs at `folder`/results for as long as the block lasts."""
    if not can_mount():
        pytest.skip("takes root and a file system that can be mounted")
    root = folder / "results"
    root.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", options, "tmpfs", root)
    try:
        yield root
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)


def mount(*arguments, check=True) -> bool:
    """Whether `mount ARGUMENTS` worked."""
    return not subprocess.run(["mount", *arguments], check=check, capture_output=True).returncode


@contextmanager
def locked(root):
    """Read-only while the block lasts. Root ignores permissions, so its file system is mounted so."""
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]

    def allow(writing):
        if can_mount():
            mount("-o", f"remount,{'rw' if writing else 'ro'}", root)
        else:
            for folder in folders:
                folder.chmod(0o755 if writing else 0o555)

    allow(False)
    yield
    allow(True)
