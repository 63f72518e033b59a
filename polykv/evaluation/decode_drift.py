"""Decode drift: divergence along a reply that is generated from a compressed cache.

The uncompressed run writes a greedy reply. Under a recipe the prompt's cache is compressed and the same reply is fed
(teacher forcing); every distribution from which a token was chosen is compared with that of the uncompressed run. New
tokens stay exact, or are quantized in pages: the tokens of a page attend to each other exactly and to all pages before
as quantized, so that an error in a page enters the keys and values of the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from polykv import kernels
from polykv.attention.cascade import read_unshared
from polykv.codecs.base import Codec, Packed
from polykv.codecs.context import LayerContext
from polykv.documents import digest_of
from polykv.evaluation.continuation import Comparison, compare
from polykv.greedy import greedy
from polykv.pool import SharedKVPool
from polykv.prefill import prefill
from polykv.recipe import Recipe, load_recipe
from polykv.segment import Segment, decode_segments
from polykv.supported import check_every_token

VERSION = 1  # of replies and of how pages are quantized
MODES = ("exact", "pages")  # what happens to new tokens


@dataclass(frozen=True, eq=False)
class Reply:
    """A prompt and the uncompressed run's greedy reply to it.

    Attributes:
        pool: the uncompressed cache of all tokens of the prompt but the last.
        ids_BT: (1, tokens) of prompt and reply.
        contexts: by layer, of all tokens up to the end of the reply; statistics are of the tokens in the pool.
    """

    pool: SharedKVPool
    ids_BT: Tensor
    contexts: tuple[LayerContext, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens of the reply."""
        return self.rest_BT.shape[1] - 1

    @property
    def rest_BT(self) -> Tensor:
        """The last token of the prompt, and the reply."""
        return self.ids_BT[:, self.pool.n_tokens :]

    @cached_property
    def digest(self) -> str:
        """8 hex digits of the SHA-256 of the token ids of prompt and reply."""
        return digest_of(self.ids_BT)


def write_replies(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    limit: int,
    stops: Sequence[int],
) -> list[Reply]:
    """Greedy replies to prompts (tokens,) of at least 2 tokens, generated in one batch.

    Args:
        limit: tokens of a reply, at most.
        stops: ids that end a reply; without any, all replies have `limit` tokens.

    Raises:
        PolyKVError: a model whose outputs depend on padding, or more tokens than it has positions.
    """
    texts = greedy(model, DynamicCache(config=model.config), prompts, limit, stops=stops)
    return [
        reply_of(model, prompt_T, text_T) for prompt_T, text_T in zip(prompts, texts, strict=True)
    ]


def reply_of(model: PreTrainedModel, prompt_T: Tensor, reply_T: Tensor) -> Reply:
    """A given reply (tokens,) to a prompt (tokens,)."""
    check_every_token(model.config, "decode drift")
    ids_BT = torch.cat([prompt_T, reply_T])[None]
    n_pooled = len(prompt_T) - 1
    full = load_recipe("full")
    pool = SharedKVPool.from_cache(prefill(model, ids_BT[:, :n_pooled]), full, "torch")
    along = prefill(model, ids_BT).contexts
    contexts = tuple(
        replace(context, query_rms=mine.query_rms)
        for context, mine in zip(along, pool.contexts, strict=True)
    )
    return Reply(pool, ids_BT, contexts)


