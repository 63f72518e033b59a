"""The notebook in examples, run as it stands but on the embedded model, which is fast and needs no hub."""

import os
import re

import nbformat
import pytest
from nbclient import NotebookClient

from polykv.config import REPO

FILE = REPO / "examples" / "quickstart.ipynb"
SECONDS = 300  # for one cell; the first imports torch
BITS = {"q8_0": 8.5, "polykv": 5.625, "turboquant_3bit": 3.25}  # a value, at head_dim 64


def printed(cells):
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the notebook prints."""
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        cell.source = re.sub(r'(?m)^MODEL = "[^"]+"', 'MODEL = "reference"', cell.source)
    assert any('\nMODEL = "reference"' in cell.source for cell in notebook.cells)
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder))
        patch.setenv("PYTHONPATH", str(REPO), prepend=os.pathsep)
        NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        ).execute()
    return printed(notebook.cells)


@pytest.mark.slow
def test_three_recipes_are_compared_at_their_stored_bits(said):
    lines = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.split()}
    damage = []
    for name, bits in BITS.items():
        stored, change, low, high, kl, same = map(float, lines[name])
        assert stored == pytest.approx(bits, abs=0.01)
        assert low <= change <= high and kl > 0 and 0 <= same <= 1
        damage.append(kl)
    assert damage[0] < min(damage[1:]), "8.5 bits lose less than 5.6 and 3.3"


@pytest.mark.slow
def test_agents_answer_over_one_pool_that_is_smaller_by_their_number_and_the_ratio(said):
    answered, expected = said.count("   agent: "), said.count("   text:  ")
    assert answered == expected > 1
    unshared, pool = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes", said))
    assert unshared / pool == pytest.approx(answered * 16 / BITS["polykv"], rel=1e-3)


def test_what_is_committed_is_small_and_names_no_machine():
    notebook = nbformat.read(FILE, as_version=4)
    assert FILE.stat().st_size < 20_000
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {output.get("name") for output in outputs} <= {"stdout"}
    assert not re.search(r"(/home|/root|/tmp|/Users|site-packages)/", FILE.read_text("utf-8"))
