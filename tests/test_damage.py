"""Every quality metric of every study sees a cache whose values are another document's.

A metric that stays where it was does not read the cache. Each case runs one cell twice, as it is and damaged; what
is held to account is every metric that the study's own rows name, so that a new one has its test at once.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import checked_cell
from hydra import compose, initialize_config_dir
from torch import Tensor
from transformers import DynamicCache

from experiments.session import Session
from experiments.study import studies
from polykv import config
from polykv.config import CONF
from polykv.evaluation import bertscore, continuation, gsm8k, outside, readings
from polykv.evaluation.online import OnlineLayer
from polykv.evaluation.statistics import MIN_DOCUMENTS, skewed_interval
from polykv.handoff.card import CacheCard
from polykv.models import load_weights
from polykv.pool import SharedKVPool, prefill
from polykv.recipe import Recipe
from polykv.reference.documents import generate_document
from polykv.results import Rows

# Studies made by none of these measure bytes and time, which no content changes.
SCORES = {bertscore, continuation, gsm8k}
NO_QUALITY = {name for name, study in studies().items() if not SCORES & {*study.made_by}}
# What rows say beside quality: bytes, time, theory, what the uncompressed cache is like, what unrelated answers score,
# which answers are empty, unfinished or of more than one mark; which of several answers is chosen, where all but the
# right one name another subject than the question.
NOT_QUALITY = {
    "mean_bits", "file_bits", "compression_ratio", "kv_memory", "time", "gaussian_error", "dc_share", "peak_to_rms",
    "questions_per_minute", "choice_right", "relay_minutes", "replay_minutes",
    "bias_norm", "token_norm",
    "bertscore_floor", "empty_answer", "empty_reference", "several_marks", "unfinished_answer",
}  # fmt: skip
# The baseline and what is measured without a recipe: damage to a recipe must leave them as they are.
HELD = frozenset({"nll_full", "reader_floor_kl", "reader_floor_nll_delta"})
RELAYED_METRICS = ("answer_right", "kl", "same_top1", "digit_flip")
BEFORE_CARDS = frozenset(f"{metric} hop 0" for metric in RELAYED_METRICS)
AFTER_ONE = BEFORE_CARDS | {f"{metric} hop 1" for metric in RELAYED_METRICS}
LEAST = 0.1  # by which a metric has to move, of the larger of the two means
LOGARITHMS = {"nll", "nll_full"}  # of perplexities: here it is the perplexity that has to move
# A row's place among the others of its metric; what it is one of many of, its samples, is not part of it.
SAMPLES = ("sample", "block", "agent", "head")

Layer = tuple[Tensor, Tensor]
Damage = Callable[[pytest.MonkeyPatch], None]


@cache
def other_document() -> DynamicCache:
    """The reference model's cache of a document that no study reads, longer than all that are read here."""
    settings = config.load_group("model", "reference")
    settings.weights = "reference"
    model, tokenizer = load_weights(settings, "cpu")
    document = generate_document(tokenizer, 600, seed=99, n_questions=1, prefix_fraction=0.7)
    ids_T = tokenizer(document.text, add_special_tokens=False).input_ids
    return prefill(model, torch.tensor([ids_T]))


def damaged(k_BHTD: Tensor, v_BHTD: Tensor, layer: int, keys: bool = False) -> Layer:
    """The layer with another document's values, or its keys."""
    other = other_document().layers[layer]
    n_tokens = k_BHTD.shape[2]
    if keys:
        return other.keys[:, :, :n_tokens].clone(), v_BHTD
    return k_BHTD, other.values[:, :, :n_tokens].clone()


def damaged_pool(pool: SharedKVPool) -> SharedKVPool:
    layers = [damaged(*pool.decode_layer(index), index) for index in range(pool.n_layers)]
    return SharedKVPool.from_layers(layers, pool.recipe, backend=pool.backend)


def recipes(patch: pytest.MonkeyPatch, keys: bool = False) -> None:
    """What a recipe compresses is another document's; the uncompressed cache is as it was."""
    encode_layer = Recipe.encode_layer

    def encode(self: Recipe, k: Tensor, v: Tensor, layer: int, *rest: Any, **more: Any) -> Any:
        pair = (k, v) if self.is_full else damaged(k, v, layer, keys)
        return encode_layer(self, *pair, layer, *rest, **more)

    patch.setattr(Recipe, "encode_layer", encode)


