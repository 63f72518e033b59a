"""CacheCard: an agent's KV cache, sealed under a policy into a self-contained, verifiable file.

QKVShare, arXiv 2605.03884. A card identifies the model and tokenizer that made it and contains all that another process
with the same two needs to continue: packed tensors, the map of tiers, and the token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from polykv import kernels
from polykv.attention.cache import CascadeCache
from polykv.codecs.identity import DTYPES
from polykv.errors import PolyKVError
from polykv.geometry import Geometry
from polykv.handoff import cardfile, fingerprint, stores, verify
from polykv.handoff.about import CardMetadata
from polykv.handoff.cardfile import CardError, Stamp
from polykv.handoff.coded import CodedPayload
from polykv.handoff.mixed import MixedCodec
from polykv.handoff.payload import MixedPayload, Payload
from polykv.handoff.policy import Policy, load_policy
from polykv.handoff.signals import Sender, Topology
from polykv.handoff.signing import SigningKey
from polykv.handoff.stateful import StatefulPayload
from polykv.handoff.windowed import WindowedPayload
from polykv.recurrent import State
from polykv.unshared import unshared_cache

ALONE = Topology()


@dataclass(frozen=True, eq=False)
class CacheCard:
    """An immutable, quantized KV cache with its token ids and metadata; made by `seal`, `append` or `open`.

    Save and open cards that cross trust boundaries with a `SigningKey` (polykv.handoff.signing).
    """

    metadata: CardMetadata
    ids_T: Tensor  # (tokens,) int32, on the CPU
    payload: Payload
    backend: str  # for decoding, and for attention in place
    _stamp: Stamp | None = None  # of the file it was read from

    @classmethod
    def seal(
        cls,
        cache: Cache,
        token_ids: Tensor | Sequence[int],
        model: PreTrainedModel,
        tokenizer: Any,
        policy: str | Policy = "uniform",
        budget_bits: float = 4.0,
        topology: Topology = ALONE,
        sender: str = "",
        parent: CacheCard | None = None,
        position_offset: int = 0,
        seed: int = 0,
        backend: str = "auto",
        receiver: str = "",
        session: str = "",
    ) -> CacheCard:
        """Quantize a whole cache.

        Warns if tokens get less than 4 bits.

        Args:
            budget_bits: bound of the mean payload bits per cached value, as the papers count (Q4 is 4.0), of all tokens
                except the first 4, the attention sinks, which stay exact. Policies that keep every token in one dtype
                (`full`, `fp16`) ignore it. Stored bits, including metadata and sinks, are `mean_bits`.
            parent: the card that the sender received; only its digest and hop are recorded.
            backend: (polykv/kernels) affects speed only: all backends write the same bits, but for the rounding of ties
                under policies with store `codecs`.
            sender, receiver, session: labels in the metadata, which a receiver can require (`open`).

        Raises:
            PolyKVError: ids that do not match the cache, another model's cache, a budget below the lowest tier, or a
                backend that is not available.
        """
        policy = load_policy(policy) if isinstance(policy, str) else policy
        policy.check_windows(model.config)
        ids_T = verify.checked_ids(cache, token_ids, model, position_offset)
        backend = kernels.pick_backend(backend, model.device)
        sending = Sender(model, cache, ids_T, topology, seed)
        options = (sending, policy, budget_bits, backend)
        geometry = Geometry.of(model.config)
        payload: Payload
        if policy.store == "codecs":
            payload = CodedPayload.seal(*options, position_offset)
        elif any(geometry.windows):
            payload = WindowedPayload.seal(*options, geometry.windows)
        elif geometry.stateful:
            payload = StatefulPayload.seal(*options)
        else:
            payload = MixedPayload.seal(*options)
        labels = {"sender": sender, "receiver": receiver, "session": session}
        metadata = CardMetadata.of(
            sending, tokenizer, policy, payload, budget_bits, position_offset, **labels
        )
        return cls(_after(parent, metadata), ids_T, payload, backend)

    def append(
        self,
        cache: Cache,
        token_ids: Tensor | Sequence[int],
        model: PreTrainedModel,
        tokenizer: Any,
        policy: str | Policy = "uniform",
        budget_bits: float = 4.0,
        topology: Topology = ALONE,
        sender: str = "",
        seed: int = 0,
        receiver: str = "",
        session: str = "",
    ) -> CacheCard:
        """A card of a longer cache that begins with this card's tokens, whose packed bits are reused.

        Tokens that have left a sliding window since are dropped from its layers (`metadata.n_left`).

        Raises:
            PolyKVError: the cache does not continue this card, or too little of the budget is left.
        """
        policy = load_policy(policy) if isinstance(policy, str) else policy
        policy.check_windows(model.config)
        old = self.metadata
        ids_T = verify.checked_ids(cache, token_ids, model, old.position_offset)
        if len(ids_T) < old.n_tokens or not torch.equal(ids_T[: old.n_tokens], self.ids_T):
            raise PolyKVError("the cache does not continue this card's tokens; use CacheCard.seal")
        sending = Sender(model, cache, ids_T, topology, seed)
        payload = self.payload.append(sending, policy, budget_bits)
        labels = {"sender": sender, "receiver": receiver, "session": session}
        metadata = CardMetadata.of(
            sending, tokenizer, policy, payload, budget_bits, old.position_offset, **labels
        )
        return CacheCard(_after(self, metadata), ids_T, payload, self.backend)

    @classmethod
    def open(
        cls,
        path: str,
        model: PreTrainedModel,
        tokenizer: Any,
        key: SigningKey | None = None,
        backend: str = "auto",
        **expected: Any,
    ) -> CacheCard:
        """Read and verify a card from any location that fsspec supports.

        With a `key`, cards that were not signed with it are refused. Without a key, signed and unsigned cards are both
        opened, and `verified` is False.

        `expected` are values of metadata fields by name, such as session="a", receiver="checker" or parent=digest.
        Cards with other values are refused. Without a key this protects from mistakes only: anyone can write metadata.

        Raises:
            CardError: missing, truncated, altered, of a newer format, of another model or tokenizer, not signed with
                the key, or another card than expected.
            PolyKVError: `expected` names a field that cards do not have.
        """
        content = stores.read(path, verify.largest(model))
        return cls.from_bytes(content, model, tokenizer, key, backend, **expected)

    @classmethod
    def from_bytes(
        cls,
        content: bytearray,
        model: PreTrainedModel,
        tokenizer: Any,
        key: SigningKey | None = None,
        backend: str = "auto",
        **expected: Any,
    ) -> CacheCard:
        """Verify a card's bytes; its tensors are views of `content` (copied only to another device).

        Raises:
            CardError, PolyKVError: as `open`.
        """
        backend = kernels.pick_backend(backend, model.device)
        given, tensors, stamp = cardfile.loads(content, key)
        mean_bits = given.pop("mean_bits", None)
        metadata = CardMetadata.parse(given)
        _check_windows(metadata, model)
        if metadata.model != fingerprint.of_model(model):
            raise CardError(
                f"the card is from another model ({metadata.n_layers} layers, {metadata.n_kv_heads} kv "
                "heads, or other weights); load the model that sealed it"
            )
        if metadata.tokenizer != fingerprint.of_tokenizer(tokenizer):
            raise CardError("the card is from another tokenizer; load the one that sealed it")
        metadata.check(expected)
        ids_T = tensors.pop("token_ids", None)
        try:
            verify.check_metadata(metadata, model)
            verify.check_ids(ids_T, metadata.n_tokens, model)
            verify.check_finite(tensors)
            payload = _payload_of(metadata, tensors, model, backend)
        except PolyKVError as error:
            raise CardError(f"the card is inconsistent: {error}; seal it again") from error
        card = cls(metadata, ids_T, payload, backend, stamp)
        if mean_bits != card.mean_bits:
            raise CardError("the card's mean bits do not match its tensors; seal it again")
        return card

    def to_bytes(self, key: SigningKey | None = None) -> bytearray:
        """The card as a file, signed with `key`; without a key it keeps the signature it was read with, if any."""
        tensors = {"token_ids": self.ids_T, **self.payload.tensors()}
        fields = {**self.metadata.to_fields(), "mean_bits": self.mean_bits}
        signature = self._stamp.signature if self._stamp else None
        return cardfile.dumps(fields, tensors, key, signature)

    def save(self, path: str, key: SigningKey | None = None) -> None:
        """Write atomically to a local path, `memory://`, or any remote that fsspec supports.

        Raises:
            CardError: the location is not writable.
        """
        stores.write(path, self.to_bytes(key))

    def decode(self) -> Sequence[tuple[Tensor, Tensor] | State]:
        """Keys and values of every layer, each (1, kv_heads, tokens, head_dim), in the model's dtype; or its state.

        Of layers with a sliding window, those of its last tokens.
        """
        return self.payload.decode()

    def dequantize(self) -> DynamicCache:
        """A full-precision transformers cache, ready to be continued."""
        return unshared_cache(self.decode(), self.metadata.windows or (), self.n_tokens)

    def reader(self, n_agents: int = 1) -> CascadeCache:
        """A cache in which `n_agents` receivers attend to this card in place, within `attend_in_place(model)`.

        The card stays packed; attention decodes it chunk by chunk.

        Raises:
            PolyKVError: n_agents < 1.
        """
        how = (self.n_tokens, self.metadata.windows or (), self.payload.orders())
        return CascadeCache(self.payload.segments(), n_agents, self.backend, *how)

    @property
    def n_tokens(self) -> int:
        """Tokens in the card."""
        return self.metadata.n_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: codes, scales, channels, maps, token ids; without the file's JSON header."""
        return self.ids_T.nbytes + self.payload.nbytes

    @property
    def nominal_bits(self) -> float:
        """Mean payload bits per cached value of the tokens after the sinks, which `budget_bits` bounds."""
        return self.payload.nominal_bits

    @property
    def mean_bits(self) -> float:
        """Stored bits per cached value, including metadata; states count as fp16 values of as many bytes."""
        return 8 * self.nbytes / (self.metadata.n_values + self.payload.state_bytes // 2)

    @property
    def digest(self) -> str:
        """Digest of the file that it was read from, which is `parent` in the next card; else of the unsigned file."""
        stamp = self._stamp or cardfile.loads(self.to_bytes())[2]
        return stamp.digest

    @property
    def signed(self) -> bool:
        """Whether the file it was read from has a signature, verified or not."""
        return self._stamp is not None and self._stamp.signature is not None

    @property
    def verified(self) -> bool:
        """Whether it was opened with the key that it was signed with."""
        return self._stamp is not None and self._stamp.verified


def _check_windows(metadata: CardMetadata, model: PreTrainedModel) -> None:
    """Refuse a card whose layers have other sliding windows than the receiver's; raises CardError."""
    own = Geometry.of(model.config).windows
    given = metadata.windows or [None] * metadata.n_layers
    for number, pair in enumerate(zip(given, own, strict=False)):
        if pair[0] != pair[1]:
            raise CardError(
                f"layer {number} of the card has a sliding window of {pair[0]} tokens and the model's one of "
                f"{pair[1]}; load the model that sealed it"
            )


def _after(parent: CacheCard | None, metadata: CardMetadata) -> CardMetadata:
    """`metadata` with hop and parent of the next card after `parent`."""
    return (
        replace(metadata, hop=parent.metadata.hop + 1, parent=parent.digest) if parent else metadata
    )


def _payload_of(
    metadata: CardMetadata, tensors: Mapping[str, Tensor], model: PreTrainedModel, backend: str
) -> Payload:
    """The payload of a file's tensors, on the model's device.

    Raises:
        PolyKVError: tensors that do not fit the metadata.
    """
    kept = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    dtype, shape = DTYPES[metadata.dtype], metadata.shape
    if metadata.payload == MixedPayload.kind:
        codec = MixedCodec(metadata.exact, metadata.group_size, backend)
        return MixedPayload.rebuild(kept, codec, shape, dtype, metadata.n_kv_heads)
    if metadata.payload == WindowedPayload.kind:
        codec = MixedCodec(metadata.exact, metadata.group_size, backend)
        of_text = (metadata.n_kv_heads, *shape[2:])
        windows = tuple(metadata.windows or ())
        return WindowedPayload.rebuild(kept, codec, windows, of_text, dtype)
    if metadata.payload == StatefulPayload.kind:
        codec = MixedCodec(metadata.exact, metadata.group_size, backend)
        of_text = (metadata.n_kv_heads, *shape[2:])
        layers = Geometry.of(model.config).layers
        return StatefulPayload.rebuild(kept, codec, layers, of_text, dtype)
    by_layer = (metadata.n_layers, metadata.n_kv_heads, *shape[2:])
    place = (by_layer, dtype, model, metadata.position_offset, backend)
    payload = CodedPayload.rebuild(kept, metadata.payload, metadata.budget_bits, *place)
    if (payload.exact, payload.group_size) != (metadata.exact, metadata.group_size):
        raise PolyKVError("its dtype of exact tokens or group_size is not the payload's")
    return payload
