"""Settings of a cell: made explicit, checked, and written into its rows.

Every `check` of this package raises PolyKVError for bad input: one line that says what is wrong and what to do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from polykv import chat, config, digests, hub, kernels, loading, models, naming, packaged, shipped
from polykv import documents as texts
from polykv.attention import cascade
from polykv.documents import check_document
from polykv.errors import PolyKVError
from polykv.evaluation import continuation, statistics
from polykv.evaluation.concurrency import READERS
from polykv.evaluation.per_token import METRICS
from polykv.pool import check_reader
from polykv.recipe import Recipe
from polykv.reference import documents as generated
from polykv.results import Rows
from polykv.supported import (
    check_attention,
    check_every_token,
    check_length,
    check_model,
    check_rope,
    counts_padding,
)
from polykv.tokens import encode

if TYPE_CHECKING:
    from experiments.session import Session

# Settings that measurements of a pool over documents depend on.
POOL = (
    "model", "weights", "document", "context", "prefix_fraction", "n_documents", "recipe", "reader", "backend",
    "seed", "device",
)  # fmt: skip
# Modules that make documents and compute scores.
SCORES = (texts, generated, cascade, continuation, *METRICS.values(), statistics)
# (group, setting that names a file, setting for the digest of its content)
FILES = (
    ("document", "path", "digest"),
    ("document", "questions", "questions_digest"),
    ("relay", "path", "digest"),
)


def settle(cfg: DictConfig, fastest: bool = False) -> DictConfig:
    """The config with everything that depends on this machine made explicit, for identity and rows.

    backend=auto: with reader=in_place, or if `fastest`, the fastest one here; else torch, whose numbers are the same on
    every machine. Groups with overrides get a label (polykv/naming.py).

    Args:
        fastest: for studies of cards, in which all backends write the same bits, but for the rounding of ties under
            policies with store `codecs`.
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
        fastest = fastest or cfg.reader == "in_place"
        settled.backend = kernels.pick_backend("auto", device) if fastest else "torch"
    return settled


def _add_digests(settled: DictConfig) -> None:
    """Add digests of the files that settings name: a rewritten file makes another cell."""
    for group in ("document", "relay"):
        if group in settled and settled[group].name in shipped.FILES:
            settled[group].digest = shipped.digest(settled[group].name)
    for group, key, name in FILES:
        setting = f"{group}.{key}"
        if path := OmegaConf.select(settled, setting):  # `check` reports a missing one
            settled[group][name] = digests.of_file(Path(str(path)).expanduser(), setting)


def label(cfg: DictConfig, group: str) -> str:
    """The name in rows of the cell's model, document, recipe or another of naming.GROUPS, overrides included."""
    return OmegaConf.select(cfg, f"labels.{group}") or cfg[group].name


def check_common(cfg: DictConfig, spread: bool = False) -> None:
    """Check what every study has in common. `spread`: the study takes a model on several devices."""
    check_whole(cfg, "n_agents", "n_documents", "max_new_tokens")
    check_whole(cfg, "seed", least=0)
    if cfg.context is not None:
        check_whole(cfg, "context", instead=", or null for a whole text")
    if not isinstance(cfg.prefix_fraction, float) or not 0 < cfg.prefix_fraction < 1:
        raise PolyKVError(
            f"prefix_fraction={cfg.prefix_fraction!r}; it takes a number between 0 and 1"
        )
    check_reader(cfg.reader)
    models.check_weights(cfg.model)
    for dtype in {cfg.model.dtype, answering(cfg).dtype}:
        models.pick_dtype(dtype)
    device = models.pick_device(cfg.device)
    loading.check(cfg.model, device)
    if cfg.model.get("device_map") and not (spread and cfg.reader == "dequantize"):
        raise PolyKVError(
            f"model.device_map spreads a model over devices, and {cfg.study} with "
            f"reader={cfg.reader} works on one; use experiment=polykv_quality reader=dequantize, or device_map=null"
        )
    kernels.pick_backend(cfg.backend, device)
    recipe, architecture = Recipe.from_config(cfg.recipe), models.load_config(cfg.model)
    check_model(architecture)
    if recipe.keep:
        check_every_token(architecture, f"recipe {recipe.name!r}, which drops tokens,")
    if cfg.weights == "local":
        models.check_folder(cfg.model)
    readers = cfg.get("readers") or [cfg.reader]
    if "dequantize" in readers:
        recipe.check_exact_suffix("reader=dequantize")
    if "in_place" in readers:
        check_attention(architecture, "leave reader=in_place out")
    check_document(cfg)
    if cfg.context is not None:
        check_length(architecture, cfg.context, f"context={cfg.context}")


