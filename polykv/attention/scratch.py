"""How much memory attention works in at a time."""

import torch

# Work that keeps a CPU core busy for a millisecond, and its caches warm, is done on a GPU before the next launch.
GPU_TIMES = 32


def scratch(n_bytes: int, device: torch.device) -> int:
    """`n_bytes` on a CPU; on a GPU so many times that as make a launch worth its time."""
    return n_bytes if device.type == "cpu" else n_bytes * GPU_TIMES
