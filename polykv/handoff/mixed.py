"""Token-level mixed precision: every token at 3, 4, 8 or 16 bits, separately for keys and values.

A token has the same tier in all layers and heads, so the tier maps take 2 bits per token for keys and 2 for values.
Layers are stacked along the heads, and the tokens of a tier are stored together in order of position: a whole cache is
a handful of tensors, and appended tokens go to the end of their tier.

Vectors to be quantized are rotated (signed Hadamard along head_dim). Before that, keys are normalized by channel
(polykv/codecs/channels.py): otherwise the large biases of some models' keys leave too few levels for the rest.
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

VERSION = 1  # of a card's content, with packing.py and codecs/channels.py
TIERS = (3, 4, 8, 16)  # bits; maps hold indices into it
EXACT = 3  # the tier that is not quantized
MAP_BITS = 2
GROUP = 64  # values that share a scale, which takes 0.25 bits per value
SEED = 0  # of the rotation's signs
DECODED_AT_ONCE = 1 << 22  # fp32 values


@dataclass(frozen=True)
class Mixed:
    """One side (keys or values) of a whole cache: the tier of every token, and the packed tokens of each tier.

    `tiers_T` (tokens,) uint8 indexes TIERS; `parts[tier]` holds (1, layers * heads, tokens of the tier, D), rotated if
    the tier is quantized. `channels`: the normalization of quantized keys.
    """

    tiers_T: Tensor
    parts: Mapping[int, Packed]
    shape: Shape
    dtype: torch.dtype
    channels: Channels | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, channels and the packed map."""
        kept = sum(part.nbytes for part in self.parts.values())
        kept += 0 if self.channels is None else self.channels.nbytes
        return kept + bitpack.packed_size(len(self.tiers_T), MAP_BITS)

    def tensors(self) -> dict[str, Tensor]:
        """All stored tensors by name: `map`, `BITS.NAME` for each tier, and for keys `mean` and `spread`."""
        found = {"map": bitpack.pack(self.tiers_T, MAP_BITS)}
        found |= self.channels._asdict() if self.channels else {}
        for tier, part in self.parts.items():
            found |= {f"{TIERS[tier]}.{name}": tensor for name, tensor in part.tensors.items()}
        return found


