"""A machine that gives out inside a sweep (memory, workers, clock), and sweeps that share a results folder."""

import os
import time
from functools import partial

import pytest
from analysis_rows import cell, write

from polykv import results
from robustness import stage
from robustness.stage import first

MIB = 1 << 20
# Two cells of a few MB; between them, in the order of a sweep, one whose cache alone takes 260 MB.
GEOMETRIES = ("experiment=polykv_ratio", "model=smollm2-135m", "recipe=full", "context=100,8000,90")


@pytest.mark.faults
def test_one_cell_that_runs_out_of_memory(tmp_path):
    limit = partial(stage.little_memory, 160 * MIB)
    answer = stage.run((*GEOMETRIES, f"results_dir={tmp_path}"), limit)
    assert answer.code == 1 and "failed: " in answer.err, answer
    assert len(stage.finished(tmp_path)) == 2
    stage.resume(tmp_path, sweep=GEOMETRIES)


@pytest.mark.faults
def test_a_clock_that_jumps(tmp_path):
    answer = stage.run(stage.in_folder(tmp_path), stage.jumping_clock)
    assert answer.code == 0, answer
    stage.assert_undisturbed(tmp_path)
    lost, *kept = stage.finished(tmp_path)
    lost.unlink()
    for number, path in enumerate(kept):
        date = time.mktime(((1971, 2100)[number % 2], 1, 1, 0, 0, 0, 0, 0, 0))
        os.utime(path, (date, date))
    stage.resume(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("n_processes", first(1, [2, 2, 2, 4, 4]))
def test_processes_that_run_the_same_sweep_at_once(n_processes, tmp_path):
    sweeps = [stage.Run(stage.in_folder(tmp_path)) for _ in range(n_processes)]
    for answer in [sweep.end() for sweep in sweeps]:
        # A process that found every cell held and none finished has nothing to draw.
        idle = answer.code == 2 and "no results in" in answer.err
        assert (answer.code == 0 or idle) and "Traceback" not in answer.err, answer
    stage.assert_undisturbed(tmp_path)


def test_the_claim_of_a_killed_process_is_free_and_its_leftovers_are_gone(tmp_path):
    holder = stage.fork(_hold, tmp_path)
    folder, store = tmp_path / "cells" / "e", results.Store(tmp_path)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    (folder / ".c.json.0123").write_text("half")
    with store.claim("e", "c") as mine:
        assert not mine
    holder.kill()
    holder.join()
    assert (folder / "c.lock").exists() and not store.done("e", "c")
    with store.claim("e", "c") as mine:
        assert mine and [path.name for path in folder.iterdir()] == ["c.lock"]
    assert list(folder.iterdir()) == []


def _hold(root):
    with results.Store(root).claim("e", "c"):
        (root / "ready").touch()
        time.sleep(60)


def test_a_table_that_differs_in_one_digit_is_noticed(tmp_path, monkeypatch):
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    for root, value in ((right, 2.5), (wrong, 2.5000000000000004)):
        made = cell("e", "c")
        made[3].add("perplexity", value, "ppl")
        write(root, [made])
    table = stage.table(right)
    monkeypatch.setattr(stage, "undisturbed", lambda sweep: table)
    stage.assert_undisturbed(right)
    with pytest.raises(AssertionError):
        stage.assert_undisturbed(wrong)
    (right / "cells" / "e" / ".c.json.0123").write_text("half")
    with pytest.raises(AssertionError):
        stage.assert_undisturbed(right)
