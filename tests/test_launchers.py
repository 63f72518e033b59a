"""The same sweep one after the other, in processes and in submitit's jobs; failed cells, killed workers, Ctrl-C."""

import hashlib
import io
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
from hydra import compose, initialize_config_dir
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import BrokenProcessPool
from omegaconf import OmegaConf, open_dict

from experiments import polykv_memory, processes, progress, session, sweep, tracking
from hydra_plugins.cell_sweeper import Job, Plan, deal
from polykv.config import CONF, REPO
from polykv.errors import PolyKVError
from polykv.progress import phase, track
from polykv.results import Rows, Store, load_rows

# 24 cells of about 0.05 s each: long enough to kill a worker within them.
CELLS = ["experiment=polykv_ratio", "model=smollm2-1.7b", "model.geometry.num_hidden_layers=8",
         "recipe=full,fp16,polykv,q4_0,q8_0,turboquant_2bit", "context=40,60,80,100"]  # fmt: skip
DECLARED = {
    "name": "e",
    "title": "E",
    "question": "E?",
    "answers": [],
    "settings": [],
    "columns": {},
}
FEW = ["experiment=polykv_ratio", "model=smollm2-135m", "recipe=full,fp16,polykv", "context=100"]


@pytest.fixture
def launch(monkeypatch, tmp_path_factory):
    """Run a sweep in this process, its cells where the launcher says; how it ended."""
    monkeypatch.chdir(
        tmp_path_factory.mktemp("elsewhere")
    )  # nothing may depend on where it is started
    monkeypatch.syspath_prepend(REPO)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    for name, value in (("PYTHONPATH", ""), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, os.environ.get(name, value))
    monkeypatch.setattr(session.of_process(), "storage_failed", "")
    import run

    def launched(results: Path, *overrides: str) -> sweep.Ended:
        arguments = ["--config-path", str(CONF), *overrides, f"results_dir={results}"]
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        run.task()
        return sweep.ended

    return launched


@pytest.fixture
def report(monkeypatch, capsys):
    """What run.py says of an ended sweep on stderr, and its exit code."""
    from analysis import __main__ as analysis

    monkeypatch.setattr(analysis, "main", lambda argv: 0)
    import run

    def reported() -> tuple[str, int]:
        capsys.readouterr()
        code = run.report(sweep.ended)
        return capsys.readouterr().err, code

    return reported


def statuses(ended: sweep.Ended) -> list[str]:
    return sorted(outcome.status for outcome in ended.outcomes)


def table(results: Path) -> pd.DataFrame:
    return load_rows(results)[0].drop(columns="created_at")


def files(results: Path) -> dict[str, tuple[bytes, int]]:
    found = results.glob("cells/*/*.json")
    return {path.stem: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sequential")


@pytest.fixture
def sequential(launch, kept) -> Path:
    """The 24 cells, one after the other in this process; once for all tests."""
    if not files(kept):
        launch(kept, *CELLS)
    assert len(files(kept)) == 24
    return kept


# joblib's processes in `make test` are those of robustness/test_kills.py.
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["launcher=submitit_local", "hydra/launcher=joblib"])
def test_24_cells_give_the_same_table_under_every_launcher(launcher, launch, sequential, tmp_path):
    n_jobs = ["hydra.launcher.n_jobs=2"] if "joblib" in launcher else []
    ended = launch(tmp_path, *CELLS, launcher, *n_jobs)
    assert statuses(ended) == ["done"] * 24 and not ended.died
    pd.testing.assert_frame_equal(table(tmp_path), table(sequential))


