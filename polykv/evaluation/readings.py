"""One document read under one recipe: what its scored rest and its agents' answers come from."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from polykv.attention.cascade import attend_in_place, read_privately
from polykv.documents import Document
from polykv.evaluation.concurrency import caches_of
from polykv.evaluation.continuation import Comparison, compare, score_rest
from polykv.pool import SharedKVPool
from polykv.recipe import Recipe


@dataclass(eq=False)
class Reading:
    """A pool over a document's prefix. Scores and answers are computed when asked for, once.

    `asked_pool` is over what agents are asked after, where that is not the plain prefix (polykv/chat.py).
    """

    model: PreTrainedModel
    tokenizer: Any
    document: Document
    pool: SharedKVPool
    max_new_tokens: int
    reader: str = "inject"
    asked_pool: SharedKVPool | None = None
    _answers: list[str] = field(default_factory=list)

    def under(self, recipe: Recipe, reader: str, backend: str = "torch") -> "Reading":
        """The same document's cache under another recipe, taken from this pool's decoded layers."""
        pool, asked = (
            pool and _under(pool, recipe, backend) for pool in (self.pool, self.asked_pool)
        )
        settings = (self.max_new_tokens, reader, asked)
        return Reading(self.model, self.tokenizer, self.document, pool, *settings)

    @cached_property
    def log_probs_TV(self) -> Tensor:
        """Of the rest of the document: (scored tokens, vocabulary), fp32."""
        if self.reader == "inject":
            with read_privately(self.model):
                return score_rest(self.model, self.pool.inject(), self.document.rest_BT)
        with attend_in_place(self.model):
            return score_rest(self.model, self.pool.reader(1), self.document.rest_BT)

    @torch.no_grad()
    def score_together(self, n_agents: int) -> Tensor:
        """What `log_probs_TV` says, by each of `n_agents` in one batch: (agents, scored tokens, vocabulary).

        Agent 0 starts with the rest of the document, each other one with one token of padding more than the
        one before; what fills their rows behind the rest is not scored. `inject` gives each its own copy.
        """
        rest_T, n_prefix = self.document.rest_BT[0], self.pool.n_tokens
        n_rest, width = len(rest_T), len(rest_T) + n_agents - 1
        ids_NT = rest_T.new_zeros(n_agents, width)
        mask_NT = rest_T.new_ones(n_agents, n_prefix + width)
        for agent in range(n_agents):
            ids_NT[agent, agent : agent + n_rest] = rest_T
            mask_NT[agent, n_prefix : n_prefix + agent] = 0
        last = n_prefix + n_rest - 1  # no filling is beyond the model's positions
        positions_NT = (mask_NT.cumsum(-1) - 1)[:, n_prefix:].clamp_max(last)
        (cache,) = caches_of(self.reader, (), self.pool, n_agents, together=True)
        device = self.model.device
        with (
            attend_in_place(self.model) if self.reader == "cascade" else read_privately(self.model)
        ):
            logits_NTV = self.model(
                input_ids=ids_NT.to(device),
                attention_mask=mask_NT.to(device),
                position_ids=positions_NT.to(device),
                past_key_values=cache,
            ).logits
        scored = [logits_NTV[n, n : n + n_rest - 1] for n in range(n_agents)]
        return torch.stack(scored).float().log_softmax(dim=-1)

    def compare_to(self, full: "Reading") -> Comparison:
        """Per scored token, this reading against the uncompressed one."""
        return compare(full.log_probs_TV, self.log_probs_TV, self.document.rest_BT)

    def answers(self, n_agents: int) -> list[str]:
        """The first `n_agents` agents' greedy answers; agents already asked are not asked again."""
        new = self.document.questions[len(self._answers) : n_agents]
        if new:
            pool = self.asked_pool or self.pool
            self._answers += pool.ask(
                self.model,
                self.tokenizer,
                [question.prompt for question in new],
                max_new_tokens=self.max_new_tokens,
                reader=self.reader,
            )
        return self._answers[:n_agents]


def _under(pool: SharedKVPool, recipe: Recipe, backend: str) -> SharedKVPool:
    layers = (pool.decode_layer(index) for index in range(pool.n_layers))
    return SharedKVPool.from_layers(layers, recipe, n_layers=pool.n_layers, backend=backend)
