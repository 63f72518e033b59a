"""A result file that is not what was written: it is named, set aside whole, and its cell is measured again."""

import pytest

from analysis.load import load
from robustness import kinds, stage
from robustness.promises import check_cell, committed
from robustness.stage import N_CELLS, first

AT_ONCE = N_CELLS - 1  # kinds in one folder, each of another cell
NAMES = list(kinds.CELLS)


@pytest.mark.parametrize("kind", kinds.CELLS)
def test_a_damaged_cell_is_named(kind, tmp_path):
    content = committed("cell")["sealed"]
    changed = kinds.CELLS[kind](content)
    said = check_cell(changed, tmp_path)
    assert changed != content and "damaged" in said


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    stage.run(stage.in_folder(root))
    return root


@pytest.mark.parametrize("at", first(1, range(0, len(NAMES), AT_ONCE)))
def test_a_damaged_cell_is_set_aside_and_measured_again(at, root):
    struck = dict(zip(NAMES[at : at + AT_ONCE], stage.finished(root), strict=False))
    for kind, path in struck.items():
        path.with_name(f"{path.name}.damaged").unlink(missing_ok=True)  # of an earlier round
        path.write_bytes(kinds.CELLS[kind](path.read_bytes()))
    wrong = {path: path.read_bytes() for path in struck.values()}
    named = load(root).damaged
    again = stage.run(stage.in_folder(root))
    assert again.code == 0, again
    for path, content in wrong.items():
        (said,) = [line for line in again.err.splitlines() if str(path) in line]
        aside = path.with_name(f"{path.name}.damaged")
        assert aside.name in said and aside.read_bytes() == content
        assert any(str(path) in line for line in named)
    stage.resume(root)