@pytest.mark.slow
def test_a_killed_worker_costs_no_finished_cell(launch, report, sequential, tmp_path):
    swept = threading.Event()

    def kill() -> None:
        """SIGKILL a worker while it measures, once four cells are kept."""
        while not swept.wait(0.002):
            for worker in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                    worker.suspend()  # so that it cannot go on to send its results before it is killed
                    opened = {Path(file.path).parent.parent.parent for file in worker.open_files()}
                    if tmp_path in opened and len(files(tmp_path)) >= 4:
                        worker.kill()
                        return
                    worker.resume()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        ended = launch(tmp_path, *CELLS, "launcher=joblib")
    finally:
        swept.set()
        killer.join()
    kept = files(tmp_path)
    assert 4 <= len(kept) < 24
    assert "TerminatedWorkerError" in ended.died
    assert statuses(ended) == sorted(["done"] * len(kept) + ["lost"] * (24 - len(kept)))
    said, code = report()
    assert code == 1 and f"{24 - len(kept)} cells" in said and "SIGKILL" in said
    assert all(len(line) < 500 for line in said.splitlines())

    ended = launch(tmp_path, *CELLS)  # another launcher goes on just as well
    assert statuses(ended) == ["done"] * (24 - len(kept))
    assert kept.items() <= files(tmp_path).items()  # none was run again
    pd.testing.assert_frame_equal(table(tmp_path), table(sequential))


def test_a_worker_killed_while_it_sends_its_result_is_noticed(monkeypatch):
    def half_a_message():
        frame = sys._getframe()
        while "result_queue" not in frame.f_locals:
            frame = frame.f_back
        os.write(frame.f_locals["result_queue"]._writer.fileno(), struct.pack("!i", 100) + b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(processes, "STUCK", 0.5)
    with processes.workers_watched(), pytest.raises(BrokenProcessPool):
        Parallel(n_jobs=2)(delayed(job)() for job in (time.monotonic, half_a_message))


def test_a_child_that_is_no_worker_may_end_without_being_waited_for(monkeypatch):
    monkeypatch.setattr(processes, "STUCK", 0.05)
    with processes.workers_watched():
        child = subprocess.Popen([sys.executable, "-c", ""])
        assert Parallel(n_jobs=2)(delayed(time.sleep)(0.5) for _ in range(4)) == [None] * 4
    assert child.wait() == 0


@pytest.mark.slow
def test_a_failed_cell_is_listed_kept_and_tried_again(launch, report, monkeypatch, tmp_path):
    study = polykv_memory.STUDY

    def run(cfg, session):
        if cfg.recipe.name == "fp16":
            raise ZeroDivisionError("out of\nnumbers")
        return study.run(cfg, session)

    monkeypatch.setattr(polykv_memory, "STUDY", replace(study, run=run))
    ended = launch(tmp_path, *FEW)
    assert statuses(ended) == ["done", "done", "failed"]
    said, code = report()
    failed = next(o for o in ended.outcomes if o.status == "failed")
    assert code == 1 and f"cell {failed.cell} failed: ZeroDivisionError: out of numbers" in said
    log = sweep.failure_path(str(tmp_path), "polykv_memory", failed.cell)
    assert str(log.parent) in said
    text = log.read_text()
    assert "Traceback" in text and "raise ZeroDivisionError" in text and "context: 100" in text
    found = sweep.outcome_on_disk(str(tmp_path), "polykv_memory", failed.cell)
    assert found == failed  # what the sweep falls back on where a worker cannot say it

    monkeypatch.setattr(polykv_memory, "STUDY", study)
    ended = launch(tmp_path, *FEW)
    assert [outcome.cell for outcome in ended.outcomes] == [failed.cell]
    assert statuses(ended) == ["done"] and not log.exists()
    assert report() == ("", 0)


@pytest.mark.slow
def test_a_cell_that_another_process_measures_is_left_to_it(launch, report, tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*FEW[:2], "recipe=fp16", "context=100", "weights=random"])
    cell = sweep.prepare(cfg).identity
    with Store(tmp_path).claim("polykv_memory", cell) as mine:
        assert mine
        ended = launch(tmp_path, *FEW)
    assert sweep.Outcome(cell, "held") in ended.outcomes
    said, _ = report()
    assert f"cell {cell} is being measured by another process" in said
    assert statuses(launch(tmp_path, *FEW)) == ["done"]


