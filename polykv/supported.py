"""Which caches and models can be pooled or handed on: plain full attention, within the model's positions."""

from typing import Any

from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from polykv.errors import PolyKVError


def check_cache(cache: Cache) -> None:
    """Refuse every cache that is not made of plain full-attention layers.

    Raises:
        PolyKVError: names the first thing that is not supported.
    """
    if isinstance(cache, EncoderDecoderCache):
        raise PolyKVError("encoder-decoder caches cannot be pooled; use a decoder-only model")
    for index, layer in enumerate(cache.layers):
        # Subclasses of DynamicLayer (sliding window, hybrid, quantized) hold something else than all tokens.
        if type(layer) is not DynamicLayer:
            raise PolyKVError(
                f"layer {index} is a {type(layer).__name__}, not full attention with a DynamicCache; "
                "use a model whose layers all attend to every token"
            )
        if layer.get_seq_length() == 0:
            raise PolyKVError(f"layer {index} of the cache is empty; prefill at least one token")
        if layer.keys.shape != layer.values.shape:
            raise PolyKVError(
                f"layer {index} has keys {tuple(layer.keys.shape)} and values "
                f"{tuple(layer.values.shape)} (multi-head latent attention?); "
                "use a model whose keys and values have one shape"
            )


def check_model(model_config: Any) -> None:
    """Refuse architectures whose cache is not plain full attention, before any work.

    Raises:
        PolyKVError: encoder-decoder, latent attention (MLA), sliding-window or hybrid layers.
    """
    name = model_config.model_type
    text_config = model_config.get_text_config(decoder=True)
    if model_config.is_encoder_decoder:
        raise PolyKVError(f"{name} is an encoder-decoder; use a decoder-only model")
    if getattr(text_config, "kv_lora_rank", None):
        raise PolyKVError(
            f"{name} uses latent attention (MLA); use a model with plain keys and values"
        )
    try:
        cache = DynamicCache(config=model_config)
    except Exception as error:
        raise PolyKVError(f"{name} has no cache that transformers can build: {error}") from error
    for index, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            raise PolyKVError(
                f"{name} has a {type(layer).__name__} at layer {index} (sliding-window or hybrid); "
                "use a model whose layers all attend to every token"
            )


def max_positions(model_config: Any) -> int | None:
    """The longest sequence the model takes, or None where its config sets no limit."""
    return getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_length(model_config: Any, n_tokens: int, what: str) -> None:
    """Refuse more tokens than the model has positions.

    Raises:
        PolyKVError: with both numbers.
    """
    limit = max_positions(model_config)
    if limit is not None and n_tokens > limit:
        raise PolyKVError(
            f"{what} needs {n_tokens} positions and {model_config.model_type} has {limit}; "
            "shorten the document or the answer"
        )
