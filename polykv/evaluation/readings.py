"""One document read under one recipe: what its scored rest and its agents' answers come from."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from polykv.attention.cascade import attend_in_place, read_privately
from polykv.documents import Document
from polykv.evaluation.continuation import Comparison, compare, score_rest
from polykv.pool import SharedKVPool
from polykv.recipe import Recipe


@dataclass(eq=False)
class Reading:
    """A pool over a document's prefix. Scores and answers are computed when asked for, once."""

    model: PreTrainedModel
    tokenizer: Any
    document: Document
    pool: SharedKVPool
    max_new_tokens: int
    reader: str = "inject"
    _answers: list[str] = field(default_factory=list)

    def under(self, recipe: Recipe, reader: str, backend: str = "torch") -> "Reading":
        """The same document's cache under another recipe, taken from this pool's decoded layers."""
        layers = (self.pool.decode_layer(index) for index in range(self.pool.n_layers))
        pool = SharedKVPool.from_layers(
            layers, recipe, n_layers=self.pool.n_layers, backend=backend
        )
        return Reading(self.model, self.tokenizer, self.document, pool, self.max_new_tokens, reader)

    @cached_property
    def log_probs_TV(self) -> Tensor:
        """Of the rest of the document: (scored tokens, vocabulary), fp32."""
        return self.score()

    def score(self) -> Tensor:
        """What `log_probs_TV` says, by one more agent."""
        if self.reader == "inject":
            with read_privately(self.model):
                return score_rest(self.model, self.pool.inject(), self.document.rest_BT)
        with attend_in_place(self.model):
            return score_rest(self.model, self.pool.reader(1), self.document.rest_BT)

    def compare_to(self, full: "Reading") -> Comparison:
        """Per scored token, this reading against the uncompressed one."""
        return compare(full.log_probs_TV, self.log_probs_TV, self.document.rest_BT)

    def answers(self, n_agents: int) -> list[str]:
        """The first `n_agents` agents' greedy answers; agents already asked are not asked again."""
        new = self.document.questions[len(self._answers) : n_agents]
        if new:
            self._answers += self.pool.ask(
                self.model,
                self.tokenizer,
                [question.prompt for question in new],
                max_new_tokens=self.max_new_tokens,
                reader=self.reader,
            )
        return self._answers[:n_agents]