@pytest.mark.slow
def test_without_slurm_the_slurm_launcher_says_so_in_one_line(launch, report, tmp_path):
    with pytest.raises(PolyKVError, match="device=auto.*device=cuda"):
        launch(tmp_path, *FEW, "launcher=submitit_slurm")
    # A GPU that this machine lacks is for the cluster's to have.
    ended = launch(tmp_path, *FEW, "launcher=submitit_slurm", "device=cuda")
    assert statuses(ended) == ["lost"] * 3 and "slurm" in ended.died.lower()
    said, code = report()
    assert code == 1 and "3 cells to go" in said


def test_a_device_that_is_not_here_is_refused_before_work(launch, tmp_path):
    with pytest.raises(PolyKVError, match="device=cuda:9 cannot be used"):
        launch(tmp_path, *FEW, "device=cuda:9")
    assert not files(tmp_path)


@pytest.mark.parametrize("n_jobs", [1, 2, 3, 7, 24, 100])
def test_cells_are_dealt_in_runs_of_neighbours(n_jobs):
    cells = [Plan([], OmegaConf.create(), str(number)) for number in range(24)]
    shares = deal(cells, n_jobs)
    assert [cell for share in shares for cell in share] == cells
    lengths = {len(share) for share in shares}
    assert len(shares) == min(n_jobs, 24) and max(lengths) - min(lengths) <= 1


def test_a_cell_that_settles_otherwise_where_it_runs_is_refused():
    def task(cfg):
        raise AssertionError("it must not run")

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*FEW[:2], "recipe=fp16", "context=100", "weights=random"])
    job = Job([], task, planned_on="login")
    outcome = job.run(Plan([], cfg, "0" * 12))
    assert outcome.status == "failed" and outcome.cell == "0" * 12
    assert "planned on login" in outcome.reason and "device" in outcome.reason


def test_where_results_are_logged_and_how_they_are_launched_is_no_identity():
    base = [*FEW[:2], "recipe=fp16", "context=100", "weights=random"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain = compose("config", base)
        others = [
            compose("config", [*base, *more])
            for more in (["logger=csv"], ["logger=wandb"], ["launcher=joblib"], ["results_dir=/x"])
        ]
        with open_dict(plain):  # as it was before there were loggers and launchers
            del plain["logger"]
    cells = {sweep.prepare(cfg).identity for cfg in (plain, *others)}
    assert len(cells) == 1


def test_a_finished_cell_is_logged_and_a_logger_that_fails_costs_nothing(monkeypatch, tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*FEW[:2], "recipe=fp16", "context=100", "weights=random",
                                 f"results_dir={tmp_path}"])  # fmt: skip
    seen = []
    monkeypatch.setattr(tracking, "record", lambda *told: seen.append(told))
    done = sweep.run_cell(sweep.prepare(cfg))
    assert done.status == "done"
    ((told, written),) = seen
    assert written.name == done.cell and told.recipe.name == "fp16"
    stored = load_rows(tmp_path)[0]
    assert len(written.rows["value"]) == len(stored)
    assert written.provenance["created_at"] == stored.created_at[0]

    with open_dict(cfg):
        cfg.logger = {"_target_": "nowhere.Nothing"}
        cfg.context = 101
    monkeypatch.undo()
    assert sweep.run_cell(sweep.prepare(cfg)).status == "done"
    assert len(files(tmp_path)) == 2


def test_progress_counts_what_the_folder_holds(tmp_path):
    cells = [f"{number:012x}" for number in range(3)]
    stale = sweep.failure_path(str(tmp_path), "e", cells[2])
    stale.parent.mkdir(parents=True)
    stale.write_text("before")
    out = io.StringIO()
    with progress.Reporter(out), progress.shown(str(tmp_path), "e", set(cells)):
        Store(tmp_path).write(DECLARED, cells[0], {}, Rows())
        Store(tmp_path).write(DECLARED, "f" * 12, {}, Rows())  # of another sweep
        sweep.failure_path(str(tmp_path), "e", cells[1]).write_text("now")
    assert "2 of 3 cells finished" in out.getvalue()


