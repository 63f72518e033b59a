"""What experiments share: the settings of a cell made explicit, its rows, and what cells need but once.

A cell's model, documents, prefill and uncompressed run are kept between cells, so that a sweep computes
them once. Cells that share them run one after the other (experiments/sweep.py sees to that).
"""

import json
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from polykv import chat, config, digests, hub, kernels, loading, models, naming, packaged, shipped
from polykv import documents as texts
from polykv.attention import cascade
from polykv.documents import N_QUESTIONS, Document, check_document, load_documents
from polykv.errors import PolyKVError
from polykv.evaluation import continuation, statistics
from polykv.evaluation.process import keep_freed_memory
from polykv.evaluation.readings import Reading
from polykv.pool import SharedKVPool, check_reader, prefill
from polykv.progress import phase, track
from polykv.recipe import Recipe, load_recipe
from polykv.reference import documents as generated
from polykv.results import Rows
from polykv.supported import check_attention, check_length, check_model, check_rope
from polykv.tokens import encode

# A study declares the modules that make its numbers as MADE_BY: their versions are part of what a cell is. Of scores:
SCORES = (texts, generated, cascade, continuation, statistics)
# An agent's answer must not depend on how many other agents a sweep asks, and in a batch of another size rounding may
# change a token: so every batch has this size, and cells with fewer or more agents share it.
ASKED_TOGETHER = 5
POSITIVE = ("n_agents", "n_documents", "max_new_tokens")
# Settings that name a file, and where the digest of what it holds goes.
FILES = (
    ("document", "path", "digest"),
    ("document", "questions", "questions_digest"),
    ("relay", "path", "digest"),
)


def settle(cfg: DictConfig) -> DictConfig:
    """The config with everything that depends on this machine made explicit, for identity and rows.

    backend=auto is the fastest one here for reader=cascade, for encoding and attention alike. Reader inject
    rebuilds the cache in torch; auto encodes it in torch too, so that its numbers are the same everywhere.
    What is not its YAML gets a label; what is, none: its cells stay the same.

    Raises:
        PolyKVError: a local file or model that cannot be read.
    """
    settled = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    if settled.document.name == "auto":
        suited = "generated" if settled.weights in ("reference", "random") else "wikitext2"
        settled.document = config.load_group("document", suited)
    if labels := naming.labels(settled):
        settled.labels = labels
    settled.model.weights = settled.weights
    models.settle(settled.model)
    settled.weights = settled.model.weights
    _add_digests(settled)
    device = models.pick_device(cfg.device)
    loading.settle(settled.model, device)
    chat.settle(settled.model)
    settled.device = device.type if cfg.device == "auto" else cfg.device
    if cfg.backend == "auto":
        cascade = cfg.reader == "cascade"
        settled.backend = kernels.pick_backend("auto", device) if cascade else "torch"
    return settled


def _add_digests(settled: DictConfig) -> None:
    """A file rewritten is another file, though the path is the same."""
    for group in ("document", "relay"):
        if group in settled and settled[group].name in shipped.FILES:
            settled[group].digest = shipped.digest(settled[group].name)
    for group, key, name in FILES:
        setting = f"{group}.{key}"
        if path := OmegaConf.select(settled, setting):  # `check` says where one is missing
            settled[group][name] = digests.of_file(Path(path).expanduser(), setting)


def label(cfg: DictConfig, group: str) -> str:
    """What rows call the cell's model, document, recipe or another of naming.GROUPS."""
    return OmegaConf.select(cfg, f"labels.{group}") or cfg[group].name


def check_common(cfg: DictConfig, spread: bool = False) -> None:
    """What every experiment refuses before any work. `spread`: it can take a model on several devices.

    Raises:
        PolyKVError: one clear line.
    """
    for name in POSITIVE:
        if not isinstance(cfg[name], int) or cfg[name] < 1:
            raise PolyKVError(f"{name}={cfg[name]!r}; it takes a whole number from 1 up")
    if cfg.context is not None and (not isinstance(cfg.context, int) or cfg.context < 1):
        raise PolyKVError(f"context={cfg.context!r}; it takes a whole number of tokens, or null")
    if not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise PolyKVError(f"seed={cfg.seed!r}; it takes a whole number from 0 up")
    if not isinstance(cfg.prefix_fraction, float) or not 0 < cfg.prefix_fraction < 1:
        raise PolyKVError(
            f"prefix_fraction={cfg.prefix_fraction!r}; it takes a number between 0 and 1"
        )
    check_reader(cfg.reader)
    models.check_weights(cfg.model)
    models.pick_dtype(cfg.model.dtype)
    device = models.pick_device(cfg.device)
    loading.check(cfg.model, device)
    if cfg.model.get("device_map") and not (spread and cfg.reader == "inject"):
        raise PolyKVError(
            f"model.device_map spreads a model over devices, and {cfg.experiment_name} with "
            f"reader={cfg.reader} works on one; use experiment=polykv_quality reader=inject, or device_map=null"
        )
    kernels.pick_backend(cfg.backend, device)
    Recipe.from_config(cfg.recipe)
    architecture = models.load_config(cfg.model)
    check_model(architecture)
    if cfg.weights == "local":
        models.check_folder(cfg.model)
    if "cascade" in (cfg.get("readers") or [cfg.reader]):
        check_attention(architecture, "leave reader=cascade out")
    check_document(cfg)
    if cfg.context is not None:
        check_length(architecture, cfg.context, f"context={cfg.context}")


