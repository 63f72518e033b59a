"""Checks of which caches and models are supported, by the kinds of their layers, within the model's positions.

tests/test_families.py verifies them on the model families of transformers; docs/families.yaml lists the results.
"""

from collections.abc import Iterator
from typing import Any

from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from polykv.errors import PolyKVError
from polykv.geometry import Geometry
from polykv.probe import kept_tokens, probe
from polykv.recurrent import STATES

# Encoders that transformers can run as decoders. They attend in both directions by default (is_decoder), and most count
# positions from the padding, so that an agent's answer would depend on the other queries.
ENCODERS = {
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr", "xlm-roberta", "xlm-roberta-xl",
    "xmod",
}  # fmt: skip
# Distances between tokens (ALiBi, windows of some layers) include the padding of shorter queries.
COUNT_PADDING = {"gpt_neo", "mpt"}
LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def check_cache(cache: Cache) -> None:
    """Check that a cache consists of layers of full or sliding-window attention that have seen the same tokens, and of
    layers with a state.

    Raises:
        PolyKVError: names the first layer that is not supported.
    """
    if isinstance(cache, EncoderDecoderCache):
        raise PolyKVError("encoder-decoder caches cannot be pooled; use a decoder-only model")
    for index, layer in enumerate(cache.layers):
        # Other subclasses of DynamicLayer (hybrid, quantized) do not hold tokens as they are.
        if type(layer) not in LAYERS + STATES:
            raise PolyKVError(
                f"layer {index} is a {type(layer).__name__}, not full, sliding-window or linear attention with a "
                "DynamicCache; use a model all of whose layers are"
            )
        if type(layer) in STATES:
            if type(layer) is not DummyLayer and not all(layer.has_previous_state.values()):
                raise PolyKVError(
                    f"layer {index} of the cache has no state; prefill at least one token"
                )
            continue
        n_tokens = layer.get_seq_length()
        if n_tokens == 0:
            raise PolyKVError(f"layer {index} of the cache is empty; prefill at least one token")
        if n_tokens != cache.get_seq_length() or layer.keys.shape[2] < kept_tokens(
            n_tokens, window_of(layer)
        ):
            raise PolyKVError(
                f"layer {index} of the cache has seen {n_tokens} tokens and holds {layer.keys.shape[2]}, and layer 0 "
                f"has seen {cache.get_seq_length()}; prefill all layers with the same tokens"
            )
        if layer.keys.shape != layer.values.shape:
            raise PolyKVError(
                f"layer {index} has keys {tuple(layer.keys.shape)} and values "
                f"{tuple(layer.values.shape)} (multi-head latent attention?); "
                "use a model whose keys and values have one shape"
            )
    if cache.layers and not any(type(layer) in LAYERS for layer in cache.layers):
        raise PolyKVError(_nothing_to_compress("the cache"))


def _nothing_to_compress(what: str) -> str:
    return f"{what} has no layer of attention, and so nothing to compress; use a model with some"


def window_of(layer: Any) -> int | None:
    """The window of a cache's layer; None for full attention and for a layer with a state."""
    return getattr(layer, "sliding_window", None)


def check_model(model_config: Any) -> None:
    """Check that an architecture's cache is that of full or sliding-window attention, with or without states.

    Raises:
        PolyKVError: encoders, encoder-decoders, latent attention (MLA), attention within chunks, layers of two kinds at
            once, states from which the model does not continue, no attention at all, layers that share a cache, or
            layers that do not store every token's keys and values.
    """
    name = model_config.model_type
    text_config = model_config.get_text_config(decoder=True)
    if model_config.is_encoder_decoder or text_config.model_type in ENCODERS:
        kind = "encoder-decoder" if model_config.is_encoder_decoder else "encoder"
        raise PolyKVError(f"{name} is an {kind}; use a decoder-only model")
    try:
        cache = DynamicCache(config=model_config)
    except Exception as error:
        raise PolyKVError(f"{name} has no cache that transformers can build: {error}") from error
    for index, layer in enumerate(cache.layers):
        if type(layer) not in LAYERS + STATES:
            raise PolyKVError(
                f"{name} has a {type(layer).__name__} at layer {index} (two kinds of attention at once, or an index); "
                "use a model each of whose layers has full, sliding-window or linear attention"
            )
    if not any(type(layer) in LAYERS for layer in cache.layers):
        raise PolyKVError(_nothing_to_compress(name))
    # transformers caches attention within chunks as it does sliding windows.
    if "chunked_attention" in (getattr(text_config, "layer_types", None) or ()) or getattr(
        text_config, "attention_chunk_size", None
    ):
        raise PolyKVError(
            f"{name} attends within chunks of tokens; use a model with full or sliding-window attention"
        )
    windows = {window_of(layer) for layer in cache.layers} - {None}
    # transformers makes one mask for all windowed layers, and caches everything where a window is 1.
    if len(windows) > 1 or min(windows, default=2) < 2:
        raise PolyKVError(
            f"{name} has sliding windows of {sorted(windows)} tokens; use a model with one window, of 2 tokens or more"
        )
    if getattr(text_config, "kv_lora_rank", None):
        raise PolyKVError(
            f"{name} uses latent attention (MLA); use a model with plain keys and values"
        )
    probe(model_config)


