"""Attention for a CascadeCache, registered with transformers: agents read a pool in place.

    cache = pool.reader(n_agents)
    with attend_in_place(model):
        model.generate(ids, attention_mask=mask, past_key_values=cache, ...)

`ids` and `mask` (n_agents, pool.n_tokens + query tokens) cover the whole sequence. The ids of the prefix are never
read, and its part of `mask` is ones. Queries are padded on the left. For another turn, pass the same cache and the
sequences so far, with zeros in `mask` at every padding token and after an agent's end token. No model is patched:
transformers calls the two functions registered below.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from polykv.attention.layers import CascadeLayer, QuantizedSuffixLayer
from polykv.attention.mask import cascade_mask, checked_mask
from polykv.attention.prefix import attend_prefix
from polykv.attention.scratch import scratch
from polykv.attention.softmax import with_sinks
from polykv.attention.suffix import attend_suffix
from polykv.codecs.base import FP16_MAX
from polykv.errors import PolyKVError
from polykv.kernels import TORCH
from polykv.probe import UNSUPPORTED
from polykv.segment import Segment
from polykv.supported import check_attention

VERSION = 1  # of attention in place, with softmax.py, prefix.py and suffix.py
NAME = "polykv_cascade"
# Implementations that read unshared caches the same way inside and outside `attend_in_place`.
SWITCHED = ("sdpa", NAME)
# Long queries are split into blocks of this many bytes of fp32 queries on a CPU (see `scratch`); attention to a block
# takes about six times as much memory.
QUERY_BYTES = 2 << 20


def cascade_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' AttentionInterface; sdpa's result where the cache is not a CascadeCache.

    `query` is (B, heads, query tokens, D); `key` and `value` (B, kv_heads, suffix tokens, D) come from
    `CascadeLayer.update`. `softcap` limits the scores, and `s_aux` (heads,) are attention sinks (softmax.py). Returns
    (B, query tokens, heads, D) in the query's dtype, and no attention weights.

    Raises:
        PolyKVError: dropout, gradients or attention weights are requested, the attention is not softmax(qk)v, or the
            layer's window is not that of the cache.
    """
    layer: CascadeLayer | None = getattr(key, "cascade_layer", None)
    if layer is None and softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _check_request(module, query, dropout, kwargs)
    window = kwargs.get("sliding_window")
    attention_mask = checked_mask(attention_mask, module, query, key, layer, window)
    if layer is not None:
        layer.n_unseen = getattr(attention_mask, "n_unseen", 0)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    batch, heads, n_queries, dim = query.shape
    sink_HG = None if s_aux is None else s_aux.unflatten(0, (key.shape[1], -1))
    out_BQHD = query.new_empty(batch, n_queries, heads, dim)
    block = max(scratch(QUERY_BYTES, query.device) // (batch * heads * dim * 4), 1)
    for start in range(0, n_queries, block):
        part = slice(start, start + block)
        mask = attention_mask[:, :, part]
        out_BQHD[:, part] = _attend(
            query[:, :, part], key, value, mask, layer, scaling, softcap, sink_HG
        )
    if layer is not None:
        layer.awaits_attention = False
    return out_BQHD, None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    layer: CascadeLayer | None,
    scaling: float,
    softcap: float | None,
    sink_HG: Tensor | None,
) -> Tensor:
    """Attention output (B, query tokens, heads, D) of a block of query tokens, in fp32."""
    batch, heads, n_queries, _ = query.shape
    group = heads // key.shape[1]
    # Rows are (query token, query head of the group); for the prefix the rows of all agents are stacked.
    q_BHRD = query.unflatten(1, (-1, group)).transpose(2, 3).flatten(2, 3)
    n_masked = mask.shape[3] - key.shape[2]
    shared, backend = None, TORCH
    if layer is not None:
        seen_QT = None
        if layer.is_sliding:
            seen_QT = mask[:, 0, :, :n_masked].flatten(0, 1).repeat_interleave(group, 0)
            seen_QT = seen_QT if layer.order is None else seen_QT[:, layer.order]
        shared = _attend_shared(q_BHRD, layer, scaling, seen_QT, softcap)
        backend = layer.backend
    own = layer.own(key, value) if layer is not None else Segment.uncompressed(key, value)
    scaled_BHRD = q_BHRD if layer is None else layer.scale_queries(q_BHRD)
    done = attend_suffix(scaled_BHRD, own, mask[..., n_masked:], scaling, softcap, shared, backend)
    if query.dtype == torch.float16 and isinstance(layer, QuantizedSuffixLayer):
        done[0].clamp_(-FP16_MAX, FP16_MAX)  # as Codec.decode does
    out_BHRD = with_sinks(*done, sink_HG)
    return out_BHRD.unflatten(2, (n_queries, group)).permute(0, 2, 1, 3, 4).flatten(2, 3)


