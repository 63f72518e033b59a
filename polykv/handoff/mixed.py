"""Token-level mixed precision: every token at 2, 4, 8 or 16 bits, keys and values apart.

A token has one tier in all layers and heads, so the map of a cache is 2 bits per token for keys and 2 for
values. Layers are stacked along the heads, and the tokens of a tier lie together in the order of their
positions: a whole cache is a handful of tensors, and appended tokens go to the end of their tier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from polykv import kernels
from polykv.codecs import bitpack
from polykv.codecs.base import Codec, Packed, Shape, saturated
from polykv.codecs.identity import Identity
from polykv.codecs.uniform import Uniform
from polykv.errors import PolyKVError

TIERS = (2, 4, 8, 16)  # bits; the map holds the index
EXACT = 3  # the tier that is not quantized
MAP_BITS = 2
GROUP = 64  # 0.25 bits per value for scales


@dataclass(frozen=True)
class Mixed:
    """One side (keys or values) of a whole cache: the tier of every token, and each tier's tokens.

    `tiers_T` (tokens,) uint8 indexes TIERS; `parts[tier]` holds (1, layers * heads, tokens of the tier, D).
    """

    tiers_T: Tensor
    parts: Mapping[int, Packed]
    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and the packed map."""
        kept = sum(part.nbytes for part in self.parts.values())
        return kept + bitpack.packed_size(len(self.tiers_T), MAP_BITS)

    def tensors(self) -> dict[str, Tensor]:
        """Everything kept, by name: `map`, and `BITS.NAME` per tier."""
        found = {"map": bitpack.pack(self.tiers_T, MAP_BITS)}
        for tier, part in self.parts.items():
            found |= {f"{TIERS[tier]}.{name}": tensor for name, tensor in part.tensors.items()}
        return found


@dataclass(frozen=True)
class MixedCodec:
    """The four tiers' codecs. `exact` is the dtype of the 16-bit tier; None keeps the model's own.

    Under None a float32 model's exact tokens take 32 bits: that is policy `full`. `backend`, one that
    `kernels.pick_backend` gave, does the work; all of them give the same bits.
    """

    exact: str | None = "float16"
    group_size: int = GROUP
    backend: str = kernels.TORCH

    def codec(self, tier: int) -> Codec:
        if tier == EXACT:
            return Identity(self.exact)
        return Uniform(TIERS[tier], self.group_size)

    def token_bits(self, tier: int, width: int, dim: int, dtype: torch.dtype) -> int:
        """Stored bits of one token's vectors in all `width` = layers * heads at a tier."""
        return 8 * self.codec(tier).stored_bytes((1, width, 1, dim), dtype)

    def encode(self, layers: Sequence[Tensor], tiers_T: Tensor) -> Mixed:
        """Quantize one side of a cache: per layer (1, heads, tokens, D)."""
        _, heads, n_tokens, dim = layers[0].shape
        parts = {}
        for tier in tiers_T.unique().tolist():
            at = (tiers_T == tier).nonzero().squeeze(1).to(layers[0].device)
            x_BHTD = torch.cat([layer.index_select(2, at) for layer in layers], dim=1)
            parts[tier] = kernels.encode(self.codec(tier), x_BHTD, self.backend)
        shape = (1, len(layers) * heads, n_tokens, dim)
        return Mixed(tiers_T.cpu(), parts, shape, layers[0].dtype)

    def decode(self, mixed: Mixed) -> Tensor:
        """(1, layers * heads, tokens, D) in the cache's dtype; a layer is a slice along dimension 1."""
        if len(mixed.parts) == 1:
            ((tier, part),) = mixed.parts.items()
            return self._decode(tier, part)
        device = next(iter(next(iter(mixed.parts.values())).tensors.values())).device
        out = torch.empty(mixed.shape, dtype=mixed.dtype, device=device)
        for tier, part in mixed.parts.items():
            at = (mixed.tiers_T == tier).nonzero().squeeze(1).to(device)
            out.index_copy_(2, at, self._decode(tier, part))
        return out

    def _decode(self, tier: int, part: Packed) -> Tensor:
        codec = self.codec(tier)
        if tier == EXACT or self.backend == kernels.TORCH:
            return codec.decode(part)
        # No tier rotates its vectors.
        return saturated(kernels.decode_rotated(codec, part, self.backend), part.dtype)

    def extend(self, mixed: Mixed, new: Mixed) -> Mixed:
        """Old tokens followed by new ones; the old ones' codes and scales are copied, not made again."""
        parts = dict(mixed.parts)
        for tier, part in new.parts.items():
            old = parts.get(tier)
            parts[tier] = part if old is None else _joined(old, part)
        shape = (*mixed.shape[:2], mixed.shape[2] + new.shape[2], mixed.shape[3])
        return Mixed(torch.cat([mixed.tiers_T, new.tiers_T]), parts, shape, mixed.dtype)

    def rebuild(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Mixed:
        """The inverse of `Mixed.tensors`.

        Raises:
            PolyKVError: names, shapes or dtypes that do not fit the map and `shape`.
        """
        left = dict(tensors)
        packed_map = left.pop("map", None)
        _check(packed_map, "map", (bitpack.packed_size(shape[2], MAP_BITS),), torch.uint8)
        tiers_T = bitpack.unpack(packed_map.cpu(), MAP_BITS, shape[2])
        parts = {}
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
        return Mixed(tiers_T, parts, shape, dtype)

    def _layout(
        self, tier: int, shape: Shape, dtype: torch.dtype
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        if tier == EXACT:
            return {"values": (shape, getattr(torch, self.exact) if self.exact else dtype)}
        bits, n_groups = TIERS[tier], ceil(shape[3] / self.group_size)
        codes = (*shape[:3], bitpack.packed_size(shape[3], bits))
        return {"codes": (codes, torch.uint8), "scale": ((*shape[:3], n_groups), torch.float16)}


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
