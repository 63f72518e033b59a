"""transformers' own QuantizedCache as an external baseline: quantized by transformers, measured here.

QuantizedCache (transformers, cache_utils.py): `quanto` and `hqq` quantize groups of `q_group_size` values per channel,
keys and values alike, and need their packages; `fp8` has one scale per layer tensor and, unlike our pools and the other
two, also quantizes the tokens read after the prefix.
"""

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, QuantizedCache

from polykv.errors import PolyKVError
from polykv.pool import SharedKVPool
from polykv.supported import check_every_token


def new_cache(config: PretrainedConfig, options: dict[str, Any]) -> QuantizedCache:
    """An empty QuantizedCache; `options` are its arguments, including `backend`.

    Raises:
        PolyKVError: the backend's package is not installed, or does not support these options.
    """
    try:
        return QuantizedCache(config=config, **options)
    except (ImportError, ValueError, TypeError) as error:
        raise PolyKVError(
            f"transformers' QuantizedCache rejects {options}: {' '.join(str(error).split())}; install the "
            "backend's package (optimum-quanto, hqq) or choose another baseline"
        ) from error


def quantized(
    model: PreTrainedModel, full: SharedKVPool, options: dict[str, Any]
) -> QuantizedCache:
    """A QuantizedCache filled with the keys and values of an uncompressed pool."""
    check_every_token(model.config, "transformers' QuantizedCache")
    cache = new_cache(model.config, options)
    for index in range(full.n_layers):
        cache.update(*full.decode_layer(index), index)
    return cache


def stored_bytes(cache: QuantizedCache) -> int:
    """Bytes of all tensors in which the filled cache stores its keys and values."""
    return _bytes([(layer._quantized_keys, layer._quantized_values) for layer in cache.layers])


def _bytes(kept: Any) -> int:
    if isinstance(kept, dict):
        return _bytes(list(kept.values()))
    if isinstance(kept, list | tuple):
        return sum(map(_bytes, kept))
    if not isinstance(kept, Tensor):
        return 0  # a backend's metadata: shapes, dtypes, names
    if hasattr(kept, "__tensor_flatten__"):  # quanto's tensors wrap others
        return _bytes([getattr(kept, name) for name in kept.__tensor_flatten__()[0]])
    return kept.nbytes
