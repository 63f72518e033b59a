"""Linear layers of models on a CPU, computed by oneDNN where that is faster than PyTorch's own choice.

- fp32, on AMD's processors with AVX-512: PyTorch computes these with MKL, which does not use AVX-512 there. oneDNN
  takes a half to a third of the time (docs/log.md).
- bfloat16, on processors that multiply in it: PyTorch uses oneDNN, with weights as they are in memory. Weights in
  oneDNN's own arrangement make one row 1.4 to 2.3 times as fast, 16 rows 1.3 to 1.6 times, and give the same results to
  the bit.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 16  # the number of rows that the arrangement is chosen for


class OneDnnLinear(nn.Linear):
    """nn.Linear whose fp32 products on the CPU are oneDNN's, unless gradients are recorded."""

    def forward(self, input: Tensor) -> Tensor:
        own = input.is_cpu and self.weight.dtype == torch.float32 and not _left(self, input)
        return _product(self, input) if own else super().forward(input)


class PackedLinear(nn.Linear):
    """nn.Linear whose weight is kept as oneDNN arranges it: in as many bytes, and readable only by `to_dense()`.

    Its state dict has the dense weight, unless `keep_vars` is set. Moved or converted (`to`), copied, pickled, or given
    other weights, it becomes an nn.Linear again.
    """

    def forward(self, input: Tensor) -> Tensor:
        if _left(self, input):
            return F.linear(input, self.weight.to_dense(), self.bias)
        return _product(self, input)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[f"{prefix}weight"] = self.weight.to_dense()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._unpack()
        return self._apply(fn, recurse)

    def _load_from_state_dict(self, *loaded: Any) -> None:
        self._unpack()
        self._load_from_state_dict(*loaded)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._unpack()
        return self.__reduce_ex__(protocol)

    def _unpack(self) -> None:
        kept = self.weight
        self.weight = nn.Parameter(kept.to_dense().detach(), requires_grad=kept.requires_grad)
        self.__class__ = nn.Linear  # type: ignore[assignment]


def _left(layer: nn.Linear, input: Tensor) -> bool:
    """Whether a product is left to PyTorch: gradients are recorded, a dtype is converted, or there are no rows."""
    tensors = (input, layer.weight, layer.bias)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    converted = input.dtype != layer.weight.dtype or torch.is_autocast_enabled("cpu")
    return recorded or converted or not input.numel()


def _product(layer: nn.Linear, input: Tensor) -> Tensor:
    # Rows that are not contiguous take oneDNN far longer than their copy.
    rows = input.contiguous()
    return torch.ops.mkldnn._linear_pointwise(rows, layer.weight, layer.bias, "none", [], "")


def with_onednn(model: nn.Module) -> None:
    """Let oneDNN compute the linear layers of a model on this CPU where it gains. Packed weights get no gradients."""
    if not torch.backends.mkldnn.is_available():
        return
    fp32, bfloat16 = _gains()
    shared = _shared(model)
    for module in model.modules():
        # A subclass of either may compute something else.
        if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
            continue
        weight = module.weight
        packable = bfloat16 and weight.is_cpu and id(weight) not in shared
        if weight.dtype == torch.float32 and fp32:
            module.__class__ = OneDnnLinear
        elif weight.dtype == torch.bfloat16 and packable:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
            module.weight = nn.Parameter(packed, requires_grad=False)
            module.__class__ = PackedLinear


def _shared(model: nn.Module) -> set[int]:
    """The ids of parameters that several modules have, such as an embedding table that is also the output layer."""
    held = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    return {key for key, times in held.items() if times > 1}


def _gains() -> tuple[bool, bool]:
    """Whether this processor gains in fp32, and in bfloat16."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False, False
    bfloat16 = "avx512_bf16" in told and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "AuthenticAMD" in told and "avx512f" in told, bfloat16
