"""The base class of codecs: chunked encoding and decoding, and `Packed`, the bundle of tensors that is stored.

A codec sees one tensor (batch B, kv_heads H, tokens T, head_dim D) and what it asks to know of the model
(polykv/codecs/context.py; most ask for nothing). The base class cuts the tensor into chunks of tokens, which bounds the
memory of every method, and checks that everything stored is finite.

Edge cases are the same for every codec, in torch, C++ and Triton (a kernel may break ties between two equally near
levels the other way):

- NaN and infinity are refused with the index of the token; a pool adds the layer, and keys or values.
- A finite tensor is refused if a norm, scale, step, minimum or value that is stored in fp16 would overflow (65,520 and
  more). It is not clipped: a clipped cache would give wrong numbers without a warning. Identity in the tensor's
  own dtype (recipe=full) and the codecs with one fp32 scale (Fp8, Int8 per tensor) accept every finite tensor.
  (TurboQuantNC, which scales up a norm, clamps it to fp16's maximum.)
- A scale or norm below fp16's normal range is rounded to its grid (steps of 2**-24); one that rounds to zero decodes
  to zeros. This adds at most the number of levels times 2**-25, below 1e-5, to the method's own error. fp32 scales
  below 2**-126 are stored as zero.
- Zeros (and -0) decode to zeros; in codecs whose tokens share a minimum or mean only if all of these are zero.
- Scaling a tensor by a power of two changes no code while its scales stay normal in fp16 (but in KVarN).
- Single tokens, equal tokens, constant vectors and any head_dim are valid.
- Decoding into fp16 saturates at 65,504.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from polykv.codecs.context import NOTHING, LayerContext
from polykv.errors import PolyKVError

Shape = tuple[int, int, int, int]

INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP16_MAX = 65504.0
# A chunk is a sixteenth of the tensor, so that a method may use 64 bytes of temporaries per value and stay within twice
# the tensor's fp16 bytes; but at least this many values, below which call overhead dominates.
CHUNKS = 16
MIN_CHUNK_VALUES = 1 << 14


@dataclass(frozen=True)
class Packed:
    """Everything that is stored of one tensor of shape (B, H, T, D).

    `tensors` holds codes, scales, norms, ..., each 4-D (B, H, N, X) or (1, 1, 1, X): N == T is per
    token, N == 1 is shared by all tokens, N == ceil(T / group) is per `group` consecutive tokens.
    `dtype` is that of the tensor that `Codec.decode` returns. `context` is what the codec asked to know of these
    tokens; it comes from the model and does not count as stored.
    """

    tensors: Mapping[str, Tensor]
    shape: Shape
    dtype: torch.dtype
    group: int = 1
    context: LayerContext = NOTHING

    def __post_init__(self) -> None:
        n_tokens = self.shape[2]
        allowed = {n_tokens, 1, -(-n_tokens // self.group)}
        for name, tensor in self.tensors.items():
            if tensor.ndim != 4 or tensor.shape[2] not in allowed:
                raise PolyKVError(
                    f"packed tensor '{name}' of {n_tokens} tokens has shape {tuple(tensor.shape)}; "
                    f"make it 4-D with {sorted(allowed)} entries along dimension 2"
                )

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def narrow(self, start: int, stop: int) -> Packed:
        """Tokens [start, stop) as views; `start` must be a multiple of `group`."""
        batch, heads, n_tokens, dim = self.shape
        if not 0 <= start <= stop <= n_tokens or start % self.group:
            raise PolyKVError(
                f"cannot narrow {n_tokens} tokens to [{start}, {stop}); give a range within them that "
                f"starts at a multiple of {self.group}"
            )

        def view(tensor: Tensor) -> Tensor:
            if tensor.shape[2] == n_tokens:
                return tensor[:, :, start:stop]
            if tensor.shape[2] == 1:
                return tensor
            return tensor[:, :, start // self.group : -(-stop // self.group)]

        tensors = {name: view(tensor) for name, tensor in self.tensors.items()}
        context, shape = self.context.narrow(start, stop), (batch, heads, stop - start, dim)
        return replace(self, tensors=tensors, shape=shape, context=context)

    def join(self, other: Packed) -> Packed:
        """The tokens of both; tensors that these share are the same object in both."""
        tensors = {
            name: kept if kept is other.tensors[name] else torch.cat([kept, other.tensors[name]], 2)
            for name, kept in self.tensors.items()
        }
        batch, heads, n_tokens, dim = self.shape
        shape = (batch, heads, n_tokens + other.shape[2], dim)
        return replace(self, tensors=tensors, shape=shape, context=self.context.join(other.context))


class Codec(ABC):
    """A quantizer of (B, H, T, D) tensors: a frozen dataclass whose fields are its options.

    A method implements `_quantize` and `_dequantize` on one chunk, `payload_bits` and `stored_bytes`. It overrides
    `_statistics` if all tokens share metadata, and sets `group` if consecutive tokens do. A method that rotates
    vectors before quantizing them overrides `rotation` (or `rotate` and `unrotate`, if one matrix does not describe
    it): attention then rotates queries and outputs instead of the tokens.

    `_statistics`, `_quantize` and `_dequantize` get what the method asks for (`needs`) as keyword arguments, which are
    None if unknown.

    `version` is part of a cell's identity (polykv/versions.py). Each codec of this package declares its own and raises
    it when its bits or decoded numbers change (tests/outputs.py records them).
    """

    group: int = 1
    # Here: of the code that all codecs share (chunks, bit packing, rotations, codebooks).
    version: ClassVar[int] = 1

    @property
    def needs(self) -> tuple[str, ...]:
        """The fields of LayerContext that the method asks for."""
        return ()

    @abstractmethod
    def payload_bits(self, dtype: torch.dtype) -> float:
        """Code bits per value of a `dtype` tensor, without metadata (the "nominal" accounting)."""

    @abstractmethod
    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        """Bytes stored of a tensor of this shape and dtype, by formula; equals `encode(x).nbytes`."""

    @abstractmethod
    def _quantize(self, x_BHTD: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Per-token or per-group tensors of one chunk, given in its own dtype.

        `shared`: the result of `_statistics`.
        """

    @abstractmethod
    def _dequantize(self, tensors: Mapping[str, Tensor], dim: int) -> Tensor:
        """One chunk (B, H, T, D), D == `dim`, in any float dtype; in the rotated domain if the codec has one."""

    def _statistics(self, chunks: Sequence[Tensor]) -> dict[str, Tensor]:
        """Tensors (.., .., 1, X) shared by all tokens, from one or more passes over the chunks.

        The keyword arguments that a codec asked for (`needs`) are about all chunks together.
        """
        return {}

    def rotation(self, dim: int, device: torch.device) -> Tensor | None:
        """Orthonormal fp32 matrix R (dim, dim) that rotates vectors by x @ R; None if the codec does not rotate."""
        return None

    def rotate(self, x_BHTD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """fp32 vectors (queries, say) rotated into the domain of the packed `tensors`."""
        matrix = self.rotation(x_BHTD.shape[-1], x_BHTD.device)
        return x_BHTD if matrix is None else x_BHTD @ matrix

    def unrotate(self, y_BHTD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `rotate`, for vectors of the rotated domain or sums of them."""
        matrix = self.rotation(y_BHTD.shape[-1], y_BHTD.device)
        return y_BHTD if matrix is None else y_BHTD @ matrix.T

    def _reconstruct(self, tensors: Mapping[str, Tensor], dim: int, **known: Any) -> Tensor:
        """One chunk (B, H, T, D), dequantized and rotated back."""
        return self.unrotate(self._dequantize(tensors, dim, **known), tensors)

    def _asked(self, context: LayerContext) -> dict[str, Any]:
        return {name: getattr(context, name) for name in self.needs}

    def told(self, context: LayerContext) -> LayerContext:
        """Of what is known, what the method asks for."""
        return LayerContext(**self._asked(context))

    @torch.no_grad()
    def decode_rotated(self, packed: Packed) -> Tensor:
        """Dequantize to fp32 (B, H, T, D) in the rotated domain; `decode` also rotates back and casts.

        Decodes all tokens at once: use `Packed.narrow` to bound the memory.
        """
        known = self._asked(packed.context)
        return self._dequantize(packed.tensors, packed.shape[3], **known).float()

    @torch.no_grad()
    def scores(self, q_BHQD: Tensor, packed: Packed) -> Tensor:
        """Inner products (B, H, Q, T) in fp32 of rotated fp32 queries with the packed keys."""
        return q_BHQD @ self.decode_rotated(packed).mT

    @torch.no_grad()
    def encode(self, x_BHTD: Tensor, context: LayerContext = NOTHING) -> Packed:
        """Quantize (B, H, T, D) in fp32, fp16 or bf16, on the device of `x_BHTD`.

        Temporary memory is under twice the tensor's fp16 bytes (under half a MiB for fewer than 2**17 values).

        Raises:
            PolyKVError: NaN or infinite values, or a scale or norm that overflows fp16.
        """
        shape = _checked_shape(x_BHTD)
        _check_rope(context, shape[2])
        chunks = [x_BHTD[:, :, i:j] for i, j in _spans(shape, self.group)]
        shared = self._statistics(chunks, **self._asked(context))
        return self._encoded(x_BHTD, shared, context)

    @torch.no_grad()
    def extend(self, packed: Packed, x_BHTD: Tensor, context: LayerContext = NOTHING) -> Packed:
        """`packed` with the tokens (B, H, T, D) appended, quantized with its shared statistics.

        The codes of its own tokens do not change. `context` is that of the new tokens.

        Raises:
            PolyKVError: as `encode`, or the last group of `packed` is not full.
        """
        _checked_shape(x_BHTD)
        n_tokens = packed.shape[2]
        if n_tokens % self.group:
            raise PolyKVError(
                f"cannot append to {n_tokens} tokens in groups of {self.group}; encode all tokens together"
            )
        if packed.context.rope is None:  # its mean was computed without RoPE
            context = NOTHING
        elif context.rope is None:
            raise PolyKVError("give the context of the appended tokens: their RoPE is not known")
        _check_rope(context, x_BHTD.shape[2])
        # With a single token or group these are all tensors; `_encoded` replaces those that are not shared.
        shared = {name: kept for name, kept in packed.tensors.items() if kept.shape[2] == 1}
        added = self._encoded(x_BHTD, shared, context)
        return packed.join(added)

    def _encoded(
        self, x_BHTD: Tensor, shared: Mapping[str, Tensor], context: LayerContext
    ) -> Packed:
        """Quantize all tokens with the given statistics."""
        shape = _checked_shape(x_BHTD)
        kept: dict[str, Tensor] = {}
        per: dict[str, int] = {}
        finite = torch.ones((), dtype=torch.bool, device=x_BHTD.device)
        for tensor in shared.values():
            finite &= _all_finite(tensor)
        for start, stop in _spans(shape, self.group):
            known = self._asked(context.narrow(start, stop))
            part = self._quantize(x_BHTD[:, :, start:stop], shared, **known)
            for name, tensor in part.items():
                if name not in kept:
                    # Per token or per group? Decided by the first chunk, since the last may hold a single token.
                    per[name] = 1 if tensor.shape[2] == stop - start else self.group
                    size = (*tensor.shape[:2], -(-shape[2] // per[name]), tensor.shape[3])
                    kept[name] = tensor.new_empty(size)
                kept[name][:, :, start // per[name] : -(-stop // per[name])] = tensor
                finite &= _all_finite(tensor)
        kept |= {name: tensor for name, tensor in shared.items() if name not in kept}
        if not finite:
            raise PolyKVError(not_finite(x_BHTD) or _overflow(x_BHTD, self, kept))
        return Packed(kept, shape, x_BHTD.dtype, self.group, self.told(context))

    @torch.no_grad()
    def decode(self, packed: Packed) -> Tensor:
        """Dequantize to (B, H, T, D) in `packed.dtype`; saturates in fp16."""
        device = next(iter(packed.tensors.values())).device
        out = torch.empty(packed.shape, dtype=packed.dtype, device=device)
        for start, stop in _spans(packed.shape, packed.group):
            part = packed.narrow(start, stop)
            known = self._asked(part.context)
            values = self._reconstruct(part.tensors, packed.shape[3], **known)
            out[:, :, start:stop] = saturated(values, packed.dtype)
        return out


def padded_blocks(x_BHTD: Tensor, size: int) -> Tensor:
    """(B, H, T, D) -> (B, H, T, ceil(D / size), size), the last block padded with the last value."""
    if missing := -x_BHTD.shape[-1] % size:
        x_BHTD = torch.cat([x_BHTD, x_BHTD[..., -1:].expand(*x_BHTD.shape[:3], missing)], dim=-1)
    return x_BHTD.unflatten(-1, (-1, size))


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values cast to `dtype`, clamped to its range if it is fp16."""
    return (values.clamp(-FP16_MAX, FP16_MAX) if dtype == torch.float16 else values).to(dtype)


def _all_finite(tensor: Tensor) -> Tensor | bool:
    # Faster and smaller than isfinite(): amax propagates NaN, which compares False.
    return not tensor.is_floating_point() or tensor.abs().amax() < torch.inf


def _checked_shape(x: Tensor) -> Shape:
    if x.ndim != 4 or 0 in x.shape:
        raise PolyKVError(
            f"cannot encode a tensor of shape {tuple(x.shape)}; "
            "give (batch, kv_heads, tokens, head_dim), none of them zero"
        )
    if x.dtype not in INPUT_DTYPES:
        raise PolyKVError(f"cannot encode {x.dtype}; cast it to float32, float16 or bfloat16")
    batch, heads, n_tokens, dim = x.shape
    return batch, heads, n_tokens, dim


def _check_rope(context: LayerContext, n_tokens: int) -> None:
    if context.rope is not None and context.rope.n_tokens != n_tokens:
        raise PolyKVError(
            f"the context has the RoPE of {context.rope.n_tokens} tokens, and the tensor {n_tokens} tokens; "
            "narrow the context to them"
        )


def _spans(shape: Shape, group: int) -> Iterator[tuple[int, int]]:
    """Token ranges of the chunks, each starting at a multiple of `group`."""
    batch, heads, n_tokens, dim = shape
    tokens = max(n_tokens // CHUNKS, MIN_CHUNK_VALUES // (batch * heads * dim), 1)
    step = -(-tokens // group) * group
    for start in range(0, n_tokens, step):
        yield start, min(start + step, n_tokens)


def fp32_scale(absmax: Tensor, largest: float) -> Tensor:
    """absmax / largest in fp32; 0 where that is subnormal, since its inverse might overflow."""
    scale = absmax / largest
    return torch.where(scale < torch.finfo(torch.float32).tiny, 0, scale)


def not_finite(x_BHTD: Tensor, first: int = 0) -> str | None:
    """An error message about the first NaN or infinite value, tokens counted from `first`; None if all are finite."""
    bad = ~x_BHTD.isfinite()
    if not bad.any():
        return None
    kind = "NaN" if x_BHTD.isnan().any() else "an infinite value"
    token = first + int(bad.any(dim=-1).any(dim=1).any(dim=0).nonzero()[0])
    return (
        f"cannot encode {kind} (first at token {token}); fix the model or run it in a wider dtype"
    )


def _overflow(x: Tensor, codec: Codec, kept: Mapping[str, Tensor]) -> str:
    names = " and ".join(name for name, tensor in kept.items() if not _all_finite(tensor))
    return (
        f"values up to {x.abs().max():.5g} overflow fp16, in which {type(codec).__name__} stores its "
        f"{names}; use recipe=full for this model, or recipe=fp8_e4m3, whose scales are fp32"
    )
