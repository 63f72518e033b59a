"""Results that are not what was written: named, set aside whole and measured again; packed ones are refused."""

import shutil

import pytest
from hypothesis import given

from analysis.load import load
from polykv.archive import pack
from robustness import forge, stage
from robustness.promises import check_cell, check_results
from robustness.stage import N_CELLS, first
from robustness.test_damaged_cards import FAST

AT_ONCE = N_CELLS - 1  # kinds in one folder, each of another cell
NAMES = list(forge.CELLS)


@pytest.mark.parametrize("kind", forge.CELLS)
def test_a_damaged_cell_is_named(kind, tmp_path):
    changed = forge.CELLS[kind](forge.CELL)
    assert changed != forge.CELL and "damaged" in check_cell(changed, tmp_path)


@FAST
@given(content=forge.cells())
def test_an_edited_cell_is_named_or_read(content, tmp_path_factory):
    check_cell(content, tmp_path_factory.getbasetemp() / "edited")


@pytest.fixture
def packed(tmp_path):
    assert check_cell(forge.CELL, tmp_path) is None
    pack(tmp_path)
    shutil.rmtree(tmp_path / "cells")
    assert check_results(tmp_path) is None
    return tmp_path


@pytest.mark.parametrize("kind", [*forge.FILES, *forge.PACKED])
def test_damaged_packed_rows_are_refused(kind, packed):
    forge.damage_packed(packed, kind)
    assert "packed rows" in check_results(packed)
    assert "packed rows" in check_cell(forge.CELL, packed)  # a whole cell beside them hides nothing


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    stage.run(stage.in_folder(root))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("at", first(1, range(0, len(NAMES), AT_ONCE)))
def test_a_damaged_cell_is_set_aside_and_measured_again(at, root):
    struck = dict(zip(NAMES[at : at + AT_ONCE], stage.finished(root), strict=False))
    for kind, path in struck.items():
        path.with_name(f"{path.name}.damaged").unlink(missing_ok=True)  # of an earlier round
        path.write_bytes(forge.CELLS[kind](path.read_bytes()))
    wrong = {path: path.read_bytes() for path in struck.values()}
    named = load(root).damaged
    again = stage.run(stage.in_folder(root))
    assert again.code == 0, again
    for path, content in wrong.items():
        (said,) = [line for line in again.err.splitlines() if str(path) in line]
        aside = path.with_name(f"{path.name}.damaged")
        assert aside.name in said and aside.read_bytes() == content
        assert any(str(path) in line for line in named)
    stage.assert_undisturbed(root)
