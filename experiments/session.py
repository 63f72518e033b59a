"""The session of one process: the model, documents, prefilled caches and answers that its cells share.

A sweep runs cells that share them one after the other (experiments/sweep.py), so that each is computed once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from polykv.evaluation import online
from polykv.evaluation.process import keep_freed_memory
from polykv.evaluation.readings import Reading
from polykv.parts import Parts
from polykv.pool import SharedKVPool, prefill
from polykv.progress import phase, track
from polykv.recipe import Recipe, load_recipe

# Batch size of answers, whatever n_agents is: in a batch of another size rounding can change a token, and cells that
# differ in n_agents could not share their answers.
ASKED_TOGETHER = 5
MODEL, DOCUMENTS, PREFILLED = "the model", "the documents", "prefilled caches"
FULL, READ = "the baseline's readings", "a recipe's readings"
ONLINE = "the baseline's scores in chunks"
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
    """A cache of what cells share, one value of each kind. A cell that needs another model frees the one before.

    Attributes:
        storage_failed: why the results folder could not be written; the remaining cells are then skipped.
        parts: where the running cell saves its finished parts; by default nowhere.
    """

    storage_failed: str = ""
    parts: Parts = Parts()
    _held: dict[str, _Kept] = field(default_factory=dict)

    @contextmanager
    def saving(self, parts: Parts) -> Iterator[None]:
        """Context in which a cell saves its finished parts there."""
        self.parts = parts
        try:
            yield
        finally:
            self.parts = Parts()

    def kept(
        self, what: str, needs: Any, make: Callable[[], Thing], of: tuple[str, ...] = ()
    ) -> Thing:
        """The value of `make()`, cached as `what` until it is requested with other `needs`.

        Args:
            needs: everything that the value depends on, as plain values that can be compared.
            of: names of cached values that this one refers to; it is freed together with any of them.
        """
        held = self._held.get(what)
        if held is None or held.needs != needs:
            self.free(what)
            held = _Kept(needs, make(), of)
            self._held[what] = held
        return held.value

    def free(self, what: str) -> None:
        """Drop a cached value and those that refer to it, each reported as a phase."""
        for name in [name for name, held in self._held.items() if what in held.of]:
            self.free(name)
        if self._held.pop(what, None):
            phase(f"freeing {what}")

    def model(self, cfg: DictConfig) -> tuple[PreTrainedModel, Any]:
        """The cell's model in its scoring dtype, and the tokenizer."""
        return self._model(scoring(cfg), cfg.device)

    def answering(self, cfg: DictConfig) -> tuple[PreTrainedModel, Any]:
        """The cell's model in the dtype of its answers, and the tokenizer."""
        return self._model(answering(cfg), cfg.device)

    def documents(self, cfg: DictConfig) -> list[Document]:
        """The cell's documents, cut to its context."""
        needs = _documents_need(cfg)
        return self.kept(
            DOCUMENTS,
            needs,
            lambda: load_documents(OmegaConf.create(needs), models.load_tokenizer(cfg.model)),
        )

    def full_readings(self, cfg: DictConfig) -> tuple[Reading, ...]:
        """The cell's documents under the uncompressed cache, read by the cell's reader: the recipe's baseline."""

        def prefilled() -> tuple[Reading, ...]:
            model, _ = self.model(cfg)
            return tuple(
                Reading(model, document, _full_pool(model, document.prefix_BT))
                for document in track(self.documents(cfg), "prefilling the documents")
            )

        def make() -> tuple[Reading, ...]:
            dequantized = self.kept(PREFILLED, _full_need(cfg), prefilled, of=(MODEL,))
            return tuple(one.in_mode(cfg.reader, cfg.backend) for one in dequantized)

        needs = [_full_need(cfg), cfg.reader, cfg.backend]
        return self.kept(FULL, needs, make, of=(PREFILLED,))

    def readings(self, cfg: DictConfig) -> tuple[Reading, ...]:
        """The cell's documents under its recipe."""

        def make() -> tuple[Reading, ...]:
            recipe = Recipe.from_config(cfg.recipe)
            full = track(self.full_readings(cfg), f"encoding {recipe.name}")
            return tuple(one.under(recipe, cfg.backend) for one in full)

        needs = [_full_need(cfg), plain(cfg.recipe), cfg.reader, cfg.backend]
        return self.kept(READ, needs, make, of=(FULL,))

    def full_online(self, cfg: DictConfig) -> tuple[tuple[Document, Tensor], ...]:
        """The cell's documents and their scores (online.score) under the uncompressed cache, in the same chunks."""

        def make() -> tuple[tuple[Document, Tensor], ...]:
            model, _ = self.model(cfg)
            full = load_recipe("full")
            return tuple(
                (document, online.score(model, document, full, cfg.chunk)[0])
                for document in track(self.documents(cfg), "scoring uncompressed")
            )

        return self.kept(ONLINE, [_full_need(cfg), cfg.chunk], make, of=(MODEL,))

    def answers(
        self, cfg: DictConfig, n_documents: int, recipe: Recipe | None = None
    ) -> list[list[str]]:
        """Answers of `cfg.n_agents` agents to each of the first documents, under the cell's recipe or another.

        Model and caches are in `model.answer_dtype`, if set. All recipes are read by the cell's reader, so that
        answers under two recipes differ by the recipe alone.
        """
        recipe = recipe or Recipe.from_config(cfg.recipe)
        said = self.kept(SAID, _asked_need(cfg, n_documents), dict)
        batches = []
        for first in range(0, cfg.n_agents, ASKED_TOGETHER):
            key = (recipe, cfg.reader, cfg.backend, first, cfg.max_new_tokens)
            if key not in said:
                said[key] = _ask(self.asked(cfg, n_documents), *key)
            batches.append(said[key])
        return [
            [*chain(*of_document)][: cfg.n_agents] for of_document in zip(*batches, strict=True)
        ]

    def asked(self, cfg: DictConfig, n_documents: int) -> tuple[AskedPool, ...]:
        """For each document: model, tokenizer, document, and the uncompressed pool that its agents read."""

        def make() -> tuple[AskedPool, ...]:
            model, tokenizer = self.answering(cfg)
            documents = self.documents(cfg)[:n_documents]
            return tuple(
                (model, tokenizer, document, _full_pool(model, document.asked_BT))
                for document in track(documents, "prefilling for answers")
            )

        return self.kept(ASKED, _asked_need(cfg, n_documents), make, of=(MODEL,))

    def _model(self, chosen: DictConfig, device: str) -> tuple[PreTrainedModel, Any]:
        """Model and tokenizer. One model is cached, in up to two dtypes: for scores and for answers."""
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
    """The session of this process, in which cells run one after the other whatever the launcher."""
    return Session()


