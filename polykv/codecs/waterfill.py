"""Keys centred before RoPE, in blocks of channels of 1 to 7 bits, allocated by reverse water-filling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from math import ceil, inf
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from polykv.codecs import bitpack
from polykv.codecs.base import Codec, Shape
from polykv.codecs.centred import mean_of, turned_mean, with_rope
from polykv.codecs.context import Rope
from polykv.codecs.normal import SMALLEST, codes_of, levels_of, log_codes, log_values
from polykv.codecs.rotation import rotation
from polykv.errors import PolyKVError

BLOCK = 16  # channels that share a width, and are rotated together
LEAST = 1e-3  # of the relative sigma and w, see step 2


@dataclass(frozen=True)
class WaterfillKey(Codec):
    """Keys at `bits` bits per value on average; blocks of channels whose errors change the logits more get more bits.

    Per head of D = head_dim channels in n = ceil(D / 16) blocks:

    1. mean: of the keys with RoPE undone (fp16). R_t mean is the mean turned to the position of token t, and
       P_t = k_t - R_t mean. (KVQuant, arXiv 2401.18079, section 3.2, quantizes keys before RoPE.)
    2. sigma: RMS of each channel of P over the tokens. w: RMS of each channel of the queries, averaged over the pairs
       of RoPE; 1 if unknown. Both relative to their mean over the channels, at least LEAST.
    3. scale = sqrt(w / sigma) in fp16, Y = P * scale. Channels are sorted by falling w * sigma and cut into blocks of
       16; zeros fill the last block. A score is q.k = (q / scale).Y + q.(R_t mean).
    4. Importance e of a block = log2 of the RMS of Y over its channels + log2 of that of w / scale + log2 of the mean w
       of the head (before 2 made it relative).
    5. Widths by reverse water-filling: every block of all heads of the layer has 1 bit; the others go one by one to
       the block with the largest 2 e - 2 width. At most 6 bits, or 7 if `bits` is 4.5 or more.
    6. Codes: signed Hadamard-16 of each block (signs from `seed`), divided by the RMS of the block (fp16) and the RMS
       of the token over all blocks (8-bit logarithm, polykv/codecs/normal.py), to the nearest Lloyd-Max level.

    Stored, for H heads: per token 2 * round(bits * n * H) bytes of codes, head after head, and H bytes of RMS; per head
    5 D + 2 n + ceil(n / 2) + 2 bytes (6 D above 256): mean, scale and order of channels, RMS and widths (4 bits) of
    blocks, largest RMS of a token. Appended tokens (`extend`) use these as they are. Exact attention sinks are the
    recipe's (`exempt`).

    The other options leave a part out, to measure what it is worth. centred: without it the mean is zero. before_rope:
    without it the mean is that of the keys as they are. queries: without them w is 1. equal_widths: all blocks have
    `bits` bits (a fraction is spread over the first blocks).
    """

    version = 1
    most_bits: ClassVar[int] = 7

    bits: float = 4
    seed: int = 0
    centred: bool = True
    before_rope: bool = True
    queries: bool = True
    equal_widths: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= self.most_bits:
            raise PolyKVError(
                f"{type(self).__name__} has no bits={self.bits}; choose a number from 1 to {self.most_bits}"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("rope",) * self.before_rope + ("query_rms",) * self.queries

    def payload_bits(self, dtype: torch.dtype) -> float:
        return float(self.bits)

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        batch, heads, n_tokens, dim = shape
        n_blocks = ceil(dim / BLOCK)
        token = self.code_bytes(heads, dim) + heads
        head = (4 + _order_dtype(dim).itemsize) * dim + 2 * n_blocks + ceil(n_blocks / 2) + 2
        return batch * (n_tokens * token + heads * head)

    @property
    def widest(self) -> int:
        """Bits of the widest block that there may be."""
        return 7 if self.bits >= 4.5 else 6

    def code_bytes(self, heads: int, dim: int) -> int:
        """Bytes of codes of a token, all heads together."""
        return BLOCK // 8 * self._total_width(heads * ceil(dim / BLOCK))

    def _total_width(self, n_blocks: int) -> int:
        """The sum of the widths of this many blocks."""
        return round(self.bits * n_blocks)

    def _statistics(
        self, chunks: Sequence[Tensor], rope: Rope | None = None, query_rms: Tensor | None = None
    ) -> dict[str, Tensor]:
        mean = mean_of(chunks, rope) * self.centred
        pairs = list(with_rope(chunks, rope))
        sums = [
            (x_BHTD.float() - turned_mean(mean, part)).square().sum(2, True, dtype=torch.float64)
            for x_BHTD, part in pairs
        ]
        n_tokens = sum(chunk.shape[2] for chunk in chunks)
        sigma = (torch.stack(sums).sum(0) / n_tokens).sqrt().float()
        shared = {"mean": mean} | self._plan(sigma, rope, query_rms)
        largest = [
            self._norms(self._whitened(x_BHTD, shared, part)).amax(2, True)
            for x_BHTD, part in pairs
        ]
        return shared | {"largest": torch.stack(largest).amax(0).half()}

    def _plan(
        self, sigma: Tensor, rope: Rope | None, query_rms: Tensor | None
    ) -> dict[str, Tensor]:
        """Steps 2 to 5: scale, order, RMS and packed widths of blocks, from the RMS (B, H, 1, D) of centred keys."""
        w = torch.ones_like(sigma) if query_rms is None else query_rms
        if query_rms is not None and rope is not None:
            w = rope.pair_mean(query_rms.square()).sqrt()
        level = w.mean(-1, keepdim=True).clamp_min(SMALLEST)
        w = (w / level).clamp_min(LEAST)
        spread = sigma.mean(-1, keepdim=True)
        scale = (w / torch.where(spread > 0, sigma / spread, 1).clamp_min(LEAST)).sqrt().half()
        order = (w * sigma).argsort(dim=-1, descending=True, stable=True)
        y_energy = _in_blocks((sigma * scale.float()).square(), order).mean(-1)
        w_energy = _in_blocks((w / scale.float()).square(), order).mean(-1)
        # Products of such squares could leave fp32.
        logs = y_energy.clamp_min(1e-30).log2() + w_energy.clamp_min(1e-30).log2()
        e = logs / 2 + level.log2()
        widths = [self._widths(one.flatten().nan_to_num().tolist()) for one in e]
        widths_BH1n = torch.tensor(widths, dtype=torch.uint8, device=e.device).view(e.shape)
        return {
            "scale": scale,
            "order": order.to(_order_dtype(order.shape[-1])),
            "block_rms": y_energy.sqrt().half(),
            "widths": bitpack.pack(widths_BH1n, 4),
        }

    def _widths(self, importance: Sequence[float]) -> list[int]:
        """The width of each block of a layer: reverse water-filling in whole bits."""
        if self.equal_widths:
            least, more = divmod(self._total_width(len(importance)), len(importance))
            return [least + (index < more) for index in range(len(importance))]
        widths = [1] * len(importance)
        # log2 of the squared error of each block, negated, since a heap has its least entry first.
        heap = [(-2 * e, index) for index, e in enumerate(importance)]
        heapify(heap)
        for _ in range(self._total_width(len(widths)) - len(widths)):
            error, index = heap[0]
            widths[index] += 1
            # A bit divides the squared error of a block by 4.
            heapreplace(heap, (error + 2 if widths[index] < self.widest else inf, index))
        return widths

    def _whitened(self, x_BHTD: Tensor, shared: Mapping[str, Tensor], rope: Rope | None) -> Tensor:
        """fp32 (B, H, T, n, 16): step 6 before the division by the RMS of the token."""
        y_BHTD = (x_BHTD.float() - turned_mean(shared["mean"], rope)) * shared["scale"].float()
        blocks = _in_blocks(y_BHTD, shared["order"].long()) @ self._hadamard(y_BHTD.device)
        return blocks / shared["block_rms"].float().clamp_min(SMALLEST).unsqueeze(-1)

    def _quantize(
        self,
        x_BHTD: Tensor,
        shared: Mapping[str, Tensor],
        rope: Rope | None = None,
        query_rms: Tensor | None = None,
    ) -> dict[str, Tensor]:
        y_BHTnb = self._whitened(x_BHTD, shared, rope)
        norm = log_codes(self._norms(y_BHTnb), shared["largest"])
        y_BHTnb /= log_values(norm, shared["largest"]).clamp_min(SMALLEST).unsqueeze(-1)
        batch, heads, n_tokens, n_blocks, _ = y_BHTnb.shape
        size = (batch, 1, n_tokens, self.code_bytes(heads, x_BHTD.shape[-1]))
        codes = torch.empty(size, dtype=torch.uint8, device=x_BHTD.device)
        for row, places in enumerate(_places(shared["widths"], n_blocks)):
            y_TNb = y_BHTnb[row].transpose(0, 1).flatten(1, 2)
            for bits, (blocks, columns) in places.items():
                packed = bitpack.pack(self._codes(y_TNb[:, blocks], bits), bits)
                codes[row, 0][:, columns] = packed.flatten(1)
        return {"codes": codes, "norm": norm}

    def _dequantize(
        self,
        tensors: Mapping[str, Tensor],
        dim: int,
        rope: Rope | None = None,
        query_rms: Tensor | None = None,
    ) -> Tensor:
        """Rotated domain of 16 n channels: the blocks after the Hadamard, times their RMS, R_t mean included."""
        codes, norm = tensors["codes"], log_values(tensors["norm"], tensors["largest"])
        batch, heads, n_tokens, _ = norm.shape
        n_blocks = tensors["block_rms"].shape[3]
        y_BHTnb = norm.new_empty(batch, heads, n_tokens, n_blocks, BLOCK)
        for row, places in enumerate(_places(tensors["widths"], n_blocks)):
            y_TNb = norm.new_empty(n_tokens, heads * n_blocks, BLOCK)
            for bits, (blocks, columns) in places.items():
                stream = codes[row, 0][:, columns].unflatten(1, (len(blocks), -1))
                y_TNb[:, blocks] = self._levels(bitpack.unpack(stream, bits, BLOCK), bits)
            y_BHTnb[row] = y_TNb.unflatten(1, (heads, n_blocks)).transpose(0, 1)
        y_BHTnb *= (tensors["block_rms"].float() * norm).unsqueeze(-1)
        mean_BHTD = turned_mean(tensors["mean"], rope) * tensors["scale"].float()
        mean_BHTnb = _in_blocks(mean_BHTD, tensors["order"].long()) @ self._hadamard(norm.device)
        return (y_BHTnb + mean_BHTnb).flatten(-2)

    def _norms(self, y_BHTnb: Tensor) -> Tensor:
        """What the blocks of a token are divided by: their RMS (B, H, T, 1)."""
        return y_BHTnb.square().mean((-2, -1)).sqrt().unsqueeze(-1)

    def _codes(self, y: Tensor, bits: int) -> Tensor:
        return codes_of(y, bits)

    def _levels(self, codes: Tensor, bits: int) -> Tensor:
        return levels_of(codes, bits)

    def rotate(self, x_BHTD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Queries for products with rotated keys: divided by the scale, since keys are multiplied by it."""
        order = tensors["order"].long()
        blocks = _in_blocks(x_BHTD / tensors["scale"].float(), order)
        return (blocks @ self._hadamard(x_BHTD.device)).flatten(-2)

    def unrotate(self, y_BHTD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Keys of the rotated domain, brought back (not the inverse of `rotate`, which is for queries)."""
        scale, order = tensors["scale"].float(), tensors["order"].long()
        blocks = y_BHTD.unflatten(-1, (-1, BLOCK)) @ self._hadamard(y_BHTD.device).T
        sorted_BHTD = blocks.flatten(-2)[..., : scale.shape[3]]
        places = order.argsort(-1).expand(*sorted_BHTD.shape)
        return sorted_BHTD.gather(-1, places) / scale

    def _hadamard(self, device: torch.device) -> Tensor:
        return rotation(BLOCK, self.seed, device)


def _order_dtype(dim: int) -> torch.dtype:
    return torch.uint8 if dim <= 256 else torch.int16


def _in_blocks(x_BHTD: Tensor, order_BH1D: Tensor) -> Tensor:
    """(B, H, T, n, 16): the channels in order, filled up with zeros."""
    sorted_BHTD = x_BHTD.gather(-1, order_BH1D.expand_as(x_BHTD))
    return F.pad(sorted_BHTD, (0, -x_BHTD.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def _places(widths: Tensor, n_blocks: int) -> list[dict[int, tuple[Tensor, Tensor]]]:
    """For each batch row: width -> the blocks (N,) of that width, counted over all heads, and where their 2 width bytes
    are in a token's codes (N * 2 width,).
    """
    found = []
    for widths_N in bitpack.unpack(widths, 4, n_blocks).long().flatten(1):
        starts_N = (widths_N.cumsum(0) - widths_N) * (BLOCK // 8)
        places = {}
        for bits in widths_N.unique().tolist():
            blocks = (widths_N == bits).nonzero().squeeze(1)
            span = torch.arange(BLOCK // 8 * bits, device=widths.device)
            places[bits] = (blocks, (starts_N[blocks].unsqueeze(1) + span).flatten())
        found.append(places)
    return found
