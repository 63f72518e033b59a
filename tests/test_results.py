"""The store: identity, atomic files, damage, and one process per cell; test_schema.py has the rows."""

import json
import multiprocessing

import pytest

from analysis.load import load
from polykv import results
from polykv.cellfile import COLUMNS
from polykv.errors import PolyKVError
from polykv.results import Rows, Store, cell_id, load_rows

QUICKSTART = {
    "name": "quickstart",
    "title": "t",
    "question": "q?",
    "answers": [],
    "settings": [],
    "columns": {},
}
CONFIG = {"model": {"name": "reference"}, "context": 512, "seed": 0, "results_dir": "a"}


def one_row() -> Rows:
    rows = Rows(model="reference", recipe="polykv")
    rows.add("perplexity", 2.5, "ppl", n=10)
    return rows


def write(store, cell="abc", config=CONFIG):
    """The path of a cell's file with one row."""
    store.write(QUICKSTART, cell, config, one_row())
    return store.path("quickstart", cell)


def test_identity_is_what_affects_the_numbers():
    assert cell_id(CONFIG) == cell_id(CONFIG | {"results_dir": "b"})
    assert cell_id(CONFIG) == cell_id(dict(reversed(CONFIG.items())))
    assert cell_id(CONFIG) != cell_id(CONFIG | {"seed": 1})
    assert cell_id(CONFIG) != cell_id(CONFIG | {"model": {"name": "reference", "dtype": "float16"}})


def test_a_cell_round_trips_with_every_column(tmp_path):
    store = Store(tmp_path)
    assert not store.done("quickstart", "abc")
    write(store)
    assert store.done("quickstart", "abc")
    frame, damaged = load_rows(tmp_path)
    assert list(frame.columns) == list(COLUMNS) and damaged == []
    row = frame.iloc[0]
    assert (row.study, row.cell, row.value, row.n) == ("quickstart", "abc", 2.5, 10)
    assert row.commit == results.commit()


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    store = Store(tmp_path)
    write(store, "kept")

    def no_space(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", no_space)
    with pytest.raises(PolyKVError, match="No space left on device.*results_dir"):
        write(store, "lost")
    with pytest.raises(PolyKVError, match="No space left"):
        store.check_writable()
    assert [p.name for p in (tmp_path / "cells" / "quickstart").iterdir()] == ["kept.json"]


def test_damaged_files_are_named_and_the_rest_is_read(tmp_path):
    store = Store(tmp_path)
    whole = write(store, "whole")
    text = whole.read_text()
    whole.with_name("half.json").write_text(text[: len(text) // 2])
    edited = json.loads(text)
    del edited["rows"]["value"]
    whole.with_name("edited.json").write_text(json.dumps(edited))
    frame, damaged = load_rows(tmp_path)
    assert len(frame) == 1
    assert ["edited.json" in damaged[0], "half.json" in damaged[1]] == [True, True]


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


EDITS = {
    "value": lambda content: content["rows"].update(value=2.4),
    "config": lambda content: content["config"].update(seed=1),
    "provenance": lambda content: content["provenance"].update(commit="0123456789ab"),
    "row": lambda content: content.update(n_rows=2),
    "study": lambda content: content["study"].update(title="another"),
    "column": lambda content: content["rows"].update(colour="red"),
    "digest": lambda content: content.update(digest=7),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_by_hand_is_noticed_and_the_file_set_aside(tmp_path, capsys, edit):
    store = Store(tmp_path)
    path = write(store)
    edited(path, EDITS[edit])
    wrong = path.read_bytes()
    assert not store.done("quickstart", "abc")
    with store.claim("quickstart", "abc") as mine:
        assert mine and not path.exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(path) in said and "abc.json.damaged" in said
    assert path.with_name("abc.json.damaged").read_bytes() == wrong
    write(store)
    frame, damaged = load_rows(tmp_path)
    assert len(frame) == 1 and damaged == [] and store.done("quickstart", "abc")


def test_what_was_set_aside_before_is_kept(tmp_path):
    store = Store(tmp_path)
    for text in ("first", "second"):
        path = store.path("quickstart", "abc")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        with store.claim("quickstart", "abc"):
            pass
    aside = {path.name: path.read_text() for path in path.parent.iterdir()}
    assert aside == {"abc.json.damaged": "first", "abc.json.damaged2": "second"}


def test_saving_a_cell_with_another_layout_is_no_damage(tmp_path):
    store = Store(tmp_path)
    path = write(store, config=CONFIG | {"layers": {"1": 2.0}})
    edited(path, lambda content: None)
    assert store.done("quickstart", "abc")


def test_a_copy_under_another_name_is_no_other_cell(tmp_path):
    store = Store(tmp_path)
    path = write(store)
    path.with_name("def.json").write_bytes(path.read_bytes())
    assert store.done("quickstart", "abc") and not store.done("quickstart", "def")
    frame, damaged = load_rows(tmp_path)
    assert len(frame) == 1 and "it is cell abc of quickstart" in damaged[0]


@pytest.mark.parametrize("text", ["[" * 100_000, "NaN", '{"rows": {"value": Infinity}}', "\x00"])
def test_no_text_breaks_the_reader(tmp_path, text):
    store = Store(tmp_path)
    write(store, "whole")
    store.path("quickstart", "abc").write_text(text)
    frame, damaged = load_rows(tmp_path)
    assert len(frame) == 1 and len(damaged) == 1 and "abc.json" in damaged[0]


def test_a_folder_in_place_of_a_cell_is_set_aside_too(tmp_path, capsys):
    store = Store(tmp_path)
    (store.path("quickstart", "abc") / "inside").mkdir(parents=True)
    with store.claim("quickstart", "abc"):
        write(store)
    assert store.done("quickstart", "abc") and "a folder, not a file" in capsys.readouterr().err
    assert (store.path("quickstart", "abc").parent / "abc.json.damaged" / "inside").is_dir()


def test_a_cell_that_may_not_be_read_is_no_damage(tmp_path, monkeypatch):
    store = Store(tmp_path)
    write(store)

    def refuse(path, **how):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(PolyKVError, match="cannot read .*abc.json .Permission denied"):
        store.done("quickstart", "abc")


def test_a_folder_that_takes_no_lock_is_one_clear_error(tmp_path):
    (tmp_path / "cells").write_text("a file where a folder should be")
    with (
        pytest.raises(PolyKVError, match="cannot write into .*results_dir"),
        Store(tmp_path).claim("quickstart", "abc"),
    ):
        pass


def test_the_look_whether_a_folder_can_be_written_leaves_nothing(tmp_path):
    for _ in range(2):
        Store(tmp_path).check_writable()
    assert [path.name for path in tmp_path.rglob("*")] == ["cells"]


def test_where_a_cell_runs_is_not_its_identity():
    for name in ("launcher", "logger", "results_dir"):
        assert cell_id(CONFIG) == cell_id(CONFIG | {name: "another"})


def test_an_empty_folder_is_refused_by_the_analysis(tmp_path):
    assert load_rows(tmp_path)[0].empty
    with pytest.raises(PolyKVError, match=str(tmp_path)):
        load(tmp_path)


def _try_claim(root, answer):
    with Store(root).claim("quickstart", "abc") as mine:
        answer.put(mine)


def test_one_process_at_a_time_claims_a_cell(tmp_path):
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    with Store(tmp_path).claim("quickstart", "abc") as mine:
        assert mine
        other = context.Process(target=_try_claim, args=(tmp_path, answer))
        other.start()
        assert answer.get(timeout=60) is False
        other.join()
    with Store(tmp_path).claim("quickstart", "abc") as mine:
        assert mine
