"""Retrieval tasks over one pool: agents ask different questions of a document, and right answers are counted.

The cell of recipe `full` also asks of another document's pool and without any document: what is right there is no
retrieval, and a task on which these score separates no recipes.
"""

import time

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from experiments import compare, settings
from experiments import rows as write
from experiments.session import Session
from experiments.settings import answer_dtype
from experiments.study import Study
from polykv import chat, documents
from polykv.attention import cascade
from polykv.attention.cascade import attend_in_place, read_unshared
from polykv.documents import Document
from polykv.errors import PolyKVError
from polykv.evaluation import answers, retrieval
from polykv.evaluation.answers import contains
from polykv.evaluation.retrieval import as_continued, candidates, log_probs
from polykv.pool import SharedKVPool, generate
from polykv.progress import phase
from polykv.recipe import Recipe
from polykv.reference import documents as generated
from polykv.results import Rows
from polykv.tasks.given import DOCUMENT, NOTHING, OTHER
from polykv.tokens import encode, opening

# given: what the agents read (polykv/tasks/given.py). depth: where the document answers the question, 0 to 1. text: the
# document's digest.
COLUMNS = {**write.BYTES, "text": str, "agent": int, "depth": float, "given": str}


def check(cfg: DictConfig, session: Session) -> None:
    """Check the settings, and that every document has questions enough with known and different answers."""
    settings.check_context(cfg, 1024)
    settings.check_quality(cfg, session)
    settings.check_whole(cfg, "n_wrong", least=0)
    settings.check_padded(cfg)
    found, about = session.documents(cfg), f"document={cfg.document.name}"
    if len(found) < 2:
        raise PolyKVError(
            f"{about} has one document and a control takes another; raise n_documents"
        )
    for document in found:
        known = [q.answer for q in document.questions[: cfg.n_agents] if q.answer is not None]
        if len(known) < cfg.n_agents:
            raise PolyKVError(
                f"{about} has {len(known)} questions with known answers for n_agents={cfg.n_agents}; "
                "use document=needle, or lower n_agents"
            )
        if len(set(known)) <= cfg.n_wrong:
            raise PolyKVError(
                f"{about} has {len(set(known))} different answers; lower n_wrong={cfg.n_wrong}"
            )


def run(cfg: DictConfig, session: Session) -> Rows:
    """For each question whether the reply contains the answer, and the log-probability of the answer."""
    recipe = Recipe.from_config(cfg.recipe)
    rows = write.new_rows(cfg, session, COLUMNS, dtype=answer_dtype(cfg))
    asked = session.asked(cfg, cfg.n_documents)
    before_T = _before_document(cfg, asked[0][1])
    # What is given in the place of document i: the pool of document i + 1, or no pool.
    given = {DOCUMENT: 0} | ({OTHER: 1, NOTHING: None} if recipe.is_full else {})
    total, began = len(given) * len(asked) * cfg.n_agents, time.perf_counter()
    for number, (name, shift) in enumerate(given.items()):
        for sample, (model, tokenizer, document, _) in enumerate(asked):
            done = (number * len(asked) + sample) * cfg.n_agents
            phase(f"questions under {recipe.name}", done, total, "questions")
            pool, start_T = None, before_T
            if shift is not None:
                *_, full = asked[(sample + shift) % len(asked)]
                pool, start_T = full.under(recipe, cfg.backend), before_T[:0]
                if not sample and not shift:
                    write.add_ratio(rows, pool)
            about = {"sample": sample, "text": document.digest, "given": name}
            _add(rows, cfg, model, tokenizer, document, pool, start_T, about)
    per_minute = 60 * total / (time.perf_counter() - began)
    rows.add("questions_per_minute", per_minute, "1/min", n=total)
    return rows


def _add(
    rows: Rows,
    cfg: DictConfig,
    model: PreTrainedModel,
    tokenizer: object,
    document: Document,
    pool: SharedKVPool | None,
    start_T: Tensor,
    about: dict[str, int | str],
) -> None:
    """The rows of one document's questions, all asked in one batch; `start_T` comes before each prompt."""
    questions = document.questions[: cfg.n_agents]
    prompts = [torch.cat([start_T, encode(tokenizer, q.prompt)[0]]) for q in questions]
    options = candidates(questions, cfg.n_wrong)
    options_ids = [[encode(tokenizer, as_continued(text))[0] for text in of] for of in options]
    in_mode = attend_in_place if cfg.reader == "in_place" else read_unshared
    with in_mode(model):
        scores = log_probs(model, _cache(cfg, pool), prompts, options_ids)
        on_device = [ids_T.to(model.device) for ids_T in prompts]
        said = generate(model, tokenizer, _cache(cfg, pool), on_device, cfg.max_new_tokens)
    for agent, (question, (own, *others), reply) in enumerate(
        zip(questions, scores, said, strict=True)
    ):
        place = about | {"agent": agent, "depth": question.depth, "n": 1}
        right = any(contains(reply, text) for text in question.accepted)
        rows.add("contains", float(right), "rate", **place)
        rows.add("answer_logprob", own, "nats", why="the model's logits are not finite", **place)
        chosen = float(own > max(others)) if others else None
        rows.add("choice_right", chosen, "rate", why="n_wrong is 0", **place)
        told = {"document": about["sample"], "given": about["given"], "agent": agent}
        rows.answers.append(
            told | {"question": question.text, "gold": question.answer, "answer": reply}
        )


def _cache(cfg: DictConfig, pool: SharedKVPool | None) -> Cache:
    if pool is None:
        return DynamicCache()
    return pool.reader(cfg.n_agents) if cfg.reader == "in_place" else pool.dequantize(cfg.n_agents)


def _before_document(cfg: DictConfig, tokenizer: object) -> Tensor:
    """The ids (tokens,) that every prompt begins with: the chat template's up to the document, or BOS."""
    if chat.is_wanted(cfg.model.get("question_style", "plain"), tokenizer):
        return chat.before_document(tokenizer)
    return torch.tensor(opening(tokenizer), dtype=torch.long)


STUDY = Study(
    name="shared_tasks",
    title="Retrieval from a shared pool",
    question="Do agents that share a compressed document answer as often as from the uncompressed one?",
    run=run,
    check=check,
    settle=compare.seeded,
    made_by=(documents, generated, cascade, answers, retrieval),
    settings=(*settings.POOL, "n_agents", "n_wrong", "max_new_tokens"),
    columns=COLUMNS,
)