def test_a_pipe_is_not_silent_for_five_seconds(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(progress, "HEARTBEAT", 0.05)
    monkeypatch.setattr(progress, "LOOK", 0.01)
    with progress.Reporter(out):
        for _ in track(range(2), "scoring", "texts"):
            time.sleep(0.2)
    lines = out.getvalue().splitlines()
    assert len(lines) >= 4 and any("scoring 1/2" in line for line in lines)
    assert any("scoring 2/2" in line and "left" in line for line in lines)
    (rate,) = {*re.findall(r"scoring 2/2, ([\d.]+) texts a minute", lines[-1])}
    assert 0 < float(rate) < 300  # one in the first 0.2 seconds


@pytest.fixture
def hasty(monkeypatch):
    """Progress that is reported every 0.02 seconds."""
    monkeypatch.setattr(progress, "HEARTBEAT", 0.02)
    monkeypatch.setattr(progress, "LOOK", 0.01)


@pytest.mark.parametrize(
    ("earlier", "first"), [([], 5), ([0, 100], 0)], ids=["in an earlier run", "in the cell before"]
)
def test_steps_done_before_do_not_count_into_the_rate(earlier, first, hasty):
    out = io.StringIO()
    with progress.Reporter(out):
        for done in earlier:  # in no time
            phase("scoring", done, 100, "texts")
        phase("scoring", first, 10, "texts")
        time.sleep(0.2)
        phase("scoring", first + 1, 10, "texts")
        time.sleep(0.1)
    rates = re.findall(rf"scoring {first + 2}/10, ([\d.]+) texts a minute", out.getvalue())
    assert rates and all(0 < float(rate) < 300 for rate in rates)  # one in 0.2 seconds


def test_a_cell_longer_than_those_before_has_the_time_left_of_its_phase(tmp_path, hasty):
    out = io.StringIO()
    cells = ["0" * 12, "1" * 12]
    with progress.Reporter(out), progress.shown(str(tmp_path), "e", set(cells)):
        Store(tmp_path).write(DECLARED, cells[0], {}, Rows())
        time.sleep(0.1)
        phase("scoring", 0, 10)
        time.sleep(0.3)  # longer than the first cell
        phase("scoring", 1, 10)
        time.sleep(0.1)
    last = out.getvalue().splitlines()[-1]
    assert re.search(r"scoring 2/10, about [1-9] s left of it", last)


NATIVE = """
import hashlib, sys
from experiments import processes
processes.settle_signals()
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha512", b"", b"", 10**9)  # many minutes without a look at signals
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", processes.ENDING)
def test_a_second_interrupt_quits_native_code_at_once(number):
    assert "sha512" in hashlib.algorithms_available
    hung = subprocess.Popen([sys.executable, "-c", NATIVE], stdout=subprocess.PIPE, cwd=REPO)
    assert hung.stdout.readline() == b"ready\n"
    time.sleep(0.5)
    hung.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        hung.wait(timeout=1)  # Python cannot see the first one
    hung.send_signal(number)
    assert hung.wait(timeout=10) == processes.INTERRUPTED
    hung.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_a_sweep_and_keeps_its_cells(number, tmp_path):
    command = [sys.executable, str(REPO / "run.py"), *CELLS, f"results_dir={tmp_path}"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while len(files(tmp_path)) < 2 and running.poll() is None:
        time.sleep(0.005)
    running.send_signal(number)
    _, said = running.communicate(timeout=30)
    assert running.returncode == processes.INTERRUPTED
    assert said.decode().strip().splitlines()[-1].startswith("stopped; finished cells are kept")
    assert b"Traceback" not in said
    assert 2 <= len(files(tmp_path)) < 24
    assert not list(tmp_path.glob("cells/*/.*"))  # nothing half-written is left
