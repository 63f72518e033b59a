"""SharedKVPool: one document's KV cache, compressed once, read by N agents (PolyKV, arXiv 2604.24971, section 3).

Pools are immutable, so any number of threads may read one. There are two read modes: with `dequantize`, as published,
each agent rebuilds an unshared full-precision cache; with `in_place` (`reader`) all agents attend to the one compressed
copy (polykv/attention/cascade.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from polykv import kernels
from polykv.attention.cache import CascadeCache
from polykv.attention.cascade import attend_in_place, read_unshared
from polykv.chat import Chat, is_wanted
from polykv.codecs.context import NOTHING, LayerContext
from polykv.errors import PolyKVError
from polykv.greedy import greedy
from polykv.prefill import prefill
from polykv.recipe import Recipe
from polykv.segment import Segment, decode_segments
from polykv.supported import check_cache, check_length, check_rope
from polykv.tokens import encode

READERS = ("dequantize", "in_place")
COPIES = 2 << 30  # bytes of full-precision caches in a batch of agents


class SharedKVPool:
    """A document's KV cache, compressed under a recipe; made by `from_text`, `from_cache` or `from_layers`.

    `backend` encodes the cache and attends to it: "auto", "torch", "cpu" or "triton" (polykv/kernels).
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Segment]],
        recipe: Recipe,
        backend: str = "torch",
        contexts: Sequence[LayerContext] = (),
    ) -> None:
        if not layers:
            raise PolyKVError("the cache holds no layers; prefill the document first")
        self._layers = tuple(tuple(segments) for segments in layers)
        self.recipe = recipe
        # For the pools that are made of an uncompressed one; its segments hold what a codec asked for.
        self.contexts = tuple(contexts) if recipe.is_full else ()
        self.chat: Chat | None = None
        self.device = next(iter(self._layers[0][0].key.tensors.values())).device
        self.backend = kernels.pick_backend(backend, self.device)
        self.n_tokens: int = sum(segment.n_tokens for segment in self._layers[0])
        self.dtype: torch.dtype = self._layers[0][0].key.dtype
        self.n_values: int = sum(
            torch.Size(packed.shape).numel()
            for segment in self._segments()
            for packed in (segment.key, segment.value)
        )

    @classmethod
    def from_text(
        cls,
        model: PreTrainedModel,
        tokenizer: Any,
        text: str,
        recipe: Recipe,
        backend: str = "auto",
        style: str = "plain",
    ) -> "SharedKVPool":
        """Prefill `text` (with BOS, if the tokenizer adds one) and compress its cache.

        `style` "chat" is for instruct models: the text goes into the user's turn of the tokenizer's chat template, and
        `ask` takes plain questions, which continue that turn. "auto" is "chat" if there is a template, else "plain".

        Raises:
            PolyKVError: empty text, more tokens than the model has positions, an unsupported architecture, or a chat
                template without a common prefix (polykv/chat.py).
        """
        chat = Chat(tokenizer, text) if is_wanted(style, tokenizer) else None
        if not text:
            raise PolyKVError("the document is empty; give at least one token of text")
        ids_BT = chat.ids_BT if chat else encode(tokenizer, text, begins=True)
        pool = cls.from_cache(prefill(model, ids_BT), recipe, backend)
        pool.chat = chat
        return pool

    @classmethod
    def from_cache(cls, cache: Cache, recipe: Recipe, backend: str = "auto") -> "SharedKVPool":
        """Compress a transformers cache of full-attention layers, which is not modified.

        Raises:
            PolyKVError: sliding-window, hybrid, MLA, static, quantized or encoder-decoder caches; a recipe that needs
                to know more of the model, and a cache that does not come from `polykv.prefill.prefill`.
        """
        check_cache(cache)
        contexts = getattr(cache, "contexts", ())
        _check_known(recipe, contexts)
        layers = ((layer.keys, layer.values) for layer in cache.layers)
        return cls.from_layers(layers, recipe, backend=backend, contexts=contexts)

    @classmethod
    def from_layers(
        cls,
        layers: Iterable[tuple[Tensor, Tensor]],
        recipe: Recipe,
        n_layers: int | None = None,
        backend: str = "auto",
        contexts: Sequence[LayerContext] = (),
    ) -> "SharedKVPool":
        """Compress (keys, values) layer by layer, each (batch, kv_heads, tokens, head_dim).

        `layers` may be a generator, so that only one layer exists at full size at a time; then give `n_layers`.
        `contexts`: what the recipe's codecs may know of each layer. Without them the codecs do without, which is enough
        to count bytes.

        Raises:
            PolyKVError: a tensor that the recipe's codec cannot encode; names the layer, and keys or values.
        """
        if n_layers is None:
            layers = list(layers)
            n_layers = len(layers)
        encoded: list[list[Segment]] = []
        # Not enumerate, which keeps a reference to a layer while the next is made.
        for k_BHTD, v_BHTD in layers:
            index, backend = len(encoded), kernels.pick_backend(backend, k_BHTD.device)
            context = contexts[index] if contexts else NOTHING
            try:
                encoded.append(
                    recipe.encode_layer(k_BHTD, v_BHTD, index, n_layers, backend, context)
                )
            except PolyKVError as error:
                raise PolyKVError(f"layer {index}: {error}") from error
            del k_BHTD, v_BHTD
        return cls(encoded, recipe, backend, contexts)

    def _segments(self) -> Iterator[Segment]:
        return (segment for segments in self._layers for segment in segments)

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self._layers)

    @property
    def head_dim(self) -> int:
        """Size of a head's vectors."""
        return self._layers[0][0].key.shape[3]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors: codes, scales, norms."""
        return sum(segment.nbytes for segment in self._segments())

    @property
    def nominal_ratio(self) -> float:
        """fp16 bits over payload bits, without metadata (the papers' "2.91x")."""
        return self.recipe.nominal_ratio(self.dtype)

    @property
    def stored_ratio(self) -> float:
        """fp16 bytes of the cache over `stored_bytes`."""
        return 2 * self.n_values / self.stored_bytes

    def decode_layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each (batch, kv_heads, tokens, head_dim), in the cache's dtype."""
        return decode_segments(self._layers[index])

    def under(self, recipe: Recipe, backend: str = "auto") -> "SharedKVPool":
        """A pool of this pool's decoded cache under another recipe or backend.

        Raises:
            PolyKVError: a recipe that needs to know more of the model than this pool kept (only uncompressed ones do).
        """
        backend = kernels.pick_backend(backend, self.device)
        if (recipe, backend) == (self.recipe, self.backend):
            return self
        _check_known(recipe, self.contexts)
        layers = (self.decode_layer(index) for index in range(self.n_layers))
        return SharedKVPool.from_layers(layers, recipe, self.n_layers, backend, self.contexts)

    def dequantize(self, n_agents: int = 1) -> DynamicCache:
        """A full-precision DynamicCache with a row for each of `n_agents`, ready to continue the document.

        Rows are views of one decoded copy until the first tokens are appended, which copies them.
        """
        layers = (self.decode_layer(index) for index in range(self.n_layers))
        return DynamicCache(
            tuple(x_BHTD.expand(n_agents, -1, -1, -1) for x_BHTD in layer) for layer in layers
        )

    def reader(self, n_agents: int) -> CascadeCache:
        """A cache in which `n_agents` attend to this pool in place, within `attend_in_place(model)`.

        It references the pool's tensors and stores only the agents' own tokens.

        Raises:
            PolyKVError: n_agents < 1, or a pool of several documents.
        """
        return CascadeCache(self._layers, n_agents, self.backend)

    def ask(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        queries: Sequence[str],
        max_new_tokens: int = 64,
        reader: str = "dequantize",
    ) -> list[str]:
        """Greedy answers of agents, one per query; a query continues the document directly, or in chat format.

        With read mode `reader` "dequantize" each agent has a full-precision cache, in batches of up to COPIES bytes;
        with "in_place" all agents attend to the compressed copy in one batch.

        Raises:
            PolyKVError: an unknown read mode, an empty query, max_new_tokens < 1, more tokens than the model has
                positions, or a model that other threads are using in another read mode (`attend_in_place`).
        """
        check_reader(reader)
        if self.chat:
            queries = [self.chat.prompt(query) for query in queries]
        queries_ids = encode_queries(model, tokenizer, queries, self.n_tokens, max_new_tokens)
        if not queries_ids:
            return []
        if reader == "dequantize":
            batch = max(COPIES // (self.n_values * self.dtype.itemsize), 1)
            with read_unshared(model):
                answers = [
                    generate(model, tokenizer, self.dequantize(len(part)), part, max_new_tokens)
                    for part in (
                        queries_ids[start : start + batch]
                        for start in range(0, len(queries_ids), batch)
                    )
                ]
            return list(chain.from_iterable(answers))
        cache = self.reader(len(queries_ids))
        with attend_in_place(model):
            return generate(model, tokenizer, cache, queries_ids, max_new_tokens)


def _check_known(recipe: Recipe, contexts: Sequence[LayerContext]) -> None:
    if recipe.needs and not contexts:
        raise PolyKVError(
            f"recipe {recipe.name!r} needs the model's {' and '.join(sorted(recipe.needs))}, and this cache has only "
            "keys and values; make it with polykv.prefill.prefill, or the pool with SharedKVPool.from_text"
        )


def check_reader(name: str) -> None:
    """Validate the name of a read mode.

    Raises:
        PolyKVError: an unknown name; lists the known ones.
    """
    if name not in READERS:
        raise PolyKVError(f"no reader named {name!r}; there are: {', '.join(READERS)}")


def encode_queries(
    model: PreTrainedModel,
    tokenizer: Any,
    queries: Sequence[str],
    n_prefix: int,
    max_new_tokens: int,
) -> list[Tensor]:
    """Token ids (tokens,) of each query.

    Raises:
        PolyKVError: an empty query, max_new_tokens < 1, or no positions left after `n_prefix` tokens.
    """
    if max_new_tokens < 1:
        raise PolyKVError(f"max_new_tokens={max_new_tokens}; give 1 or more")
    encoded = []
    for number, query in enumerate(queries):
        ids_T = encode(tokenizer, query)[0]
        if len(ids_T) == 0:
            raise PolyKVError(f"query {number} is empty; an agent has to ask something")
        n_tokens = n_prefix + len(ids_T) + max_new_tokens
        check_length(model.config, n_tokens, f"query {number}")
        check_rope(model.config, n_prefix, n_tokens, f"query {number}")
        encoded.append(ids_T.to(model.device))
    return encoded


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: Cache,
    queries_ids: Sequence[Tensor],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers: continue each row of a cache with its query (tokens,) and return the generated texts."""
    answers = greedy(model, cache, queries_ids, max_new_tokens, tokenizer)
    return tokenizer.batch_decode(answers, skip_special_tokens=True)