def check_quality(cfg: DictConfig) -> None:
    """What a quality measurement needs: trained weights that can be had, and texts within the model's positions.

    Raises:
        PolyKVError: random weights, no hub, a folder without a model, or a text that is too long as it is tokenised.
    """
    check_common(cfg, spread=True)
    if cfg.weights == "random":
        raise PolyKVError(
            f"quality cannot be measured on random weights (model={cfg.model.name}); leave weights "
            "out, or use experiment=polykv_memory"
        )
    if cfg.document.name == "generated" and cfg.weights != "reference":
        raise PolyKVError(
            f"document=generated is written for the reference model, not for {cfg.model.name}; "
            "use document=moon_landing, packet_networks, wikitext2 or file"
        )
    check_hub(cfg)
    architecture = models.load_config(cfg.model)
    tokenizer = models.load_tokenizer(cfg.model)
    about = f"document={cfg.document.name} context={cfg.context}"
    for document in documents_of(cfg):
        check_length(architecture, document.n_tokens, about)
        check_rope(architecture, document.prefix_BT.shape[1], document.n_tokens, about)
        for question in document.questions[: cfg.n_agents]:
            n_asked = encode(tokenizer, question.prompt).shape[1]
            needed = document.asked_BT.shape[1] + n_asked + cfg.max_new_tokens
            check_length(architecture, needed, f"{about} with question and answer")
            check_rope(architecture, document.asked_BT.shape[1], needed, f"{about} with an answer")


def check_hub(
    cfg: DictConfig, mend: str = "use model=local model.path=/a/folder, or model=reference"
) -> None:
    """Refuse weights of a hub that cannot be reached.

    Raises:
        PolyKVError: with the mend.
    """
    if cfg.weights == "hub":
        mend = packaged.mend(cfg.model) + mend
        hub.check_reachable(cfg.model.path, f"model {cfg.model.name}:", mend, cfg.model.revision)


def check_injects(cfg: DictConfig) -> None:
    """Refuse another reader where private caches are what an experiment measures.

    Raises:
        PolyKVError: names the reader.
    """
    if cfg.reader != "inject":
        raise PolyKVError(
            f"{cfg.experiment_name} reads private caches, not reader={cfg.reader}; use reader=inject"
        )


def new_rows(cfg: DictConfig, **columns: Any) -> Rows:
    """Rows that say which cell they belong to."""
    shared = {
        "model": label(cfg, "model"),
        "weights": models.weights_label(cfg.model),
        "document": label(cfg, "document"),
        "context_tokens": cfg.context,
        "n_agents": cfg.n_agents,
        "recipe": label(cfg, "recipe"),
        "backend": cfg.backend,
        "seed": cfg.seed,
        "device": cfg.device,
        "dtype": loading.dtype_label(cfg.model),
    }
    return Rows(**(shared | columns))


def document_rows(cfg: DictConfig, **columns: Any) -> Rows:
    """Rows of a cell that reads documents: their length as they are tokenised, and whether they begin with BOS."""
    document = documents_of(cfg)[0]
    read = {"context_tokens": document.n_tokens, "bos": document.bos, "reader": cfg.reader}
    return new_rows(cfg, **(read | columns))


def answer_dtype(cfg: DictConfig) -> str:
    """The dtype of rows that come from answers."""
    return loading.dtype_label(answering(cfg))


def model_of(cfg: DictConfig) -> tuple[PreTrainedModel, Any]:
    """The cell's model and tokenizer, loaded once."""
    return _model(as_key(scoring(cfg)), cfg.device)


