"""Reading: one document whose prefix is pooled under one recipe and read in one read mode, and its scores.

The two read modes are those of polykv/pool.py: `dequantize` rebuilds a full-precision cache, `in_place` attends to the
compressed copy.
"""

from contextlib import AbstractContextManager
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
    """A pool of a document's prefix, which `model` reads in the read mode `reader`.

    `baseline` is the reading of the uncompressed cache in the same read mode, so that differences between the two are
    due to the recipe alone. It is None if this reading is itself a baseline.
    """

    model: PreTrainedModel
    document: Document
    pool: SharedKVPool
    reader: str = "dequantize"
    baseline: "Reading | None" = None

    def in_mode(self, reader: str, backend: str) -> "Reading":
        """This baseline in another read mode (itself if it is the same), encoded and read by `backend`."""
        if reader == self.reader:
            return self
        pool = self.pool.under(self.pool.recipe, backend)
        return Reading(self.model, self.document, pool, reader)

    def under(self, recipe: Recipe, backend: str) -> "Reading":
        """The same document under `recipe`, with this reading as its baseline (itself if the recipe is the same)."""
        if recipe == self.pool.recipe:
            return self
        pool = self.pool.under(recipe, backend)
        return Reading(self.model, self.document, pool, self.reader, self)

    def _attention(self) -> AbstractContextManager[None]:
        """Context in which the model reads caches in this read mode."""
        in_place = self.reader == "in_place"
        return attend_in_place(self.model) if in_place else read_unshared(self.model)

    def score(self) -> Tensor:
        """Log-probabilities of the document's tokens after the prefix: (scored tokens, vocabulary) in fp32.

        The first token after the prefix is fed and not scored (polykv/evaluation/continuation.py).

        Raises:
            PolyKVError: the document is longer than the model supports.
        """
        with self._attention():
            cache = self.pool.reader(1) if self.reader == "in_place" else self.pool.dequantize()
            return score_rest(self.model, cache, self.document.rest_BT)

    @cached_property
    def log_probs_TV(self) -> Tensor:
        """`score()`, kept in memory: for baselines, which are compared with several recipes."""
        return self.score()

    @cached_property
    def comparison(self) -> Comparison:
        """This reading against its baseline, per scored token; a baseline is compared with itself."""
        baseline = self.baseline or self
        # Only the baseline's log-probabilities are kept: they take vocabulary x tokens x 4 bytes.
        own_TV = self.score() if self.baseline else self.log_probs_TV
        return compare(baseline.log_probs_TV, own_TV, self.document.rest_BT)

    @cached_property
    def reader_floor(self) -> Comparison:
        """The uncompressed cache in this read mode against `dequantize`, per scored token.

        This is what the read mode itself costs: the two attention implementations round differently. In bfloat16 the
        difference is as large as that of an 8-bit recipe.
        """
        if self.baseline:
            return self.baseline.reader_floor
        dequantized = Reading(self.model, self.document, self.pool)
        return compare(dequantized.score(), self.log_probs_TV, self.document.rest_BT)

    @torch.no_grad()
    def score_together(self, n_agents: int) -> Tensor:
        """The log-probabilities of `score` from each of `n_agents` agents in one batch.

        All agents read the same tokens. So that their rows differ, agent i has i tokens of padding before them, and the
        rows are padded at the end to equal length. `dequantize` gives each agent its own copy of the cache.

        Returns:
            (agents, scored tokens, vocabulary) in fp32.

        Raises:
            PolyKVError: a model whose outputs depend on padding.
        """
        check_padding(self.model.config, unshared=self.reader != "in_place")
        rest_T, n_prefix = self.document.rest_BT[0], self.pool.n_tokens
        n_rest = len(rest_T)
        n_padded = n_rest + n_agents - 1
        ids_NT = rest_T.new_zeros(n_agents, n_padded)
        mask_NT = rest_T.new_ones(n_agents, n_prefix + n_padded)
        for agent in range(n_agents):
            ids_NT[agent, agent : agent + n_rest] = rest_T
            mask_NT[agent, n_prefix : n_prefix + agent] = 0
        # Clamped because the model may have no positions for the padding at the end.
        last_position = n_prefix + n_rest - 1
        positions_NT = (mask_NT.cumsum(-1) - 1)[:, n_prefix:].clamp_max(last_position)
        # () because only the mode `unshared` copies uncompressed layers.
        (cache,) = caches_of(self.reader, (), self.pool, n_agents, together=True)
        device = self.model.device
        with self._attention():
            logits_NTV = self.model(
                input_ids=ids_NT.to(device),
                attention_mask=mask_NT.to(device),
                position_ids=positions_NT.to(device),
                past_key_values=cache,
            ).logits
        # The logits at a token predict the next one, so those at the last token are left out.
        scored_NTV = torch.stack(
            [logits_NTV[agent, agent : agent + n_rest - 1] for agent in range(n_agents)]
        )
        return scored_NTV.float().log_softmax(dim=-1)
