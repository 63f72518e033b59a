"""Agents that read a pool in place: the attention that goes with a CascadeCache, registered with transformers.

    cache = pool.reader(n_agents)
    with attend_in_place(model):
        model.generate(ids, attention_mask=mask, past_key_values=cache, ...)

`ids` and `mask` (n_agents, pool.n_tokens + query tokens) stand for the whole sequence: what `ids` say of the
prefix is never read, and its part of `mask` is ones. Queries are padded on the left. For a further turn, pass
the same cache and the sequences so far, with zeros in `mask` at every padding token and after an agent's end.
No model is patched: transformers calls the two functions that are registered below.
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
from transformers.masking_utils import sdpa_mask

from polykv.attention.cache import CascadeLayer
from polykv.attention.prefix import attend_prefix
from polykv.attention.scratch import scratch
from polykv.attention.softmax import merge
from polykv.attention.suffix import attend_suffix
from polykv.codecs.base import FP16_MAX
from polykv.errors import PolyKVError
from polykv.probe import UNSUPPORTED
from polykv.supported import check_attention, check_rope

VERSION = 1  # of attention in place, with softmax.py, prefix.py and suffix.py
NAME = "polykv_cascade"
# Attention that reads other caches alike in `attend_in_place` and out of it.
SWITCHED = ("sdpa", NAME)
# A long query is taken in blocks of so many bytes of fp32 queries (on a CPU: `scratch`); an attention holds about
# six times that.
QUERY_BYTES = 2 << 20


def cascade_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' AttentionInterface has it; plain sdpa where the cache is no CascadeCache.

    `query` is (B, heads, query tokens, D), `key` and `value` (B, kv_heads, tokens, D) come from
    `CascadeLayer.update`; the output is (B, query tokens, heads, D) in the query's dtype.

    Raises:
        PolyKVError: dropout, gradients, attention weights, or an attention that is not plain.
    """
    layer: CascadeLayer | None = getattr(key, "cascade_layer", None)
    if layer is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _check_request(module, query, dropout, kwargs)
    if config := getattr(module, "config", None):
        check_rope(config, layer.n_prefix, layer.get_seq_length(), "this query")
    if attention_mask is None or attention_mask.shape[2:] != (query.shape[2], key.shape[2]):
        raise PolyKVError(
            "a pool cannot be read with a mask of your own in 4 dimensions; give attention_mask as "
            "(agents, tokens)"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    batch, heads, n_queries, dim = query.shape
    out_BQHD = query.new_empty(batch, n_queries, heads, dim)
    block = max(scratch(QUERY_BYTES, query.device) // (batch * heads * dim * 4), 1)
    for start in range(0, n_queries, block):
        part = slice(start, start + block)
        out_BQHD[:, part] = _attend(
            query[:, :, part], key, value, attention_mask[:, :, part], layer, scaling
        )
    layer.awaits_attention = False
    return out_BQHD, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, layer: CascadeLayer, scaling: float
) -> Tensor:
    """The output (B, query tokens, heads, D) in fp32 of a block of query tokens."""
    batch, heads, n_queries, _ = query.shape
    group = heads // key.shape[1]
    # Rows: query tokens times the query heads of a group. For the prefix all agents' rows are stacked.
    q_BHRD = query.unflatten(1, (-1, group)).transpose(2, 3).flatten(2, 3)
    q_HQD = q_BHRD.transpose(0, 1).flatten(1, 2).contiguous()
    out_HQD, lse_HQ = attend_prefix(q_HQD, layer.segments, scaling, layer.backend)
    if (
        query.dtype == torch.float16
    ):  # as decode does; what the agents' own tokens give is left alone
        out_HQD.clamp_(-FP16_MAX, FP16_MAX)
    shared = (
        out_HQD.unflatten(1, (batch, -1)).transpose(0, 1),
        lse_HQ.unflatten(1, (batch, -1)).transpose(0, 1),
    )
    own = attend_suffix(q_BHRD, key, value, mask, scaling)
    out_BHRD, _ = merge(own, shared)
    return out_BHRD.unflatten(2, (n_queries, group)).permute(0, 2, 1, 3, 4).flatten(2, 3)


def _check_request(
    module: nn.Module, query: Tensor, dropout: float, kwargs: dict[str, Any]
) -> None:
    for option, what in UNSUPPORTED.items():
        if kwargs.get(option) is not None:
            raise PolyKVError(
                f"{type(module).__name__} {what}; use reader=dequantize for this model"
            )
    if kwargs.get("output_attentions"):
        raise PolyKVError(
            "attention to a pool in place has no weights to show; drop output_attentions"
        )
    if dropout > 0:
        raise PolyKVError("a pool is read without attention dropout; call model.eval() first")
    if torch.is_grad_enabled() and query.requires_grad:
        raise PolyKVError("no gradients pass through a pool; read it under torch.no_grad()")


def cascade_mask(
    *args: Any, kv_offset: int = 0, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """The boolean mask (B, 1, query tokens, suffix tokens) of a CascadeCache; sdpa's for any other cache.

    Raises:
        PolyKVError: the attention mask hides a part of the prefix.
    """
    # Only a prefix that the mask leaves out sets an offset; the models that a pool takes have no sliding windows.
    if kv_offset:
        if attention_mask is not None and not attention_mask[:, :kv_offset].all():
            raise PolyKVError(
                f"attention_mask hides some of the pool's {kv_offset} tokens; put ones there, and the "
                "padding between the pool and the query"
            )
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, kv_offset=kv_offset, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, cascade_attention)
AttentionMaskInterface.register(NAME, cascade_mask)


@dataclass
class _Use:
    """Who runs a model just now: threads in `attend_in_place`, and reads that its attention must outlast."""

    own: str  # the attention that it was loaded with
    in_place: list[int] = field(default_factory=list)
    unshared: int = 0


_lock = Lock()
_uses: WeakKeyDictionary[PreTrainedModel, _Use] = WeakKeyDictionary()


@contextmanager
def attend_in_place(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model attends to CascadeCaches in place; other caches are read with sdpa.

    Any number of threads may be in here; the model's attention implementation is set with the first and restored
    with the last of them. Threads outside may go on reading caches of their own if that implementation is sdpa,
    which reads them the same either way; with any other, see `read_unshared`.

    Raises:
        PolyKVError: the model's attention is not plain or not to be chosen, or not just now.
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
    """Within it the model reads caches of this thread's own, and no other thread switches its attention.

    A switch in the middle of a forward pass would pair one implementation's mask with another's scores. Between
    sdpa and in place it does no harm; a model of any other attention is read one way at a time.

    Raises:
        PolyKVError: other threads attend in place, and the model's own attention is not sdpa.
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
        f"{type(model).__name__} attends with {use.own}, which cannot be switched while threads read with "
        "it; let those that inject and those that read in place take turns, or load it with "
        "attn_implementation=sdpa"
    )
