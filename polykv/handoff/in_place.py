"""Conversion of a card into segments for attention in place.

Keys and values have separate tier maps, so each segment holds the tokens of one (key tier, value tier) pair: at most
sixteen, and two if a policy gives all tokens but the sinks the same bits. The order of tokens does not matter to
attention, since cached keys contain their positions; the mask of a sliding window needs it (`order_of_tokens`).
"""

from dataclasses import replace

from torch import Tensor

from polykv.codecs.base import Packed
from polykv.handoff.mixed import EXACT_TIER, TIERS, Mixed, MixedCodec, select_heads
from polykv.segment import Segment


def segments_by_layer(
    key: Mixed, value: Mixed, codec: MixedCodec, n_kv_heads: int
) -> list[list[Segment]]:
    """The segments of every layer, each with `n_kv_heads` heads; views of the card where a tier is not split."""
    layers: list[list[Segment]] = [[] for _ in range(key.shape[1] // n_kv_heads)]
    pairs_T = _pairs(key, value)
    for pair in pairs_T.unique().tolist():
        key_tier, value_tier = divmod(pair, len(TIERS))
        wanted_T = pairs_T == pair
        keys, values = _tokens(key, key_tier, wanted_T), _tokens(value, value_tier, wanted_T)
        codecs = codec.codec(key_tier), codec.codec(value_tier)
        for index, segments in enumerate(layers):
            span = slice(index * n_kv_heads, (index + 1) * n_kv_heads)
            even = key.channels is not None and key_tier != EXACT_TIER
            channels = key.channels.heads(span) if even else None
            segments.append(
                Segment(*codecs, select_heads(keys, span), select_heads(values, span), channels)
            )
    return layers


def order_of_tokens(key: Mixed, value: Mixed) -> Tensor:
    """The places of the tokens, (tokens,), in the order in which the segments of a layer hold them."""
    device = next(iter(next(iter(key.parts.values())).tensors.values())).device
    return _pairs(key, value).argsort(stable=True).to(device)


def _pairs(key: Mixed, value: Mixed) -> Tensor:
    """(tokens,): the tiers of key and value as one number, by which segments are made in rising order."""
    return key.tiers_T * len(TIERS) + value.tiers_T


def _tokens(mixed: Mixed, tier: int, wanted_T: Tensor) -> Packed:
    """The tokens `wanted_T` (boolean, all of them in this tier) of a tier's packed tensors."""
    part = mixed.parts[tier]
    places = wanted_T[mixed.tiers_T == tier].nonzero().squeeze(1)
    if len(places) == part.shape[2]:
        return part
    tensors = {
        name: tensor.index_select(2, places.to(tensor.device))
        for name, tensor in part.tensors.items()
    }
    return replace(part, tensors=tensors, shape=(*part.shape[:2], len(places), part.shape[3]))
