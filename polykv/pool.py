"""SharedKVPool: one document's KV cache, compressed once, read by N agents (PolyKV, arXiv 2604.24971, section 3).

Pools are immutable, so any number of threads may read one. There are two read modes: with `dequantize`, as published,
each agent rebuilds an unshared full-precision cache; with `in_place` (`reader`) all agents attend to the one compressed
copy (polykv/attention/cascade.py).
"""

from collections.abc import Iterable, Iterator, Sequence
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
from polykv.probe import kept_tokens
from polykv.recipe import Recipe
from polykv.recurrent import STATES, State
from polykv.segment import Segment, decode_segments
from polykv.supported import (
    check_cache,
    check_length,
    check_rope,
    check_windows,
    counts_padding,
    window_of,
)
from polykv.tokens import encode
from polykv.unshared import unshared_cache

READERS = ("dequantize", "in_place")
# What a layer keeps: keys and values, each (batch, kv_heads, tokens, head_dim), or a state.
Kept = tuple[Tensor, Tensor] | State
COPIES = 2 << 30  # bytes of full-precision caches in a batch of agents


class SharedKVPool:
    """A document's KV cache, compressed under a recipe; made by `from_text`, `from_cache` or `from_layers`.

    Layers of linear attention, convolution or recurrence keep their state (polykv/recurrent.py), which is not
    compressed. A recipe's numbers of layers (`layer_bits`, exempt first and last ones) count these layers as well.

    Attributes:
        n_values: number of cached values, keys and values together, of all tokens.
        state_bytes: bytes of all states.

    `backend` encodes the cache and attends to it: "auto", "torch", "cpu" or "triton" (polykv/kernels).
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Segment] | State],
        recipe: Recipe,
        backend: str = "torch",
        contexts: Sequence[LayerContext | None] = (),
        windows: Sequence[int | None] = (),
        n_tokens: int | None = None,
        scales: Sequence[Tensor | None] = (),
    ) -> None:
        """A pool of segments or a state by layer; for `windows` and `n_tokens` see `from_layers`.

        `scales`: of each layer, if the recipe has a codec for the agents' own tokens (`suffix_scale`).
        """
        self._layers = tuple(one if isinstance(one, State) else tuple(one) for one in layers)
        first = next((one for one in self._layers if not isinstance(one, State)), None)
        if first is None:
            raise PolyKVError("the cache holds no layers with keys; prefill the document first")
        self.windows = tuple(windows) or (None,) * len(self._layers)
        self.recipe = recipe
        self._scales = tuple(scales)
        # For the pools that are made of an uncompressed one; its segments hold what a codec asked for.
        self.contexts = tuple(contexts) if recipe.is_full else ()
        self.chat: Chat | None = None
        self.device = next(iter(first[0].key.tensors.values())).device
        self.backend = kernels.pick_backend(backend, self.device)
        self.n_tokens: int = n_tokens or sum(segment.n_tokens for segment in first)
        self.dtype: torch.dtype = first[0].key.dtype
        self.head_dim: int = first[0].key.shape[3]
        self.state_bytes: int = sum(one.nbytes for one in self._layers if isinstance(one, State))
        self.n_values: int = sum(
            torch.Size(packed.shape).numel()
            for segment in self._segments()
            for packed in (segment.key, segment.value)
        )
        if recipe.keep:  # those of all tokens, so that ratios are to the whole cache
            n_kept = sum(segment.n_tokens for segment in first)
            self.n_values = self.n_values // n_kept * self.n_tokens

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
        """Compress a transformers cache, which is not modified.

        Of a sliding-window layer the tokens are kept that the next token would see, as transformers keeps them; of a
        layer of linear attention, convolution or recurrence a copy of its state.

        Raises:
            PolyKVError: layers of two kinds at once, MLA, static, quantized or encoder-decoder caches; a recipe that
                needs to know more of the model, and a cache that does not come from `polykv.prefill.prefill`.
        """
        check_cache(cache)
        contexts = getattr(cache, "contexts", ())
        _check_known(recipe, contexts)
        n_tokens = cache.get_seq_length()
        windows = [window_of(layer) for layer in cache.layers]
        # Cloned, as a view keeps all tokens of the prefill alive.
        layers = (
            State.of(layer)
            if type(layer) in STATES
            else (layer.keys[:, :, -kept:].clone(), layer.values[:, :, -kept:].clone())
            if (kept := kept_tokens(n_tokens, window)) < n_tokens
            else (layer.keys, layer.values)
            for layer, window in zip(cache.layers, windows, strict=True)
        )
        about: Any = {"contexts": contexts, "windows": windows, "n_tokens": n_tokens}
        return cls.from_layers(layers, recipe, len(windows), backend, **about)

    @classmethod
    def from_layers(
        cls,
        layers: Iterable[Kept],
        recipe: Recipe,
        n_layers: int | None = None,
        backend: str = "auto",
        contexts: Sequence[LayerContext | None] = (),
        windows: Sequence[int | None] = (),
        n_tokens: int | None = None,
    ) -> "SharedKVPool":
        """Compress (keys, values) layer by layer, each (batch, kv_heads, tokens, head_dim); states are kept.

        Args:
            layers: may be a generator, so that only one layer exists at full size at a time; then give `n_layers`.
            contexts: what the recipe's codecs may know of each layer. Without them the codecs do without, which is
                enough to count bytes.
            windows: the sliding window of each layer, None for full attention; empty: all have full attention. Of a
                layer with a window, `layers` has the last tokens only (`polykv.probe.kept_tokens`).
            n_tokens: tokens of the document; None: those of the first layer with keys. Needed if that one has a window.

        Raises:
            PolyKVError: a tensor that the recipe's codec cannot encode (names the layer, and keys or values), a number
                of tokens that does not fit the window, or a recipe that drops tokens, which states have read.
        """
        if n_layers is None:
            layers = list(layers)
            n_layers = len(layers)
        windows = tuple(windows) or (None,) * n_layers
        encoded: list[list[Segment] | State] = []
        scales: list[Tensor | None] = []
        # Not enumerate, which keeps a reference to a layer while the next is made.
        for kept in layers:
            if isinstance(kept, State):
                recipe.check_keeps_all("a model whose states have read them")
                encoded.append(kept)
                scales.append(None)
                continue
            k_BHTD, v_BHTD = kept
            index, backend = len(encoded), kernels.pick_backend(backend, k_BHTD.device)
            context = (contexts[index] if contexts else None) or NOTHING
            n_tokens = n_tokens or k_BHTD.shape[2]
            n_left = n_tokens - k_BHTD.shape[2]
            if k_BHTD.shape[2] != kept_tokens(n_tokens, windows[index]):
                raise PolyKVError(
                    f"layer {index} has {k_BHTD.shape[2]} of {n_tokens} tokens and a window of {windows[index]}; "
                    f"give its last {kept_tokens(n_tokens, windows[index])}"
                )
            place = (index, n_layers, backend, context, n_left if windows[index] else None)
            try:
                encoded.append(recipe.encode_layer(k_BHTD, v_BHTD, *place))
            except PolyKVError as error:
                raise PolyKVError(f"layer {index}: {error}") from error
            scales.append(suffix_scale(k_BHTD) if recipe.suffix else None)
            del kept, k_BHTD, v_BHTD
        return cls(encoded, recipe, backend, contexts, windows, n_tokens, scales)

    def _segments(self) -> Iterator[Segment]:
        return (one for kept in self._layers if not isinstance(kept, State) for one in kept)

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self._layers)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors: codes, scales, norms, states."""
        scales = sum(scale.nbytes for scale in self._scales if scale is not None)
        return sum(segment.nbytes for segment in self._segments()) + scales + self.state_bytes

    @property
    def nominal_ratio(self) -> float:
        """fp16 bits over payload bits of keys and values, without metadata (the papers' "2.91x")."""
        attending = [n for n, one in enumerate(self._layers) if not isinstance(one, State)]
        if len(attending) < self.n_layers:  # those with a state have their share of `layer_bits`
            return self._nominal_ratio(attending)
        return self.recipe.nominal_ratio(self.dtype)

    def _nominal_ratio(self, layers: Iterable[int]) -> float:
        codecs = [one for index in layers for one in self.recipe.codecs(index, self.n_layers)]
        return 16 * len(codecs) / sum(codec.payload_bits(self.dtype) for codec in codecs)

    @property
    def stored_ratio(self) -> float:
        """Bytes of the cache, its keys and values in fp16 and its states as they are, over `stored_bytes`."""
        return (2 * self.n_values + self.state_bytes) / self.stored_bytes

    @property
    def full_layers_ratios(self) -> tuple[float, float] | None:
        """(nominal, stored) ratio of the layers of full attention alone; None if all layers are, or none is."""
        segments = {
            index: kept
            for index, (kept, window) in enumerate(zip(self._layers, self.windows, strict=True))
            if window is None and not isinstance(kept, State)
        }
        if len(segments) in (0, self.n_layers):
            return None
        full = [one for kept in segments.values() for one in kept]
        n_values = sum(2 * torch.Size(one.key.shape).numel() for one in full)
        return self._nominal_ratio(segments), 2 * n_values / sum(one.nbytes for one in full)

    def kept(self) -> Iterator[Kept]:
        """What each layer keeps: its keys and values (`decode_layer`), or its state."""
        for index, kept in enumerate(self._layers):
            yield kept if isinstance(kept, State) else self.decode_layer(index)

    def decode_layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each (batch, kv_heads, tokens, head_dim), in the cache's dtype.

        Of a sliding-window layer, of its last tokens (`polykv.probe.kept_tokens`).

        Raises:
            PolyKVError: a layer with a state.
        """
        kept = self._layers[index]
        if isinstance(kept, State):
            raise PolyKVError(f"layer {index} keeps a state and no keys; take another layer")
        return decode_segments(kept)

    def under(self, recipe: Recipe, backend: str = "auto") -> "SharedKVPool":
        """A pool of this pool's decoded cache under another recipe or backend.

        Raises:
            PolyKVError: a recipe that needs to know more of the model than this pool kept (only uncompressed ones do),
                or this pool dropped tokens.
        """
        backend = kernels.pick_backend(backend, self.device)
        if (recipe, backend) == (self.recipe, self.backend):
            return self
        self.recipe.check_keeps_all("a pool under another recipe or backend")
        _check_known(recipe, self.contexts)
        about = (self.contexts, self.windows, self.n_tokens)
        return SharedKVPool.from_layers(self.kept(), recipe, self.n_layers, backend, *about)

    def dequantize(self, n_agents: int = 1) -> DynamicCache:
        """A full-precision DynamicCache with a row for each of `n_agents`, ready to continue the document.

        Rows are views of one decoded copy until the first tokens are appended, which copies them; states are shared
        with the pool until then.

        Raises:
            PolyKVError: a recipe that quantizes agents' own tokens.
        """
        self.recipe.check_exact_suffix("reader=dequantize")
        rows = (
            kept.layer(n_agents)
            if isinstance(kept, State)
            else tuple(x.expand(n_agents, -1, -1, -1) for x in kept)
            for kept in self.kept()
        )
        return unshared_cache(rows, self.windows, self.n_tokens)

    def reader(self, n_agents: int) -> CascadeCache:
        """A cache in which `n_agents` attend to this pool in place, within `attend_in_place(model)`.

        It references the pool's tensors and stores only the agents' own tokens, and their own states once they have
        read any.

        Raises:
            PolyKVError: n_agents < 1, or a pool of several documents.
        """
        about = (self.backend, self.n_tokens, self.windows, (), self.recipe.suffix, self._scales)
        return CascadeCache(self._layers, n_agents, *about)

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
        with "in_place" all agents attend to the compressed copy in one batch. Where padding would change answers, a
        batch has queries of one length only.

        Raises:
            PolyKVError: an unknown read mode, an empty query, max_new_tokens < 1, more tokens than the model has
                positions, another model's sliding windows, or a model that other threads are using in another read mode
                (`attend_in_place`).
        """
        check_reader(reader)
        check_windows(model.config, self.windows)
        if self.chat:
            queries = [self.chat.prompt(query) for query in queries]
        queries_ids = encode_queries(model, tokenizer, queries, self.n_tokens, max_new_tokens)
        if not queries_ids:
            return []
        unshared = reader == "dequantize"
        answers: dict[int, str] = {}
        with read_unshared(model) if unshared else attend_in_place(model):
            for part in self._batches(model, queries_ids, unshared):
                cache = self.dequantize(len(part)) if unshared else self.reader(len(part))
                ids = [queries_ids[number] for number in part]
                said = generate(model, tokenizer, cache, ids, max_new_tokens)
                answers |= dict(zip(part, said, strict=True))
        return [answers[number] for number in range(len(queries))]

    def _batches(
        self, model: PreTrainedModel, queries_ids: Sequence[Tensor], unshared: bool
    ) -> Iterator[Any]:
        """The numbers of the queries that are answered together: of one length, if padding would change the answer."""
        copied = self.n_values * self.dtype.itemsize + self.state_bytes
        batch = max(COPIES // copied, 1) if unshared else len(queries_ids)
        numbers = range(len(queries_ids))
        groups: Any = [numbers]
        if counts_padding(model.config, unshared):
            lengths = sorted({len(ids_T) for ids_T in queries_ids})
            groups = [[n for n in numbers if len(queries_ids[n]) == length] for length in lengths]
        for group in groups:
            for start in range(0, len(group), batch):
                yield group[start : start + batch]


def _check_known(recipe: Recipe, contexts: Sequence[LayerContext | None]) -> None:
    needs = recipe.keep.needs if recipe.keep else ()
    if any(getattr(context, name) is None for name in needs for context in contexts if context):
        raise PolyKVError(
            f"recipe {recipe.name!r} chooses tokens by the model's {' and '.join(needs)}, which only sdpa shows; "
            "load the model with attn_implementation=sdpa, or use another recipe"
        )
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


def suffix_scale(k_BHTD: Tensor) -> Tensor:
    """The largest power of two up to the largest value of each channel of a layer's keys, (1, kv_heads, 1, head_dim).

    In fp16, from 2**-14 to 2**15. Keys are divided and queries multiplied by it without rounding.
    """
    _, exponents = torch.frexp(k_BHTD.abs().amax((0, 2), keepdim=True).float())
    return torch.exp2((exponents - 1).clamp(-14, 15)).half()
