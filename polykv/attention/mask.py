"""Masks of attention in place: which tokens of its suffix, and of the pool where a layer has a window, a query sees."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask

from polykv.attention.layers import CascadeLayer, PrefixOffset
from polykv.errors import PolyKVError
from polykv.supported import check_rope


def cascade_mask(
    *args: Any,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    mask_function: Callable = causal_mask_function,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Boolean mask (B, 1, query tokens, tokens) for a CascadeCache (`checked_mask`); sdpa's mask for any other cache.

    `local_size` is the window of sliding-window layers. Their windows count an agent's tokens here, where sdpa's mask
    counts the padding between pool and query as well.

    Raises:
        PolyKVError: the attention mask hides a part of the prefix, or tokens that a state would read, or lets a query
            see what the cache has dropped.
    """
    kwargs |= {"kv_offset": kv_offset, "attention_mask": attention_mask, "local_size": local_size}
    if not isinstance(kv_offset, PrefixOffset):
        return sdpa_mask(*args, mask_function=mask_function, **kwargs)
    if attention_mask is not None:
        n_prefix = kv_offset.n_prefix
        if not attention_mask[:, :n_prefix].all():
            raise PolyKVError(
                f"attention_mask hides some of the pool's {n_prefix} tokens; set them to 1, and put the "
                "padding between the pool and the query"
            )
        if kv_offset.beside_states and not attention_mask[:, n_prefix:].all():
            raise PolyKVError(
                "attention_mask hides tokens after the pool, which the states of other layers would read; give queries "
                "of one length, and sequences without tokens after an end"
            )
        if local_size is not None:
            mask_function = _by_token(mask_function, attention_mask)
    kwargs["allow_is_causal_skip"] = False
    mask: Any = sdpa_mask(*args, mask_function=mask_function, **kwargs)
    n_masked = kv_offset.n_prefix - kv_offset
    if kv_offset.n_dropped:
        mask = _without(mask, n_masked, n_masked + kv_offset.n_dropped)
    mask.window, mask.n_unseen = local_size, 0
    if local_size is not None and mask.shape[-1] - n_masked > local_size:
        # Windows only move forward: what the last query does not see, no later one will.
        mask.n_unseen = int(mask[:, 0, -1, n_masked:].any(0).int().argmax())
    return mask


def _without(mask_B1QT: Tensor, start: int, stop: int) -> Tensor:
    """The mask without the columns of tokens that the cache has dropped; raises PolyKVError if a query sees one."""
    if mask_B1QT[..., start:stop].any():
        raise PolyKVError(
            "agents would see tokens of their own that had left their windows and were dropped: since then the cache "
            "was cropped, or attention_mask hides more; give a new reader the sequences from the pool on"
        )
    return torch.cat([mask_B1QT[..., :start], mask_B1QT[..., stop:]], -1)


def _by_token(mask_function: Callable, attention_mask: Tensor) -> Callable:
    """A mask function of columns that applies `mask_function` to the numbers of the tokens in them."""
    positions_BT = attention_mask.long().cumsum(-1) - 1

    def of_columns(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_function(batch, head, positions_BT[batch, query], positions_BT[batch, key])

    return of_columns


def checked_mask(
    mask: Tensor | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    layer: CascadeLayer | None,
    sliding_window: int | None,
) -> Tensor:
    """The mask (B, 1, query tokens, tokens) of the suffix, and before it of the prefix where the layer has a window.

    Raises:
        PolyKVError: it is not the one that `cascade_mask` makes for the layer.
    """
    n_queries, n_tokens = query.shape[2], key.shape[2]
    if layer is None:
        # None stands for causal attention (sdpa_mask).
        shape = (query.shape[0], 1, n_queries, n_tokens)
        full = torch.ones(shape, dtype=torch.bool, device=query.device)
        return full.tril(n_tokens - n_queries) if mask is None else mask
    if config := getattr(module, "config", None):
        check_rope(config, layer.n_prefix, layer.get_seq_length(), "this query")
    if mask is None or mask.shape[2:] != (n_queries, layer.n_masked + n_tokens):
        raise PolyKVError(
            "a pool cannot be read with a custom 4-D mask; give attention_mask as (agents, tokens)"
        )
    for window in (getattr(mask, "window", None), sliding_window or layer.window):
        if window == layer.window:
            continue
        raise PolyKVError(
            f"{type(module).__name__} has a sliding window of {window} tokens, and the layer of the pool one of "
            f"{layer.window}; read a pool with the model that wrote it, and make it of a cache from "
            "polykv.prefill.prefill or DynamicCache(config=model.config)"
        )
    return mask
