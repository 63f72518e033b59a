"""QKVShare's accuracy table: right answers after each handoff of a relay, and the divergence of the answers.

Every agent is asked for the final number, so that a relay of n_hops handoffs gives the accuracy after 0 to n_hops of
them. The teacher-forced KL divergence to the fp16 relay separates policies with far fewer problems than accuracy does.
"""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments import relays, settings
from experiments.relay_arrays import Replays
from experiments.relays import (
    ALL,
    FP16,
    Played,
    forced,
    fp16_relays,
    key_of,
    played,
    style_of,
    tasks_of,
)
from experiments.session import Session
from experiments.study import Study
from polykv import models
from polykv.errors import PolyKVError
from polykv.evaluation import continuation, gsm8k
from polykv.evaluation.continuation import UNITS, Comparison, why_not_finite
from polykv.evaluation.per_token import same_top1
from polykv.greedy import end_tokens
from polykv.handoff import relay
from polykv.handoff.coded import recipe_of
from polykv.handoff.policy import OTHER_PROBLEM, Policy
from polykv.handoff.relay import RESEALS, prompts_of, text_of
from polykv.handoff.tasks import Task
from polykv.results import Rows
from polykv.supported import check_padding
from polykv.tokens import opening

RELAY = {"n_hops": int, "reseal": str}
# hop: handoffs so far, 0 for the first agent, whose answer precedes all cards.
# extraction: how the number is read from an answer, one of gsm8k.EXTRACTIONS.
COLUMNS = {**RELAY, "hop": int, "extraction": str}
MADE_BY = (*relays.MADE_BY, continuation, same_top1)
SETTINGS = (*relays.SHARED, "weights", "policy", "budget_bits", "reseal", "n_forced")


def settle(cfg: DictConfig) -> DictConfig:
    """The settled config. A policy without a budget loses nothing, so its budget and resealing are dropped."""
    settled = settle_key(settings.settle(cfg, fastest=True))
    settled.context = None  # not read: a model may have fewer positions than its default
    if settled.n_forced is None:
        settled.n_forced = settled.n_problems
    if not Policy.from_config(cfg.policy).has_budget:
        settled.budget_bits, settled.reseal = None, RESEALS[0]
    if settled.n_hops == 1 and settled.reseal in RESEALS:  # there is only the first card
        settled.reseal = RESEALS[0]
    if has_answers(settled) is True:  # a default that came later: identities are what they were
        settled.pop("answers", None)
    return settled


def has_answers(cfg: DictConfig) -> Any:
    """The setting `answers`: whether relays are played under the policy and judged; unset: they are."""
    return cfg.get("answers", True)


def check(cfg: DictConfig, session: Session) -> None:
    """Check the settings, and that the problems fit the model's positions once tokenised."""
    settings.check_common(cfg)
    settings.check_dequantizes(cfg)
    settings.check_full_attention(cfg)
    policy = Policy.from_config(cfg.policy)
    settings.check_whole(cfg, "n_hops", "n_problems", "batch")
    if policy.carries == OTHER_PROBLEM and cfg.n_problems == 1:
        raise PolyKVError(f"policy {policy.name!r} hands on another problem's cache; n_problems=1")
    if cfg.n_forced is not None:
        settings.check_whole(cfg, "n_forced", instead=", or null for all problems")
        if cfg.n_forced > cfg.n_problems:
            raise PolyKVError(
                f"n_forced={cfg.n_forced} and n_problems={cfg.n_problems}; replay at most as many as are played"
            )
    check_budget(cfg.budget_bits, [policy])
    key_of(cfg)
    if not isinstance(has_answers(cfg), bool):
        raise PolyKVError(f"answers={cfg.answers!r}; it takes true or false")
    if cfg.reseal not in RESEALS:
        raise PolyKVError(f"no reseal {cfg.reseal!r}; there are: {', '.join(RESEALS)}")
    settings.check_trained(cfg, "experiment=handoff_ttft")
    if cfg.relay.name == "gsm8k":
        gsm8k.check_available(cfg.relay.path, cfg.n_problems)
    elif cfg.weights != "reference":
        raise PolyKVError(
            f"relay=reference is written for the reference model, not for {cfg.model.name}; "
            "use relay=gsm8k"
        )
    settings.check_hub(cfg)
    architecture, tokenizer = models.load_config(cfg.model), models.load_tokenizer(cfg.model)
    if min(cfg.batch, cfg.n_problems) > 1:
        check_padding(architecture, "use batch=1")
    for number, task in enumerate(tasks_of(cfg)):
        prompts_of(
            task, tokenizer, architecture, f"the relay of problem {number + 1}", style_of(cfg)
        )


