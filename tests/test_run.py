"""`python run.py` as a user runs it: the local path end to end, kill and resume, and one clear line for bad input."""

import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from conftest import run_process, run_py

from polykv.config import REPO
from polykv.results import load_rows

PROGRESS = re.compile(r"\[ *\d+ (s|min|h)")
SWEEP = ["experiment=polykv_quality", "context=160", "n_agents=2,3", "recipe=full,polykv,turboquant_2bit",
         "max_new_tokens=4"]  # fmt: skip


def local(checkpoint: Path, results: Path) -> list[str]:
    return [*SWEEP, "model=local", f"model.path={checkpoint}", "document=file",
            f"document.path={checkpoint}/text.txt", f"results_dir={results}"]  # fmt: skip


def numbers(root: Path) -> pd.DataFrame:
    frame, damaged = load_rows(root)
    assert damaged == []
    return frame.drop(columns=["created_at", "commit"])


@pytest.fixture(scope="module")
def undisturbed(checkpoint, tmp_path_factory) -> Path:
    """The folder of the whole sweep, without its tables and figures."""
    results = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analysis.__main__.show", lambda *shown: 0)
        done = run_py(*local(checkpoint, results))
    assert done.returncode == 0, done.stderr
    return results


@pytest.mark.slow
def test_help_names_the_axes_and_needs_no_torch():
    code = """if True:
        import runpy, sys
        sys.argv = ["run.py", "--help"]
        try:
            runpy.run_path("run.py", run_name="__main__")
        finally:
            assert not {"torch", "transformers"} & sys.modules.keys()
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("recipe", "polykv_memory", "n_agents"):
        assert word in done.stdout


def test_own_model_and_text_end_to_end(undisturbed, checkpoint):
    frame = numbers(undisturbed)
    assert set(frame.weights.str.partition("@")[0]) == {"local"} and frame.weights.nunique() == 1
    assert set(frame.model) == {f"local {checkpoint.name}"}
    assert set(frame.document) == {"file text.txt"}
    assert frame.cell.nunique() == 6
    assert {"nll", "nll_delta", "kl", "same_top1", "bertscore_f1"} <= set(frame.metric)
    assert set(frame[frame.metric == "bertscore_f1"].scorer) == {"minilm"}
    kl = frame[(frame.metric == "kl") & frame["sample"].notna()]
    assert (kl[kl.recipe == "full"].value == 0).all()
    assert (kl[kl.recipe == "turboquant_2bit"].value > 0).all()
    missing = frame[frame.value.isna()]
    assert (missing.note != "").all()


def test_a_finished_sweep_runs_nothing_again(undisturbed, checkpoint, monkeypatch):
    results = undisturbed
    monkeypatch.setattr("analysis.__main__.show", lambda *shown: 0)
    before = {path: path.stat().st_mtime_ns for path in results.glob("cells/*/*.json")}
    done = run_py(*local(checkpoint, results))
    assert "6 cells: 6 done before, 0 to run" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in results.glob("cells/*/*.json")}


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_table(undisturbed, checkpoint, tmp_path):
    cells = tmp_path / "cells" / "polykv_quality"
    kept: dict[Path, bytes] = {}
    for n_wanted in (0, 1, 4):  # kill before the first cell, in the second, in the fifth
        sweep = subprocess.Popen(
            [sys.executable, str(REPO / "run.py"), *local(checkpoint, tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO,
        )
        for line in sweep.stdout:
            if "cells:" in line:
                break
        while len(list(cells.glob("*.json"))) < n_wanted and sweep.poll() is None:
            time.sleep(0.005)
        sweep.kill()  # nothing where it has just ended
        sweep.wait()
        sweep.stdout.close()
        done = {path: path.read_bytes() for path in cells.glob("*.json")}
        assert kept.items() <= done.items()  # what was done was neither lost nor run again
        kept = done
    finished = run_process(*local(checkpoint, tmp_path))
    assert finished.returncode == 0, finished.stderr
    assert kept.items() <= {path: path.read_bytes() for path in cells.glob("*.json")}.items()
    pd.testing.assert_frame_equal(numbers(tmp_path), numbers(undisturbed))
    for folder in ("tables", "figures"):
        assert str(tmp_path / folder) in finished.stdout
        assert any((tmp_path / folder).iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recpie=polykv"], "recpie"),
        (["experiment=polykv_quality", "model=qwen2.5-0.5b", "document=moon_landing"], "hub"),
        (["device=warp"], "device=warp"),
        (["+contxt=512"], "'context'"),
        (["model=/a/folder"], "model=local model.path=/a/folder"),
        (["document=./a.txt"], "document=file document.path=./a.txt"),
        (["model=llama-3-8"], "llama-3-8b"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(overrides, message, tmp_path, run_either):
    done = run_either(*overrides, f"results_dir={tmp_path}")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("cells/*/*.json"))


def test_where_every_cell_fails_the_cause_comes_first(tmp_path):
    too_many = f"+recipe.layer_bits={[[8, 4]] * 99}".replace(" ", "")
    done = run_py("experiment=polykv_ratio", "model=reference", "recipe=uniform,uniform_rotated", too_many,
               "context=64", f"results_dir={tmp_path}")  # fmt: skip
    assert done.returncode == 1
    first, *others = [line for line in done.stderr.splitlines() if not PROGRESS.match(line)]
    assert first.startswith("error: ") and "layer_bits" in first and "99" in first
    assert "make run" not in done.stderr + done.stdout
    assert str(tmp_path / "failed") in "".join(others)


def test_a_missing_file_is_named(checkpoint, tmp_path):
    arguments = [*local(checkpoint, tmp_path), "document.path=/nowhere/text.txt"]
    done = run_py(*arguments)
    assert done.returncode != 0
    assert (
        done.stderr.strip().splitlines()[-1].startswith("error: cannot read document.path=/nowhere")
    )


def test_a_results_folder_that_is_a_file_is_refused(checkpoint, tmp_path):
    blocked = tmp_path / "results"
    blocked.write_text("not a folder")
    done = run_py(*local(checkpoint, blocked))
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: cannot write into") and "results_dir" in last


def test_a_disk_that_fills_up_ends_the_sweep_and_keeps_what_is_done(tmp_path, monkeypatch):
    from hydra import compose, initialize_config_dir

    from experiments import polykv_memory, session, sweep
    from polykv import results

    monkeypatch.setattr(session.of_process(), "storage_failed", "")
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        cells = [
            compose("config", ["experiment=polykv_ratio", "model=smollm2-135m", f"recipe={recipe}",
                               "context=100", f"results_dir={tmp_path}"])
            for recipe in ("full", "fp16", "polykv")
        ]  # fmt: skip
    runs, study = [], polykv_memory.STUDY
    counted = replace(study, run=lambda cfg, own: runs.append(cfg) or study.run(cfg, own))
    monkeypatch.setattr(polykv_memory, "STUDY", counted)
    cells = [sweep.prepare(cell) for cell in cells]
    assert sweep.run_cell(cells[0]).status == "done"

    def no_space(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", no_space)
    second, third = sweep.run_cell(cells[1]), sweep.run_cell(cells[2])
    assert second.status == third.status == "failed"
    assert "No space left on device" in second.reason and second.reason == third.reason
    assert len(runs) == 2  # the third was not measured in vain
    assert len(list(tmp_path.glob("cells/*/*.json"))) == 1
