"""Observation of a model's attention: a callback sees the queries and keys of every layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "polykv_observed"
_lock = Lock()  # transformers' registry of attention functions is global


@contextmanager
def observe(
    model: PreTrainedModel, see: Callable[[nn.Module, Tensor, Tensor, float], None]
) -> Iterator[None]:
    """Context in which the model attends with SDPA, calling `see(module, query, key, scaling)` in every layer.

    `query` is (batch, heads, query tokens, head_dim), `key` (batch, kv_heads, tokens, head_dim). One thread at a time
    may enter; forward passes of other threads meanwhile are not observed.
    """
    thread = get_ident()

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **options: Any
    ) -> tuple[Tensor, None]:
        if get_ident() == thread:
            see(module, query, key, options.get("scaling") or query.shape[-1] ** -0.5)
        return sdpa_attention_forward(module, query, key, *rest, **options)

    with _lock:
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        before = model.config._attn_implementation
        model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            model.set_attn_implementation(before)
