"""Packed results: what is read from them is what the cells held, and nothing else is taken for it."""

import gzip
import json
import shutil

import pandas as pd
import pytest
from analysis_rows import cell, quickstart, run, write
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schema import ABOUT, DECLARED, VALUES

from analysis.load import load
from experiments.rows import SCORES
from polykv.archive import CELLS, ROWS, pack, unpack
from polykv.errors import PolyKVError
from polykv.results import Rows, Store, frame, load_rows


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(VALUES[float], ABOUT), min_size=1, max_size=4), VALUES[str])
def test_packed_rows_are_the_rows(tmp_path_factory, observed, note):
    root = tmp_path_factory.mktemp("packed")
    rows = Rows(SCORES)
    for value, about in observed:
        rows.add("m", value, "u", **about)
    rows.add("m", None, "u", why=note or "none")
    done = Store(root).write(DECLARED, "c", {"a": {"b": [1, None]}}, rows)
    pack(root)
    (found,) = unpack(root)
    pd.testing.assert_frame_equal(frame([found]), frame([done]))
    assert (found.config, found.provenance, found.study) == (
        done.config,
        done.provenance,
        done.study,
    )


def test_a_packed_folder_is_rendered_like_its_cells(tmp_path, capsys):
    write(tmp_path, quickstart((512,), (3,)))
    shown = ("--only", "compare", "--format", "md,tex,csv")
    assert run(tmp_path, *shown) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()}
    pack(tmp_path)
    for name in ("cells", "tables", "figures"):
        shutil.rmtree(tmp_path / name)
    assert run(tmp_path, *shown) == 0 and before
    assert {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()} == before


def test_the_same_cells_give_the_same_bytes_and_a_later_one_joins(tmp_path):
    write(tmp_path, quickstart((512,), (3,)))
    pack(tmp_path)
    first = [(tmp_path / name).read_bytes() for name in (ROWS, CELLS)]
    assert pack(tmp_path)[0] == 3
    assert [(tmp_path / name).read_bytes() for name in (ROWS, CELLS)] == first
    shutil.rmtree(tmp_path / "cells")
    made = cell("compare", "later", model="m")
    made[3].add("kl", 1.0, "nats")
    write(tmp_path, [made])
    assert len(load(tmp_path).cells) == 4 and pack(tmp_path)[0] == 4


def test_cells_of_one_study_keep_their_own_columns(tmp_path):
    for name, columns in (("a", {"layer": "int"}), ("b", {})):
        rows = Rows({"layer": int} if columns else {})
        rows.add("kl", 1.0, "nats", **dict.fromkeys(columns, 3))
        Store(tmp_path).write({**DECLARED, "columns": columns}, name, {}, rows)
    before = load_rows(tmp_path)[0]
    pack(tmp_path)
    pd.testing.assert_frame_equal(frame(unpack(tmp_path)), before)


def edit(path, change):
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


@pytest.mark.parametrize(
    "damage",
    [
        lambda root: (root / CELLS).unlink(),
        lambda root: (root / ROWS).unlink(),
        lambda root: (root / ROWS).write_bytes((root / ROWS).read_bytes()[:-30]),
        lambda root: (root / CELLS).write_bytes(b"version https://git-lfs.github.com/spec/v1"),
        lambda root: edit(root / ROWS, lambda text: text.replace(b"2.9", b"3.9", 1)),
        lambda root: edit(root / CELLS, lambda text: json.dumps(json.loads(text) | {"format": 1}).encode()),
        lambda root: edit(root / CELLS, lambda text: b"[]"),
        lambda root: edit(root / CELLS, lambda text: text.replace(b'"commit": "', b'"commit": "0', 1)),
    ],
)  # fmt: skip
def test_damaged_or_edited_rows_are_refused_in_one_line(tmp_path, capsys, damage):
    write(tmp_path, quickstart((512,), (3,)))
    pack(tmp_path)
    shutil.rmtree(tmp_path / "cells")
    damage(tmp_path)
    with pytest.raises(PolyKVError, match=str(tmp_path)):
        load_rows(tmp_path)
    assert run(tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_to_pack_is_refused(tmp_path):
    with pytest.raises(PolyKVError, match=str(tmp_path)):
        pack(tmp_path)
