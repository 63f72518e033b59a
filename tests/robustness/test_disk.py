"""A results folder that takes no more: its disk is full, writes are cut short, or it may only be read."""

import subprocess
from contextlib import contextmanager
from functools import partial

import pytest

from polykv.results import load_rows
from robustness import stage
from robustness.stage import N_CELLS, first

# From less than the probe before a sweep needs, over room for some cells, to all but the last figures.
SIZES_KIB = (128, 48, 96, 112, 160, 192, 224, 256, 320, 384, 448, 512)
ROOMY = "64m"


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_folder_that_is_read_only(tmp_path):
    with mounted(tmp_path, f"size={ROOMY}") as root:
        stage.run(stage.in_folder(root))
        lost, *kept = stage.finished(root)
        lost.unlink()
        mount("-o", "remount,ro", root)
        answer = stage.run(stage.in_folder(root))
        assert_refused(answer, root)
        assert answer.code == 2 and [*stage.finished(root)] == kept
        mount("-o", "remount,rw", root)
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


@contextmanager
def mounted(folder, options):
    """A new tmpfs at `folder`/results for as long as the block lasts."""
    root = folder / "results"
    root.mkdir()
    try:
        mount("-t", "tmpfs", "-o", options, "tmpfs", root)
    except subprocess.CalledProcessError:
        pytest.skip("takes root and a file system that can be mounted")
    try:
        yield root
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)


def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
