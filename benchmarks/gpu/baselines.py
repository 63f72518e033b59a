"""16-bit attention as torch offers it, in every way that there is: what the fused kernel is held against."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Calls = list[Callable[[], Tensor]]
Cache = tuple[Tensor, Tensor]


def unshared_attentions(q_NHQD: Tensor, caches: Sequence[Cache]) -> dict[str, Calls]:
    """Each agent over its own copy, one call a cache: keys and values (agents, kv_heads, tokens, head_dim).

    Query heads that share a kv head are told to SDPA (`gqa`), or taken as queries of one head (`grouped`).
    """
    n_agents, _, _, dim = q_NHQD.shape
    grouped = q_NHQD.view(n_agents, caches[0][0].shape[1], -1, dim)
    gqa = {"enable_gqa": q_NHQD.shape[1] != grouped.shape[1]}
    found = {}
    for name, backend in _backends(q_NHQD.device).items():
        found[f"{name}, gqa"] = [partial(_sdpa, backend, q_NHQD, *cache, **gqa) for cache in caches]
        found[f"{name}, grouped"] = [partial(_sdpa, backend, grouped, *cache) for cache in caches]
    return found


def shared_attentions(
    q_HQD: Tensor, caches: Sequence[Cache], n_multiprocessors: int
) -> dict[str, Calls]:
    """All agents over one copy, one call a cache: keys and values (1, kv_heads, tokens, head_dim).

    `split` cuts the prefix into parts that count as heads, which keeps the device busy as flash-decoding does, and
    merges them by their log-sum-exp.
    """
    q_BHQD = q_HQD.unsqueeze(0)
    heads, n_tokens = caches[0][0].shape[1:3]
    found = {
        name: [partial(_sdpa, backend, q_BHQD, *cache) for cache in caches]
        for name, backend in _backends(q_HQD.device).items()
    }
    if q_HQD.device.type == "cuda":
        busy = max(2 * n_multiprocessors // heads, 1)
        parts = [n for n in range(2, 2 * busy + 1) if n_tokens % n == 0]
        for n in sorted(parts, key=lambda n: abs(n - busy))[:3]:
            found[f"flash, {n} parts"] = [partial(_split, q_BHQD, *cache, n) for cache in caches]
    return found


def _backends(device: torch.device) -> dict[str, SDPBackend]:
    return BACKENDS if device.type == "cuda" else {"math": SDPBackend.MATH}


def _sdpa(backend: SDPBackend, *inputs: Tensor, **options: bool) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*inputs, **options)


def _split(q_BHQD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, parts: int) -> Tensor:
    heads, dim = k_BHTD.shape[1], k_BHTD.shape[3]
    k, v = (x.view(1, heads * parts, -1, dim) for x in (k_BHTD, v_BHTD))
    q = q_BHQD.repeat_interleave(parts, dim=1)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    weights = lse[..., : q.shape[2]].unflatten(1, (heads, parts)).softmax(dim=2).unsqueeze(-1)
    return (out.unflatten(1, (heads, parts)) * weights).sum(dim=2)
