"""Which caches and models can be pooled or handed on: plain full attention, within the model's positions.

What is said here of families of transformers is kept true by tests/test_families.py, and listed in docs/families.yaml.
"""

from collections.abc import Iterator
from typing import Any

from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from polykv.errors import PolyKVError
from polykv.probe import probe

# Encoders that transformers can turn into decoders. They attend both ways unless told otherwise (is_decoder), and
# most count positions from their padding, so that an agent's answer would depend on the others' queries.
ENCODERS = {
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr", "xlm-roberta", "xlm-roberta-xl",
    "xmod",
}  # fmt: skip
# Their distances between tokens (ALiBi, a window of some layers) count the padding of a shorter query.
COUNT_PADDING = {"gpt_neo", "mpt"}


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
        PolyKVError: encoders, encoder-decoders, latent attention (MLA), sliding-window or hybrid layers, or layers
            that do not keep every token's keys and values.
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
        if type(layer) is not DynamicLayer:
            raise PolyKVError(
                f"{name} has a {type(layer).__name__} at layer {index} (sliding-window or hybrid); "
                "use a model whose layers all attend to every token"
            )
    if getattr(text_config, "kv_lora_rank", None):
        raise PolyKVError(
            f"{name} uses latent attention (MLA); use a model with plain keys and values"
        )
    probe(model_config)


def check_attention(model_config: Any, mend: str) -> None:
    """Refuse architectures whose attention cannot be replaced by one that gives the same, before any work.

    Raises:
        PolyKVError: it is not plain, or the model keeps it to itself; ends in `mend`.
    """
    if fault := probe(model_config).not_plain:
        raise PolyKVError(f"{model_config.model_type} {fault}; {mend}")


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


def check_rope(model_config: Any, n_cached: int, n_tokens: int, what: str) -> None:
    """Refuse to grow a cache of `n_cached` tokens to `n_tokens` where the rotary frequencies change between them.

    longrope has one set of frequencies up to a length and another beyond it, dynamic NTK one for every length
    beyond. Cached keys keep those that they were written with; later queries have the others.

    Raises:
        PolyKVError: with the lengths.
    """
    if not n_cached:
        return
    for rope, limit in _rope_limits(model_config.get_text_config(decoder=True)):
        if n_tokens > limit and (n_cached <= limit or rope != "longrope"):
            mend = f"keep the whole within {limit} tokens"
            mend += ", or the prefix beyond" if rope == "longrope" else ""
            raise PolyKVError(
                f"{what} grows a cache of {n_cached} tokens to {n_tokens}, and beyond {limit} "
                f"{model_config.model_type} has other rotary frequencies ({rope}); {mend}"
            )


def _rope_limits(config: Any) -> Iterator[tuple[str, int]]:
    """(kind, the most tokens with the frequencies of a short text) of each rotary embedding that has two."""
    given = getattr(config, "rope_parameters", None) or {}
    for rope in given.values() if all(isinstance(v, dict) for v in given.values()) else [given]:
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            yield kind, rope["original_max_position_embeddings"]
        # Hunyuan's checkpoints say dynamic and mean a fixed base (`alpha`).
        elif "dynamic" in kind and not (
            config.model_type.startswith("hunyuan") and rope.get("alpha")
        ):
            yield kind, config.max_position_embeddings


def check_padding(model_config: Any) -> None:
    """Refuse queries of different lengths in one batch where padding would change an answer.

    Raises:
        PolyKVError: names the architecture.
    """
    if model_config.model_type in COUNT_PADDING:
        raise PolyKVError(
            f"{model_config.model_type} counts the padding of a shorter query as distance; ask queries of "
            "different lengths one by one"
        )
