"""The size of attention's temporary buffers."""

import torch

# A block sized for a CPU's caches (about a millisecond of work) is too small to amortise a kernel launch on a GPU.
GPU_TIMES = 32


def scratch(n_bytes: int, device: torch.device) -> int:
    """`n_bytes` on a CPU, GPU_TIMES as much on a GPU."""
    return n_bytes if device.type == "cpu" else n_bytes * GPU_TIMES
