"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the matrices of a transformer.

Written out because `torch.optim.Muon` works matrix by matrix in bfloat16, which is slow on a CPU:
here matrices of one shape are orthogonalised in one batch, in float32 on a CPU.
"""

from collections import defaultdict

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(g_NRC: Tensor, steps: int = 5) -> Tensor:
    """Bring all singular values of each matrix near 1 by a quintic Newton-Schulz iteration."""
    a, b, c = NEWTON_SCHULZ
    x_NRC = g_NRC.bfloat16() if g_NRC.is_cuda else g_NRC
    wide = x_NRC.shape[-2] <= x_NRC.shape[-1]
    x_NRC = x_NRC if wide else x_NRC.mT
    x_NRC = x_NRC / (x_NRC.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram_NRR = x_NRC @ x_NRC.mT
        x_NRC = a * x_NRC + (b * gram_NRR + c * gram_NRR @ gram_NRR) @ x_NRC
    return (x_NRC if wide else x_NRC.mT).to(g_NRC.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; updates have the RMS of 0.2 that suits Adam's rates."""

    def __init__(
        self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for param in group["params"]:
                by_shape[param.shape].append(param)
            for shape, params in by_shape.items():
                updates = torch.stack([self._momentum(p, group["momentum"]) for p in params])
                scale = 0.2 * max(shape) ** 0.5 * group["lr"]
                for param, update in zip(params, orthogonalize(updates), strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(update, alpha=-scale)

    def _momentum(self, param: Tensor, momentum: float) -> Tensor:
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
        buffer = state["momentum"].lerp_(param.grad, 1 - momentum)
        return param.grad.lerp(buffer, momentum)