@dataclass(frozen=True)
class MixedCodec:
    """The codecs of the four tiers. `exact` is the dtype of the 16-bit tier; None keeps the model's own.

    With None, exact tokens of a float32 model take 32 bits (policy `full`). `backend` comes from
    `kernels.pick_backend`; all backends give the same bits.
    """

    exact: str | None = "float16"
    group_size: int = GROUP
    backend: str = kernels.TORCH

    def codec(self, tier: int) -> Codec:
        """The codec of a tier, including the rotation but not the normalization of keys."""
        return Identity(self.exact) if tier == EXACT else Rotated(self._uniform(tier), SEED)

    def _uniform(self, tier: int) -> Uniform:
        return Uniform(TIERS[tier], self.group_size)

    def relative_error(self, tier: int) -> float:
        """Mean squared error of a tier in units of a block's absmax^2."""
        return 0.0 if tier == EXACT else self._uniform(tier).relative_error

    def expected_error(self, tier: int, dim: int) -> float:
        """Relative RMS error of a vector with normally distributed values, as most are after rotation."""
        n_values = min(self.group_size, dim)
        absmax = NormalDist().inv_cdf((1 + 0.5 ** (1 / n_values)) / 2)  # its median
        return absmax * sqrt(self.relative_error(tier))

    def channels_of(self, layers: Sequence[Tensor], tiers_T: Tensor) -> Channels | None:
        """The channels of the keys to be quantized, given per layer as (1, heads, tokens, D); None if there are none.

        Raises:
            PolyKVError: a mean overflows fp16.
        """
        at = (tiers_T != EXACT).nonzero().squeeze(1).to(layers[0].device)
        if not len(at):
            return None
        parts = [Channels.of(layer.index_select(2, at)) for layer in layers]
        return Channels(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))

    def encode(
        self, layers: Sequence[Tensor], tiers_T: Tensor, channels: Channels | None = None
    ) -> Mixed:
        """Quantize one side of a cache, given per layer as (1, heads, tokens, D); keys with their `channels`."""
        _, heads, n_tokens, dim = layers[0].shape
        device, parts = layers[0].device, {}
        for tier in tiers_T.unique().tolist():
            at = (tiers_T == tier).nonzero().squeeze(1).to(device)
            x_BHTD = torch.cat([layer.index_select(2, at) for layer in layers], dim=1)
            if tier == EXACT:
                parts[tier] = kernels.encode(self.codec(tier), x_BHTD, self.backend)
                continue
            even = channels.normalize(x_BHTD) if channels else x_BHTD.float()
            # Rotated in torch for every backend, so that all of them round to the same codes.
            turned = even @ rotation(dim, SEED, device)
            part = kernels.encode(self._uniform(tier), turned, self.backend)
            parts[tier] = replace(part, dtype=x_BHTD.dtype)
        shape = (1, len(layers) * heads, n_tokens, dim)
        return Mixed(tiers_T.cpu(), parts, shape, layers[0].dtype, channels)

    def decode(self, mixed: Mixed) -> Tensor:
        """Dequantize to (1, layers * heads, tokens, D) in the cache's dtype; a layer is a slice along dimension 1."""
        if list(mixed.parts) == [EXACT]:
            return self.codec(EXACT).decode(mixed.parts[EXACT])
        device = next(iter(next(iter(mixed.parts.values())).tensors.values())).device
        out = torch.empty(mixed.shape, dtype=mixed.dtype, device=device)
        for tier, part in mixed.parts.items():
            at = (mixed.tiers_T == tier).nonzero().squeeze(1).to(device)
            if tier == EXACT:
                out.index_copy_(2, at, self.codec(tier).decode(part))
                continue
            _, width, n_tokens, dim = part.shape
            step = max(DECODED_AT_ONCE // (n_tokens * dim), 1)
            for start in range(0, width, step):
                span = slice(start, min(start + step, width))
                turned = kernels.decode_rotated(
                    self._uniform(tier), heads_of(part, span), self.backend
                )
                x_BHTD = turned @ rotation(dim, SEED, device).T
                if mixed.channels:
                    x_BHTD = mixed.channels.heads(span).denormalize(x_BHTD)
                out[:, span].index_copy_(2, at, saturated(x_BHTD, mixed.dtype))
        return out

    def extend(self, mixed: Mixed, new: Mixed) -> Mixed:
        """`mixed` followed by `new`, whose codes and scales are copied as they are."""
        parts = dict(mixed.parts)
        for tier, part in new.parts.items():
            old = parts.get(tier)
            parts[tier] = part if old is None else _joined(old, part)
        shape = (*mixed.shape[:2], mixed.shape[2] + new.shape[2], mixed.shape[3])
        channels = mixed.channels or new.channels
        return Mixed(torch.cat([mixed.tiers_T, new.tiers_T]), parts, shape, mixed.dtype, channels)

    def rebuild(
        self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype, is_key: bool = False
    ) -> Mixed:
        """The inverse of `Mixed.tensors`.

        Raises:
            PolyKVError: names, shapes or dtypes that do not match the map and `shape`.
        """
        left = dict(tensors)
        packed_map = left.pop("map", None)
        _check(packed_map, "map", (bitpack.packed_size(shape[2], MAP_BITS),), torch.uint8)
        tiers_T = bitpack.unpack(packed_map.cpu(), MAP_BITS, shape[2])
        parts, channels = {}, None
        if is_key and (tiers_T != EXACT).any():
            channels = Channels(*(left.pop(name, None) for name in Channels._fields))
            for name, tensor in channels._asdict().items():
                _check(tensor, name, (1, shape[1], 1, shape[3]), torch.float16)
        for tier in tiers_T.unique().tolist():
            part_shape = (*shape[:2], int((tiers_T == tier).sum()), shape[3])
            found = {}
            for name, (size, kind) in self._layout(tier, part_shape, dtype).items():
                full_name = f"{TIERS[tier]}.{name}"
                found[name] = left.pop(full_name, None)
                _check(found[name], full_name, size, kind)
            parts[tier] = Packed(found, part_shape, dtype)
        if left:
            raise PolyKVError(f"tensors that no token needs: {', '.join(sorted(left))}")
        return Mixed(tiers_T, parts, shape, dtype, channels)

    def _layout(
        self, tier: int, shape: Shape, dtype: torch.dtype
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        if tier == EXACT:
            return {"values": (shape, getattr(torch, self.exact) if self.exact else dtype)}
        bits, n_groups = TIERS[tier], ceil(shape[3] / self.group_size)
        codes = (*shape[:3], bitpack.packed_size(shape[3], bits))
        return {"codes": (codes, torch.uint8), "scale": ((*shape[:3], n_groups), torch.float16)}


def heads_of(part: Packed, span: slice) -> Packed:
    """A slice of the heads of all layers, as views."""
    tensors = {name: tensor[:, span] for name, tensor in part.tensors.items()}
    batch, _, n_tokens, dim = part.shape
    return replace(part, tensors=tensors, shape=(batch, span.stop - span.start, n_tokens, dim))


def _joined(old: Packed, new: Packed) -> Packed:
    tensors = {name: torch.cat([t, new.tensors[name]], dim=2) for name, t in old.tensors.items()}
    n_tokens = old.shape[2] + new.shape[2]
    return replace(old, tensors=tensors, shape=(*old.shape[:2], n_tokens, old.shape[3]))


def _check(tensor: Tensor | None, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
    if tensor is None:
        raise PolyKVError(f"tensor {name} is missing")
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise PolyKVError(
            f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {tuple(shape)}"
        )