def check_every_token(model_config: Any, what: str) -> None:
    """Check that all layers attend to every token, for what neither sliding windows nor states are implemented.

    Raises:
        PolyKVError: the model has sliding windows or states; the message begins with `what`.
    """
    check_attends(model_config, what)
    if any(Geometry.of(model_config).windows):
        raise PolyKVError(
            f"{what} takes models whose layers all attend to every token, and {model_config.model_type} has sliding "
            "windows; use another model"
        )


def check_attends(model_config: Any, what: str) -> None:
    """Check that all layers keep keys and values, for what states are not implemented.

    Raises:
        PolyKVError: the model has layers with a state, or with nothing; the message begins with `what`.
    """
    if stateful := Geometry.of(model_config).stateful:
        raise PolyKVError(
            f"{what} takes models all of whose layers are attention, and layer {stateful[0]} of "
            f"{model_config.model_type} keeps a state (linear attention, convolution or recurrence); use another model"
        )


def check_windows(model_config: Any, windows: tuple[int | None, ...]) -> None:
    """Check that a model's layers have the windows with which a cache was made.

    Raises:
        PolyKVError: names the first layer that differs.
    """
    own = Geometry.of(model_config).windows
    if own != windows and len(own) == len(windows):
        index = next(i for i, pair in enumerate(zip(own, windows, strict=True)) if len({*pair}) > 1)
        raise PolyKVError(
            f"layer {index} of {model_config.model_type} has a sliding window of {own[index]} tokens, and the cache "
            f"was made with {windows[index]}; read it with the model that wrote it"
        )


def check_attention(model_config: Any, remedy: str) -> None:
    """Check that an architecture's attention can be replaced by an equivalent function.

    Raises:
        PolyKVError: it is not plain, or not taken from transformers' registry; the message ends with `remedy`.
    """
    if fault := probe(model_config).attention_fault:
        raise PolyKVError(f"{model_config.model_type} {fault}; {remedy}")


def max_positions(model_config: Any) -> int | None:
    """The model's maximum sequence length, or None if its config has no limit."""
    return getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_length(model_config: Any, n_tokens: int, what: str) -> None:
    """Check that the model has positions for `n_tokens`.

    Raises:
        PolyKVError: with both numbers.
    """
    limit = max_positions(model_config)
    if limit is not None and n_tokens > limit:
        raise PolyKVError(
            f"{what} needs {n_tokens} positions and {model_config.model_type} has {limit}; "
            "shorten the text or the answers"
        )


def check_rope(model_config: Any, n_cached: int, n_tokens: int, what: str) -> None:
    """Check that a cache can grow from `n_cached` to `n_tokens` tokens without a change of rotary frequencies.

    longrope has one set of frequencies up to a certain length and another beyond it, dynamic NTK a different one for
    each longer length. Cached keys keep the frequencies with which they were written; later queries would have others.

    Raises:
        PolyKVError: with the lengths.
    """
    if not n_cached:
        return
    for rope, limit in _rope_limits(model_config.get_text_config(decoder=True)):
        if n_tokens > limit and (n_cached <= limit or rope != "longrope"):
            remedy = f"keep the whole within {limit} tokens"
            remedy += ", or the prefix beyond" if rope == "longrope" else ""
            raise PolyKVError(
                f"{what} grows a cache of {n_cached} tokens to {n_tokens}, but beyond {limit} "
                f"{model_config.model_type} has other rotary frequencies ({rope}); {remedy}"
            )


def _rope_limits(config: Any) -> Iterator[tuple[str, int]]:
    """(kind, length up to which frequencies are those of short texts) of each rotary embedding that changes them."""
    given = getattr(config, "rope_parameters", None) or {}
    for rope in given.values() if all(isinstance(v, dict) for v in given.values()) else [given]:
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            yield kind, rope["original_max_position_embeddings"]
        # Hunyuan's checkpoints are labelled dynamic but have a fixed base (`alpha`).
        elif "dynamic" in kind and not (
            config.model_type.startswith("hunyuan") and rope.get("alpha")
        ):
            yield kind, config.max_position_embeddings


def counts_padding(model_config: Any, unshared: bool) -> bool:
    """Whether padding between cached tokens and a query changes the model's output.

    `unshared`: the cache is not read in place. Sliding windows then count the padding: transformers' masks and caches
    count columns, those of attention in place tokens. A state reads padding like tokens (zeros, but it decays).
    """
    geometry = Geometry.of(model_config)
    counted = unshared and any(geometry.windows) or geometry.stateful
    return bool(counted) or model_config.model_type in COUNT_PADDING


def check_padding(
    model_config: Any,
    remedy: str = "ask queries of different lengths one by one",
    unshared: bool = True,
) -> None:
    """Check that queries of different lengths can be padded to one batch without changing answers.

    Raises:
        PolyKVError: names the architecture.
    """
    if counts_padding(model_config, unshared):
        raise PolyKVError(
            f"{model_config.model_type} counts the padding of a shorter query; {remedy}"
        )