@torch.no_grad()
def log_probs(
    model: PreTrainedModel,
    reply: Reply,
    recipe: Recipe,
    page: int | None = None,
    backend: str = "torch",
) -> Tensor:
    """Log-probabilities (tokens of the reply, vocabulary) in fp32 from which each token of the reply is chosen.

    Args:
        page: tokens of a page; None: all new tokens stay exact.

    Raises:
        PolyKVError: a tensor that the recipe's codec cannot encode, or a recipe that drops tokens.
    """
    recipe.check_keeps_all("a reply token by token")
    recipe.check_exact_suffix("a reply token by token")
    layers = [_Layer(recipe, reply, index, backend) for index in range(reply.pool.n_layers)]
    cache = DynamicCache(layer.decoded() for layer in layers)
    ids_BT = reply.rest_BT[:, :-1].to(model.device)
    found = []
    with read_unshared(model):
        for part_BT in ids_BT.split(page or reply.n_tokens, dim=1):
            logits_BTV = model(input_ids=part_BT, past_key_values=cache).logits
            found.append(logits_BTV[0].float().log_softmax(dim=-1))
            if page:
                for layer, of_cache in zip(layers, cache.layers, strict=True):
                    of_cache.keys, of_cache.values = layer.closed(of_cache.keys, of_cache.values)
    return torch.cat(found)


def drift(
    model: PreTrainedModel,
    reply: Reply,
    full_TV: Tensor,
    recipe: Recipe,
    page: int,
    backend: str = "torch",
) -> dict[str, Comparison]:
    """Mode of MODES -> the recipe's run against the uncompressed run's `full_TV`, per token of the reply."""
    return {
        mode: compare(full_TV, log_probs(model, reply, recipe, tokens, backend), reply.rest_BT)
        for mode, tokens in zip(MODES, (None, page), strict=True)
    }


class _Layer:
    """One layer of a cache that grows by pages.

    Exempt tokens of the reply (recent ones, exempt layers) stay in the model's dtype.
    """

    def __init__(self, recipe: Recipe, reply: Reply, index: int, backend: str) -> None:
        self._recipe, self._backend = recipe, backend
        self._place = (index, reply.pool.n_layers)
        self._codecs = recipe.codecs(*self._place)
        self._context = reply.contexts[index]
        n_tokens = reply.pool.n_tokens
        self._segments = recipe.encode_layer(
            *reply.pool.decode_layer(index),
            *self._place,
            backend,
            self._context.narrow(0, n_tokens),
        )
        self._stop = self._run(n_tokens)[1]  # tokens before it are quantized

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the compressed prompt."""
        return decode_segments(self._segments)

    def closed(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (1, kv_heads, tokens, head_dim) at the end of a page, with its tokens quantized.

        If the recipe exempts recent tokens, those that no longer are recent are quantized instead.
        """
        start, stop = self._run(keys.shape[2])
        start = max(start, self._stop)
        if stop <= start:
            return keys, values
        self._stop = stop
        context = self._context.narrow(start, stop)
        known = self._quantized()
        packed = (known.key, known.value) if known else (None, None)
        grown = []
        for codec, prompt, x_BHTD in zip(self._codecs, packed, (keys, values), strict=True):
            new = _appended(codec, prompt, x_BHTD[:, :, start:stop], context, self._backend)
            grown.append(torch.cat([x_BHTD[:, :, :start], new, x_BHTD[:, :, stop:]], dim=2))
        return grown[0], grown[1]

    def _run(self, n_tokens: int) -> tuple[int, int]:
        """(start, stop) of the tokens that are not exempt once there are `n_tokens`."""
        runs = self._recipe.runs(n_tokens, *self._place)
        return next(((start, stop) for start, stop, exact in runs if not exact), (0, 0))

    def _quantized(self) -> Segment | None:
        """The quantized segment of the prompt; None if all of it is exempt."""
        own = (s for s in self._segments if (s.key_codec, s.value_codec) == self._codecs)
        return next(own, None)


def _appended(
    codec: Codec, prompt: Packed | None, x_BHTD: Tensor, context: LayerContext, backend: str
) -> Tensor:
    """Tokens that follow those of the prompt, quantized with the statistics that these share, and decoded.

    They are encoded by themselves if the prompt's last group of tokens is not full, or there is none.
    """
    if prompt is None or prompt.shape[2] % codec.group:
        return codec.decode(kernels.encode(codec, x_BHTD, backend, context))
    n_prompt = prompt.shape[2]
    both = codec.extend(prompt, x_BHTD, context)
    return codec.decode(both.narrow(n_prompt, both.shape[2]))
