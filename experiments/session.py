"""What the cells of one process share: the model, the documents, their caches and what agents said of them.

Cells that share them run one after the other (experiments/sweep.py sees to that), so a sweep computes each once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from experiments.settings import answering, plain, scoring
from polykv import models
from polykv.documents import N_QUESTIONS, Document, load_documents
from polykv.evaluation.process import keep_freed_memory
from polykv.evaluation.readings import Reading
from polykv.pool import SharedKVPool, prefill
from polykv.progress import phase, track
from polykv.recipe import Recipe, load_recipe

# An agent's answer must not depend on how many other agents a sweep asks, and in a batch of another size rounding may
# change a token: so every batch has this size, and cells with fewer or more agents share it.
ASKED_TOGETHER = 5
MODEL, DOCUMENTS, PREFILLED = "the model", "the documents", "prefilled caches"
FULL, READ = "the baseline's readings", "a recipe's readings"
ASKED, SAID = "caches of what is asked", "answers"

Thing = TypeVar("Thing")
AskedPool = tuple[PreTrainedModel, Any, Document, SharedKVPool]


@dataclass
class _Kept:
    needs: Any
    value: Any
    of: tuple[str, ...]


@dataclass
class Session:
    """What is kept between cells. A cell that needs another model or document frees the one before.

    Attributes:
        storage_failed: why the results folder takes no more, once it does not; the remaining cells are skipped.
    """

    storage_failed: str = ""
    _held: dict[str, _Kept] = field(default_factory=dict)

    def kept(
        self, what: str, needs: Any, make: Callable[[], Thing], of: tuple[str, ...] = ()
    ) -> Thing:
        """What `make` gives, kept under the name `what` until it is asked for with other `needs`.

        Args:
            needs: all that it depends on, as plain values that can be compared.
            of: the names of kept things that it holds on to: where one of these is freed, it is freed as well.
        """
        held = self._held.get(what)
        if held is None or held.needs != needs:
            self.free(what)
            held = _Kept(needs, make(), of)
            self._held[what] = held
        return held.value

    def free(self, what: str) -> None:
        """Let go of it, and before it of what holds on to it."""
        for name in [name for name, held in self._held.items() if what in held.of]:
            self.free(name)
        if self._held.pop(what, None):
            phase(f"freeing {what}")

    def model(self, cfg: DictConfig) -> tuple[PreTrainedModel, Any]:
        """The cell's model, in the dtype that it scores in, and its tokenizer."""
        return self._model(scoring(cfg), cfg.device)

    def documents(self, cfg: DictConfig) -> list[Document]:
        """The cell's documents, cut to its context."""
        needs = _documents_need(cfg)
        return self.kept(
            DOCUMENTS,
            needs,
            lambda: load_documents(OmegaConf.create(needs), models.load_tokenizer(cfg.model)),
        )

    def full_readings(self, cfg: DictConfig) -> tuple[Reading, ...]:
        """The cell's documents read from their uncompressed cache by its reader: the baseline of its recipe."""

        def prefilled() -> tuple[Reading, ...]:
            model, _ = self.model(cfg)
            return tuple(
                Reading(model, document, _full_pool(model, document.prefix_BT))
                for document in track(self.documents(cfg), "prefilling the documents")
            )

        def make() -> tuple[Reading, ...]:
            dequantized = self.kept(PREFILLED, _full_need(cfg), prefilled, of=(MODEL,))
            return tuple(one.read_by(cfg.reader, cfg.backend) for one in dequantized)

        needs = [_full_need(cfg), cfg.reader, cfg.backend]
        return self.kept(FULL, needs, make, of=(PREFILLED,))

    def readings(self, cfg: DictConfig) -> tuple[Reading, ...]:
        """The cell's documents read under its recipe."""

        def make() -> tuple[Reading, ...]:
            recipe = Recipe.from_config(cfg.recipe)
            full = track(self.full_readings(cfg), f"encoding {recipe.name}")
            return tuple(one.under(recipe, cfg.backend) for one in full)

        needs = [_full_need(cfg), plain(cfg.recipe), cfg.reader, cfg.backend]
        return self.kept(READ, needs, make, of=(FULL,))

    def answers(
        self, cfg: DictConfig, n_documents: int, recipe: Recipe | None = None
    ) -> list[list[str]]:
        """What the agents of the first documents say under the cell's recipe (or another): a list for each document.

        Model and caches are in `model.answer_dtype`, where one is set. Every recipe is read by the cell's reader, so
        that answers under two of them differ by the recipe alone.
        """
        recipe = recipe or Recipe.from_config(cfg.recipe)
        needs = [plain(answering(cfg)), cfg.device, _documents_need(cfg), n_documents]
        said = self.kept(SAID, needs, dict)
        batches = []
        for first in range(0, cfg.n_agents, ASKED_TOGETHER):
            key = (recipe, cfg.reader, cfg.backend, first, cfg.max_new_tokens)
            if key not in said:
                said[key] = _ask(self._asked(cfg, needs, n_documents), *key)
            batches.append(said[key])
        return [
            [*chain(*of_document)][: cfg.n_agents] for of_document in zip(*batches, strict=True)
        ]

    def _asked(self, cfg: DictConfig, needs: Any, n_documents: int) -> tuple[AskedPool, ...]:
        """The uncompressed pool of what the agents of each document read."""

        def make() -> tuple[AskedPool, ...]:
            model, tokenizer = self._model(answering(cfg), cfg.device)
            documents = self.documents(cfg)[:n_documents]
            return tuple(
                (model, tokenizer, document, _full_pool(model, document.asked_BT))
                for document in track(documents, "prefilling for answers")
            )

        return self.kept(ASKED, needs, make, of=(MODEL,))

    def _model(self, chosen: DictConfig, device: str) -> tuple[PreTrainedModel, Any]:
        """One model in one dtype or two: for scores, and for answers."""
        settings = plain(chosen)
        dtype = settings.pop("dtype")
        by_dtype = self.kept(MODEL, [settings, device], dict)
        if dtype not in by_dtype:
            phase("loading the model")
            keep_freed_memory()
            by_dtype[dtype] = models.load_weights(chosen, device)
        return by_dtype[dtype]


