"""TurboQuant's variants: norm correction, inner-product residual, and outlier channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import pi, prod, sqrt
from typing import Any

import torch
from torch import Tensor

from polykv.codecs.base import FP16_MAX, Codec, Shape
from polykv.codecs.bitpack import pack, packed_size, unpack
from polykv.codecs.rotation import rotation
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.errors import PolyKVError


@dataclass(frozen=True)
class TurboQuantNC(TurboQuantMSE):
    """TurboQuant-MSE with norm correction, the `_nc` of vLLM's presets (turboquant/config.py).

    The stored norm is divided by the length of the quantized unit vector, so that x' has the norm of x; without it
    Lloyd-Max levels shrink vectors, by 1.7 % at 3 bits. Granularity and stored bits are those of TurboQuantMSE.
    """

    version = 1

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = super()._quantize(x_BHTD, shared)
        norm = torch.linalg.vector_norm(x_BHTD.float(), dim=-1, keepdim=True)
        shrunk = torch.linalg.vector_norm(
            self._reconstruct(kept, x_BHTD.shape[-1]), dim=-1, keepdim=True
        )
        # The corrected norm may overflow fp16 where the norm itself does not; an infinite norm becomes NaN here.
        norm = torch.where(shrunk == 0, kept["norm"], kept["norm"] * norm / shrunk)
        kept["norm"] = norm.clamp_max(FP16_MAX).half()
        return kept


@dataclass(frozen=True)
class TurboQuantProd(Codec):
    """TurboQuant with the inner-product residual (arXiv 2504.19874, Algorithm 2; QJL 2406.03482).

    TurboQuant-MSE at bits - 1, then one sign per coordinate of the residual r under a second
    rotation S, and the residual's norm in fp16: x' = x_mse + sqrt(pi / 2) / sqrt(d) * |r| *
    S^T sign(S r). Inner products with x' are unbiased, at a larger squared error than TurboQuant-MSE with the same
    bits. The paper's S is i.i.d. Gaussian; ours is a signed Hadamard matrix with a seed of its own, which has the same
    expectation and less variance. Stored: bits + 32/head_dim bits per value.
    """

    version = 1

    bits: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits not in range(2, 7):
            raise PolyKVError(f"TurboQuantProd has no {self.bits}-bit code; choose 2 to 6 bits")

    @property
    def _mse(self) -> TurboQuantMSE:
        return TurboQuantMSE(self.bits - 1, signs=True, seed=self.seed)

    def payload_bits(self, dtype: torch.dtype) -> float:
        return float(self.bits)

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return self._mse.stored_bytes(shape, dtype) + prod(shape[:3]) * (
            packed_size(shape[3], 1) + 2
        )

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dim = x_BHTD.shape[-1]
        kept = self._mse._quantize(x_BHTD, shared)
        residual = x_BHTD.float() - self._mse._reconstruct(kept, dim)
        norm = torch.linalg.vector_norm(residual, dim=-1, keepdim=True)
        signs = residual @ self._projection(residual) > 0
        return {**kept, "signs": pack(signs.to(torch.uint8), 1), "residual_norm": norm.half()}

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        signs = unpack(tensors["signs"], 1, dim).float().mul_(2).sub_(1)
        signs *= tensors["residual_norm"].float() * sqrt(pi / 2 / dim)
        return torch.cat([self._mse._dequantize(tensors, dim), signs], dim=-1)

    def _projection(self, like: Tensor) -> Tensor:
        """The second rotation, S."""
        return rotation(like.shape[-1], self.seed + 1, like.device)

    # The rotated domain is (..., 2 * D): the vectors under the two rotations, concatenated.

    def rotate(self, x_BHTD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat(
            [self._mse.rotate(x_BHTD, tensors), x_BHTD @ self._projection(x_BHTD)], dim=-1
        )

    def unrotate(self, y_BHTD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        main, residual = y_BHTD.chunk(2, dim=-1)
        return self._mse.unrotate(main, tensors) + residual @ self._projection(residual).T


@dataclass(frozen=True)
class TurboQuantOutlier(Codec):
    """TurboQuant's non-integer widths (arXiv 2504.19874, section 4.3): outlier channels get one more bit.

    The channels with the largest energy over all tokens (`outliers`, a fraction of head_dim, chosen per head) form a
    vector that TurboQuant-MSE quantizes at bits + 1, the others a vector at `bits`, each with its own norm. The paper's
    example, 32 of 128 channels at 3 bits and 96 at 2, is called "2.5 bits" and is 2.25; half of the channels give true
    2.5 and 3.5 bits. Stored: bits + outliers + 32/head_dim bits per value, plus 2 * head_dim bytes per head for the
    order of the channels.
    """

    version = 1

    bits: int = 2
    outliers: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits not in range(1, 5) or not 0 < self.outliers < 1:
            raise PolyKVError(
                f"TurboQuantOutlier has no bits={self.bits} with outliers={self.outliers}; choose "
                "1 to 4 bits and a share between 0 and 1"
            )

    def _parts(self, dim: int) -> tuple[tuple[str, TurboQuantMSE, int], ...]:
        if dim < 2:
            raise PolyKVError(
                "TurboQuantOutlier splits channels and head_dim is 1; choose another codec"
            )
        n_outliers = min(max(round(self.outliers * dim), 1), dim - 1)
        more = TurboQuantMSE(self.bits + 1, seed=self.seed)
        fewer = TurboQuantMSE(self.bits, seed=self.seed + 1)
        return ("outlier", more, n_outliers), ("other", fewer, dim - n_outliers)

    def payload_bits(self, dtype: torch.dtype) -> float:
        return self.bits + self.outliers

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        batch, heads, n_tokens, dim = shape
        vectors = sum(
            codec.stored_bytes((batch, heads, n_tokens, size), dtype)
            for _, codec, size in self._parts(dim)
        )
        return vectors + batch * heads * dim * 2

    def _statistics(self, chunks: Iterable[Tensor]) -> dict[str, Tensor]:
        energy: Any = sum(chunk.float().square().sum(dim=2, keepdim=True) for chunk in chunks)
        return {"order": energy.argsort(dim=-1, descending=True, stable=True).to(torch.int16)}

    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        order = shared["order"].long().expand_as(x_BHTD)
        start = 0
        kept: dict[str, Tensor] = {}
        for name, codec, size in self._parts(x_BHTD.shape[-1]):
            part = codec._quantize(x_BHTD.gather(-1, order[..., start : start + size]), {})
            kept |= {f"{name}_{key}": tensor for key, tensor in part.items()}
            start += size
        return kept

    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        decoded = [
            codec._dequantize({key: tensors[f"{name}_{key}"] for key in ("codes", "norm")}, size)
            for name, codec, size in self._parts(dim)
        ]
        return torch.cat(decoded, dim=-1)

    # In the rotated domain channels are sorted by the head's `order`, and each part is rotated separately.

    def rotate(self, x_BHTD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        parts = self._parts(x_BHTD.shape[-1])
        ordered = x_BHTD.gather(-1, tensors["order"].long().expand_as(x_BHTD))
        split = ordered.split([size for _, _, size in parts], dim=-1)
        rotated = [codec.rotate(x, tensors) for (_, codec, _), x in zip(parts, split, strict=True)]
        return torch.cat(rotated, dim=-1)

    def unrotate(self, y_BHTD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        parts = self._parts(y_BHTD.shape[-1])
        split = y_BHTD.split([size for _, _, size in parts], dim=-1)
        ordered = torch.cat(
            [codec.unrotate(y, tensors) for (_, codec, _), y in zip(parts, split, strict=True)],
            dim=-1,
        )
        order = tensors["order"].long().expand_as(ordered)
        return torch.empty_like(ordered).scatter_(-1, order, ordered)
