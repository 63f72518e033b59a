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
TENSORS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
            triton_attend,
            "_merge_splits",
            merge,
            size | {"ROWS": triton_attend.MERGED_ROWS, "ROTATED": dim == 128},
        )
    for bits in (2, 4, 8):
        tile = tile_shape(128) | {"BITS": bits, "BLOCKS": 2}
        pointers = {"codes": "u8", "scale": "fp16"}
        compile_kernel(triton_uniform, "_encode", {"x": "bf16"} | pointers, tile)
        compile_kernel(triton_uniform, "_decode", pointers | {"out": "fp32"}, tile)
    # head_dim, queries, their dtype; of keys and values: kind, bits, block.
    attends = (
        (128, 60, "bf16", ("tensor", 8, 1), ("token", 3, 1)), (64, 200, "bf16", ("token", 8, 1), ("token", 2, 1)),
        (80, 4, "bf16", ("block", 8, 32), ("token", 4, 1)), (128, 60, "fp32", ("token", 4, 1), ("token", 4, 1)),
        (128, 64, "bf16", ("block", 4, 64), ("block", 2, 64)), (128, 64, "bf16", ("exact", 16, 1), ("block", 8, 64)),
        (64, 16, "fp16", ("block", 2, 32), ("exact", 16, 1)),
    )  # fmt: skip
    for dim, n_queries, dtype, (keys, key_bits, key_block), (
        values,
        value_bits,
        value_block,
    ) in attends:
        launch = triton_attend.Launch.of(n_queries, dim, TENSORS[dtype])
        table = "fp32" if dtype == "fp32" else "i32"
        int8 = (keys, key_bits) in (("tensor", 8), ("token", 8), ("block", 8))
        pointers = {
            "q": dtype, "k_codes": dtype if keys == "exact" else "i8" if int8 else "u8", "k_levels": table,
            "k_scale": "fp32" if keys == "tensor" else "fp16", "v_codes": dtype if values == "exact" else "u8",
            "v_scale": "fp16", "v_levels": table, "out": "fp32", "lse": "fp32",
        }  # fmt: skip
        constants = {
            "DIM": dim, "PAD": padded(dim), "KEYS": keys, "K_BITS": key_bits, "K_BLOCK": key_block,
            "VALUES": values, "V_BITS": value_bits, "V_BLOCK": value_block, "QUERIES": launch.queries,
            "TOKENS": launch.tokens, "num_warps": launch.num_warps, "num_stages": launch.num_stages,
        }  # fmt: skip
        compile_kernel(triton_attend, "_attend_splits", pointers, constants)


if __name__ == "__main__":
    main()
