"""Protocol `online`: each token's keys and values are quantized when they are written, and attention reads them so.

A document is processed in chunks of tokens, as servers prefill. A layer quantizes a chunk's keys and values as it
writes them to the cache, before attention reads them: a token sees the quantized keys and values of all tokens up to
itself, its own included, and later layers compute from the result. Scored tokens are treated alike. (Protocol `paper`,
continuation.py, prefills a prefix exactly, compresses it once, and scores the rest with exact keys and values.)

Statistics that a codec shares among all tokens (the scale of Int8 per tensor, the means and widths of Waterfill) are
those of the first chunk, for good: later tokens are appended with `Codec.extend`, and clipped where they exceed them.
The RMS of queries is that of an exact prefill of the first chunk. If a codec of the recipe has groups of tokens (KIVI),
every write is encoded by itself, its last group may be short, and its statistics are its own.

Exempt tokens are kept in fp16: the first `sinks`, and the last `recent` until later tokens push them out of the window.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from polykv.attention.cascade import read_unshared
from polykv.codecs.base import not_finite
from polykv.codecs.context import NOTHING, LayerContext
from polykv.documents import Document
from polykv.errors import PolyKVError
from polykv.pool import SharedKVPool
from polykv.prefill import prefill
from polykv.recipe import EXACT, Recipe
from polykv.segment import SIDES, Segment
from polykv.supported import check_every_token, check_length, check_rope

VERSION = 1  # of the protocol


class OnlineLayer(DynamicLayer):
    """One layer of a cache that is quantized as it is written.

    Attributes:
        keys, values: (batch, kv_heads, tokens, head_dim) as attention reads them: decoded, or exempt in fp16 precision.
        quantized: what is stored of the tokens that are not exempt.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, recipe: Recipe, index: int, n_layers: int, context: LayerContext) -> None:
        """`context`: what codecs may know of the layer and of all tokens that will be written."""
        super().__init__()
        self.recipe = recipe
        self.place = (index, n_layers)
        self.context = context
        self.codecs = recipe.codecs(index, n_layers)
        self.quantized: list[Segment] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values (batch, kv_heads, new tokens, head_dim); returns those of all tokens.

        Raises:
            PolyKVError: a codec cannot encode them; names the layer, and keys or values.
        """
        super().update(key_states, value_states)
        for start, stop, exact in self._runs():
            if exact:
                for x_BHTD in (self.keys, self.values):
                    x_BHTD[:, :, start:stop] = EXACT.decode(EXACT.encode(x_BHTD[:, :, start:stop]))
            elif (start := start + self._n_quantized()) < stop:
                self._quantize(start, stop)
        return self.keys, self.values

    def stored(self) -> list[Segment]:
        """All tokens as they are stored."""
        found = []
        for start, stop, exact in self._runs():
            if exact:
                keys, values = (EXACT.encode(x[:, :, start:stop]) for x in (self.keys, self.values))
                found.append(Segment(EXACT, EXACT, keys, values))
            else:
                found += self.quantized
        return found

    def _runs(self) -> list[tuple[int, int, bool]]:
        return self.recipe.runs(self.keys.shape[2], *self.place)

    def _n_quantized(self) -> int:
        return sum(segment.n_tokens for segment in self.quantized)

    def _quantize(self, start: int, stop: int) -> None:
        """Encode tokens [start, stop), and replace them by what they are decoded to."""
        extends = all(codec.group == 1 for codec in self.codecs) and self.quantized
        last = self.quantized.pop() if extends else None
        before = (last.key, last.value) if last else (None, None)
        context = self.context.narrow(start, stop)
        made = []
        for side, codec, x_BHTD, old in zip(
            SIDES, self.codecs, (self.keys, self.values), before, strict=True
        ):
            new_BHTD = x_BHTD[:, :, start:stop]
            try:
                packed = (
                    codec.extend(old, new_BHTD, context) if old else codec.encode(new_BHTD, context)
                )
            except PolyKVError as error:
                message = not_finite(x_BHTD) or f"tokens {start} to {stop - 1}: {error}"
                raise PolyKVError(f"layer {self.place[0]}: {side}: {message}") from error
            n_tokens = packed.shape[2]
            x_BHTD[:, :, start:stop] = codec.decode(
                packed.narrow(n_tokens - (stop - start), n_tokens)
            )
            made.append(packed)
        keys, values = made
        self.quantized.append(Segment(*self.codecs, keys, values))


@torch.no_grad()
def score(
    model: PreTrainedModel, document: Document, recipe: Recipe, chunk: int
) -> tuple[Tensor, SharedKVPool]:
    """A document written and read online in chunks of `chunk` tokens.

    Returns:
        Log-probabilities (tokens - 1, vocabulary) in fp32 of the document's tokens after the prefix but the first, as
        continuation.score_rest has them; and the cache of the whole document as it is stored.

    Raises:
        PolyKVError: sliding windows, a recipe that drops tokens, more tokens than the model has positions, rotary
            frequencies that change along them, or keys or values that a codec cannot encode.
    """
    check_every_token(model.config, "protocol `online`")
    recipe.check_keeps_all("protocol `online`")
    recipe.check_exact_suffix("protocol `online`")
    ids_BT = document.ids_BT.to(model.device)
    n_prefix, n_tokens = document.n_prefix, document.n_tokens
    check_length(model.config, n_tokens, "the whole document")
    check_rope(model.config, min(chunk, n_tokens), n_tokens, "the whole document")
    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    contexts = _contexts(model, ids_BT, chunk) if recipe.needs else [NOTHING] * n_layers
    layers = [OnlineLayer(recipe, index, n_layers, known) for index, known in enumerate(contexts)]
    cache = Cache(layers=layers)
    scored = []
    with read_unshared(model):
        for start in range(0, n_tokens, chunk):
            part_BT = ids_BT[:, start : start + chunk]
            n_scored = part_BT.shape[1] - max(0, min(n_prefix - start, part_BT.shape[1]))
            logits_BTV = model(
                input_ids=part_BT, past_key_values=cache, logits_to_keep=max(n_scored, 1)
            ).logits
            if n_scored:
                scored.append(logits_BTV[0].float().log_softmax(dim=-1))
    pool = SharedKVPool([layer.stored() for layer in layers], recipe)
    return torch.cat(scored)[:-1], pool


def _contexts(model: PreTrainedModel, ids_BT: Tensor, chunk: int) -> Sequence[LayerContext]:
    """For each layer the RoPE of all tokens, and the RMS of the first chunk's queries."""
    whole, first = prefill(model, ids_BT), prefill(model, ids_BT[:, :chunk])
    return [
        LayerContext(one.rope, other.query_rms)
        for one, other in zip(whole.contexts, first.contexts, strict=True)
    ]
