"""Token-level mixed precision for cards: every token at 2, 3, 4, 8 or 16 bits, chosen separately for keys and values.

A tier is one of these precisions, identified by its index into TIERS. A token has the same tier in all layers and
heads, so a tier map takes 3 bits per token for the keys and 3 for the values. Layers are stacked along the heads
dimension, and the tokens of a tier are stored together in order of position: a whole cache takes a few tensors, and
appended tokens go to the end of their tier.

The tiers below 16 bits quantize vectors after a rotation (signed Hadamard along head_dim). Before it, keys are
normalized by channel (polykv/codecs/channels.py): with the large biases of some models' keys, too few quantization
levels would be left for the other channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt
from statistics import NormalDist

import torch
from torch import Tensor

from polykv import kernels
from polykv.codecs import bitpack
from polykv.codecs.base import Codec, Packed, Shape, saturated
from polykv.codecs.channels import Channels
from polykv.codecs.identity import Identity
from polykv.codecs.rotated import Rotated
from polykv.codecs.rotation import rotation
from polykv.codecs.uniform import Uniform
from polykv.errors import PolyKVError

VERSION = 2  # of a card's content, which packing.py and codecs/channels.py determine as well
TIERS = (2, 3, 4, 8, 16)  # bits per value
EXACT_TIER = TIERS.index(16)  # the only tier that is not quantized
MAP_BITS = 3  # per token: an index into TIERS
GROUP = 64  # values that share an fp16 scale, which costs 0.25 bits per value
SEED = 0  # of the rotation's random signs
DECODE_CHUNK = 1 << 22  # values that `decode` holds in fp32 at a time, to bound its memory


@dataclass(frozen=True)
class Mixed:
    """The keys or the values of a whole cache: the tier of every token, and the packed tokens of each tier.

    Attributes:
        tiers_T: (tokens,) uint8, indices into TIERS.
        parts: tier -> its tokens, packed from (1, layers * heads, tokens of the tier, D); rotated if quantized.
        shape: (1, layers * heads, tokens, D).
        dtype: that of the decoded cache.
        channels: the normalization of the quantized keys; None for values, or if no key is quantized.
    """

    tiers_T: Tensor
    parts: Mapping[int, Packed]
    shape: Shape
    dtype: torch.dtype
    channels: Channels | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, 16-bit values, channels and the packed tier map."""
        packed = sum(part.nbytes for part in self.parts.values())
        channels = self.channels.nbytes if self.channels else 0
        return packed + channels + bitpack.packed_size(len(self.tiers_T), MAP_BITS)

    def tensors(self) -> dict[str, Tensor]:
        """All stored tensors by name.

        These are `map` (the packed tiers), `BITS.NAME` for each tier (`4.codes`, `4.scale`, `16.values`), and the
        channels' `mean` and `spread`, if there are any.
        """
        found = {"map": bitpack.pack(self.tiers_T, MAP_BITS)}
        found |= self.channels._asdict() if self.channels else {}
        for tier, part in self.parts.items():
            found |= {f"{TIERS[tier]}.{name}": tensor for name, tensor in part.tensors.items()}
        return found