def documents_of(cfg: DictConfig) -> list[Document]:
    """The cell's documents, cut to its context."""
    needed = ("model", "document", "context", "prefix_fraction", "n_documents", "seed")
    # Documents carry at least N_QUESTIONS, whatever n_agents is, so that cells share them; a user's own are
    # as many as they are.
    own = cfg.document.get("questions") is not None
    n_questions = cfg.n_agents if own else max(N_QUESTIONS, cfg.n_agents)
    shared = {name: cfg[name] for name in needed} | {"n_agents": n_questions}
    return _documents(as_key(shared))


def full_readings(cfg: DictConfig) -> tuple[Reading, ...]:
    """The cell's documents read from their uncompressed cache by its reader: the baseline of its recipe."""
    injected = _full_readings(as_key(scoring(cfg)), cfg.device, tuple(documents_of(cfg)))
    return _baselines(injected, cfg.reader, cfg.backend)


def readings(cfg: DictConfig) -> tuple[Reading, ...]:
    """The cell's documents read under its recipe."""
    return _readings(full_readings(cfg), as_key(cfg.recipe), cfg.backend)


def answers(cfg: DictConfig, n_documents: int, recipe: Recipe | None = None) -> list[list[str]]:
    """What the agents of the first documents say under the cell's recipe (or another): a list for each document.

    Model and caches are in `model.answer_dtype`, where one is set. Every recipe is read by the cell's reader, so
    that answers under two of them differ by the recipe alone.
    """
    documents = tuple(documents_of(cfg)[:n_documents])
    asked = _asked_pools(as_key(answering(cfg)), cfg.device, documents)
    recipe = recipe or Recipe.from_config(cfg.recipe)
    batches = [
        _answers(asked, recipe, cfg.reader, cfg.backend, first, cfg.max_new_tokens)
        for first in range(0, cfg.n_agents, ASKED_TOGETHER)
    ]
    return [[*chain(*of_document)][: cfg.n_agents] for of_document in zip(*batches, strict=True)]


def scoring(cfg: DictConfig) -> DictConfig:
    """The cell's model as it scores: in `model.dtype`."""
    chosen = cfg.model.copy()
    chosen.pop("answer_dtype", None)
    return chosen


def answering(cfg: DictConfig) -> DictConfig:
    """The cell's model as it answers: in `model.answer_dtype`, where one is set."""
    chosen = OmegaConf.merge(cfg.model, {"dtype": cfg.model.get("answer_dtype") or cfg.model.dtype})
    chosen.pop("answer_dtype", None)
    return chosen


@lru_cache(maxsize=2)  # in float32 for scores, in bfloat16 for answers
def _model(model: str, device: str) -> tuple[PreTrainedModel, Any]:
    phase("loading the model")
    keep_freed_memory()
    return models.load_weights(from_key(model), device)


@lru_cache(maxsize=32)
def _documents(key: str) -> list[Document]:
    cfg = from_key(key)
    return load_documents(cfg, models.load_tokenizer(cfg.model))


@lru_cache(maxsize=1)
def _full_readings(
    model_key: str, device: str, documents: tuple[Document, ...]
) -> tuple[Reading, ...]:
    model, _ = _model(model_key, device)
    return tuple(
        Reading(model, document, _full_pool(model, document.prefix_BT))
        for document in track(documents, "prefilling the documents")
    )


@lru_cache(maxsize=1)
def _baselines(injected: tuple[Reading, ...], reader: str, backend: str) -> tuple[Reading, ...]:
    return tuple(one.by(reader, backend) for one in injected)


@lru_cache(maxsize=1)
def _readings(full: tuple[Reading, ...], recipe: str, backend: str) -> tuple[Reading, ...]:
    made = Recipe.from_config(from_key(recipe))
    return tuple(one.under(made, backend) for one in track(full, f"encoding {made.name}"))


AskedPool = tuple[PreTrainedModel, Any, Document, SharedKVPool]


@lru_cache(maxsize=1)
def _asked_pools(
    model_key: str, device: str, documents: tuple[Document, ...]
) -> tuple[AskedPool, ...]:
    """The uncompressed pool of what the agents of each document read."""
    model, tokenizer = _model(model_key, device)
    return tuple(
        (model, tokenizer, document, _full_pool(model, document.asked_BT))
        for document in track(documents, "prefilling for answers")
    )


@lru_cache(maxsize=256)  # of text
def _answers(
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


def as_key(settings: Any) -> str:
    if isinstance(settings, DictConfig):
        settings = OmegaConf.to_container(settings, resolve=True)
    plain = {
        k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in settings.items()
    }
    return json.dumps(plain, sort_keys=True)


def from_key(key: str) -> DictConfig:
    return OmegaConf.create(json.loads(key))
