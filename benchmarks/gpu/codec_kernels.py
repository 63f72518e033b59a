"""Encode and decode of a pool's codecs by Triton, on a GPU: correct in fp64, and against a device copy.

    python benchmarks/gpu/codec_kernels.py            one GPU with 8 GB; goes on where it was stopped
    python benchmarks/gpu/codec_kernels.py --tiny     the same path on a CPU, through Triton's interpreter

Bandwidth: bytes that have to be moved (values once, or twice where a scale is shared by the whole tensor;
everything stored once) over the time, beside a device-to-device copy timed in turn with it. Inputs are several
times the L2 cache. `graph` is the device's time (CUDA graph replay), `call` what a caller in Python waits for,
with the check that all values are finite.
"""

import os
import sys
from functools import partial
from itertools import product

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton loads

import numpy as np
import torch
from checks import decode_error, fresh, wrong_codes
from common import Bench, add_times, captured, copies, parser

from polykv import kernels
from polykv.codecs.base import Codec, Packed
from polykv.codecs.int8 import Int8
from polykv.codecs.q8_0 import Q8_0
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.kernels import triton_int8, triton_turboquant
from polykv.results import Rows

EXPERIMENT = "gpu_codecs"
CODECS = {
    "turboquant_2bit": TurboQuantMSE(2),
    "turboquant_3bit": TurboQuantMSE(3),
    "turboquant_4bit": TurboQuantMSE(4),
    "int8_tensor": Int8(),
    "int8_token": Int8("token"),
    "q8_0": Q8_0(),
}
TOKENS = 32768
CHECKED_TOKENS = 2037  # no multiple of a tile
GIGA = 1e9
TOLERANCE = 1e-6  # of decoded fp32 values


def main() -> None:
    bench = Bench(parser(__doc__).parse_args())
    n_tokens = 70 if bench.tiny else TOKENS
    for model, codec in product(bench.heads, CODECS):
        identity = {"model": model, "codec": codec, "tokens": n_tokens}
        about = {"model": model, "weights": "random", "dtype": "bfloat16", "recipe": codec}
        about |= {"context_tokens": n_tokens, "backend": "triton"}
        bench.cell(EXPERIMENT, identity, partial(measure, bench, model, codec, n_tokens), **about)
    report(bench)


def measure(bench: Bench, model: str, name: str, n_tokens: int, rows: Rows) -> None:
    """Correctness on fresh values, then the times of one layer's keys or values."""
    codec, (_, heads, dim), device = CODECS[name], bench.heads[model], bench.device
    check(device, codec, (1, heads, min(n_tokens, CHECKED_TOKENS), dim), rows)
    shape = (1, heads, n_tokens, dim)
    count = copies(device, 2 * heads * n_tokens * dim)
    inputs = [fresh(shape, torch.bfloat16, device)[0] for _ in range(count)]
    stored = [kernels.encode(codec, x, "triton") for x in inputs]
    passes = 2 if codec == Int8("tensor") else 1
    n_bytes = stored[0].nbytes + passes * inputs[0].nbytes
    compare(bench, codec, "encode", inputs, n_bytes, inputs, rows)
    n_bytes = stored[0].nbytes + 4 * inputs[0].numel()
    compare(bench, codec, "decode_rotated", stored, n_bytes, inputs, rows)


def check(device: torch.device, codec: Codec, shape: tuple[int, ...], rows: Rows) -> None:
    x, seed = fresh(shape, torch.bfloat16, device)
    packed = kernels.encode(codec, x, "triton")
    error = decode_error(codec, packed, kernels.decode_rotated(codec, packed, "triton"))
    rows.add("wrong_codes", wrong_codes(codec, x, packed), "codes", n=x.numel(), seed=seed)
    rows.add("decode_error", error, "relative", seed=seed, note="largest, against fp64")


def compare(
    bench: Bench,
    codec: Codec,
    direction: str,
    given: list[torch.Tensor] | list[Packed],
    n_bytes: int,
    copied: list[torch.Tensor],
    rows: Rows,
) -> None:
    """The kernel, the call around it and the torch path, and a copy of `copied` beside them."""
    module = triton_turboquant if isinstance(codec, TurboQuantMSE) else triton_int8
    kernel, call = getattr(module, direction), getattr(kernels, direction)
    target = torch.empty_like(copied[0])
    cases = {
        "copy": captured(lambda: [target.copy_(x) for x in copied], bench.device),
        "graph": captured(lambda: [kernel(codec, one) for one in given], bench.device),
        "call": lambda: [call(codec, one, "triton") for one in given],
        "torch": lambda: [call(codec, one, "torch") for one in given],
    }
    taken = {case: all_of / len(given) for case, all_of in bench.milliseconds(cases).items()}
    metric = direction.removesuffix("_rotated")
    note = f"{n_bytes} bytes; inputs by turns: {len(given)}"
    seconds = add_times(rows, f"{metric}_time", taken["graph"], timed="graph", note=note) / 1e3
    add_times(rows, f"{metric}_time", taken["call"], timed="call", note=note)
    add_times(rows, f"{metric}_time", taken["torch"], timed="call", backend="torch", note=note)
    limit = 2 * copied[0].nbytes / GIGA / float(np.median(taken["copy"]) / 1e3)
    moved = n_bytes / GIGA / seconds
    rows.add("copy_bandwidth", limit, "GB/s", note=f"a copy of the values, timed beside {metric}")
    rows.add(f"{metric}_bandwidth", moved, "GB/s", timed="graph", note=note)
    rows.add(f"{metric}_share", 100 * moved / limit, "percent", timed="graph", note="of the copy")


def report(bench: Bench) -> None:
    found = bench.rows(EXPERIMENT)
    found = found[found["backend"] == "triton"]
    times = found[found["metric"].str.endswith("_time")]
    keys = ["model", "recipe"]
    table = found.drop(times.index).pivot_table(index=keys, columns="metric", values="value")
    title = "Encode and decode beside a device copy: GB/s, percent of the copy"
    bench.show("gpu_codecs", title, table.reset_index())
    table = times.pivot_table(
        index=keys, columns=["metric", "timed"], values="value", aggfunc="median"
    )
    table.columns = [" ".join(column) for column in table.columns]
    bench.show(
        "gpu_codecs_time", "Milliseconds for one layer's keys or values", table.reset_index()
    )
    wrong = found.loc[found["metric"] == "wrong_codes", "value"].sum()
    error = found.loc[found["metric"] == "decode_error", "value"].max()
    if wrong or error > TOLERANCE:
        raise SystemExit(f"error: {wrong:.0f} wrong codes, largest error of decoding {error:.1e}")


if __name__ == "__main__":
    main()