@cache
def of_process() -> Session:
    """The session of this process: its cells come one after the other, from whatever launcher."""
    return Session()


def _documents_need(cfg: DictConfig) -> dict[str, Any]:
    needed = ("model", "document", "context", "prefix_fraction", "n_documents", "seed")
    # Documents carry at least N_QUESTIONS, whatever n_agents is, so that cells share them; a user's own are
    # as many as they are.
    own = cfg.document.get("questions") is not None
    n_questions = cfg.n_agents if own else max(N_QUESTIONS, cfg.n_agents)
    return plain(OmegaConf.masked_copy(cfg, needed)) | {"n_agents": n_questions}


def _full_need(cfg: DictConfig) -> Any:
    return [plain(scoring(cfg)), cfg.device, _documents_need(cfg)]


def _ask(
    asked: tuple[AskedPool, ...],
    recipe: Recipe,
    reader: str,
    backend: str,
    first: int,
    max_new_tokens: int,
) -> list[list[str]]:
    """What the agents from number `first` on say, as many as are asked together."""
    found = []
    for model, tokenizer, document, full in track(asked, f"{recipe.name} answers"):
        pool = full.under(recipe, backend)
        questions = document.questions[first : first + ASKED_TOGETHER]
        prompts = [question.prompt for question in questions]
        found.append(pool.ask(model, tokenizer, prompts, max_new_tokens, reader))
    return found


def _full_pool(model: PreTrainedModel, ids_BT: Tensor) -> SharedKVPool:
    return SharedKVPool.from_cache(prefill(model, ids_BT), load_recipe("full"), backend="torch")
