"""Compile every Triton kernel for Hopper, without a GPU, and print what shared memory each takes.

The interpreter accepts kernels that the compiler does not. A process of its own, since a process either
interprets or compiles.
"""

from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from polykv.kernels import triton_attend, triton_int8, triton_turboquant, triton_uniform
from polykv.kernels.triton_bits import padded, tile_shape

HOPPER = GPUTarget("cuda", 90, 32)
# Strides that are multiples of 16 at every head_dim here, as Triton finds out when it runs.
ALIGNED = ("stride_b", "stride_h", "stride_t", "k_h", "k_t", "v_h", "split_tokens")
TENSORS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def compile_kernel(
    module: ModuleType, name: str, pointers: dict[str, str], constants: dict[str, Any]
) -> None:
    """Arguments that are neither pointers nor constants are int32, or fp32 where they are named a scale."""
    kernel, constants = getattr(module, name), dict(constants)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in pointers:
            signature[argument] = "*" + pointers[argument]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            is_float = argument in ("k_factor", "matrix_scale", "root_dim", "step_of_top")
            signature[argument] = "fp32" if is_float else "i32"
            if argument in ALIGNED:
                attributes[(position,)] = [["tt.divisibility", 16]]
    positions = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=positions, attrs=attributes)
    compiled = triton.compile(source, target=HOPPER, options=options)
    about = {key: value for key, value in constants.items() if key not in ("PAD", "ROWS")}
    print(module.__name__, name, *pointers.values(), about, "shared", compiled.metadata.shared)


def main() -> None:
    for dim, dtype, widths in ((128, "bf16", (2, 3, 4)), (80, "fp32", (3,))):
        for bits in widths:
            tile = tile_shape(dim) | {"BITS": bits}
            pointers = {"codes": "u8", "norm": "fp16"}
            encode = {"x": dtype, "matrix": "bf16", "boundaries": "fp32"}
            compile_kernel(
                triton_turboquant, "_encode", encode | pointers, tile | {"num_stages": 2}
            )
            compile_kernel(
                triton_turboquant, "_decode", pointers | {"levels": "fp32", "out": "fp32"}, tile
            )
        for shared_by in ("tensor", "block"):
            tile = tile_shape(dim) | {"SHARED_BY": shared_by}
            pointers = {"codes": "i8", "scale": "fp32" if shared_by == "tensor" else "fp16"}
            given = {"x": dtype, "top": "i32"}
            compile_kernel(triton_int8, "_encode", given | pointers, tile)
            compile_kernel(triton_int8, "_decode", pointers | {"out": "fp32"}, tile)
        compile_kernel(triton_int8, "_absmax", {"x": dtype, "top": "i32"}, tile_shape(dim))
        merge = {
            "parts": "fp32",
            "part_lse": "fp32",
            "matrix": "bf16",
            "out": "fp32",
            "lse": "fp32",
        }
        size = {"DIM": dim, "PAD": padded(dim)}
        compile_kernel(
            triton_attend, "_merge_splits", merge, size | {"ROWS": triton_attend.MERGED_ROWS}
        )
    for bits in (2, 4, 8):
        tile = tile_shape(128) | {"BITS": bits, "BLOCKS": 2}
        pointers = {"codes": "u8", "scale": "fp16"}
        compile_kernel(triton_uniform, "_encode", {"x": "bf16"} | pointers, tile)
        compile_kernel(triton_uniform, "_decode", pointers | {"out": "fp32"}, tile)
    attends = (
        (128, "bf16", 60, "tensor", 8, 3), (64, "bf16", 200, "token", 8, 2), (80, "bf16", 4, "block", 8, 4),
        (128, "fp32", 60, "turboquant", 4, 4),
    )  # fmt: skip
    for dim, dtype, n_queries, keys, key_bits, value_bits in attends:
        launch = triton_attend.Launch.of(n_queries, dim, TENSORS[dtype])
        table = "fp32" if dtype == "fp32" else "i32"
        pointers = {
            "q": dtype, "k_codes": "u8" if keys == "turboquant" else "i8", "k_levels": table,
            "k_scale": "fp32" if keys == "tensor" else "fp16", "v_codes": "u8", "v_norm": "fp16",
            "v_levels": table, "out": "fp32", "lse": "fp32",
        }  # fmt: skip
        constants = {
            "DIM": dim, "PAD": padded(dim), "KEYS": keys, "K_BITS": key_bits, "V_BITS": value_bits,
            "QUERIES": launch.queries, "TOKENS": launch.tokens, "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
        }  # fmt: skip
        compile_kernel(triton_attend, "_attend_splits", pointers, constants)


if __name__ == "__main__":
    main()
