"""Reading: one document under one recipe in one read mode, and its scores."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from polykv.attention.cascade import attend_in_place, read_unshared
from polykv.documents import Document
from polykv.evaluation.concurrency import caches_of
from polykv.evaluation.continuation import Comparison, compare, score_rest
from polykv.pool import SharedKVPool
from polykv.recipe import Recipe
from polykv.supported import check_padding


@dataclass(eq=False)
class Reading:
    """A pool over a document's prefix, read by `model` in a read mode.

    `full` is the baseline: the uncompressed cache in the same read mode, so that differences are due to the recipe
    alone. None if this reading is the baseline.
    """

    model: PreTrainedModel
    document: Document
    pool: SharedKVPool
    reader: str = "dequantize"
    full: "Reading | None" = None

    def read_by(self, reader: str, backend: str) -> "Reading":
        """This baseline in another read mode."""
        if reader == self.reader:
            return self
        pool = self.pool.under(self.pool.recipe, backend)
        return Reading(self.model, self.document, pool, reader)

    def under(self, recipe: Recipe, backend: str) -> "Reading":
        """The same document under another recipe, with this reading as its baseline."""
        if recipe == self.pool.recipe:
            return self
        pool = self.pool.under(recipe, backend)
        return Reading(self.model, self.document, pool, self.reader, self)

    def score(self) -> Tensor:
        """Log-probabilities of the rest of the document: (scored tokens, vocabulary) in fp32."""
        if self.reader == "dequantize":
            with read_unshared(self.model):
                return score_rest(self.model, self.pool.dequantize(), self.document.rest_BT)
        with attend_in_place(self.model):
            return score_rest(self.model, self.pool.reader(1), self.document.rest_BT)

    @cached_property
    def log_probs_TV(self) -> Tensor:
        """`score`, cached: for the baseline, with which other readings are compared."""
        return self.score()

    @cached_property
    def comparison(self) -> Comparison:
        """This reading against its baseline, per scored token."""
        full = self.full or self
        # Only the baseline's log-probabilities are cached: they take vocabulary x tokens x 4 bytes.
        mine_TV = self.score() if self.full else self.log_probs_TV
        return compare(full.log_probs_TV, mine_TV, self.document.rest_BT)

    @cached_property
    def reader_floor(self) -> Comparison:
        """The cost of the read mode itself, per scored token: the uncompressed cache read by it, against `dequantize`.

        The two attention implementations round differently, in bfloat16 by as much as an 8-bit recipe costs.
        """
        if self.full:
            return self.full.reader_floor
        dequantized = Reading(self.model, self.document, self.pool)
        return compare(dequantized.score(), self.log_probs_TV, self.document.rest_BT)

    @torch.no_grad()
    def score_together(self, n_agents: int) -> Tensor:
        """`score` by each of `n_agents` in one batch: (agents, scored tokens, vocabulary) in fp32.

        Agent i has i tokens of padding before the rest of the document, and padding behind it that is not scored.
        `dequantize` gives each agent its own copy of the cache.

        Raises:
            PolyKVError: a model whose outputs depend on padding.
        """
        check_padding(self.model.config)
        rest_T, n_prefix = self.document.rest_BT[0], self.pool.n_tokens
        n_rest, width = len(rest_T), len(rest_T) + n_agents - 1
        ids_NT = rest_T.new_zeros(n_agents, width)
        mask_NT = rest_T.new_ones(n_agents, n_prefix + width)
        for agent in range(n_agents):
            ids_NT[agent, agent : agent + n_rest] = rest_T
            mask_NT[agent, n_prefix : n_prefix + agent] = 0
        last = n_prefix + n_rest - 1  # keeps the padding within the model's positions
        positions_NT = (mask_NT.cumsum(-1) - 1)[:, n_prefix:].clamp_max(last)
        (cache,) = caches_of(self.reader, (), self.pool, n_agents, together=True)
        device = self.model.device
        with (
            attend_in_place(self.model) if self.reader == "in_place" else read_unshared(self.model)
        ):
            logits_NTV = self.model(
                input_ids=ids_NT.to(device),
                attention_mask=mask_NT.to(device),
                position_ids=positions_NT.to(device),
                past_key_values=cache,
            ).logits
        scored = [logits_NTV[n, n : n + n_rest - 1] for n in range(n_agents)]
        return torch.stack(scored).float().log_softmax(dim=-1)
