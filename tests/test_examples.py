"""Every example is run as a user runs it, and what it prints is checked."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import analysis_rows
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from polykv.config import REPO

EXAMPLES = REPO / "examples"
# bitsandbytes' own NF4 table (functional.py, create_normal_map), to four decimals: the paper's appendix E.
NF4 = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]


def output_of(name, *arguments):
    """What `python examples/NAME.py` prints, without the settings of this test run."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_every_example_is_tested_and_short():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    tests = Path(__file__).read_text(encoding="utf-8")
    assert names and all(f'output_of("{name}"' in tests for name in names)
    for name in names:
        assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.slow
def test_agents_that_share_a_document_answer_from_one_small_copy():
    text = output_of("share_a_document")
    assert text.count("(right)") == 6
    unshared, pool = (
        int(number.replace(",", "")) for number in re.findall(r"([\d,]+) bytes", text)
    )
    # 6 agents, keys and values of 4 layers, 2 heads of 64, 1,024 tokens in fp16 (2 bytes)
    assert unshared == 6 * 2 * 4 * 2 * 64 * 1024 * 2
    assert unshared / pool == pytest.approx(6 * 2.844, rel=1e-3)  # README: polykv at head_dim 64


@pytest.mark.slow
def test_a_hand_off_crosses_processes_and_a_damaged_card_is_refused():
    text = output_of("hand_off")
    sender, receiver = re.findall(r"process (\d+)", text)
    assert sender != receiver
    stored, full = (
        int(n.replace(",", "")) for n in re.search(r"([\d,]+) bytes, .* ([\d,]+)", text).groups()
    )
    # An fp32 cache against 4 payload bits and a scale of 16 per 64 values; 4 of 512 tokens are exact; ids, maps,
    # and mean and spread of each channel of the keys.
    bits = 4.25 + 4 / 512 * (16 - 4.25) + 32 / (2 * 8 * 64) + 2 / (8 * 64) + 16 / 512
    assert full / stored == pytest.approx(32 / bits, rel=1e-3)
    # The sender's document says it; the receiver had the card alone.
    assert "What is Bea's pet? A:Bea's pet is pigeon." in text
    assert "one bit flipped on the way: the card was altered" in text


@pytest.mark.slow
def test_a_pool_in_a_pipeline_keeps_every_token():
    text = output_of("transformers_pipeline")
    answers = dict(re.findall(r"^(\w+) +[\d,]+ bytes.* (\d+) of 6 answers", text, re.M))
    assert answers["full"] == "6"
    sizes = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes", text)]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 3


@pytest.mark.slow
@pytest.mark.parametrize("shown", [6, 0])
def test_a_claim_is_tested_on_rows(tmp_path, shown):
    cells = []
    for keys, values in product((8, 4, 3, 2), repeat=2):
        recipe = f"k{keys}v{values}"
        one = analysis_rows.cell("compare", recipe, model="m", recipe=recipe, context_tokens=512)
        # Keys of few bits cost more; with keys and values exchanged the same test must find nothing.
        lost = 16.0**-keys if shown else 16.0**-values
        for sample in range(16):
            kl = (lost + 2.0**-20) * (1 + sample / 16)
            one[3].add("kl", kl, "nats", sample=sample, n=100)
            one[3].add("kl", kl, "nats", sample=sample, n=10, block=0)
        cells.append(one)
    text = output_of("read_results", str(analysis_rows.write(tmp_path, cells)))
    assert "of 16 documents" in text and text.count("keys win on") == 6
    assert f"the claim is shown for {shown} of 6 pairs" in text


@pytest.mark.slow
def test_a_recipe_from_outside_runs_beside_the_known_ones():
    text = output_of("own_recipe")
    lines = dict(re.findall(r"^(\w+) +(\d\.\d{3}) +0\.\d{5} \[", text, re.M))
    assert lines == {"q4_0": "4.500", "uniform": "4.250", "normal_float": "4.250"}
    files = (EXAMPLES / "own_recipe").glob("**/*.[py]*")
    written = [line for path in files for line in path.read_text().splitlines() if line.strip()]
    assert len(written) < 30


def test_the_recipe_from_outside_is_what_it_says(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "own_recipe"))
    import normal_float

    assert torch.allclose(normal_float.LEVELS, torch.tensor(NF4), atol=1e-4)
    recipe = OmegaConf.load(EXAMPLES / "own_recipe" / "recipe" / "normal_float.yaml")
    codec = instantiate(recipe.key)
    x_BHTD = torch.randn(2, 3, 50, 64, generator=torch.Generator().manual_seed(0))
    x_BHTD[0, 0, 7] = 0
    packed = codec.encode(x_BHTD)
    assert packed.nbytes == codec.stored_bytes(packed.shape, packed.dtype)
    decoded = codec.decode(packed)
    assert not decoded[0, 0, 7].any()
    # No level is farther than half the widest gap, (1 - 0.6962) / 2, of the vector's largest value.
    error = (decoded - x_BHTD).abs().amax(-1) / x_BHTD.abs().amax(-1).clamp(min=1e-9)
    assert error.max() < 0.153
