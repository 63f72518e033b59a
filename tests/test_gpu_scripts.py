"""benchmarks/gpu on a CPU with tiny shapes: every script from one end to the other, in processes of their own."""

import json
import os
import subprocess
import sys
from math import exp
from pathlib import Path
from sysconfig import get_path

import numpy as np
import pandas as pd
import pytest
import torch

from polykv.results import Rows, load_rows

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"
sys.path.append(str(SCRIPTS))  # behind everything else: its names are plain ones

import baselines  # noqa: E402
import checks  # noqa: E402
import common  # noqa: E402
import concurrency  # noqa: E402
import handoff_ttft  # noqa: E402

from polykv import kernels  # noqa: E402
from polykv.codecs.int8 import Int8  # noqa: E402
from polykv.codecs.q8_0 import Q8_0  # noqa: E402
from polykv.codecs.turboquant import TurboQuantMSE  # noqa: E402


def run(out, script, *options):
    """From a checkout that is not installed (-S finds no editable install), as where packages are carried."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": get_path("purelib")}
    program = [sys.executable, "-S", str(SCRIPTS / f"{script}.py")]
    command = [*program, "--tiny", "--out", str(out), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows_of(out, experiment):
    rows, damaged = load_rows(out)
    assert not damaged
    return rows[rows["study"] == experiment]


@pytest.mark.slow
def test_codec_kernels(tmp_path):
    pytest.importorskip("triton", reason="triton has wheels for Linux only")
    run(tmp_path, "codec_kernels")
    rows = rows_of(tmp_path, "gpu_codecs")
    assert (rows[rows["metric"] == "wrong_codes"]["value"] == 0).all()
    found = rows.groupby(["model", "recipe"])["metric"].agg(set)
    assert len(found) == 12
    assert all({"encode_share", "decode_share", "copy_bandwidth"} <= metrics for metrics in found)
    again = run(tmp_path, "codec_kernels")
    assert again.count("done before") == 12
    cell = json.loads(next(tmp_path.glob("cells/gpu_codecs/*.json")).read_text())
    assert cell["config"]["state"]["before"]["torch"] == torch.__version__


@pytest.mark.slow
def test_attention_kernels(tmp_path):
    pytest.importorskip("triton", reason="triton has wheels for Linux only")
    run(tmp_path, "attention_kernels")
    rows = rows_of(tmp_path, "gpu_attention")
    errors = rows[rows["metric"] == "attention_error"]["value"]
    assert errors.min() > 0 and errors.max() < 2e-2
    speedups = rows[rows["metric"] == "attention_speedup"]
    assert set(speedups["reader"]) == {"unshared", "shared"} and (speedups["value"] > 0).all()
    run(tmp_path, "attention_kernels", "--sweep")
    assert rows_of(tmp_path, "gpu_attention_sweep")["note"].str.startswith("Launch").all()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak resident memory is read on Linux only")
def test_concurrency(tmp_path):
    run(tmp_path, "concurrency")
    rows = rows_of(tmp_path, "concurrency")
    stored = rows[rows["accounting"] == "stored"].set_index(["model", "reader", "n_agents"])[
        "value"
    ]
    for model in concurrency.MODELS:
        assert stored[model, "unshared", 3] == pytest.approx(3 * stored[model, "unshared", 1])
        assert stored[model, "in_place", 3] == stored[model, "in_place", 1]
    assert set(rows[rows["metric"] == "step_time"]["reader"]) == {
        "unshared",
        "dequantize",
        "in_place",
    }
    assert (rows_of(tmp_path, "gpu_largest")["value"] == 4).all()


@pytest.mark.slow
def test_handoff_ttft(tmp_path):
    # 300 tokens of 2 layers with 2 heads of 64: 4.25 bits with scales, 4 exact tokens, channels of the keys, maps, ids.
    bits = 4.25 + 4 / 300 * 11.75 + 16 / 300 + 3 / 256 + 32 / 512
    assert f"uniform {bits:.3f} bits" in run(tmp_path, "handoff_ttft")
    rows = rows_of(tmp_path, "handoff_ttft")
    assert set(rows["policy"]) == {"reprefill", "fp16", "uniform", "topology"}
    assert set(rows["context_tokens"]) == {128, 256}
    # Three policies, two transports, two readers: a line each below the table's head.
    shown = (tmp_path / "tables" / "gpu_break_even.md").read_text().splitlines()
    assert sum(line.startswith("|") for line in shown) == 2 + 12
    assert len((tmp_path / "device_states.jsonl").read_text().splitlines()) == 1


def test_without_a_gpu_the_scripts_say_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here"):
        common.pick_device(tiny=False)


def test_the_largest_number_of_agents_is_found_by_trying(monkeypatch):
    monkeypatch.setattr(concurrency.gc, "collect", lambda: 0)  # seconds, among all tests' objects

    class Decoding:
        backend = "torch"

        def run(self, reader, n_tokens, n_agents, n_steps):
            if n_agents > {"unshared": 37, "dequantize": 0, "in_place": 1000}[reader]:
                raise torch.OutOfMemoryError("CUDA out of memory")

    rows = Rows()
    concurrency.largest(Decoding(), 100, 256, rows)
    found = {row["reader"]: (row["value"], row["note"]) for row in rows}
    assert found == {
        "unshared": (37, "38 do not fit"),
        "dequantize": (0, "1 do not fit"),
        "in_place": (256, "no more were tried"),
    }


def test_break_even_is_where_the_lines_cross():
    def medians(card):
        return pd.DataFrame({"text": [10.0, 20.0, 40.0], "card": card}, index=[100, 200, 400])

    crossing, note = handoff_ttft.break_even(medians([20.0, 20.0 * 2**0.5, 40.0 / 2**0.5]))
    assert crossing == pytest.approx(200 * 2**0.5) and "between 200 and 400" in note
    assert handoff_ttft.break_even(medians([5.0, 5.0, 5.0]))[0] == 100
    assert handoff_ttft.break_even(medians([50.0, 50.0, 50.0]))[0] is None
    # Faster, slower, faster: what counts is from where on it stays faster.
    assert 200 < handoff_ttft.break_even(medians([5.0, 20.0 * exp(0.1), 5.0]))[0] < 400


@pytest.mark.parametrize("codec", (TurboQuantMSE(3), Int8("token"), Q8_0()))
def test_the_checks_notice_a_wrong_code_and_a_wrong_value(codec):
    x, _ = checks.fresh((1, 2, 33, 64), torch.bfloat16, torch.device("cpu"))
    packed = codec.encode(x)
    decoded = kernels.decode_rotated(codec, packed, "torch")
    assert checks.wrong_codes(codec, x, packed) == 0
    assert checks.decode_error(codec, packed, decoded) < 1e-6
    # 4 levels away, or 32: no decision boundary excuses it.
    packed.tensors["codes"][0, 1, 7, 3] ^= 1 << 5
    assert checks.wrong_codes(codec, x, packed) == 1
    assert checks.decode_error(codec, packed, decoded) > 1e-3


def test_every_baseline_computes_the_same_attention():
    q, caches = torch.randn(3, 4, 1, 16), [(torch.randn(3, 2, 50, 16), torch.randn(3, 2, 50, 16))]
    k, v = (x.repeat_interleave(2, dim=1) for x in caches[0])
    expected = (q @ k.mT / 4).softmax(dim=-1) @ v
    for calls in baselines.unshared_attentions(q, caches).values():
        torch.testing.assert_close(calls[0]().reshape(expected.shape), expected)
    shared = [(caches[0][0][:1], caches[0][1][:1])]
    q_HQD = torch.randn(2, 9, 16)
    expected = (q_HQD @ shared[0][0][0].mT / 4).softmax(dim=-1) @ shared[0][1][0]
    for calls in baselines.shared_attentions(q_HQD, shared, 1).values():
        torch.testing.assert_close(calls[0]()[0], expected)


def test_times_are_taken_in_turn(tmp_path):
    order = []
    bench = common.Bench(common.parser("").parse_args(["--tiny", "--out", str(tmp_path)]))
    cases = {name: lambda name=name: order.append(name) for name in "ab"}
    times = bench.milliseconds(cases)
    assert order == ["a", "b"] * common.TINY_REPEATS
    assert all(isinstance(taken, np.ndarray) and (taken >= 0).all() for taken in times.values())
