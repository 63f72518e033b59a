"""Every quality metric of every study sees a cache whose values are another document's.

A metric that stays where it was does not read the cache. Each case runs one cell twice, as it is and damaged; what
is held to account is every metric that the study's own rows name, so that a new one has its test at once.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import checked_cell
from hydra import compose, initialize_config_dir
from torch import Tensor
from transformers import DynamicCache

from experiments import common, handoff_accuracy
from polykv import config
from polykv.config import CONF
from polykv.evaluation import outside, readings
from polykv.handoff.card import CacheCard
from polykv.models import load_weights
from polykv.pool import SharedKVPool, prefill
from polykv.recipe import Recipe
from polykv.reference.documents import generate_document
from polykv.results import Rows

# Studies of bytes and time, which no content changes.
NO_QUALITY = {"capacity", "concurrency", "handoff_stages", "polykv_memory", "polykv_ratio"}
# What rows say beside quality: bytes, time, theory, what the uncompressed cache is like, what unrelated answers score,
# how many answers are empty or of more than one mark, and how many wrong answers became right by chance.
NOT_QUALITY = {
    "bits",
    "mean_bits",
    "file_bits",
    "compression_ratio",
    "ttft",
    "ttft_speedup",
    "gaussian_error_key",
    "gaussian_error_value",
    "dc_share_key",
    "dc_share_value",
    "peak_to_rms_key",
    "peak_to_rms_value",
    "bertscore_floor",
    "empty_answers",
    "empty_pairs",
    "empty_references",
    "several_marks",
    "answers_won",
}
# The baseline and what is measured without a recipe: damage to one must leave them as they are.
HELD = frozenset({"perplexity_full", "reader_floor_kl_mean", "reader_floor_perplexity_delta"})
LEAST = 0.1  # by which a metric without an interval has to move, of the larger of the two values

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

    def encode(self: Recipe, k: Tensor, v: Tensor, layer: int, *rest: Any) -> Any:
        pair = (k, v) if self.is_full else damaged(k, v, layer, keys)
        return encode_layer(self, *pair, layer, *rest)

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
    """One cell, the damage to it, and the metrics of quality that this damage must leave as they are."""

    overrides: tuple[str, ...]
    damage: Damage
    held: frozenset[str] = HELD

    @property
    def study(self) -> str:
        return self.overrides[0].removeprefix("experiment=")


SCORED = ("model=reference", "document=generated", "context=192", "n_documents=3", "recipe=fp16")
ANSWERED = ("answers=3", "max_new_tokens=12", "scorer=minilm")
RELAYED = ("relay.n_facts=8", "relay.max_new_tokens=24", "n_problems=8", "budget_bits=8")
ABOUT_KEYS = frozenset({"error_key", "error_logits"})
ABOUT_VALUES = frozenset({"error_value"})
OWN = frozenset({"perplexity", "exact_match", "contains"})  # of the recipe, whatever it is held to
CASES = {
    "compare": Case(("experiment=compare", *SCORED, *ANSWERED), recipes),
    "polykv_quality in place": Case(
        ("experiment=polykv_quality", *SCORED, *ANSWERED, "n_agents=3", "reader=cascade"), recipes
    ),
    "polykv_quality, the baseline in place": Case(
        (
            "experiment=polykv_quality",
            *SCORED,
            *ANSWERED,
            "n_agents=3",
            "reader=cascade",
        ),
        reading_in_place,
        OWN,
    ),
    "recipe_frontier": Case(("experiment=recipe_frontier", *SCORED), recipes),
    "recipe_search": Case(
        ("experiment=recipe_search", *SCORED[:-1], "n_trials=1", "widths=[8]", "budget_bits=9"),
        recipes,
    ),
    "agent_scaling": Case(("experiment=agent_scaling", *SCORED, "n_agents=3"), batches),
    "layer_sensitivity of values": Case(
        ("experiment=layer_sensitivity", *SCORED), recipes, HELD | ABOUT_KEYS
    ),
    "layer_sensitivity of keys": Case(
        ("experiment=layer_sensitivity", *SCORED), partial(recipes, keys=True), HELD | ABOUT_VALUES
    ),
    "outside_references": Case(
        ("experiment=outside_references", *SCORED[:-1], "outside=fp8"), outsiders
    ),
    "handoff_accuracy": Case(
        ("experiment=handoff_accuracy", *RELAYED, "policy=uniform", "n_hops=2", "reseal=requantize"),
        partial(cards, policy="uniform", resealed=True),
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


def run(case: Case, folder: Path) -> Rows:
    """The rows of the case's cell, nothing of which was kept from another run."""
    module, settled = checked_cell(*case.overrides, "device=cpu", f"results_dir={folder}")
    for holder in (common, handoff_accuracy, module):
        for kept in vars(holder).values():
            if hasattr(kept, "cache_clear"):
                kept.cache_clear()
    return module.run(settled)


def by_place(rows: Rows) -> dict[tuple, dict]:
    """Each row by its metric and what it is about."""
    about = ("metric", "protocol", "sample", "recipe", "policy", "reader")
    found = {tuple(row[name] for name in about): row for row in rows}
    assert len(found) == len(rows)
    return found


def apart(one: dict, other: dict) -> bool:
    """Whether the two intervals share no point; without intervals, whether the values are far from each other."""
    if one["value"] is None or other["value"] is None:
        return False
    values = (one["value"], other["value"])
    ends = [
        (row["value"], row["value"]) if row["ci_low"] is None else (row["ci_low"], row["ci_high"])
        for row in (one, other)
    ]
    disjoint = ends[0][1] < ends[1][0] or ends[1][1] < ends[0][0]
    return disjoint and abs(values[0] - values[1]) > LEAST * max(map(abs, values))


@pytest.mark.parametrize("name", CASES)
def test_every_metric_sees_another_documents_values(name, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.polykv_memory.add_rows", lambda *_: None)  # bytes, not quality
    case = CASES[name]
    right = by_place(run(case, tmp_path / "right"))
    with pytest.MonkeyPatch.context() as patch:
        case.damage(patch)
        wrong = by_place(run(case, tmp_path / "wrong"))
    assert right.keys() == wrong.keys()
    blind = {
        place[0] for place in right
        if place[0] not in NOT_QUALITY | case.held and not apart(right[place], wrong[place])
    }  # fmt: skip
    assert not blind
    for place in right:
        if place[0] in case.held:
            assert wrong[place]["value"] == right[place]["value"], place


@pytest.mark.parametrize("name", config.available("experiment"))
def test_every_study_of_quality_has_a_case(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        study = compose("config", [f"experiment={name}"]).experiment_name
    runs = {module_of(case.study).run for case in CASES.values()}
    assert study in NO_QUALITY or module_of(study).run in runs


def module_of(study: str) -> ModuleType:
    return importlib.import_module(f"experiments.{study}")