def _attend_shared(
    q_BHRD: Tensor,
    layer: CascadeLayer,
    scaling: float,
    seen_QT: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, R, D) and log-sum-exp (B, H, R) of attention to the prefix alone."""
    batch = q_BHRD.shape[0]
    q_HQD = q_BHRD.transpose(0, 1).flatten(1, 2).contiguous()
    out_HQD, lse_HQ = attend_prefix(q_HQD, layer.segments, scaling, layer.backend, seen_QT, softcap)
    if q_BHRD.dtype == torch.float16:  # as Codec.decode does; uncompressed suffixes are not clamped
        out_HQD.clamp_(-FP16_MAX, FP16_MAX)
    return (
        out_HQD.unflatten(1, (batch, -1)).transpose(0, 1),
        lse_HQ.unflatten(1, (batch, -1)).transpose(0, 1),
    )


def _check_request(
    module: nn.Module, query: Tensor, dropout: float, kwargs: dict[str, Any]
) -> None:
    for option, what in UNSUPPORTED.items():
        if kwargs.get(option) is not None:
            raise PolyKVError(
                f"{type(module).__name__} {what}; use reader=dequantize for this model"
            )
    if kwargs.get("output_attentions"):
        raise PolyKVError("attention in place returns no attention weights; drop output_attentions")
    if dropout > 0:
        raise PolyKVError("a pool is read without attention dropout; call model.eval() first")
    if torch.is_grad_enabled() and query.requires_grad:
        raise PolyKVError("no gradients pass through a pool; read it under torch.no_grad()")


AttentionInterface.register(NAME, cascade_attention)
AttentionMaskInterface.register(NAME, cascade_mask)


@dataclass
class _Use:
    """Which threads use a model at the moment, and how."""

    own: str  # the attention implementation it was loaded with
    in_place: list[int] = field(default_factory=list)  # ids of the threads in `attend_in_place`
    unshared: int = (
        0  # reads of unshared caches in progress that a switch of implementation would break
    )


_lock = Lock()
_uses: WeakKeyDictionary[PreTrainedModel, _Use] = WeakKeyDictionary()


@contextmanager
def attend_in_place(model: PreTrainedModel) -> Iterator[None]:
    """Context in which the model attends to CascadeCaches in place and reads other caches with sdpa.

    Reentrant and shared between threads: the first to enter sets the model's attention implementation, the last to
    leave restores it. Meanwhile other threads may read unshared caches if the model's own implementation is sdpa,
    which gives the same results either way; for any other implementation see `read_unshared`.

    Raises:
        PolyKVError: the model's attention is not plain or cannot be replaced, or another thread is using it.
    """
    with _lock:
        use = _use_of(model)
        if not use.in_place:
            if use.unshared:
                raise PolyKVError(_not_now(model, use))
            check_attention(model.config, "use reader=dequantize")
            model.set_attn_implementation(NAME)
        use.in_place.append(get_ident())
    try:
        yield
    finally:
        with _lock:
            use.in_place.remove(get_ident())
            if not use.in_place:
                model.set_attn_implementation(use.own)


@contextmanager
def read_unshared(model: PreTrainedModel) -> Iterator[None]:
    """Context in which this thread reads unshared caches and no other thread may switch the model's attention.

    A switch during a forward pass would pair one implementation's mask with another's scores. Between sdpa and
    in-place attention that is harmless; a model with any other implementation is read in one mode at a time.

    Raises:
        PolyKVError: other threads attend in place and the model's own attention is not sdpa.
    """
    with _lock:
        use = _use_of(model)
        counted = use.own not in SWITCHED and get_ident() not in use.in_place
        if counted and use.in_place:
            raise PolyKVError(_not_now(model, use))
        use.unshared += counted
    try:
        yield
    finally:
        with _lock:
            use.unshared -= counted


def _use_of(model: PreTrainedModel) -> _Use:
    use = _uses.setdefault(model, _Use(own=""))
    if not use.in_place:
        use.own = model.config._attn_implementation
    return use


def _not_now(model: PreTrainedModel, use: _Use) -> str:
    return (
        f"{type(model).__name__} attends with {use.own}, which cannot be switched while other threads use it; "
        "run the read modes dequantize and in_place one after the other, or load it with attn_implementation=sdpa"
    )
