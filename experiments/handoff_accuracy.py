"""QKVShare's accuracy table: right answers after a relay of n_hops handoffs, and the divergence of the last answer.

The teacher-forced KL divergence to the fp16 relay separates policies with far fewer problems than accuracy does.
"""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from experiments import settings
from experiments.session import MODEL, Session
from experiments.study import Study
from polykv import models
from polykv.errors import PolyKVError
from polykv.evaluation import continuation, gsm8k
from polykv.evaluation.continuation import UNITS, Comparison, why_not_finite
from polykv.evaluation.per_token import same_top1
from polykv.handoff import allocate, mixed, relay, signals, tasks
from polykv.handoff.card import CacheCard
from polykv.handoff.policy import Policy
from polykv.handoff.relay import (
    RESEALS,
    Handoff,
    Turn,
    divergence,
    force,
    play,
    prompts_of,
    text_of,
)
from polykv.handoff.signing import SigningKey
from polykv.handoff.tasks import Task, load_tasks
from polykv.progress import track
from polykv.results import Rows
from polykv.tokens import opening

# extraction: how the number is read from an answer, one of gsm8k.EXTRACTIONS.
RELAY = {"n_hops": int, "reseal": str}
COLUMNS = {**RELAY, "extraction": str}
CARDS = (mixed, allocate, signals)
MADE_BY = (*CARDS, tasks, relay, gsm8k, continuation, same_top1)
# Settings that the fp16 relays depend on; cells that agree in them share the relays.
SHARED = ("model", "device", "relay", "n_problems", "n_hops", "seed", "backend")
SETTINGS = (*SHARED, "weights", "policy", "budget_bits", "reseal", "signed")
FP16 = Policy("fp16", store="float16")  # the reference of all policies, independent of conf/policy
FP16_RELAYS = "fp16 relays"


def settle(cfg: DictConfig) -> DictConfig:
    """The settled config. A policy without a budget loses nothing, so its budget and resealing are dropped."""
    settled = settle_key(settings.settle(cfg))
    if not Policy.from_config(cfg.policy).has_budget:
        settled.budget_bits, settled.reseal = None, RESEALS[0]
    return settled


def check(cfg: DictConfig, session: Session) -> None:
    """Check the settings, and that the problems fit the model's positions once tokenised."""
    settings.check_common(cfg)
    settings.check_dequantizes(cfg)
    Policy.from_config(cfg.policy)
    settings.check_whole(cfg, "n_hops", "n_problems")
    check_budget(cfg.budget_bits)
    key_of(cfg)
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
    for number, task in enumerate(tasks_of(cfg)):
        prompts_of(task, tokenizer, architecture, f"the relay of problem {number}")


def settle_key(settled: DictConfig) -> DictConfig:
    """Set `signed` for signed cards, which are longer and so another cell; the key itself does not matter."""
    if OmegaConf.select(settled, "card.key_file"):
        settled.signed = True
    return settled


def key_of(cfg: DictConfig) -> SigningKey | None:
    """The key in `card.key_file`, if set. It is read each time: a config only has the path."""
    path = OmegaConf.select(cfg, "card.key_file")
    return SigningKey.read(path) if path else None


def check_budget(bits: Any) -> None:
    """Check a number of bits; None is allowed, for policies without a budget."""
    if bits is not None and (not isinstance(bits, int | float) or not 0 < bits <= 32):
        raise PolyKVError(f"budget_bits={bits!r}; it takes a number of bits such as 4.0")


def run(cfg: DictConfig, session: Session) -> Rows:
    """Rows of each problem: whether the answer is right, the bits of the last card, the last answer's divergence.

    `kl` is measured after all handoffs; `kl_once` on the same tokens with the last handoff alone; `kl_passing` where
    one agent wrote all turns and the others only passed its card on.
    """
    policy = Policy.from_config(cfg.policy)
    rows = new_rows(cfg, session, COLUMNS, policy=settings.label(cfg, "policy"))
    _, tokenizer = session.model(cfg)
    problems, texts = tasks_of(cfg), []
    for sample, task in enumerate(track(problems, f"relays under {policy.name}")):
        handoff = new_handoff(cfg, session, policy)
        texts.append(text_of(play(task, handoff)[-1], tokenizer))
        add_bits(rows, sample, handoff.card)
    add_answers(rows, texts, [task.answer for task in problems])
    add_divergence(rows, forced(cfg, session, policy))
    if cfg.n_hops > 1:
        for metric, n_passes in (("kl_once", 1), ("kl_passing", cfg.n_hops)):
            add_divergence(rows, forced(cfg, session, policy, 1, n_passes), {metric: "kl"})
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


