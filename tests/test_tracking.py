"""Loggers beside the store: what they write, and that none of their failures costs a cell."""

import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from analysis.__main__ import upload
from experiments import sweep, tracking
from polykv import wandb_run
from polykv.cellfile import COLUMNS, Cell
from polykv.config import CONF, REPO
from polykv.errors import PolyKVError
from polykv.results import Rows, Store, frame, provenance

OWN = {"accounting": str}
STUDY = {"name": "compare", "title": "t", "question": "q?", "answers": [], "settings": [],
         "columns": {"accounting": "str"}}  # fmt: skip
BLOCK = 32768  # of the log that wandb writes offline: LevelDB's format


def config(folder, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [f"results_dir={folder}", *overrides])


def rows(n_agents=3):
    made = Rows(OWN, model="reference", n_agents=n_agents)
    for sample, value in enumerate((0.1 + 0.2, 0.5)):
        made.add("kl", value, "nats", reader="dequantize", sample=sample, n=8)
    made.add("kl", 0.125, "nats", reader="in_place", sample=0, n=8)
    made.add("bertscore_f1", None, "f1", why="no scorer, no score")
    return made


def finished(cell, made=None, config=None):
    return Cell(STUDY, cell, config or {}, provenance(), (made or rows()).by_column())


def record(cfg, cell):
    tracking.record(cfg, finished(cell, config=OmegaConf.to_container(cfg, resolve=True)))


def forked(target, *arguments):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def test_no_logger_writes_nothing(tmp_path):
    record(config(tmp_path), "c0")
    assert not list(tmp_path.iterdir())


def test_csv_holds_every_row_as_it_was_given(tmp_path, capsys):
    cfg = config(tmp_path, "logger=csv")
    record(cfg, "c0")
    record(cfg, "c1")
    read = pd.read_csv(tmp_path / "log.csv", float_precision="round_trip")
    assert list(read.columns) == [*COLUMNS, *OWN]
    assert read["cell"].tolist() == ["c0"] * 4 + ["c1"] * 4
    assert read["value"].tolist()[:3] == [0.1 + 0.2, 0.5, 0.125]
    assert read["note"].tolist()[3] == "no scorer, no score"
    assert set(read["study"]) == {"compare"} and read["commit"].notna().all()
    assert pd.read_csv(tmp_path / "log.csv", dtype=str)["n"].tolist()[:2] == ["8", "8"]
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_csv_takes_several_processes_at_once(tmp_path):
    cfg = config(tmp_path, "logger=csv")

    def work(name):
        for number in range(8):
            record(cfg, f"{name}{number}")

    workers = [forked(work, name) for name in "abcd"]
    for worker in workers:
        worker.join(60)
    cells = pd.read_csv(tmp_path / "log.csv")["cell"].value_counts()
    assert len(cells) == 32 and set(cells) == {4}


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_killed_csv_writer_leaves_whole_cells_only(tmp_path, monkeypatch, moment):
    cfg = config(tmp_path, "logger=csv")
    record(cfg, "before")

    def die():
        monkeypatch.setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        record(cfg, "killed")

    process = forked(die)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert pd.read_csv(tmp_path / "log.csv")["cell"].tolist() == ["before"] * 4
    record(cfg, "after")  # its lock died with it
    assert pd.read_csv(tmp_path / "log.csv")["cell"].tolist() == ["before"] * 4 + ["after"] * 4


def test_csv_of_other_columns_is_left_alone(tmp_path, capsys):
    (tmp_path / "log.csv").write_text("date,weight\n")
    record(config(tmp_path, "logger=csv"), "c0")
    assert (tmp_path / "log.csv").read_text() == "date,weight\n"
    assert "c0 is kept, but was not logged" in capsys.readouterr().err


def test_a_logger_that_fails_costs_no_cell(tmp_path, capsys):
    cfg = config(
        tmp_path,
        "experiment=polykv_ratio",
        "model=llama-3-8b",
        "context=16",
        "logger=csv",
        f"logger.path={tmp_path}",
    )
    outcome = sweep.run_cell(sweep.prepare(cfg))
    assert outcome.status == "done"
    assert Store(tmp_path).done("polykv_memory", outcome.cell)
    warning = capsys.readouterr().err
    assert f"warning: cell {outcome.cell} is kept, but was not logged" in warning
    assert warning.count("\n") == 1


@pytest.fixture
def wandb_home(tmp_path, monkeypatch):
    """Nobody is logged in, and nothing but wandb's own rules decides the mode."""
    import wandb

    wandb.teardown()  # it keeps the settings that it found first
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb_cache"))
    # Whatever would reach for a server finds a closed port of this machine.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    yield tmp_path / "results"
    wandb.teardown()
    # open_run sets these for the process; monkeypatch knows only what it set itself.
    for name in ("WANDB_MODE", "WANDB_DATA_DIR"):
        os.environ.pop(name, None)


def logged(run):
    """The records of an offline run's file, which wandb's own process goes on writing for a moment."""
    (path,) = run.glob("run-*.wandb")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        records = parsed(path.read_bytes())
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.05)
    raise AssertionError(f"{path} is not finished")