def settle_key(settled: DictConfig) -> DictConfig:
    """Set `signed` for signed cards, which are longer and so another cell; the key itself does not matter."""
    if OmegaConf.select(settled, "card.key_file"):
        settled.signed = True
    return settled


def check_budget(bits: Any, policies: Sequence[Policy]) -> None:
    """Check that these policies can seal cards at a number of bits; None is for those without a budget."""
    budgeted = [policy for policy in policies if policy.has_budget]
    if bits is None and not budgeted:
        return
    if not isinstance(bits, int | float) or not 0 < bits <= 32:
        raise PolyKVError(f"budget_bits={bits!r}; it takes a number of bits such as 4.0")
    for policy in budgeted:
        if policy.store == "codecs":
            recipe_of(policy.kind, bits)  # refuses bits that its codecs lack
        elif bits < policy.tiers[0]:
            raise PolyKVError(
                f"budget_bits={bits} and the lowest tier of policy {policy.name!r} has {policy.tiers[0]} bits; raise "
                "budget_bits or give the policy a lower tier"
            )


def run(cfg: DictConfig, session: Session) -> Rows:
    """Rows of each problem and hop: whether the answer is right, the bits of the card, the answer's divergence.

    `kl` is measured after all handoffs so far. At the last hop, `kl_once` is on the same tokens with the last handoff
    alone; `kl_passing` where one agent wrote all turns and the others only passed its card on. Without `answers` there
    are only the bits and `kl`.
    """
    policy = Policy.from_config(cfg.policy)
    rows = new_rows(cfg, session, COLUMNS, policy=settings.label(cfg, "policy"))
    ways = {"kl": ALL}
    if has_answers(cfg):
        exact = fp16_relays(cfg, session)
        name = f"relays under {policy.name}"
        found = exact if policy == FP16 else played(cfg, session, policy, name, session.parts)
        add_bits(rows, [one.bits for one in found], cfg, dtype=settings.answer_dtype(cfg))
        add_answers(rows, found, exact, cfg, session)
        add_minutes(rows, "relay_minutes", found, cfg, dtype=settings.answer_dtype(cfg))
        if cfg.n_hops > 1:
            ways |= {"kl_once": (1, 1), "kl_passing": (1, cfg.n_hops)}
    replays = forced(cfg, session, policy, list(ways.values()))
    if not has_answers(cfg):
        add_bits(rows, [one.bits for one in replays], cfg)
    add_minutes(rows, "replay_minutes", replays, cfg)
    for hop in range(cfg.n_hops + 1):
        compared = [one.ways[0][hop] for one in replays]
        add_divergence(rows, compared, hop=hop)
        add_flips(rows, compared, cfg, session, hop)
    for way, metric in enumerate(list(ways)[1:], 1):
        last = [one.ways[way][-1] for one in replays]
        add_divergence(rows, last, {metric: "kl"}, hop=cfg.n_hops)
    return rows


def new_rows(cfg: DictConfig, session: Session, columns: dict[str, type], **about: Any) -> Rows:
    """Empty rows of a relay: `document` names its problems, `sample` numbers them."""
    _, tokenizer = session.model(cfg)
    of_relay = {
        "document": settings.label(cfg, "relay"),
        "context_tokens": None,
        "recipe": None,
        "n_agents": cfg.n_hops + 1,
        "n_hops": cfg.n_hops,
        "reseal": cfg.reseal,
        "budget_bits": cfg.budget_bits,
        "bos": bool(opening(tokenizer)),
    }
    return settings.new_rows(cfg, columns, **of_relay, **about)


def add_bits(
    rows: Rows, found: Sequence[Sequence[tuple[float, float]]], cfg: DictConfig, **about: Any
) -> None:
    """Bits per cached value of each problem's cards: of the tensors, which the budget limits, and of the whole file."""
    why = "no card is handed on"
    for sample, cards in enumerate(found):
        for hop in range(1, cfg.n_hops + 1):
            sizes = cards[hop - 1] if cards else (None, None)
            for metric, bits in zip(("mean_bits", "file_bits"), sizes, strict=True):
                rows.add(metric, bits, "bits", why=why, sample=sample, hop=hop, **about)