def cards(patch: pytest.MonkeyPatch, policy: str, resealed: bool = False) -> None:
    """What a policy's cards hold is another document's; `resealed`: only of cards after the first."""
    seal = CacheCard.seal

    def wrong(cache: Any, ids: Any, model: Any, tokenizer: Any, by: Any, *rest: Any, **more: Any):
        if by.name == policy and (more.get("parent") or not resealed):
            layers = enumerate(cache.layers)
            cache = DynamicCache([damaged(one.keys, one.values, index) for index, one in layers])
        return seal(cache, ids, model, tokenizer, by, *rest, **more)

    patch.setattr(CacheCard, "seal", wrong)


def outsiders(patch: pytest.MonkeyPatch) -> None:
    """transformers' quantized cache holds another document's."""
    quantized = outside.quantized
    patch.setattr(outside, "quantized", lambda m, full, o: quantized(m, damaged_pool(full), o))


def written_online(patch: pytest.MonkeyPatch) -> None:
    """What a recipe writes online is another document's."""
    update = OnlineLayer.update

    def wrong(self: OnlineLayer, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Any:
        pair = (k, v) if self.recipe.is_full else damaged(k, v, self.place[0])
        return update(self, *pair, *rest, **more)

    patch.setattr(OnlineLayer, "update", wrong)


def batches(patch: pytest.MonkeyPatch) -> None:
    """Agents in a batch read another document's values, a single reader its own."""
    caches_of = readings.caches_of

    def wrong(reader: str, layers: Any, pool: SharedKVPool, *rest: Any, **more: Any):
        return caches_of(reader, layers, damaged_pool(pool), *rest, **more)

    patch.setattr(readings, "caches_of", wrong)


def reading_in_place(patch: pytest.MonkeyPatch) -> None:
    """Whoever reads the uncompressed cache in place reads another document's values."""
    reader = SharedKVPool.reader

    def wrong(self: SharedKVPool, n_agents: int) -> Any:
        return reader(damaged_pool(self) if self.recipe.is_full else self, n_agents)

    patch.setattr(SharedKVPool, "reader", wrong)


@dataclass(frozen=True)
class Case:
    """One cell, the damage to it, and the metrics (and parts) that this damage must leave as they are."""

    overrides: tuple[str, ...]
    damage: Damage
    held: frozenset[str] = HELD


SCORED = ("model=reference", "document=generated", "context=192", "n_documents=3", "recipe=fp16")
ANSWERED = ("answers=3", "max_new_tokens=12", "scorer=minilm", "n_agents=3")
RELAYED = ("relay.n_facts=8", "relay.max_new_tokens=24", "n_problems=8", "budget_bits=8")
IN_PLACE = ("experiment=polykv_quality", *SCORED, *ANSWERED, "reader=in_place")
RELAY = ("experiment=handoff_accuracy", *RELAYED, "policy=uniform", "n_hops=2", "reseal=requantize")
OWN = frozenset({"nll", "exact_match", "contains"})  # of the recipe, whatever it is held to
CASES = {
    "compare": Case(("experiment=compare", *SCORED, *ANSWERED, "resident=false"), recipes),
    "compare in place": Case(IN_PLACE, recipes),
    "compare, the baseline in place": Case(IN_PLACE, reading_in_place, OWN),
    "compare, agents together": Case(
        ("experiment=agent_scaling", *SCORED, "n_agents=3"), batches, HELD
    ),
    "compare online": Case(
        ("experiment=recipe_frontier", *SCORED, "protocol=online", "chunk=64"), written_online
    ),
    "compare, an outside reference": Case(
        ("experiment=outside_references", *SCORED[:-1], "outside=fp8"), outsiders
    ),
    "recipe_search": Case(
        ("experiment=recipe_search", *SCORED[:-1], "n_trials=1", "widths=[8]", "budget_bits=9"),
        recipes,
    ),
    "layer_sensitivity of values": Case(
        ("experiment=layer_sensitivity", *SCORED), recipes, HELD | {"error key", "error logits"}
    ),
    "layer_sensitivity of keys": Case(
        ("experiment=layer_sensitivity", *SCORED), partial(recipes, keys=True), HELD | {"error value"}
    ),
    "decode_drift": Case(
        ("experiment=decode_drift", "model=reference", "prompts=writing", "n_prompts=3", "max_new_tokens=32",
         "page_tokens=16", "recipe=fp16"),
        recipes,
    ),
    "shared_tasks": Case(
        ("experiment=shared_tasks", *SCORED, "n_agents=5", "max_new_tokens=12"), recipes
    ),
    "handoff_accuracy": Case(RELAY, partial(cards, policy="uniform"), HELD | BEFORE_CARDS),
    "handoff_accuracy, cards after the first": Case(
        RELAY, partial(cards, policy="uniform", resealed=True), HELD | AFTER_ONE | {"kl_once hop 2"}
    ),
    "controller_ablation": Case(
        ("experiment=controller_ablation", *RELAYED, "n_hops=1"), partial(cards, policy="ablated")
    ),
    "handoff_ttft": Case(
        ("experiment=handoff_ttft", "context=160", "n_documents=3", "scored_tokens=48", "policies=[uniform]",
         "transports=[memory]", "budget_bits=8"),
        partial(cards, policy="uniform"),
    ),
}  # fmt: skip
# Other studies of quality compare recipes on documents.
OTHERS = {*studies()} - NO_QUALITY - {name.partition(" ")[0].rstrip(",") for name in CASES}
CASES |= {name: Case((f"experiment={name}", *SCORED), recipes) for name in sorted(OTHERS)}


def run(overrides: tuple[str, ...]) -> dict[tuple, dict[tuple, float | None]]:
    """The rows of a cell `by_place`, nothing of which was kept from another run."""
    study, settled = checked_cell(*overrides, "device=cpu")
    return by_place(study.run(settled, Session()))


undamaged = cache(run)  # cases share cells


def named(row: dict) -> str:
    """The metric, and the part of attention or the number of handoffs that it is of."""
    hop = None if row.get("hop") is None else f"hop {row['hop']}"
    return " ".join(filter(None, (row["metric"], row.get("part"), hop)))


def by_place(rows: Rows) -> dict[tuple, dict[tuple, float | None]]:
    """What rows are about -> sample -> value, in blocks of tokens where the rows have them."""
    about = ("baseline", "statistic", "mode", "recipe", "policy", "reader", "extraction", "layer")
    whole, blocks = defaultdict(dict), defaultdict(dict)
    for row in rows:
        place = (named(row), *(row.get(name) for name in about))
        kept = whole if row.get("block") is None else blocks
        sample = tuple(row.get(name) for name in SAMPLES)
        if named(row).split()[0] not in NOT_QUALITY:
            assert sample not in kept[place], (place, sample)
            kept[place][sample] = row["value"]
    return whole | blocks


def apart(name: str, one: dict[tuple, float | None], other: dict[tuple, float | None]) -> bool:
    """Whether the mean moved by much, and, where there are samples enough, by more than their differences spread."""
    pairs = [(one[at], other[at]) for at in one if None not in (one[at], other[at])]
    if not pairs:
        return False
    before, after = np.array(pairs).T
    interval = skewed_interval(after - before) if len(pairs) >= MIN_DOCUMENTS else None
    means = np.array([before.mean(), after.mean()])
    if name in LOGARITHMS:
        means = np.exp(means)
    far = abs(means[1] - means[0]) > LEAST * abs(means).max()
    return bool(far and (interval is None or not interval[0] <= 0 <= interval[1]))


FAST = {"compare", "decode_drift"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES]
)
def test_every_metric_sees_another_documents_values(name):
    case = CASES[name]
    right = undamaged(case.overrides)
    with pytest.MonkeyPatch.context() as patch:
        case.damage(patch)
        wrong = run(case.overrides)
    assert right.keys() == wrong.keys()
    # What is compared with a damaged policy is not damaged.
    held = {place for place in right if place[0] in case.held or place[1]}
    assert right.keys() - held
    seen = {place for place in right if apart(place[0], right[place], wrong[place])}
    blind = right.keys() - held - seen
    assert not blind
    assert {place: wrong[place] for place in held} == {place: right[place] for place in held}


@cache
def kind(*overrides: str) -> tuple[str, bool, bool]:
    """The study, and what makes it take another way through the cache."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", list(overrides))
    return cfg.study, bool(cfg.get("together")), "outside" in cfg


@pytest.mark.slow
@pytest.mark.parametrize("name", config.available("experiment"))
def test_every_study_of_quality_has_a_case(name):
    own = kind(f"experiment={name}")
    assert own[0] in NO_QUALITY or own in {kind(*case.overrides) for case in CASES.values()}
