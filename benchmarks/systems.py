"""The contenders of encode.py, each run in its own process: encode a layer's keys and values, decode the values.

python benchmarks/systems.py NAME --tokens 4096 ...     (encode.py starts these and asks them in turn)
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import answer_requests, peak_bytes, timed
from torch import Tensor

# (encode(keys, values) -> kept, decode(kept) -> values, what exactly is done)
System = tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor], str]


def memcpy(k_BHTD: Tensor, v_BHTD: Tensor) -> System:
    """The limit: a copy of the input's bytes into memory that is already allocated."""
    k_copy, v_copy = torch.empty_like(k_BHTD), torch.empty_like(v_BHTD)
    fp32 = v_BHTD.float()
    fp32_copy = torch.empty_like(fp32)

    def copy(k_BHTD: Tensor, v_BHTD: Tensor) -> None:
        k_copy.copy_(k_BHTD)
        v_copy.copy_(v_BHTD)

    return copy, lambda _: fp32_copy.copy_(fp32), "copies of K and V; of fp32 values"


def ours(recipe_name: str, backend: str, k_BHTD: Tensor, v_BHTD: Tensor) -> System:
    from context import of_layer

    from polykv import kernels
    from polykv.recipe import load_recipe

    backend = kernels.pick_backend(backend, k_BHTD.device)
    recipe, context = load_recipe(recipe_name), of_layer(*k_BHTD.shape[1:])
    return (
        # The last segment: exact sinks come before it.
        lambda k, v: recipe.encode_layer(k, v, 0, 1, backend, context)[-1],
        lambda segment: kernels.decode_rotated(segment.value_codec, segment.value, backend),
        "Recipe.encode_layer, bits packed; kernels.decode_rotated: values in fp32, rotated domain",
    )


def polykv_llm(k_BHTD: Tensor, v_BHTD: Tensor) -> System:
    """The package of arXiv 2604.24971: one int8 index per value, no decoding in the rotated domain."""
    import polykv
    from polykv.pool import SharedKVPool

    found = importlib.metadata.version("polykv-llm")
    assert polykv.__version__ == found == "0.1.0", f"polykv-llm {found} at {polykv.__file__}"
    pool = SharedKVPool(head_dim=k_BHTD.shape[-1])

    def encode(k: Tensor, v: Tensor) -> Any:
        pool.encode([(k.float(), v.float())])  # as its from_context does
        return pool.blocks[0]

    def decode(block: Any) -> Tensor:
        return pool.compressor.decompress_v(block.v_indices, block.v_norms, block.v_shape)

    return encode, decode, "SharedKVPool.encode, codes not packed; decompress_v: values in fp32"


def transformers_layer(backend: str, options: dict, k_BHTD: Tensor, v_BHTD: Tensor) -> System:
    from transformers import cache_utils

    layer_class = {
        "quanto": cache_utils.QuantoQuantizedLayer,
        "hqq": cache_utils.HQQQuantizedLayer,
        "fp8": cache_utils.Fp8QuantizedLayer,
    }[backend]

    def encode(k: Tensor, v: Tensor) -> Any:
        layer = layer_class(**options)
        layer.update(k, v)
        return layer

    layer_class(**options)
    told = ", ".join(f"{name}={value}" for name, value in options.items())
    return (
        encode,
        lambda layer: layer._dequantize(layer._quantized_values),
        f"first update of {layer_class.__name__}({told}); its _dequantize of the values",
    )


# hqq's 3 bits are left out: its dequantize fails on CPU tensors of this shape (0.2.8.post1).
SYSTEMS: dict[str, Callable[[Tensor, Tensor], System]] = {
    "memcpy": memcpy,
    "polykv, cpu kernels": partial(ours, "polykv", "cpu"),
    "polykv, torch": partial(ours, "polykv", "torch"),
    "polykv_q8_0, cpu kernels": partial(ours, "polykv_q8_0", "cpu"),
    "polykv_q8_0, torch": partial(ours, "polykv_q8_0", "torch"),
    "waterfill_4, cpu kernels": partial(ours, "waterfill_4", "cpu"),
    "waterfill_4, torch": partial(ours, "waterfill_4", "torch"),
    "trellis_3, cpu kernels": partial(ours, "trellis_3", "cpu"),
    "trellis_4, cpu kernels": partial(ours, "trellis_4", "cpu"),
    "polykv-llm 0.1.0": polykv_llm,
    "transformers quanto 4-bit": partial(transformers_layer, "quanto", {"nbits": 4}),
    "transformers quanto 2-bit": partial(transformers_layer, "quanto", {"nbits": 2}),
    "transformers hqq 4-bit": partial(
        transformers_layer, "hqq", {"nbits": 4, "axis_key": 1, "axis_value": 1}
    ),
    "transformers fp8": partial(transformers_layer, "fp8", {}),
}
# The folder of packages.py that a system needs.
NEEDS = {"polykv-llm 0.1.0": "polykv-llm", "transformers hqq 4-bit": "hqq"}
NEEDS |= dict.fromkeys(["transformers quanto 4-bit", "transformers quanto 2-bit"], "quanto")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=SYSTEMS)
    for name in ("tokens", "heads", "dim", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--packages", help="folder to import from first")
    arguments = parser.parse_args()
    if arguments.packages:
        sys.path.insert(0, arguments.packages)
    torch.set_num_threads(arguments.threads)
    answer_requests(partial(start, arguments))


def start(arguments: argparse.Namespace) -> tuple[str, dict[str, Callable[[], Any]]]:
    """A note on what is timed, and the function of each request."""
    torch.manual_seed(0)
    shape = (1, arguments.heads, arguments.tokens, arguments.dim)
    k_BHTD, v_BHTD = (torch.randn(shape).to(getattr(torch, arguments.dtype)) for _ in range(2))
    encode, decode, note = SYSTEMS[arguments.system](k_BHTD, v_BHTD)
    kept = encode(k_BHTD, v_BHTD)
    work = {"encode": lambda: encode(k_BHTD, v_BHTD), "decode": lambda: decode(kept)}
    times = {name: partial(timed, run) for name, run in work.items()}
    return note, times | {f"{name} peak": partial(peak_bytes, run) for name, run in work.items()}


if __name__ == "__main__":
    with torch.no_grad():
        main()
