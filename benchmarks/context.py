"""What codecs may know of the benchmarks' layer, whose keys and queries are N(0, 1)."""

import torch

from polykv.codecs.context import LayerContext, Rope

THETA = 10_000.0  # as in Llama


def of_layer(heads: int, n_tokens: int, dim: int) -> LayerContext:
    """RoPE of all channels in halves, at positions 0 to n_tokens - 1, and the RMS of the queries."""
    half = torch.arange(dim // 2)
    angles_TP = torch.arange(n_tokens).unsqueeze(1) * THETA ** -(half / (dim // 2))
    rope = Rope(angles_TP.cos(), angles_TP.sin(), half, half + dim // 2)
    return LayerContext(rope, torch.ones(1, heads, 1, dim))
