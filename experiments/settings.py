"""The settings of a cell made explicit, what is refused of them, and the columns that they give its rows."""

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
from polykv.evaluation.per_token import METRICS
from polykv.pool import check_reader
from polykv.recipe import Recipe
from polykv.reference import documents as generated
from polykv.results import Rows
from polykv.supported import check_attention, check_length, check_model, check_rope
from polykv.tokens import encode

if TYPE_CHECKING:
    from experiments.session import Session

# Settings of a pool over documents that what is measured of it depends on.
POOL = (
    "model", "weights", "document", "context", "prefix_fraction", "n_documents", "recipe", "reader", "backend",
    "seed", "device",
)  # fmt: skip
# Modules that make the documents and scores of a pool.
SCORES = (texts, generated, cascade, continuation, *METRICS.values(), statistics)
POSITIVE = ("n_agents", "n_documents", "max_new_tokens")
# Settings that name a file, and where the digest of what it holds goes.
FILES = (
    ("document", "path", "digest"),
    ("document", "questions", "questions_digest"),
    ("relay", "path", "digest"),
)


def settle(cfg: DictConfig) -> DictConfig:
    """The config with everything that depends on this machine made explicit, for identity and rows.

    backend=auto is the fastest one here for reader=in_place, for encoding and attention alike. Reader dequantize
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
        in_place = cfg.reader == "in_place"
        settled.backend = kernels.pick_backend("auto", device) if in_place else "torch"
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
    if cfg.model.get("device_map") and not (spread and cfg.reader == "dequantize"):
        raise PolyKVError(
            f"model.device_map spreads a model over devices, and {cfg.study} with "
            f"reader={cfg.reader} works on one; use experiment=polykv_quality reader=dequantize, or device_map=null"
        )
    kernels.pick_backend(cfg.backend, device)
    Recipe.from_config(cfg.recipe)
    architecture = models.load_config(cfg.model)
    check_model(architecture)
    if cfg.weights == "local":
        models.check_folder(cfg.model)
    if "in_place" in (cfg.get("readers") or [cfg.reader]):
        check_attention(architecture, "leave reader=in_place out")
    check_document(cfg)
    if cfg.context is not None:
        check_length(architecture, cfg.context, f"context={cfg.context}")


def check_quality(cfg: DictConfig, session: "Session") -> None:
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
    for document in session.documents(cfg):
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
        mend = packaged.remedy(cfg.model) + mend
        hub.check_reachable(cfg.model.path, f"model {cfg.model.name}:", mend, cfg.model.revision)


def check_dequantizes(cfg: DictConfig) -> None:
    """Refuse another reader where unshared caches are what an experiment measures.

    Raises:
        PolyKVError: names the reader.
    """
    if cfg.reader != "dequantize":
        raise PolyKVError(
            f"{cfg.study} reads unshared caches, not reader={cfg.reader}; use reader=dequantize"
        )


def new_rows(cfg: DictConfig, columns: Mapping[str, type] | None = None, **about: Any) -> Rows:
    """Rows that say which cell they belong to; `columns` are those of the study."""
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
    """The dtype of rows that come from answers."""
    return loading.dtype_label(answering(cfg))


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


def plain(settings: Any) -> Any:
    """Settings as plain values, which can be compared."""
    return OmegaConf.to_container(settings, resolve=True)