def add_bits(rows: Rows, sample: int, card: CacheCard | None) -> None:
    """Bits per cached value: of the card's tensors, which the budget limits, and of its whole file with the header."""
    about, why = {"sample": sample}, "the text is handed on, not a card"
    bits = card.mean_bits if card else None
    rows.add("mean_bits", bits, "bits", why=why, **about)
    file_bits = card.mean_bits * len(card.to_bytes()) / card.nbytes if card else None
    rows.add("file_bits", file_bits, "bits", why=why, **about)


def add_answers(rows: Rows, texts: Sequence[str], answers: Sequence[object]) -> None:
    """Whether each answer is right under each extraction, has several `####` marks, or is empty."""
    found = {
        ("answer_right", how): verdicts for how, verdicts in gsm8k.right(texts, answers).items()
    }
    found["several_marks", None] = [gsm8k.has_several_marks(text) for text in texts]
    found["empty_answer", None] = [not text.strip() for text in texts]
    for (metric, extraction), verdicts in found.items():
        for sample, verdict in enumerate(verdicts):
            rows.add(metric, float(verdict), "rate", sample=sample, n=1, extraction=extraction)


def add_divergence(
    rows: Rows, found: Sequence[Comparison], metrics: dict[str, str] | None = None, **about: Any
) -> None:
    """Each problem's mean over the last answer's tokens against the fp16 relay: KL and same-top-1.

    `metrics`: name in the rows -> key of continuation.UNITS.
    """
    for sample, comparison in enumerate(found):
        tokens = comparison.per_token()
        for metric, own in (metrics or {"kl": "kl", "same_top1": "same_top1"}).items():
            n = len(tokens[own])
            mean = float(tokens[own].mean()) if n else None
            why = why_not_finite([comparison]) or "the answer has no token"
            rows.add(metric, mean, UNITS[own], why=why, sample=sample, n=n, **about)


def forced(
    cfg: DictConfig,
    session: Session,
    policy: Policy,
    n_handoffs: int | None = None,
    n_passes: int = 1,
) -> list[Comparison]:
    """For each problem, the last agent's answer under the policy against the fp16 relay, token by token."""
    found = []
    for script, exact in zip(*fp16_relays(cfg, session), strict=True):
        other = force(script, new_handoff(cfg, session, policy), n_handoffs, n_passes)
        found.append(divergence(script, exact, other)[-1])
    return found


def new_handoff(cfg: DictConfig, session: Session, policy: Policy) -> Handoff:
    """How caches are handed on in one relay under this policy."""
    how = (policy, cfg.budget_bits, cfg.reseal, cfg.seed, key_of(cfg), cfg.backend)
    return Handoff(*session.model(cfg), *how)


def tasks_of(cfg: DictConfig) -> list[Task]:
    """The cell's problems, the same under every policy."""
    return load_tasks(cfg.relay, cfg.n_problems, cfg.n_hops + 1, cfg.seed)


def shared_needs(cfg: DictConfig) -> Any:
    """The settings that the fp16 relays depend on, as plain values."""
    return settings.plain(OmegaConf.masked_copy(cfg, SHARED))


def fp16_relays(cfg: DictConfig, session: Session) -> tuple[list[list[Turn]], list[list[Tensor]]]:
    """The relays under fp16 cards: for each problem the turns that agents write, and their log-probabilities."""
    # Under fp16 both ways of resealing are the same.
    own = OmegaConf.merge(cfg, {"budget_bits": 16.0, "reseal": RESEALS[0]})

    def make() -> tuple[list[list[Turn]], list[list[Tensor]]]:
        scripts, exact = [], []
        for task in track(tasks_of(own), FP16_RELAYS):
            scripts.append(play(task, new_handoff(own, session, FP16)))
            exact.append(force(scripts[-1], new_handoff(own, session, FP16)))
        return scripts, exact

    return session.kept(FP16_RELAYS, shared_needs(cfg), make, of=(MODEL,))


STUDY = Study(
    name="handoff_accuracy",
    title="Answers after a relay",
    question="Are answers as accurate after several handoffs of a quantized cache, and how far do policies diverge?",
    run=run,
    check=check,
    settle=settle,
    made_by=MADE_BY,
    settings=SETTINGS,
    columns=COLUMNS,
    answers=("accuracy",),
)
