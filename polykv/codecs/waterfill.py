"""Keys centred before RoPE, in blocks of channels whose widths reverse water-filling sets (this project's own)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from math import ceil

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
MOST_DIM = 256  # the order of channels is kept in bytes
LEAST = 1e-3  # of a channel's spread, or of its queries', over the head's mean


@dataclass(frozen=True)
class WaterfillKey(Codec):
    """Keys of one layer at `bits` bits a value on average, more where an error of the logits would be larger.

    1. mean = that of a head's keys with RoPE undone (fp16); P_t = k_t - R_t mean (KVQuant's keys before RoPE).
    2. sigma = the RMS of each channel of P over the tokens; w = that of the queries, paired as RoPE pairs channels
       (1 where they are not known). Both over their mean over the head's channels, and at least LEAST.
    3. scale = sqrt(w / sigma) in fp16; Y = P scale. Channels in the order of falling w sigma, in blocks of 16 (zeros
       fill the last one). Attention takes q.k = (q / scale).(Y) + q.R_t mean.
    4. A block's importance e is log2 of the RMS of Y times that of w / scale over its channels (0.5 log2 of the product
       of the mean squares), plus log2 of the mean w of the head.
    5. Widths: 1 bit for each block of all heads of the layer, then one by one to the block with the largest
       2 e - 2 width, up to 6 (7 from 4.5 bits on), until the mean is `bits`: reverse water-filling.
    6. Each block through a signed Hadamard-16 (from `seed`) and over its RMS (fp16); the token over its RMS over all
       blocks (8-bit logarithm, polykv/codecs/normal.py); Lloyd-Max codes of the block's width.

    Attention sinks are not exempt here but by the recipe. Kept with D = head_dim, n = ceil(D / 16) blocks of H heads:
    a token takes 2 * round(bits * n * H) bytes of codes for all heads together, heads after each other, and a byte
    for each head's RMS; a head takes 5 D + 2 n + ceil(n / 2) + 2 bytes: mean, scale, order, RMS and widths (4 bits)
    of blocks, largest RMS of a token. Tokens that are added later use all of these as they are.
    """

    version = 1
    needs = ("rope", "query_rms")

    bits: float = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 7:
            raise PolyKVError(f"WaterfillKey has no bits={self.bits}; choose a number from 1 to 7")

    def payload_bits(self, dtype: torch.dtype) -> float:
        return float(self.bits)

    def stored_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        batch, heads, n_tokens, dim = shape
        n_blocks = ceil(dim / BLOCK)
        token = BLOCK // 8 * self._total(heads * n_blocks) + heads
        return batch * (
            n_tokens * token + heads * (5 * dim + 2 * n_blocks + ceil(n_blocks / 2) + 2)
        )

    def _total(self, n_blocks: int) -> int:
        return round(self.bits * n_blocks)

    def _statistics(
        self, chunks: Sequence[Tensor], rope: Rope | None = None, query_rms: Tensor | None = None
    ) -> dict[str, Tensor]:
        if chunks[0].shape[3] > MOST_DIM:
            raise PolyKVError(
                f"WaterfillKey takes a head_dim of up to {MOST_DIM}, not {chunks[0].shape[3]}; use another recipe"
            )
        mean = mean_of(chunks, rope)
        pairs = list(with_rope(chunks, rope))
        sums = [
            (x_BHTD.float() - turned_mean(mean, part)).square().sum(2, True, dtype=torch.float64)
            for x_BHTD, part in pairs
        ]
        n_tokens = sum(chunk.shape[2] for chunk in chunks)
        sigma = (torch.stack(sums).sum(0) / n_tokens).sqrt().float()
        shared = {"mean": mean} | self._plan(sigma, _paired(query_rms, rope))
        largest = [
            _rms(self._whitened(x_BHTD, shared, part)).amax(2, True) for x_BHTD, part in pairs
        ]
        return shared | {"largest": torch.stack(largest).amax(0).half()}

    def _plan(self, sigma: Tensor, w: Tensor | None) -> dict[str, Tensor]:
        """Scale, order, RMS and packed widths of blocks, from the RMS (B, H, 1, D) of keys and of queries."""
        w = torch.ones_like(sigma) if w is None else w
        level = w.mean(-1, keepdim=True).clamp_min(SMALLEST)
        w = (w / level).clamp_min(LEAST)
        spread = sigma.mean(-1, keepdim=True)
        scale = (w / torch.where(spread > 0, sigma / spread, 1).clamp_min(LEAST)).sqrt().half()
        order = (w * sigma).argsort(dim=-1, descending=True, stable=True)
        y_energy = _in_blocks((sigma * scale.float()).square(), order).mean(-1)
        w_energy = _in_blocks((w / scale.float()).square(), order).mean(-1)
        # Products of such squares could leave fp32.
        e = (
            y_energy.clamp_min(1e-30).log2() / 2
            + w_energy.clamp_min(1e-30).log2() / 2
            + level.log2()
        )
        widths = [self._widths(one.flatten().nan_to_num().tolist()) for one in e]
        widths_BH1n = torch.tensor(widths, dtype=torch.uint8, device=e.device).view(e.shape)
        return {
            "scale": scale,
            "order": order.to(torch.uint8),
            "block_rms": y_energy.sqrt().half(),
            "widths": bitpack.pack(widths_BH1n, 4),
        }

    def _widths(self, importance: Sequence[float]) -> list[int]:
        """A width for each block of a layer: reverse water-filling in whole bits."""
        widest = 7 if self.bits >= 4.5 else 6
        widths = [1] * len(importance)
        heap = [(-2 * e, index) for index, e in enumerate(importance)]
        heapify(heap)
        for _ in range(self._total(len(widths)) - len(widths)):
            gain, index = heap[0]
            widths[index] += 1
            # Each bit divides a block's squared error by 4.
            heapreplace(heap, (gain + 2 if widths[index] < widest else torch.inf, index))
        return widths

    def _whitened(self, x_BHTD: Tensor, shared: Mapping[str, Tensor], rope: Rope | None) -> Tensor:
        """fp32 (B, H, T, n, 16): step 6 up to the token's RMS."""
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
        norm = log_codes(_rms(y_BHTnb), shared["largest"])
        y_BHTnb /= log_values(norm, shared["largest"]).clamp_min(SMALLEST).unsqueeze(-1)
        batch, heads, n_tokens, n_blocks, _ = y_BHTnb.shape
        size = BLOCK // 8 * self._total(heads * n_blocks)
        codes = torch.empty(batch, 1, n_tokens, size, dtype=torch.uint8, device=x_BHTD.device)
        for row, places in enumerate(_places(shared["widths"], n_blocks)):
            y_TNb = y_BHTnb[row].transpose(0, 1).flatten(1, 2)
            for bits, (blocks, columns) in places.items():
                packed = bitpack.pack(codes_of(y_TNb[:, blocks], bits), bits)
                codes[row, 0][:, columns] = packed.flatten(1)
        return {"codes": codes, "norm": norm}

    def _dequantize(
        self,
        tensors: Mapping[str, Tensor],
        dim: int,
        rope: Rope | None = None,
        query_rms: Tensor | None = None,
    ) -> Tensor:
        """The rotated domain has 16 n channels: blocks of Y, rotated, the mean's among them."""
        codes, norm = tensors["codes"], log_values(tensors["norm"], tensors["largest"])
        batch, heads, n_tokens, _ = norm.shape
        n_blocks = tensors["block_rms"].shape[3]
        y_BHTnb = norm.new_empty(batch, heads, n_tokens, n_blocks, BLOCK)
        for row, places in enumerate(_places(tensors["widths"], n_blocks)):
            y_TNb = norm.new_empty(n_tokens, heads * n_blocks, BLOCK)
            for bits, (blocks, columns) in places.items():
                stream = codes[row, 0][:, columns].unflatten(1, (len(blocks), -1))
                y_TNb[:, blocks] = levels_of(bitpack.unpack(stream, bits, BLOCK), bits)
            y_BHTnb[row] = y_TNb.unflatten(1, (heads, n_blocks)).transpose(0, 1)
        y_BHTnb *= (tensors["block_rms"].float() * norm).unsqueeze(-1)
        mean_BHTD = turned_mean(tensors["mean"], rope) * tensors["scale"].float()
        mean_BHTnb = _in_blocks(mean_BHTD, tensors["order"].long()) @ self._hadamard(norm.device)
        return (y_BHTnb + mean_BHTnb).flatten(-2)

    def rotate(self, x_BHTD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Queries, so that their products with rotated keys are those with keys: over the scale, not times it."""
        order = tensors["order"].long()
        blocks = _in_blocks(x_BHTD / tensors["scale"].float(), order)
        return (blocks @ self._hadamard(x_BHTD.device)).flatten(-2)

    def unrotate(self, y_BHTD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Keys of the rotated domain, brought back."""
        scale, order = tensors["scale"].float(), tensors["order"].long()
        blocks = y_BHTD.unflatten(-1, (-1, BLOCK)) @ self._hadamard(y_BHTD.device).T
        sorted_BHTD = blocks.flatten(-2)[..., : scale.shape[3]]
        places = order.argsort(-1).expand(*sorted_BHTD.shape)
        return sorted_BHTD.gather(-1, places) / scale

    def _hadamard(self, device: torch.device) -> Tensor:
        return rotation(BLOCK, self.seed, device)


def _paired(query_rms: Tensor | None, rope: Rope | None) -> Tensor | None:
    if query_rms is None or rope is None:
        return query_rms
    return rope.pair_mean(query_rms.square()).sqrt()


def _in_blocks(x_BHTD: Tensor, order_BH1D: Tensor) -> Tensor:
    """(B, H, T, n, 16): the channels in order, filled up with zeros."""
    sorted_BHTD = x_BHTD.gather(-1, order_BH1D.expand_as(x_BHTD))
    return F.pad(sorted_BHTD, (0, -x_BHTD.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def _rms(y_BHTnb: Tensor) -> Tensor:
    """Of each token over its blocks: (B, H, T, 1)."""
    return y_BHTnb.square().mean((-2, -1)).sqrt().unsqueeze(-1)


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