def check_quality(cfg: DictConfig, session: "Session") -> None:
    """Check what measuring quality takes: trained weights, and texts within the model's positions."""
    check_common(cfg, spread=True)
    check_trained(cfg, "experiment=polykv_memory")
    check_generated(cfg)
    check_hub(cfg)
    architecture = models.load_config(cfg.model)
    tokenizer = models.load_tokenizer(cfg.model)
    about = f"document={cfg.document.name} context={cfg.context}"
    for document in session.documents(cfg):
        check_length(architecture, document.n_tokens, about)
        check_rope(architecture, document.prefix_BT.shape[1], document.n_tokens, about)
        for question in document.questions[: cfg.n_agents]:
            n_asked = encode(tokenizer, question.prompt).shape[1]
            needed = document.asked_BT.shape[1] + n_asked + cfg.max_new_tokens
            check_length(architecture, needed, f"{about} with question and answer")
            check_rope(architecture, document.asked_BT.shape[1], needed, f"{about} with an answer")


def check_whole(cfg: DictConfig, *names: str, least: int = 1, instead: str = "") -> None:
    """Check that these settings are whole numbers of at least `least`. `instead`: what the message ends in."""
    for name in names:
        value = cfg.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            given = f"{name}={value!r}"
            raise PolyKVError(f"{given}; it takes a whole number from {least} up{instead}")


def check_readers(cfg: DictConfig) -> None:
    """Check that `readers` lists at least one of READERS, and no other."""
    if not cfg.readers:
        raise PolyKVError(f"readers=[] has no reader; name one or more of {', '.join(READERS)}")
    for reader in cfg.readers:
        if reader not in READERS:
            raise PolyKVError(f"no reader named {reader!r}; there are: {', '.join(READERS)}")


def check_context(cfg: DictConfig, example: int) -> None:
    """Check that `context` is set, in studies that read no text whose length it could be."""
    if cfg.context is None:
        raise PolyKVError(
            f"context=null is the length of a text, and none is read here; set context={example}"
        )


def check_trained(cfg: DictConfig, instead: str) -> None:
    """Check that the weights are trained. `instead`: a study that takes random ones."""
    if cfg.weights == "random":
        raise PolyKVError(
            f"quality cannot be measured on random weights (model={cfg.model.name}); leave weights "
            f"out, or use {instead}"
        )


def check_generated(cfg: DictConfig) -> None:
    """Check that generated documents are read by the model that they are written for."""
    if cfg.document.name == "generated" and cfg.weights != "reference":
        raise PolyKVError(
            f"document=generated is written for the reference model, not for {cfg.model.name}; "
            "use document=moon_landing, packet_networks, wikitext2 or file"
        )


def check_hub(
    cfg: DictConfig, mend: str = "use model=local model.path=/a/folder, or model=reference"
) -> None:
    """Check that a hub can be reached, if the weights are there. `mend`: what the message proposes."""
    if cfg.weights == "hub":
        mend = packaged.remedy(cfg.model) + mend
        hub.check_reachable(cfg.model.path, f"model {cfg.model.name}:", mend, cfg.model.revision)


def check_full_attention(cfg: DictConfig, what: str = "") -> None:
    """Check that the model has neither sliding windows nor states, where those are not measured; raises PolyKVError.

    `what` begins the message: the setting, or by default the study.
    """
    check_every_token(models.load_config(cfg.model), what or f"study {cfg.study}")


def check_padded(cfg: DictConfig) -> None:
    """Check that agents of one batch, each after padding of its own, read the pool alike; raises PolyKVError."""
    architecture = models.load_config(cfg.model)
    if counts_padding(architecture, unshared=cfg.reader != "in_place"):
        never = counts_padding(architecture, unshared=False)
        raise PolyKVError(
            f"reader={cfg.reader} pads agents that read together, and {architecture.model_type} counts padding; "
            f"use {'another model' if never else 'reader=in_place'}"
        )


def check_dequantizes(cfg: DictConfig) -> None:
    """Check that the reader is `dequantize`, in studies that measure unshared caches."""
    if cfg.reader != "dequantize":
        raise PolyKVError(
            f"{cfg.study} reads unshared caches, not reader={cfg.reader}; use reader=dequantize"
        )


def check_keeps_all(cfg: DictConfig, what: str) -> None:
    """Check that the recipe drops no tokens; `what` (a setting) compares every token."""
    Recipe.from_config(cfg.recipe).check_keeps_all(what)


def new_rows(cfg: DictConfig, columns: Mapping[str, type] | None = None, **about: Any) -> Rows:
    """Empty rows with the cell's fixed columns filled in. `columns` are the study's, `about` overrides values."""
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
    return Rows(columns, **(shared | about))


def answer_dtype(cfg: DictConfig) -> str:
    """The dtype of rows about answers."""
    return loading.dtype_label(answering(cfg))


def scoring(cfg: DictConfig) -> DictConfig:
    """The model's settings for scores, in `model.dtype`."""
    chosen = cfg.model.copy()
    chosen.pop("answer_dtype", None)
    return chosen


def answering(cfg: DictConfig) -> DictConfig:
    """The model's settings for answers, in `model.answer_dtype` if set."""
    chosen = OmegaConf.merge(cfg.model, {"dtype": cfg.model.get("answer_dtype") or cfg.model.dtype})
    chosen.pop("answer_dtype", None)
    return chosen


def plain(settings: Any) -> Any:
    """Settings as plain values, interpolations resolved."""
    return OmegaConf.to_container(settings, resolve=True)