def _documents_need(cfg: DictConfig) -> dict[str, Any]:
    needed = ("model", "document", "context", "prefix_fraction", "n_documents", "seed")
    # At least N_QUESTIONS whatever n_agents is, so that cells share documents; files have as many as they have.
    own = any(cfg.document.get(key) is not None for key in ("questions", "url"))
    n_questions = cfg.n_agents if own else max(N_QUESTIONS, cfg.n_agents)
    return plain(OmegaConf.masked_copy(cfg, needed)) | {"n_agents": n_questions}


def _full_need(cfg: DictConfig) -> Any:
    return [plain(scoring(cfg)), cfg.device, _documents_need(cfg)]


def _asked_need(cfg: DictConfig, n_documents: int) -> Any:
    return [plain(answering(cfg)), cfg.device, _documents_need(cfg), n_documents]


def _ask(
    asked: tuple[AskedPool, ...],
    recipe: Recipe,
    reader: str,
    backend: str,
    first: int,
    max_new_tokens: int,
) -> list[list[str]]:
    """Answers of one batch: of the agents from number `first` on, a list for each document."""
    found = []
    for model, tokenizer, document, full in track(asked, f"{recipe.name} answers"):
        pool = full.under(recipe, backend)
        questions = document.questions[first : first + ASKED_TOGETHER]
        prompts = [question.prompt for question in questions]
        found.append(pool.ask(model, tokenizer, prompts, max_new_tokens, reader))
    return found


def _full_pool(model: PreTrainedModel, ids_BT: Tensor) -> SharedKVPool:
    return SharedKVPool.from_cache(prefill(model, ids_BT), load_recipe("full"), backend="torch")