def add_minutes(
    rows: Rows, metric: str, found: Sequence[Played | Replays], cfg: DictConfig, **about: Any
) -> None:
    """Minutes that relays or replays of all problems took, in the process that made them.

    A process makes the first agents' turns once, and the first of its cells that needs them counts them.
    """
    minutes = sum(one.seconds for one in found) / 60
    rows.add(metric, minutes, "min", hop=cfg.n_hops, n=len(found), **about)


def add_answers(
    rows: Rows, found: Sequence[Played], exact: Sequence[Played], cfg: DictConfig, session: Session
) -> None:
    """Whether each answer is right under each extraction, has several `####` marks, is empty, or reached the limit.

    The texts go into `rows.answers`, beside those of the fp16 relay.
    """
    model, tokenizer = session.answering(cfg)
    problems, ends = tasks_of(cfg), set(end_tokens(model, tokenizer))
    for hop in range(cfg.n_hops + 1):
        texts, references = (
            [text_of(one.turns[hop], tokenizer) for one in side] for side in (found, exact)
        )
        gold = [task.answers[hop] for task in problems]
        judged: dict[tuple[str, str | None], Sequence[bool]] = {
            ("answer_right", how): verdicts for how, verdicts in gsm8k.right(texts, gold).items()
        }
        judged["several_marks", None] = [gsm8k.has_several_marks(text) for text in texts]
        judged["empty_answer", None] = [not text.strip() for text in texts]
        judged["unfinished_answer", None] = [
            int(one.turns[hop].answer_T[-1]) not in ends for one in found
        ]
        about: dict[str, Any] = {"hop": hop, "n": 1, "dtype": settings.answer_dtype(cfg)}
        for (metric, how), verdicts in judged.items():
            for sample, verdict in enumerate(verdicts):
                about |= {"sample": sample, "extraction": how}
                rows.add(metric, float(verdict), "rate", **about)
        said = zip(problems, gold, references, texts, strict=True)
        rows.answers += [
            {"document": sample, "agent": hop, "question": _asked(task, hop), "gold": number}
            | {"reference": reference, "answer": text}
            for sample, (task, number, reference, text) in enumerate(said)
        ]


def _asked(task: Task, hop: int) -> str:
    return (task.messages or task.prompts)[hop]


def add_divergence(
    rows: Rows, found: Sequence[Comparison], metrics: dict[str, str] | None = None, **about: Any
) -> None:
    """Each problem's mean over an answer's tokens against the fp16 relay: KL and same-top-1.

    `metrics`: name in the rows -> key of continuation.UNITS.
    """
    for sample, comparison in enumerate(found):
        tokens = comparison.per_token()
        for metric, own in (metrics or {"kl": "kl", "same_top1": "same_top1"}).items():
            n = len(tokens[own])
            mean = float(tokens[own].mean()) if n else None
            why = why_not_finite([comparison]) or "the answer has no token"
            rows.add(metric, mean, UNITS[own], why=why, sample=sample, n=n, **about)


def add_flips(
    rows: Rows, found: Sequence[Comparison], cfg: DictConfig, session: Session, hop: int
) -> None:
    """Whether greedy decoding would write another digit anywhere in each problem's answer, read up to there as it is.

    The last number alone would say little: it repeats a result that the answer has stated before. An answer without
    digits has no row.
    """
    _, tokenizer = session.model(cfg)
    scripts = [one.turns for one in fp16_relays(cfg, session)]
    for sample, (comparison, turns) in enumerate(zip(found, scripts, strict=False)):
        pieces = [tokenizer.decode([token]) for token in turns[hop].answer_T]
        same = comparison.per_token()["same_top1"][[any(map(str.isdecimal, p)) for p in pieces]]
        if len(same):
            about: dict[str, Any] = {"sample": sample, "hop": hop, "n": len(same)}
            flipped = 1 - float(same.min())  # NaN where a run is
            rows.add("digit_flip", flipped, "rate", why=why_not_finite([comparison]), **about)


STUDY = Study(
    name="handoff_accuracy",
    title="Answers after a relay",
    question="Are answers as accurate after several handoffs of a quantized cache, and how far do policies diverge?",
    run=run,
    check=check,
    settle=settle,
    also_read=("reader",),
    made_by=MADE_BY,
    settings=SETTINGS,
    options={"answers": relay},
    columns=COLUMNS,
    answers=("accuracy",),
)