@dataclass(frozen=True)
class MixedCodec:
    """Encoder and decoder of `Mixed`.

    Attributes:
        exact: dtype of the 16-bit tier. None keeps the cache's own dtype, as policy `full` does: a value of a float32
            model then takes 32 bits.
        group_size: values along head_dim that share a scale.
        backend: from `kernels.pick_backend`; all backends produce the same bits.
    """

    exact: str | None = "float16"
    group_size: int = GROUP
    backend: str = kernels.TORCH

    def codec(self, tier: int) -> Codec:
        """The codec of a tier, including the rotation but not the normalization of keys."""
        return Identity(self.exact) if tier == EXACT_TIER else Rotated(self._uniform(tier), SEED)

    def _uniform(self, tier: int) -> Uniform:
        return Uniform(TIERS[tier], self.group_size)

    def relative_error(self, tier: int) -> float:
        """Expected mean squared error of a tier, as a fraction of absmax^2 of the values that share a scale."""
        return 0.0 if tier == EXACT_TIER else self._uniform(tier).relative_error

    def expected_error(self, tier: int, dim: int) -> float:
        """Expected RMS error of a tier, relative to the RMS of the vectors (head_dim `dim`).

        Assumes independent, normally distributed values, which rotated vectors come close to. absmax is taken as its
        median m over `n` such values: P(|x| < m)^n = 1/2.
        """
        n_values = min(self.group_size, dim)
        median_absmax = NormalDist().inv_cdf((1 + 0.5 ** (1 / n_values)) / 2)
        return median_absmax * sqrt(self.relative_error(tier))

    def channels_of(self, layers: Sequence[Tensor], tiers_T: Tensor) -> Channels | None:
        """The channel normalization of the keys that are to be quantized; None if all are in the 16-bit tier.

        `layers` are the keys of each layer, (1, heads, tokens, D).

        Raises:
            PolyKVError: a channel's mean overflows fp16.
        """
        quantized = _positions(tiers_T != EXACT_TIER, layers[0].device)
        if not len(quantized):
            return None
        by_layer = [Channels.of(layer.index_select(2, quantized)) for layer in layers]
        return Channels(*(torch.cat(tensors, dim=1) for tensors in zip(*by_layer, strict=True)))

    def encode(
        self, layers: Sequence[Tensor], tiers_T: Tensor, channels: Channels | None = None
    ) -> Mixed:
        """Quantize the keys or the values of a cache, given per layer as (1, heads, tokens, D).

        `tiers_T` is (tokens,). Keys come with the `channels` from `channels_of`.

        Raises:
            PolyKVError: NaN, infinity, or a scale or value that overflows fp16.
        """
        _, heads, n_tokens, dim = layers[0].shape
        device, parts = layers[0].device, {}
        for tier in tiers_T.unique().tolist():
            positions = _positions(tiers_T == tier, device)
            x_BHTD = torch.cat([layer.index_select(2, positions) for layer in layers], dim=1)
            if tier == EXACT_TIER:
                parts[tier] = kernels.encode(self.codec(tier), x_BHTD, self.backend)
                continue
            normalized_BHTD = channels.normalize(x_BHTD) if channels else x_BHTD.float()
            # Rotated in torch for every backend, so that all of them round to the same codes.
            rotated_BHTD = normalized_BHTD @ rotation(dim, SEED, device)
            part = kernels.encode(self._uniform(tier), rotated_BHTD, self.backend)
            # The encoder was given fp32; decoding is to return the cache's dtype.
            parts[tier] = replace(part, dtype=x_BHTD.dtype)
        shape = (1, len(layers) * heads, n_tokens, dim)
        return Mixed(tiers_T.cpu(), parts, shape, layers[0].dtype, channels)

    def decode(self, mixed: Mixed) -> Tensor:
        """Dequantize to (1, layers * heads, tokens, D) in the cache's dtype; a layer is a slice along dimension 1."""
        if list(mixed.parts) == [EXACT_TIER]:  # already in order of position: no copy
            return self.codec(EXACT_TIER).decode(mixed.parts[EXACT_TIER])
        device = next(iter(next(iter(mixed.parts.values())).tensors.values())).device
        out = torch.empty(mixed.shape, dtype=mixed.dtype, device=device)
        for tier, part in mixed.parts.items():
            positions = _positions(mixed.tiers_T == tier, device)
            if tier == EXACT_TIER:
                out.index_copy_(2, positions, self.codec(tier).decode(part))
                continue
            _, n_heads, n_tokens, dim = part.shape  # heads of all layers
            step = max(DECODE_CHUNK // (n_tokens * dim), 1)
            for start in range(0, n_heads, step):
                heads = slice(start, min(start + step, n_heads))
                rotated_BHTD = kernels.decode_rotated(
                    self._uniform(tier), select_heads(part, heads), self.backend
                )
                x_BHTD = rotated_BHTD @ rotation(dim, SEED, device).T
                if mixed.channels:
                    x_BHTD = mixed.channels.heads(heads).denormalize(x_BHTD)
                out[:, heads].index_copy_(2, positions, saturated(x_BHTD, mixed.dtype))
        return out

    def extend(self, mixed: Mixed, new: Mixed) -> Mixed:
        """`mixed` followed by the tokens of `new`; codes and scales of both are kept, nothing is quantized again.

        Both must have been encoded with the same channels, if they have any.
        """
        parts = dict(mixed.parts)
        for tier, part in new.parts.items():
            parts[tier] = _append_tokens(parts[tier], part) if tier in parts else part
        shape = (*mixed.shape[:2], mixed.shape[2] + new.shape[2], mixed.shape[3])
        channels = mixed.channels or new.channels
        return Mixed(torch.cat([mixed.tiers_T, new.tiers_T]), parts, shape, mixed.dtype, channels)

    def without_first(self, mixed: Mixed, n_tokens: int) -> Mixed:
        """`mixed` without its first tokens; codes and scales of the others are kept."""
        parts = {}
        for tier, part in mixed.parts.items():
            n_gone = int((mixed.tiers_T[:n_tokens] == tier).sum())
            batch, heads, n_before, dim = part.shape
            if n_gone < n_before:
                kept = {name: t[:, :, n_gone:].clone() for name, t in part.tensors.items()}
                parts[tier] = replace(
                    part, tensors=kept, shape=(batch, heads, n_before - n_gone, dim)
                )
        shape = (*mixed.shape[:2], mixed.shape[2] - n_tokens, mixed.shape[3])
        channels = mixed.channels if set(parts) - {EXACT_TIER} else None
        return Mixed(mixed.tiers_T[n_tokens:], parts, shape, mixed.dtype, channels)

    def rebuild(
        self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype, is_key: bool = False
    ) -> Mixed:
        """The `Mixed` whose `tensors()` these are; `shape` and `dtype` are its own. Does not read codes or values.

        Raises:
            PolyKVError: a tensor is missing, superfluous, or not of the shape and dtype that `map` and `shape` require.
        """
        unread = dict(tensors)
        packed_map = unread.pop("map", None)
        check_tensor(packed_map, "map", (bitpack.packed_size(shape[2], MAP_BITS),), torch.uint8)
        tiers_T = bitpack.unpack(packed_map.cpu(), MAP_BITS, shape[2])
        parts, channels = {}, None
        if is_key and (tiers_T != EXACT_TIER).any():
            channels = Channels(*(unread.pop(name, None) for name in Channels._fields))
            for name, tensor in channels._asdict().items():
                check_tensor(tensor, name, (1, shape[1], 1, shape[3]), torch.float16)
        for tier in tiers_T.unique().tolist():
            part_shape = (*shape[:2], int((tiers_T == tier).sum()), shape[3])
            packed = {}
            for name, (wanted_shape, wanted_dtype) in self._layout(tier, part_shape, dtype).items():
                full_name = f"{TIERS[tier]}.{name}"
                packed[name] = unread.pop(full_name, None)
                check_tensor(packed[name], full_name, wanted_shape, wanted_dtype)
            parts[tier] = Packed(packed, part_shape, dtype)
        if unread:
            raise PolyKVError(f"tensors that no token needs: {', '.join(sorted(unread))}")
        return Mixed(tiers_T, parts, shape, dtype, channels)

    def _layout(
        self, tier: int, shape: Shape, dtype: torch.dtype
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """Name -> (shape, dtype) of the tensors that pack a part of `shape` in this tier; `dtype` is the cache's."""
        if tier == EXACT_TIER:
            return {"values": (shape, getattr(torch, self.exact) if self.exact else dtype)}
        bits, n_groups = TIERS[tier], ceil(shape[3] / self.group_size)
        codes = (*shape[:3], bitpack.packed_size(shape[3], bits))
        return {"codes": (codes, torch.uint8), "scale": ((*shape[:3], n_groups), torch.float16)}


def select_heads(part: Packed, heads: slice) -> Packed:
    """A slice along dimension 1 (layers * heads), as views."""
    tensors = {name: tensor[:, heads] for name, tensor in part.tensors.items()}
    batch, _, n_tokens, dim = part.shape
    return replace(part, tensors=tensors, shape=(batch, heads.stop - heads.start, n_tokens, dim))


def _positions(selected_T: Tensor, device: torch.device) -> Tensor:
    """The positions at which a boolean (tokens,) is true, on `device`."""
    return selected_T.nonzero().squeeze(1).to(device)


def _append_tokens(old: Packed, new: Packed) -> Packed:
    tensors = {name: torch.cat([t, new.tensors[name]], dim=2) for name, t in old.tensors.items()}
    n_tokens = old.shape[2] + new.shape[2]
    return replace(old, tensors=tensors, shape=(*old.shape[:2], n_tokens, old.shape[3]))


def check_tensor(
    tensor: Tensor | None, name: str, shape: Sequence[int], dtype: torch.dtype
) -> None:
    """Raises PolyKVError unless it is a tensor of this shape and dtype."""
    if tensor is None:
        raise PolyKVError(f"tensor {name} is missing")
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise PolyKVError(
            f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {tuple(shape)}"
        )