def parsed(content):
    from wandb.proto import wandb_internal_pb2

    at, part, records = 7, b"", []
    while at + 7 <= len(content):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        part += content[at + 7 : at + 7 + size]
        at += 7 + size
        if at > len(content):
            break  # being written
        if kind in (1, 4):  # whole, or the last of several
            records.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return records


@pytest.mark.slow
def test_wandb_without_a_key_keeps_the_run_offline(wandb_home, capsys):
    record(config(wandb_home, "logger=wandb", "logger.tags=[trial]"), "abc123")
    (run,) = wandb_home.glob("wandb/offline-run-*")
    records = logged(run)
    about = next(record.run for record in records if record.HasField("run"))
    assert (about.display_name, about.project, about.run_group) == (
        "abc123",
        "polykv",
        "compare",
    )
    assert list(about.tags) == ["trial"]
    kept = {entry.key: json.loads(entry.value_json) for entry in about.config.update}
    assert kept["recipe"]["name"] == "polykv" and "logger" not in kept
    assert kept["provenance"]["versions"]["torch"] == provenance()["versions"]["torch"]
    summary = {
        entry.key: json.loads(entry.value_json)
        for record in records
        for entry in record.summary.update
        if entry.key
    }
    assert summary["kl/reader=dequantize"] == pytest.approx(0.4)
    assert summary["kl/reader=in_place"] == 0.125
    assert summary["bertscore_f1"] is None
    (table,) = run.glob("files/media/table/rows*.json")
    table = json.loads(table.read_text())
    assert table["columns"] == [*COLUMNS, *OWN]
    place = table["columns"].index("value")
    assert [row[place] for row in table["data"]] == [0.1 + 0.2, 0.5, 0.125, None]

    said = wandb_run.unsynced(wandb_home)
    assert "offline: 1;" in said
    assert f"python -m wandb sync {wandb_home}/wandb/offline-run-*" in said
    (run / f"{next(run.glob('run-*.wandb')).name}.synced").touch()
    assert wandb_run.unsynced(wandb_home) == ""
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_wandb_with_a_key_but_no_server_goes_on_offline(wandb_home):
    # In a process of its own, since wandb remembers who is logged in.
    code = """if True:
        from omegaconf import OmegaConf
        from polykv import wandb_run
        from polykv.cellfile import Cell
        from experiments import tracking
        wandb_run.SECONDS_TO_WAIT = 2
        logger = OmegaConf.load("conf/logger/wandb.yaml")
        cfg = OmegaConf.create({"study": "compare", "results_dir": RESULTS, "logger": logger})
        study = {"name": "compare", "columns": {}}
        origin = {"commit": "unknown", "created_at": "today"}
        for cell in ("first", "second"):
            tracking.record(cfg, Cell(study, cell, {}, origin, {"metric": ["kl"], "value": [1.0]}))
            print(cell)
    """.replace("RESULTS", repr(str(wandb_home)))
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        env=os.environ | {"WANDB_API_KEY": "0" * 40},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["first", "second"]
    assert run.stderr.count("warning") == 1, run.stderr  # the second cell does not wait again
    assert "wandb runs are kept offline from here on" in run.stderr
    names = {logged(run)[1].run.display_name for run in wandb_home.glob("wandb/offline-run-*")}
    assert names == {"first", "second"}


def test_wandb_obeys_its_own_switch(wandb_home, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    record(config(wandb_home, "logger=wandb"), "c0")
    assert not list(wandb_home.glob("wandb/*run-*"))


def test_what_tells_a_metrics_values_apart_names_them_and_samples_are_averaged():
    cells = [finished("a"), finished("a", rows(n_agents=15))]
    found = tracking.summary(frame(cells))
    assert set(found) == {
        "kl/n_agents=3/reader=dequantize",
        "kl/n_agents=3/reader=in_place",
        "kl/n_agents=15/reader=dequantize",
        "kl/n_agents=15/reader=in_place",
        "bertscore_f1/n_agents=3",
        "bertscore_f1/n_agents=15",
    }
    assert found["kl/n_agents=3/reader=dequantize"] == pytest.approx(0.4)


@pytest.mark.slow
def test_figures_and_tables_are_uploaded_as_one_run(wandb_home):
    with pytest.raises(PolyKVError, match="python -m analysis"):
        upload(wandb_home)
    for folder, name in (("figures", "memory.png"), ("figures", "memory.pdf"), ("tables", "t.csv")):
        (wandb_home / folder).mkdir(parents=True, exist_ok=True)
        (wandb_home / folder / name).write_bytes(b"x")
    from PIL import Image

    Image.new("RGB", (4, 4)).save(wandb_home / "figures" / "memory.png")
    said = upload(wandb_home)
    (run,) = wandb_home.glob("wandb/offline-run-*")
    assert f"wandb sync {wandb_home}/wandb/offline-run-*" in said
    assert list(run.glob("files/media/images/figures/memory_*.png"))
    sent = [r.artifact for r in logged(run) if r.HasField("artifact")]
    (artifact,) = [one for one in sent if one.name == "analysis-results"]
    contents = artifact.manifest.contents
    assert [entry.path for entry in contents] == ["figures/memory.pdf", "tables/t.csv"]
    for entry in contents:  # they are in the folder, not in this machine's home
        assert Path(entry.local_path).is_relative_to(wandb_home)
    assert logged(run)[1].run.job_type == "analysis"
