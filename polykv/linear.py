"""Linear layers of models in fp32 on AMD's processors with AVX-512, computed by oneDNN.

PyTorch computes them with MKL, which does not use the AVX-512 of AMD's processors. oneDNN, which PyTorch has too and
uses for bfloat16, takes a half to a third of the time (docs/log.md).
"""

from pathlib import Path

import torch
from torch import Tensor, nn


class OneDnnLinear(nn.Linear):
    """nn.Linear whose fp32 products on the CPU are oneDNN's, unless gradients are recorded."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        own = input.is_cpu and input.dtype == weight.dtype == torch.float32 and input.numel()
        own = own and not torch.is_autocast_enabled("cpu")
        recorded = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        if not own or recorded:
            return super().forward(input)
        # Rows that are not contiguous take oneDNN far longer than their copy.
        rows = input.contiguous()
        return torch.ops.mkldnn._linear_pointwise(rows, weight, self.bias, "none", [], "")


def with_onednn(model: nn.Module) -> None:
    """Make the linear layers of a model OneDnnLinear on AMD's processors with AVX-512."""
    if not torch.backends.mkldnn.is_available() or not _gains():
        return
    for module in model.modules():
        # A subclass of either may compute something else.
        if type(module) is nn.Linear and type(module.weight) is nn.Parameter:
            module.__class__ = OneDnnLinear


def _gains() -> bool:
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return "AuthenticAMD" in told and "avx512f" in told
