"""KL divergence along a reply that is generated from a compressed prompt (polykv/evaluation/decode_drift.py)."""

import math

import numpy as np
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from experiments import compare, settings
from experiments.session import MODEL, Session
from experiments.study import Study
from polykv import loading, models
from polykv.documents import question_template
from polykv.errors import PolyKVError
from polykv.evaluation import continuation, decode_drift, gsm8k, prompts
from polykv.evaluation.continuation import UNITS, Comparison
from polykv.evaluation.decode_drift import Reply, drift, log_probs, write_replies
from polykv.evaluation.per_token import same_top1
from polykv.evaluation.process import return_freed_memory
from polykv.greedy import end_tokens
from polykv.progress import phase, track
from polykv.recipe import Recipe, load_recipe
from polykv.results import Rows
from polykv.supported import check_length, check_padding, check_rope

BLOCKS = 16  # that a reply of max_new_tokens is cut into
# mode: one of decode_drift.MODES, empty in rows of the uncompressed run alone. text: the digest of prompt and reply.
# block: its number in the reply, empty in rows of a whole reply; position: the number of its first token. page_tokens:
# new tokens that are quantized together, empty in mode `exact`.
COLUMNS = {
    "mode": str,
    "text": str,
    "block": int,
    "position": int,
    "page_tokens": int,
    "quantization": str,
}
METRICS = ("kl", "same_top1")
# What the replies depend on; cells that agree in these share them.
SHARED = (
    "model", "weights", "device", "prompts", "prompts_digest", "n_prompts", "max_new_tokens", "ignore_end",
)  # fmt: skip
REPLIES = "replies"


def settle(cfg: DictConfig) -> DictConfig:
    """The settled config, with the digest of the prompts' file."""
    settled = compare.seeded(cfg)
    settled.prompts_digest = prompts.digest(cfg.prompts)
    settled.context = None  # not read: a model may have fewer positions than its default
    return settled


def check(cfg: DictConfig, session: Session) -> None:
    """Check the settings, and that prompts and replies fit the model's positions.

    Raises:
        PolyKVError: one line, for bad input.
    """
    settings.check_common(cfg)
    settings.check_dequantizes(cfg)
    settings.check_keeps_all(cfg, f"experiment={cfg.study}")
    settings.check_full_attention(cfg)
    settings.check_trained(cfg, "experiment=polykv_memory")
    settings.check_whole(cfg, "n_prompts", "page_tokens")
    if not isinstance(cfg.ignore_end, bool):
        raise PolyKVError(f"ignore_end={cfg.ignore_end!r}; it takes true or false")
    settings.check_hub(cfg)
    architecture = models.load_config(cfg.model)
    check_padding(architecture)
    for number, ids_T in enumerate(_prompts(cfg, models.load_tokenizer(cfg.model))):
        about, n_tokens = f"prompt {number} with its reply", len(ids_T) + cfg.max_new_tokens
        if len(ids_T) < 2:
            raise PolyKVError(f"prompt {number} of prompts={cfg.prompts} has one token; give more")
        check_length(architecture, n_tokens, about)
        check_rope(architecture, len(ids_T) - 1, n_tokens, about)


def run(cfg: DictConfig, session: Session) -> Rows:
    """Means over each reply and over its blocks: KL and same top token by mode, and the full run's surprisal."""
    rows = settings.new_rows(
        cfg,
        COLUMNS,
        document=prompts.label(cfg.prompts),
        context_tokens=None,
        reader=cfg.reader,
        quantization=loading.quantized(cfg.model),
    )
    model, _ = session.model(cfg)
    recipe, length = Recipe.from_config(cfg.recipe), math.ceil(cfg.max_new_tokens / BLOCKS)
    replies = track(_replies(cfg, session), f"replies under {recipe.name}")
    full = load_recipe("full")
    for sample, reply in enumerate(replies):
        about = {"sample": sample, "text": reply.digest}
        # Once more for every recipe: those of all replies, kept for all recipes, take gigabytes on a large vocabulary.
        full_TV = log_probs(model, reply, full)
        found = drift(model, reply, full_TV, recipe, cfg.page_tokens, cfg.backend)
        _add(rows, found["exact"], ("nll_full",), length, **about)
        _add(rows, found["exact"], METRICS, length, mode="exact", **about)
        paged = {"mode": "pages", "page_tokens": cfg.page_tokens}
        _add(rows, found["pages"], METRICS, length, **paged, **about)
        del full_TV
        return_freed_memory()
    return rows


def _add(
    rows: Rows, found: Comparison, metrics: tuple[str, ...], length: int, **about: str | int
) -> None:
    """Add the mean over the reply, and over each block of `length` tokens."""
    tokens, why = found.per_token(), continuation.why_not_finite([found])
    for metric in metrics:
        values = tokens[metric]
        parts: list[tuple[dict[str, int], np.ndarray]] = [({}, values)]
        for block, start in enumerate(range(0, len(values), length)):
            place = {"block": block, "position": start}
            parts.append((place, values[start : start + length]))
        for place, part in parts:
            with np.errstate(invalid="ignore"):  # values that are not finite, which `why` explains
                mean = float(part.mean())
            rows.add(metric, mean, UNITS[metric], why=why, n=len(part), **place, **about)


def _replies(cfg: DictConfig, session: Session) -> list[Reply]:
    """The uncompressed run's replies."""

    def make() -> list[Reply]:
        model, tokenizer = session.model(cfg)
        stops = () if cfg.ignore_end else end_tokens(model, tokenizer)
        phase("writing replies")
        return write_replies(model, _prompts(cfg, tokenizer), cfg.max_new_tokens, stops)

    needs = settings.plain(OmegaConf.masked_copy(cfg, SHARED))
    return session.kept(REPLIES, needs, make, of=(MODEL,))


def _prompts(cfg: DictConfig, tokenizer: object) -> list[Tensor]:
    """Ids (tokens,) of the cell's prompts."""
    style, template = cfg.model.get("question_style", "plain"), question_template(cfg)
    texts = prompts.load(cfg.prompts, cfg.n_prompts)
    return [prompts.ids_of(tokenizer, text, style, template) for text in texts]


STUDY = Study(
    name="decode_drift",
    title="Drift while decoding",
    question="Does the divergence from the uncompressed run grow along a generated reply?",
    run=run,
    check=check,
    settle=settle,
    also_read=("reader",),
    made_by=(prompts, gsm8k, continuation, same_top1, decode_drift),
    settings=(*SHARED, "recipe", "page_tokens", "backend", "seed"),
    columns=COLUMNS,
)
